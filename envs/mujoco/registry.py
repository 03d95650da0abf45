"""The native tasks by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from genpol.envs.mujoco.task import Task

# One module per domain; each has a table TASKS from names to constructors.
_DOMAINS = (
    "acrobot",
    "ball_in_cup",
    "cartpole",
    "cheetah",
    "dog",
    "finger",
    "fish",
    "hopper",
    "humanoid_suite",
    "pendulum",
    "point_mass",
    "quadruped",
    "reacher",
    "swimmer_suite",
    "walker",
    "gymnasium_locomotion",
    "gymnasium_manipulation",
    "gymnasium_pendulums",
)


def tasks() -> dict[str, Callable[[], Task]]:
    """Return the constructors of all native tasks by name."""
    table: dict[str, Callable[[], Task]] = {}
    for domain in _DOMAINS:
        table |= importlib.import_module(f"genpol.envs.mujoco.{domain}").TASKS
    return table

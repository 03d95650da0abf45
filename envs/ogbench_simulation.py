"""OGBench's own simulations of a robot arm, made repeatable.

OGBench (Park et al., arXiv 2410.20092) settles the scene of a goal with random actions from a
generator that nothing seeds, so that equal seeds give different goals. Here they give equal ones.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import gymnasium
import numpy as np

from genpol.errors import require

ACTION_DIM = 5


def make_simulation(name: str, *, task: int | None = None, **options: Any) -> Any:
    """Make one of OGBench's environments, without gymnasium's wrappers around it.

    Args:
        name: One of :data:`~genpol.envs.settings.OGBENCH_NAMES`.
        task: Task that a single-task environment rewards, 0 for its default; ``None`` for an
            environment of all tasks, told apart by their goals.
        **options: Further arguments of OGBench's ``ManipSpaceEnv``.

    Raises:
        MissingExtraError: If OGBench is not installed.
    """
    spec = _spec(name, task)
    single = {} if task is None else {"reward_task_id": task}
    entry: Any = spec.entry_point
    base: Any = gymnasium.envs.registration.load_env_creator(entry)
    return _repeatable(base)(**{**spec.kwargs, **single, **options})


def max_episode_steps(name: str) -> int:
    """Return OGBench's time limit of an environment, which is that of its single tasks too."""
    steps = _spec(name, None).max_episode_steps
    assert steps is not None
    return steps


def _spec(name: str, task: int | None) -> gymnasium.envs.registration.EnvSpec:
    require("ogbench", "ogbench")  # registers its environments
    return gymnasium.spec(f"{name}-v0" if task is None else f"{name}-singletask-v0")


@cache
def _repeatable(base: Any) -> Any:
    class Repeatable(base):
        """``base`` whose every random number follows from the seed of ``reset``."""

        _actions: gymnasium.spaces.Box | None = None

        @property
        def action_space(self) -> gymnasium.spaces.Box:
            # OGBench makes a new, unseeded space at every access, and samples from it at resets.
            if self._actions is None:
                self._actions = gymnasium.spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
            return self._actions

        def initialize_episode(self) -> None:
            # Spawned, so that start states are those that OGBench draws with the same seed.
            (generator,) = self.np_random.spawn(1)
            self._actions = gymnasium.spaces.Box(-1, 1, (ACTION_DIM,), np.float32, seed=generator)
            super().initialize_episode()

    return Repeatable

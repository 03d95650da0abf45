"""One episode of a scripted expert, with or without noise.

Every episode draws a level of noise, evenly between 0 and the recipe's ``noise``, and adds Gaussian
numbers of that standard deviation to the expert's actions before they are cut to [-1, 1]: the data
reach from the expert's own to what the noise makes of them. What is recorded is what was done,
whether or not it led to success.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar, Protocol

import numpy as np

from genpol import __version__
from genpol.data.formats import npz
from genpol.settings import at_least, within

Expert = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class NoisyRecipe(ABC):
    """What determines the episodes of an expert whose actions are disturbed."""

    packages: ClassVar[tuple[str, ...]] = ()
    """What the episodes depend on, beside MuJoCo and NumPy."""

    noise: float = 0.0
    """Greatest standard deviation of the noise on actions; each episode draws its own."""
    seed: int = 0
    """Seed of all episodes."""

    def __post_init__(self) -> None:
        at_least("noise", self.noise, 0.0)
        within("seed", self.seed, 0, 2**63 - 1)

    @property
    @abstractmethod
    def name(self) -> str:
        """The environment's name."""

    def provenance(self) -> dict[str, Any]:
        """Return all that the data depend on, as JSON can say it."""
        versions = {name: version(name) for name in (*self.packages, "mujoco", "numpy")}
        return {
            "env": self.name,
            "noise": self.noise,
            "seed": self.seed,
            "versions": {"genpol": __version__, **versions},
        }

    def comment(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the provenance and further facts as the metadata of the data set."""
        return npz.comment_with({**self.provenance(), **facts})


class Task(Protocol):
    """An environment as agents meet it, which says under ``success`` whether it is solved."""

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, np.ndarray], Any]:
        """Start an episode."""

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, Any]:
        """Act once; observations that are not finite say that the physics broke down."""


def play(
    task: Task,
    begin: Callable[[], Expert],
    *,
    noise: float,
    rng: np.random.Generator,
    seed: int,
    max_steps: int | None = None,
    state: Callable[[], dict[str, np.ndarray]] = dict,
) -> dict[str, np.ndarray]:
    """Play one episode to its end, and another in its place if the physics breaks down.

    Args:
        task: What is played.
        begin: Called at the start of an episode, returns what maps observations to actions.
        noise: Greatest standard deviation of the noise.
        rng: Draws its level and the noise itself.
        seed: Of the task.
        max_steps: When an episode ends that the task itself does not end.
        state: Called in every state, returns further columns of it.

    Returns:
        ``observations``, ``actions`` and ``rewards`` float32, ``terminated``, ``success`` and
        ``terminals`` bool (the last True in the last row, whose action leads nowhere), and what
        ``state`` gives; all ``[T + 1, ...]``.
    """
    rows = _play(task, task.reset(seed=seed)[0], begin, noise, rng, max_steps, state)
    while not np.isfinite(rows["observations"]).all():  # go on where the task's generator stands
        rows = _play(task, task.reset()[0], begin, noise, rng, max_steps, state)
    return rows


def _play(
    task: Task,
    seen: dict[str, np.ndarray],
    begin: Callable[[], Expert],
    noise: float,
    rng: np.random.Generator,
    max_steps: int | None,
    state: Callable[[], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Play on from what is seen first to the end, whatever happens."""
    level, expert = rng.uniform(0, noise), begin()
    steps: list[dict[str, Any]] = []
    ended = False
    while not ended:
        before = {"observations": seen["observation"], **state()}
        action = expert(seen["observation"])
        action = action + level * rng.standard_normal(action.shape)
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        seen, reward, terminated, truncated, _ = task.step(action)
        steps.append(
            {
                **before,
                "actions": action,
                "rewards": np.float32(reward),
                "terminated": terminated,
                "success": bool(seen["success"]),
                "terminals": False,
            }
        )
        broken = not np.isfinite(seen["observation"]).all()
        ended = terminated or truncated or broken or len(steps) == max_steps
    last = {key: np.zeros_like(value) for key, value in steps[-1].items()}
    final = {"observations": seen["observation"], **state(), "terminals": True}
    steps.append(last | final)
    return {key: np.array([step[key] for step in steps]) for key in last}

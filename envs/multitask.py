"""Several native tasks in one environment, whose observations say which task they are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from genpol.envs.base import BatchedEnv
from genpol.envs.mujoco.env import MujocoEnv
from genpol.envs.settings import MultiTaskSettings
from genpol.errors import ConfigError

_FLAGS = ("done", "terminated", "truncated", "diverged", "is_init")


class TaskSizes(NamedTuple):
    """Widths of a task's observations and actions, and the control steps of its episodes."""

    observation: int
    action: int
    episode_steps: int

    @classmethod
    def of(cls, env: MujocoEnv) -> TaskSizes:
        """Read them from the task's own environment."""
        observation = env.observation_spec["observation"].shape[-1]
        return cls(observation, env.action_spec.shape[-1], env.max_episode_steps)


class MultiTaskEnv(BatchedEnv):
    """Environment i plays task i modulo K of the K that are played.

    Observations are those of the task, zeros up to the widest task's, and then one number for each
    task of the settings, 1 for its own and 0 for the others. Of an action, a task takes the first
    dimensions, as many as it has.

    Attributes:
        name: ``multitask``.
        tasks: Name, action width and control steps of an episode of each task of the settings,
            played or not.
        max_episode_steps: Of the longest episode, in control steps.
        action_repeat: Control steps per call of ``step``.
        control_period_s: Seconds of simulated time per call of ``step``, of the first task played.

    Args:
        environments: Of each task that is played by its name, of ``num_envs / K`` simulations.
        sizes: Of each task of the settings.
        settings: Of all.
        device: Where tensors are given and taken.

    Raises:
        ConfigError: If a task is wider than the settings allow.
    """

    name = "multitask"

    def __init__(
        self,
        environments: Mapping[str, MujocoEnv],
        sizes: Mapping[str, TaskSizes],
        settings: MultiTaskSettings,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        number = sum(env.batch_size[0] for env in environments.values())
        super().__init__(number, device=device)
        self._envs = dict(environments)
        first = next(iter(self._envs.values()))
        self._names = list(sizes)
        self.tasks = tuple((name, x.action, x.episode_steps) for name, x in sizes.items())
        self.max_episode_steps = max(env.max_episode_steps for env in self._envs.values())
        self.action_repeat = first.action_repeat
        self.control_period_s = first.control_period_s
        self.observation_width = _width(
            "observation", settings, [x.observation for x in sizes.values()]
        )
        self.action_width = _width("action", settings, [x.action for x in sizes.values()])
        shown = torch.zeros(number, self.observation_width + len(self.tasks))
        self.declare({"observation": shown}, action_dim=self.action_width)

    @property
    def row_tasks(self) -> tuple[str, ...]:
        """Name of the task that each environment plays."""
        played = list(self._envs)
        return tuple(played[row % len(played)] for row in range(self.batch_size[0]))

    @property
    def num_diverged(self) -> int:
        """Episodes that ended by divergence so far."""
        return sum(env.num_diverged for env in self._envs.values())

    def _rows(self) -> list[tuple[slice, str, MujocoEnv]]:
        """Return which rows each task has."""
        each = len(self._envs)
        return [(slice(i, None, each), *item) for i, item in enumerate(self._envs.items())]

    def _set_seed(self, seed: int | None) -> None:
        for index, env in enumerate(self._envs.values()):
            env.set_seed(None if seed is None else seed + index)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        parts = {}
        for rows, name, env in self._rows():
            asked = None
            if mask is not None:
                asked = TensorDict({"_reset": mask[rows]}, env.batch_size, device=env.device)
            parts[name] = env._reset(asked)
        return self._joined(parts)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        parts = {}
        for rows, name, env in self._rows():
            action = tensordict["action"][rows, : env.action_spec.shape[-1]]
            given = TensorDict({"action": action}, env.batch_size, device=env.device)
            parts[name] = env._step(given)
        return self._joined(parts)

    def _joined(self, parts: Mapping[str, TensorDictBase]) -> TensorDictBase:
        """Return the rows of all tasks in the order of this environment's."""
        (n,) = self.batch_size
        joined = TensorDict(
            {name: torch.zeros(n, 1, dtype=torch.bool) for name in _FLAGS}, [n], device=self.device
        )
        width = self.observation_spec["observation"].shape[-1]
        joined["observation"] = torch.zeros(n, width, device=self.device)
        stepped = next(iter(parts.values())).get("reward", None) is not None
        if stepped:
            joined["reward"] = torch.zeros(n, 1, device=self.device)
        for rows, name, _ in self._rows():
            part = parts[name]
            for flag in (*_FLAGS, *(["reward"] if stepped else [])):
                joined[flag][rows] = part[flag]
            seen = part["observation"]
            joined["observation"][rows, : seen.shape[-1]] = seen
            joined["observation"][rows, self.observation_width + self._names.index(name)] = 1.0
        return joined

    def state_dict_of_simulation(self) -> dict[str, Tensor]:
        """Return all that continuing bit for bit needs."""
        return {
            f"{task}.{name}": x
            for task, env in self._envs.items()
            for name, x in env.state_dict_of_simulation().items()
        }

    def load_simulation(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict_of_simulation`; the next full reset returns this state."""
        for task, env in self._envs.items():
            prefix = f"{task}."
            own = {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}
            env.load_simulation(own)

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Draw environment ``index`` as ``uint8 [height, width, 3]``."""
        env = list(self._envs.values())[index % len(self._envs)]
        return env.render(index // len(self._envs), height=height, width=width)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environments within."""
        for env in self._envs.values():
            if not env.is_closed:
                env.close()
        super().close(raise_if_closed=raise_if_closed)


def make_multitask(
    settings: MultiTaskSettings,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    *,
    training: bool,
) -> MultiTaskEnv:
    """Make the environments of :func:`genpol.envs.make`.

    Raises:
        ConfigError: If they cannot be shared out evenly among the tasks.
    """
    from genpol.envs import make

    # In fewer environments, such as the one of a video, the first tasks.
    played = settings.played if training else settings.played[:num_envs]
    if num_envs % len(played) != 0:
        raise ConfigError(
            f"num_envs = {num_envs}: cannot be shared out evenly among {len(played)} tasks; take a "
            "multiple, or one task with env.only"
        )

    def make_one(name: str, number: int, seed: int) -> MujocoEnv:
        env = make(settings.of(name), num_envs=number, device=device, seed=seed, training=training)
        assert isinstance(env, MujocoEnv)
        return env

    environments = {
        name: make_one(name, num_envs // len(played), seed + index)
        for index, name in enumerate(played)
    }
    sizes = {}
    for name in settings.tasks:
        probe = environments[name] if name in environments else make_one(name, 1, 0)
        sizes[name] = TaskSizes.of(probe)
        if name not in environments:
            probe.close()
    return MultiTaskEnv(environments, sizes, settings, device=device)


def _width(what: str, settings: MultiTaskSettings, widths: list[int]) -> int:
    """Return the width that all tasks' observations or actions get.

    Raises:
        ConfigError: If the settings have one that is too small.
    """
    wanted: int = getattr(settings, f"{what}_width")
    if 0 < wanted < max(widths):
        raise ConfigError(f"env.{what}_width = {wanted}: the widest of the tasks has {max(widths)}")
    return wanted or max(widths)

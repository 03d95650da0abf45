"""What the environments of simulators that batch themselves have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from genpol.envs.base import BatchedEnv, contain_divergence
from genpol.errors import ConfigError, EnvironmentFault, GenpolError


class GroupedEnv(BatchedEnv):
    """Environments of a simulator that observes in groups and whose actions have no bounds.

    One group is the ``observation``, and ``critic``, where the task has it, comes under
    ``critic_observation``. Actions in ``[-1, 1]`` are multiplied by ``action_bound``. A step that
    yields something non-finite ends its episode with ``truncated`` and ``diverged``, reward 0 and
    the last good observation. All tensors stay on the simulation's device.

    Attributes:
        sim: The simulator's own environment, once there is one.
        is_closed: Whether it is closed.

    Args:
        name: The environment's name.
        num_envs: Number of environments.
        device: Where physics and tensors are.
        action_bound: What an action of 1 is to the task.
        stagger: Start the first episodes at random clocks, so that ends are spread over time.
    """

    simulator: ClassVar[str]
    """The simulator's name."""
    actor_group: ClassVar[str]
    """Its name for the group that an actor observes."""
    sim: Any

    def __init__(
        self,
        name: str,
        *,
        num_envs: int,
        device: torch.device | str,
        action_bound: float,
        stagger: bool,
    ) -> None:
        super().__init__(num_envs, device=device)
        self.name = name
        self._bound = action_bound
        self._stagger = stagger
        self._num_diverged = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def num_diverged(self) -> int:
        """Episodes that ended by divergence so far."""
        return int(self._num_diverged)

    def adopt(self, sim: Any, cleanup: ExitStack) -> None:
        """Take the simulator's environment, which is closed here if the task cannot be used.

        Args:
            sim: It has ``single_observation_space``, ``single_action_space``, ``step_dt``,
                ``max_episode_length`` and ``episode_length_buf``.
            cleanup: Closes it.

        Raises:
            ConfigError: If observations or actions are not vectors, or episodes do not end.
        """
        self.sim, self._cleanup = sim, cleanup
        try:
            groups, action_dim = self._read_spaces()
            self.max_episode_steps = int(sim.max_episode_length)
            if self.max_episode_steps < 1:
                raise self._refused("has episodes without an end; give it a length")
        except ConfigError:
            cleanup.close()
            raise
        self._keys = {key: group for key, (group, _) in groups.items()}
        self.control_period_s = float(sim.step_dt)
        n, home = self.batch_size[0], self.device
        self._seen = {key: torch.zeros(n, width, device=home) for key, (_, width) in groups.items()}
        self._is_init = torch.ones(n, 1, dtype=torch.bool, device=home)
        self.declare(self._seen, action_dim=action_dim)
        self.is_closed = False

    def _read_spaces(self) -> tuple[dict[str, tuple[str, int]], int]:
        """Return the group of each of our keys with its width, and the width of actions."""
        spaces: Mapping[str, Any] = self.sim.single_observation_space.spaces
        action = self.sim.single_action_space
        if not _is_vector(action):
            raise self._refused(
                f"has actions in {action}; only vectors of real numbers are supported"
            )
        wanted = {"observation": self.actor_group}
        if "critic" in spaces:
            wanted["critic_observation"] = "critic"
        for group in wanted.values():
            if not _is_vector(spaces.get(group)):
                raise self._refused(
                    f"has observations {group!r} in {spaces.get(group)}; only vectors of numbers "
                    "are supported"
                )
        groups = {key: (group, spaces[group].shape[0]) for key, group in wanted.items()}
        return groups, action.shape[0]

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(f"task {self.name} of {self.simulator} {why}")

    @property
    def _elapsed(self) -> Tensor:
        """Steps of the episodes so far ``[num_envs]``, writable."""
        elapsed: Tensor = self.sim.episode_length_buf
        return elapsed

    def _spread_clocks(self, generator: torch.Generator | None = None) -> None:
        """Set the clocks of the first episodes at random, once, in training."""
        if self._stagger:
            self._stagger = False
            clocks = torch.randint(
                self.max_episode_steps,
                self._elapsed.shape,
                generator=generator,
                device=self._elapsed.device,
            )
            self._elapsed.copy_(clocks)

    def _groups(self, observation: Any) -> dict[str, Tensor]:
        """Copy what is observed out of the buffers that the simulator uses again."""
        return {key: observation[group].float().clone() for key, group in self._keys.items()}

    def _see(self, seen: Mapping[str, Tensor], rows: Tensor | None = None) -> None:
        """Remember what is observed in all environments, or in ``rows`` ``[num_envs, 1]``."""
        before = self._seen
        self._seen = {
            key: x if rows is None else torch.where(rows, x, before[key]) for key, x in seen.items()
        }

    def _begun(self, rows: Tensor) -> TensorDict:
        """Return what a reset of ``rows`` ``[num_envs, 1]`` gives."""
        self._is_init = self._is_init | rows
        return self.output(self._seen, is_init=self._is_init)

    def _outcome(
        self, seen: Mapping[str, Tensor], reward: Tensor, terminated: Tensor, truncated: Tensor
    ) -> TensorDict:
        """Return what a step gives."""
        outcome = contain_divergence(
            self._seen, seen, reward=reward, terminated=terminated, truncated=truncated
        )
        self._num_diverged += outcome.diverged.sum()
        self._seen = outcome.seen
        self._is_init = torch.zeros_like(outcome.diverged)
        return self.output_of(outcome)

    def _scaled(self, action: Tensor) -> Tensor:
        """Return what an action in ``[-1, 1]`` is to the task."""
        return action.to(self.device).clamp(-1.0, 1.0) * self._bound

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn what the simulator raises into an error that says where."""
        try:
            yield
        except GenpolError:
            raise
        except Exception as error:
            raise EnvironmentFault(
                f"environment {self.name} raised {type(error).__name__}: "
                f"{' '.join(str(error).split())[:400]}"
            ) from error

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Refuse: pictures need the simulator's own renderers.

        Raises:
            EnvironmentFault: Always.
        """
        raise EnvironmentFault(
            f"environment {self.name} cannot be drawn here: set video=false, or use the viewers of "
            f"{self.simulator}"
        )

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the simulation."""
        self._cleanup.close()
        super().close(raise_if_closed=raise_if_closed)


def _is_vector(space: Any) -> bool:
    """Return whether a space is a box of vectors; those of mjlab are not gymnasium's."""
    return hasattr(space, "low") and len(space.shape) == 1

"""A torchrl environment over a simulation of Isaac Lab."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from genpol.envs.base import BatchedEnv
from genpol.envs.isaaclab.simulation import open_simulation
from genpol.envs.settings import IsaacLabSettings, label
from genpol.errors import ConfigError, EnvironmentFault


class IsaacLabEnv(BatchedEnv):
    """``num_envs`` copies of a task of Isaac Lab as a batch-locked environment ``[num_envs]``.

    Of the task's observation groups ``policy`` is the ``observation``, and ``critic``, where the
    task has it, comes under ``critic_observation``. Actions in ``[-1, 1]`` are multiplied by
    ``settings.action_bound``. Isaac Lab starts ended episodes anew within the step that ends them;
    here that step's observation is the one that the episode ended with, and :meth:`reset` gives
    the new one. A step that yields something non-finite ends its episode with ``truncated`` and
    ``diverged``, reward 0 and the last good observation.

    All tensors stay on the simulation's device; nothing is read back in a step.

    Attributes:
        name: The task's name.
        max_episode_steps: Steps until truncation.
        action_repeat: 1; the tasks repeat actions as they please.
        control_period_s: Seconds of simulated time per step.

    Args:
        settings: Which task.
        num_envs: Number of environments.
        device: Where physics and tensors are, ``cpu`` or ``cuda``.
        seed: Seed of the start states.
        stagger: Start the first episodes at random clocks, so that ends are spread over time.

    Raises:
        ConfigError: If there is no such task, or observations or actions are not vectors.
        EnvironmentFault: If this process simulates with Isaac Lab already, or Isaac Lab fails.
        MissingExtraError: If Isaac Lab is not installed.
    """

    def __init__(
        self,
        settings: IsaacLabSettings,
        *,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int,
        stagger: bool = False,
    ) -> None:
        super().__init__(num_envs, device=device)
        self.name = label(settings)
        self._bound = settings.action_bound
        self._stagger = stagger
        self.sim, self._cleanup = open_simulation(
            settings, num_envs=num_envs, device=torch.device(device), seed=seed
        )
        self.max_episode_steps = int(self.sim.max_episode_length)
        self.control_period_s = float(self.sim.step_dt)
        home = {"device": self.device}
        self._num_diverged = torch.zeros((), dtype=torch.int64, **home)
        # Whose episode Isaac Lab has started anew since they were last reset here.
        self._fresh = torch.zeros(num_envs, 1, dtype=torch.bool, **home)
        self._is_init = torch.ones(num_envs, 1, dtype=torch.bool, **home)
        self._keys, action_dim = self._read_spaces()
        groups = self.sim.single_observation_space
        self._seen = {
            key: torch.zeros(num_envs, *groups[group].shape, **home)
            for key, group in self._keys.items()
        }
        self.declare(self._seen, action_dim=action_dim)
        self.is_closed = False
        self.set_seed(seed)

    @property
    def num_diverged(self) -> int:
        """Episodes that ended by divergence so far."""
        return int(self._num_diverged)

    @property
    def _elapsed(self) -> Tensor:
        """Steps of the episodes so far ``[num_envs]``, writable."""
        elapsed: Tensor = self.sim.episode_length_buf
        return elapsed

    def _read_spaces(self) -> tuple[dict[str, str], int]:
        """Return the task's observation group of each of our keys, and the width of actions."""
        from gymnasium.spaces import Box

        groups, space = self.sim.single_observation_space, self.sim.single_action_space
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise self._refused(
                f"has actions in {space}; only vectors of real numbers are supported"
            )
        keys = {"observation": "policy"} | (
            {"critic_observation": "critic"} if "critic" in groups.spaces else {}
        )
        for group in keys.values():
            inner = groups.spaces.get(group)
            if not isinstance(inner, Box) or len(inner.shape) != 1:
                raise self._refused(
                    f"has observations {group!r} in {inner}; only vectors of numbers are supported"
                )
        return keys, space.shape[0]

    def _refused(self, why: str) -> ConfigError:
        self._cleanup.close()
        return ConfigError(f"task {self.name} of Isaac Lab {why}")

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.sim.seed(seed)
            self._fresh.zero_()  # those that began before do not count

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        everything = mask is None or bool(mask.all())
        if everything and not bool(self._fresh.all()):
            self._read(self.sim.reset()[0])
        elif mask is not None:
            mask = mask.to(self.device).view(-1, 1)
            self._restart((mask & ~self._fresh).view(-1))
        if everything:
            self._fresh.zero_()
            self._is_init = torch.ones_like(self._is_init)
            if self._stagger:
                self._stagger = False
                self._elapsed.copy_(torch.randint_like(self._elapsed, self.max_episode_steps))
        else:
            assert mask is not None
            self._fresh &= ~mask
            self._is_init = self._is_init | mask
        return self.output(self._seen, is_init=self._is_init)

    def _restart(self, rows: Tensor) -> None:
        """Start episodes anew in the midst of them, which Isaac Lab itself does only at ends."""
        ids = rows.nonzero().view(-1).int()
        if len(ids) == 0:
            return
        sim = self.sim
        sim._reset_idx(ids)
        sim.scene.write_data_to_sim()
        sim.sim.forward()
        if hasattr(sim, "observation_manager"):
            observation = sim.observation_manager.compute()
        else:
            observation = sim._compute_observations()
        self._read(observation, rows.view(-1, 1))

    def _read(self, observation: Any, rows: Tensor | None = None) -> None:
        """Copy observations out of the buffers that Isaac Lab uses again."""
        seen = self._groups(observation)
        self._seen = (
            seen
            if rows is None
            else {key: torch.where(rows, x, self._seen[key]) for key, x in seen.items()}
        )

    def _groups(self, observation: Any) -> dict[str, Tensor]:
        return {key: observation[group].float().clone() for key, group in self._keys.items()}

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"].to(self.device).clamp(-1.0, 1.0) * self._bound
        try:
            after, reward, terminated, truncated, extras = self.sim.step(action)
        except Exception as error:
            raise EnvironmentFault(
                f"environment {self.name} raised {type(error).__name__}: "
                f"{' '.join(str(error).split())[:400]}"
            ) from error
        shown, before = self._groups(after), self._seen
        terminated = terminated.view(-1, 1).bool().clone()
        truncated = truncated.view(-1, 1).bool().clone()
        self._fresh = terminated | truncated
        last = shown
        if "final_obs" in extras:
            final = self._groups(extras["final_obs"])
            last = {key: torch.where(self._fresh, final[key], x) for key, x in shown.items()}
        reward = reward.view(-1, 1).float()
        sane = reward.isfinite()
        for x in last.values():
            sane = sane & x.isfinite().all(-1, keepdim=True)
        diverged = ~sane
        self._num_diverged += diverged.sum()
        last = {key: torch.where(diverged, before[key], x) for key, x in last.items()}
        terminated &= ~diverged
        truncated |= diverged
        self._is_init = torch.zeros_like(diverged)
        # What reset() gives: the new episode where one has begun, else what was just seen.
        self._seen = {key: torch.where(self._fresh, shown[key], last[key]) for key in last}
        return self.output(
            last,
            is_init=self._is_init,
            diverged=diverged,
            terminated=terminated,
            truncated=truncated,
            reward=torch.where(diverged, 0.0, reward),
        )

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Refuse: pictures of Isaac Lab need its own renderers.

        Raises:
            EnvironmentFault: Always.
        """
        raise EnvironmentFault(
            f"environment {self.name} cannot be drawn here: set video=false, or use Isaac Lab's "
            "visualizers"
        )

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the simulation; another can then be opened in this process."""
        self._cleanup.close()
        super().close(raise_if_closed=raise_if_closed)

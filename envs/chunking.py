"""Chunks as actions: an environment whose one step carries out several actions open loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded
from torchrl.envs import EnvBase


class ChunkedEnv(EnvBase):
    """An environment of genpol, one step of which is a chunk of actions.

    The reward is the sum over the chunk. Where an episode ends within it, the step ends there: what
    the simulation does in the rest of the chunk, while its neighbours finish theirs, is thrown
    away, and the reset that follows starts anew.

    Attributes:
        name: The environment's.
        max_episode_steps: Chunks until truncation.
        action_repeat: Simulation steps of a whole chunk.
        control_period_s: Seconds of a whole chunk.

    Args:
        env: The environment, which becomes this one's own.
        horizon: Actions H of a chunk; the action is ``[num_envs, H * A]``, in order.
        steps: How many of them are carried out.
    """

    batch_locked = True

    def __init__(self, env: EnvBase, *, horizon: int, steps: int) -> None:
        super().__init__(device=env.device, batch_size=env.batch_size)
        self._env = env
        self._shape = (horizon, env.action_spec.shape[-1])
        self._steps = steps
        self.name = env.name
        self.max_episode_steps = math.ceil(env.max_episode_steps / steps)
        self.action_repeat = env.action_repeat * steps
        self.control_period_s = env.control_period_s * steps
        self.observation_spec = env.observation_spec.clone()
        self.reward_spec = env.reward_spec.clone()
        self.full_done_spec = env.full_done_spec.clone()
        width = horizon * self._shape[1]
        self.action_spec = Bounded(-1.0, 1.0, (*env.batch_size, width), device=env.device)

    @property
    def num_diverged(self) -> int:
        """Episodes that ended by divergence so far."""
        count: int = self._env.num_diverged
        return count

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        # Not reset(), which fills in what is not reset from the argument.
        after: TensorDictBase = self._env._reset(tensordict, **kwargs)
        return after

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        chunk = tensordict["action"].unflatten(-1, self._shape)
        result: TensorDictBase | None = None
        for index in range(self._steps):
            step = TensorDict({"action": chunk[:, index]}, self.batch_size, device=self.device)
            after = self._env.step(step)["next"]
            if result is None:
                result = after.clone()
                continue
            over = result["done"].squeeze(-1)
            if over.all():
                break
            reward = result["reward"] + after["reward"]
            merged = after.clone().set("reward", reward)
            result = torch.where(over, result, merged)
        assert result is not None
        return result

    def _set_seed(self, seed: int | None) -> None:
        self._env.set_seed(seed)

    def state_dict_of_simulation(self) -> dict[str, torch.Tensor] | None:
        """Return the simulation's state, which between chunks is all there is."""
        state: dict[str, torch.Tensor] | None = self._env.state_dict_of_simulation()
        return state

    def load_simulation(self, state: dict[str, torch.Tensor] | None) -> None:
        """Restore what :meth:`state_dict_of_simulation` returned."""
        self._env.load_simulation(state)

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Draw it as ``uint8 [H, W, 3]``, as it is between chunks."""
        frame: np.ndarray = self._env.render(index, height=height, width=width)
        return frame

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environment within."""
        if not self._env.is_closed:
            self._env.close()
        super().close(raise_if_closed=raise_if_closed)

"""Observations with a history: an environment that shows its last observations side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Unbounded
from torchrl.envs import EnvBase

from genpol.errors import ConfigError

_HISTORY = "observation_history"


class StackedEnv(EnvBase):
    """An environment of genpol whose ``observation`` is its last ones, the oldest first.

    Where an episode is younger than that, its first observation stands for those that are missing,
    as in the codes of Diffusion Policy, robomimic, LeRobot and DPPO. Goals are not stacked.

    Attributes:
        inner: The environment within.
        name: The environment's.
        max_episode_steps: The environment's.
        action_repeat: The environment's.
        control_period_s: The environment's.

    Args:
        env: The environment, which becomes this one's own.
        steps: Observations N; ``observation`` is ``[num_envs, N * d]``.

    Raises:
        ConfigError: If the environments form groups, which set out in the midst of episodes.
    """

    batch_locked = True

    def __init__(self, env: EnvBase, steps: int) -> None:
        super().__init__(device=env.device, batch_size=env.batch_size)
        if getattr(env, "group_size", 1) > 1:
            raise ConfigError(
                "env.observation_steps: environments in groups set out from states without a "
                "history; leave env.group_size at 1"
            )
        self.inner = env
        self.name = env.name
        self.max_episode_steps = env.max_episode_steps
        self.action_repeat = env.action_repeat
        self.control_period_s = env.control_period_s
        width = env.observation_spec["observation"].shape[-1]
        self._history = torch.zeros(*env.batch_size, steps, width, device=env.device)
        self._restored = False
        self.observation_spec = env.observation_spec.clone()
        self.observation_spec["observation"] = Unbounded(
            (*env.batch_size, steps * width), device=env.device
        )
        self.action_spec = env.action_spec.clone()
        self.reward_spec = env.reward_spec.clone()
        self.full_done_spec = env.full_done_spec.clone()

    @property
    def num_diverged(self) -> int:
        """Episodes that ended by divergence so far."""
        count: int = self.inner.num_diverged
        return count

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        # Not reset(), which fills in what is not reset from the argument: that is stacked.
        after = self.inner._reset(tensordict, **kwargs)
        mask = None if tensordict is None else tensordict.get("_reset", None)
        everything = mask is None or bool(mask.all())
        if everything and self._restored:  # it goes on where it was saved
            self._restored = False
            return self._stacked(after)
        first = after["observation"].unsqueeze(1)
        begins = torch.ones_like(after["done"]) if mask is None else mask
        self._history = torch.where(begins.unsqueeze(-1), first, self._history)
        return self._stacked(after)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = TensorDict({"action": tensordict["action"]}, self.batch_size, device=self.device)
        after = self.inner.step(action)["next"]
        latest = after["observation"].unsqueeze(1)
        self._history = torch.cat((self._history[:, 1:], latest), dim=1)
        return self._stacked(after)

    def _stacked(self, after: TensorDictBase) -> TensorDictBase:
        return after.set("observation", self._history.flatten(1))

    def _set_seed(self, seed: int | None) -> None:
        self.inner.set_seed(seed)

    def state_dict_of_simulation(self) -> dict[str, Tensor] | None:
        """Return the simulation's state and the history; None where the simulator has none."""
        state: dict[str, Tensor] | None = self.inner.state_dict_of_simulation()
        return None if state is None else {**state, _HISTORY: self._history}

    def load_simulation(self, state: dict[str, Tensor] | None) -> None:
        """Restore what :meth:`state_dict_of_simulation` returned."""
        if state is None:
            self.inner.load_simulation(None)
            return
        self.inner.load_simulation({k: x for k, x in state.items() if k != _HISTORY})
        self._history = state[_HISTORY].to(self._history)
        self._restored = True

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Draw it as ``uint8 [H, W, 3]``."""
        frame: np.ndarray = self.inner.render(index, height=height, width=width)
        return frame

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environment within."""
        if not self.inner.is_closed:
            self.inner.close()
        super().close(raise_if_closed=raise_if_closed)

"""What was collected, in the order it came, so that windows can be drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from genpol.data.windows import WindowSampler, WindowSpec, discounted
from genpol.errors import ConfigError

_KEYS = ("observation", "action")
_AFTER = ("observation", "reward", "terminated", "done", "diverged")


class SequenceReplay:
    """The last steps of some environments, and windows over them and over a data set beside.

    Windows are drawn uniformly over both together: offline data are one part of the buffer, as in
    QC and FQL, and their share shrinks as more is collected. Batches are those of
    :class:`~genpol.data.windows.WindowSampler`; a window ends with its episode. Steps whose physics
    diverged are not valid.

    Args:
        spec: The windows.
        capacity: Transitions held; older ones are overwritten.
        num_envs: Environments that are stepped together.
        seed: Seed of the draws.
        offline: What else to draw from.

    Raises:
        ConfigError: If the windows have goals, which only a data set states, or do not fit in.
    """

    def __init__(
        self,
        spec: WindowSpec,
        *,
        capacity: int,
        num_envs: int,
        seed: int,
        offline: WindowSampler | None = None,
    ) -> None:
        if spec.goals is not None:
            raise ConfigError(
                "online_steps > 0: this agent learns from goals that only a data set states; set "
                "online_steps=0"
            )
        self.spec = spec
        self._times = capacity // num_envs
        if self._times < spec.steps:
            raise ConfigError(
                f"agent.replay_capacity = {capacity}: must hold {spec.steps} steps of {num_envs} "
                "environments"
            )
        self._num_envs = num_envs
        self._offline = offline
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: dict[str, Tensor] = {}
        self._written = 0

    def __len__(self) -> int:
        """Return how many collected transitions it holds."""
        return min(self._written, self._times) * self._num_envs

    @property
    def num_starts(self) -> int:
        """Collected steps at which a window may begin."""
        held = min(self._written, self._times)
        return max(0, held - self.spec.steps + 1) * self._num_envs

    def extend(self, rollout: TensorDict) -> None:
        """Add a rollout ``[num_envs, time]`` that goes on where the last one ended."""
        new = {name: rollout[name] for name in _KEYS}
        new |= {f"next_{name}": rollout["next", name] for name in _AFTER}
        steps = rollout.shape[1]
        if not self._rows:
            self._rows = {
                name: x.new_zeros((self._times, self._num_envs, *x.shape[2:]))
                for name, x in new.items()
            }
        skipped = max(0, steps - self._times)
        at = torch.arange(self._written + skipped, self._written + steps) % self._times
        for name, x in new.items():
            self._rows[name][at] = x.transpose(0, 1)[skipped:]
        self._written += steps

    def sample(self, size: int) -> TensorDict:
        """Return windows ``[size]``, from the data set and from what was collected."""
        offline = self._offline.num_starts if self._offline is not None else 0
        index = torch.randint(offline + self.num_starts, (size,), generator=self._generator)
        parts = []
        if self._offline is not None:
            parts.append(self._offline.at(index[index < offline]))
        parts.append(self._at(index[index >= offline] - offline))
        filled = [part for part in parts if len(part) > 0]
        batch: TensorDict = torch.cat(filled) if len(filled) > 1 else filled[0]
        return batch

    def _at(self, index: Tensor) -> TensorDict:
        """Return the windows of the given numbers, ``[B]``."""
        if len(index) == 0:
            return TensorDict({}, [0])
        oldest = max(0, self._written - self._times)
        env = index % self._num_envs
        start = oldest + index // self._num_envs
        window = (start[:, None] + torch.arange(self.spec.steps)) % self._times

        def rows(name: str) -> Tensor:
            return self._rows[name][window, env[:, None]]

        done, diverged = (rows(f"next_{name}").squeeze(-1) for name in ("done", "diverged"))
        ended = done.long().cumsum(1) - done.long()
        valid = (ended == 0) & ~diverged
        last = (valid.sum(1) - 1).clamp_min(0)
        at_end = window[torch.arange(len(index)), last], env
        reward, terminated = rows("next_reward").squeeze(-1), rows("next_terminated").squeeze(-1)
        wanted = self.spec.rewards
        earned = discounted(reward, terminated, valid, self.spec.gamma) if wanted else {}
        fields = {
            "observation": self._rows["observation"][window[:, 0], env],
            "action": rows("action"),
            "valid": valid,
            "weight": valid[:, -1].float(),
            **earned,
            "next": TensorDict(
                {"observation": self._rows["next_observation"][at_end]}, [len(index)]
            ),
        }
        return TensorDict(fields, [len(index)])

    def state(self) -> dict[str, Any]:
        """Return what was collected, and the generator."""
        held = min(self._written, self._times)
        return {
            "rows": {name: x[:held] for name, x in self._rows.items()} or None,
            "written": self._written,
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._written = state["written"]
        self._generator.set_state(state["generator"])
        self._rows = {}
        for name, x in (state["rows"] or {}).items():
            self._rows[name] = x.new_zeros((self._times, *x.shape[1:]))
            self._rows[name][: len(x)] = x

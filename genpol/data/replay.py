"""A ring of transitions for off-policy learning."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

_KEYS = (
    "observation",
    "action",
    ("next", "observation"),
    ("next", "reward"),
    ("next", "terminated"),
)


class Replay:
    """The last ``capacity`` transitions, drawn uniformly with replacement.

    Of each transition it keeps ``observation``, ``action`` and, under ``next``, ``observation``
    (the true one, also at the end of an episode), ``reward`` and ``terminated``. Truncation is not
    kept: an episode that was merely cut is bootstrapped like any other step.

    Args:
        capacity: Transitions held; older ones are overwritten.
        seed: Seed of the draws.
    """

    def __init__(self, capacity: int, *, seed: int) -> None:
        self.capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._buffer = ReplayBuffer(storage=LazyTensorStorage(capacity), generator=self._generator)

    def __len__(self) -> int:
        """Return how many transitions it holds."""
        return len(self._buffer)

    def extend(self, rollout: TensorDict) -> None:
        """Add a rollout ``[num_envs, time]``, leaving out steps whose physics diverged."""
        # Time first: what is overwritten is the oldest step of all environments.
        rows = rollout.select(*_KEYS).transpose(0, 1).flatten(0, 1)
        good = ~rollout["next", "diverged"].squeeze(-1).transpose(0, 1).flatten()
        if good.any():
            self._buffer.extend(rows[good])

    def sample(self, size: int) -> TensorDict:
        """Return ``size`` transitions, ``[size]``."""
        rows: TensorDict = self._buffer.sample(size)
        return rows

    def state(self) -> dict[str, Any]:
        """Return the transitions, the place of the next one, and the generator."""
        rows = self._buffer[:].to_dict() if len(self) > 0 else None
        return {
            "rows": rows,
            "writer": dict(self._buffer.writer.state_dict()),
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned, into a buffer that is still empty."""
        if state["rows"] is not None:
            length = len(state["rows"]["observation"])
            self._buffer.extend(TensorDict(state["rows"], batch_size=[length]))
        self._buffer.writer.load_state_dict(state["writer"])
        self._generator.set_state(state["generator"])

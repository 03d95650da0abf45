"""A ring of transitions for off-policy learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
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
        self._written = 0
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
            self._written += int(good.sum())

    def sample(self, size: int) -> TensorDict:
        """Return ``size`` transitions, ``[size]``."""
        rows: TensorDict = self._buffer.sample(size)
        return rows

    @property
    def span(self) -> tuple[int, int]:
        """The numbers of the oldest transition held and of the next one to come."""
        return self._written - len(self), self._written

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return held transitions by their numbers, ``[last - first, ...]`` each."""
        found = self._buffer[torch.arange(first, last) % self.capacity]
        return dict(found.flatten_keys("/").items())

    def position(self) -> dict[str, Any]:
        """Return all but the transitions themselves."""
        return {
            "written": self._written,
            "writer": dict(self._buffer.writer.state_dict()),
            "generator": self._generator.get_state(),
        }

    def restore(self, rows: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Become what :meth:`rows` of the whole :attr:`span` and :meth:`position` say.

        The replay must still be empty.
        """
        self._written = position["written"]
        number = len(rows["observation"]) if rows else 0
        if number > 0:
            # As they lay: which one a draw means depends on the place.
            places = torch.arange(self._written - number, self._written) % self.capacity
            held = TensorDict(dict(rows), batch_size=[number])[places.argsort()]
            self._buffer.extend(held.unflatten_keys("/"))
        self._buffer.writer.load_state_dict(position["writer"])
        self._generator.set_state(position["generator"])

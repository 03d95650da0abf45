"""Trajectories in arrays: what offline learning draws from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from genpol.data.columns import (
    REQUIRED,
    TRANSITION,
    Array,
    Source,
    blocks,
    canonical,
    row_bytes,
    stored_dtype,
    verify,
)
from genpol.data.sink import MemorySink
from genpol.errors import DatasetError


class OfflineDataset:
    """Trajectories one after the other, as rows of columns.

    Rows are states: a trajectory of T transitions has T+1 rows, so that the next observation is the
    following row and is not stored twice. Row ``i`` of a trajectory holds ``s_i`` and, for
    ``i < T``, ``a_i``, ``r_i`` and ``terminated_i`` of the step to ``s_{i+1}``. In the last row
    those are zero; it is never the start of a transition.

    Three things are apart:

    - ``terminated``: the task's own end, so nothing is bootstrapped from the next state. It may
      stand inside a trajectory whose recording went on after it.
    - :attr:`truncated`: the recording ends without the task's end.
    - ``success``: the task is solved by this transition.

    Attributes:
        columns: ``"observation"`` float32 ``[rows, d]`` and ``"action"`` float32 ``[rows, A]`` in
            [-1, 1]; perhaps ``"reward"`` float32, ``"terminated"`` and ``"success"`` bool, all
            ``[rows]``, ``"goal"`` float32 ``[rows, g]``, the state as a goal would be stated;
            ``"qpos"``, ``"qvel"``, ``"button_states"`` of simulators, and others. Memory maps
            where the data set was opened from a disk.
        starts: First row of each trajectory, int64 ``[M]``.
        ends: Last row of each trajectory, the final state, int64 ``[M]``.
        metadata: Where the data comes from, as JSON can say it: ``"format"``, ``"source"``,
            ``"env"`` and the like.
    """

    def __init__(
        self,
        columns: Mapping[str, Array],
        ends: Array,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.columns: Mapping[str, Array] = dict(columns)
        self.ends = np.asarray(ends, dtype=np.int64)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._check_structure()
        self.starts = np.concatenate([[0], self.ends[:-1] + 1]).astype(np.int64)

    @classmethod
    def from_trajectories(
        cls,
        trajectories: Iterable[Mapping[str, Any]],
        metadata: Mapping[str, Any] | None = None,
    ) -> OfflineDataset:
        """Make a data set in memory.

        Args:
            trajectories: Each as :meth:`genpol.data.sink.RowSink.append_trajectory` takes it.
            metadata: See the class.

        Raises:
            DatasetError: If a column is malformed; the message names the trajectory and the row.
        """
        sink = MemorySink(metadata)
        for index, trajectory in enumerate(trajectories):
            sink.append_trajectory(trajectory, source=Source(file=f"trajectory {index}"))
        sink.check_ended(Source(), "observation")
        return cls(sink.columns(), sink.ends(), sink.metadata)

    @property
    def num_rows(self) -> int:
        """Number of states."""
        return len(self.columns["observation"])

    @property
    def num_trajectories(self) -> int:
        """Number M of trajectories."""
        return len(self.ends)

    @property
    def num_transitions(self) -> int:
        """Number of steps, of all trajectories together."""
        return self.num_rows - self.num_trajectories

    @property
    def observation_dim(self) -> int:
        """Width d of an observation."""
        return int(self.columns["observation"].shape[1])

    @property
    def action_dim(self) -> int:
        """Width A of an action."""
        return int(self.columns["action"].shape[1])

    @cached_property
    def truncated(self) -> Array:
        """Rows whose transition is a trajectory's last without being the task's end, bool."""
        truncated = np.zeros(self.num_rows, dtype=bool)
        truncated[self.ends - 1] = True
        if "terminated" in self.columns:
            truncated[self.ends - 1] = ~self.columns["terminated"][self.ends - 1]
        return truncated

    @cached_property
    def _transitions_until(self) -> Array:
        """How many transitions there are up to the end of each trajectory, ``[M]``."""
        return self.ends - np.arange(self.num_trajectories)

    def transition_row(self, index: Any) -> Array:
        """Return the rows at which transitions begin.

        Args:
            index: Numbers of transitions, 0 to :attr:`num_transitions` - 1, of any shape.

        Raises:
            IndexError: If there is no such transition.
        """
        numbers: Array = np.asarray(index, dtype=np.int64)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.num_transitions):
            raise IndexError(f"transitions are numbered 0 to {self.num_transitions - 1}")
        # Each trajectory before it has one row more than it has transitions.
        rows: Array = numbers + np.searchsorted(self._transitions_until, numbers, side="right")
        return rows

    def validate(self, file: str = "") -> None:
        """Read every value and check that it may stand where it stands.

        Args:
            file: What messages call the data set.

        Raises:
            DatasetError: At the first that may not; the message names its column and row.
        """
        is_last = np.zeros(self.num_rows, dtype=bool)
        is_last[self.ends] = True
        for name, column in self.columns.items():
            for block in blocks(self.num_rows, row_bytes({name: column})):
                source = Source(file=file, rows=range(block.start, block.stop))
                values = np.asarray(column[block])
                verify(name, values, source)
                if name in TRANSITION:
                    _check_zero(name, values, is_last[block], source)

    def info(self) -> dict[str, Any]:
        """Return sizes, ranges and statistics, as JSON can say them.

        Reads every column once, in blocks.
        """
        lengths = self.ends - self.starts
        found: dict[str, Any] = {
            "metadata": self.metadata,
            "num_transitions": self.num_transitions,
            "num_trajectories": self.num_trajectories,
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "length": _statistics(lengths),
            "return": None,
            "success_rate": None,
            "terminated_rate": None,
            "bytes": self.num_rows * row_bytes(self.columns) + self.ends.nbytes,
            "columns": {name: self._describe(name) for name in self.columns},
        }
        if "reward" in self.columns:
            found["return"] = _statistics(self._sums("reward"))
        for flag in ("success", "terminated"):
            if flag in self.columns:
                found[f"{flag}_rate"] = float((self._sums(flag) > 0).mean())
        return found

    def _describe(self, name: str) -> dict[str, Any]:
        """Return type, shape and range of one column, without the zeros after the end."""
        column = self.columns[name]
        lows, highs = [], []
        is_step = np.ones(self.num_rows, dtype=bool)
        is_step[self.ends] = False
        for block in blocks(self.num_rows, row_bytes({name: column})):
            values = np.asarray(column[block])
            if name in TRANSITION:
                values = values[is_step[block]]
            if not np.isfinite(values).all():
                values = values[np.isfinite(values)]
            if values.size:
                lows.append(values.min().item())
                highs.append(values.max().item())
        dtype, shape = str(column.dtype), list(column.shape[1:])
        low, high = min(lows, default=None), max(highs, default=None)
        return {"dtype": dtype, "shape": shape, "min": low, "max": high}

    def _sums(self, name: str) -> Array:
        """Return the sum of a column over each trajectory, in double precision."""
        sums = np.zeros(self.num_trajectories)
        for block in blocks(self.num_rows, 8):
            values = np.asarray(self.columns[name][block], dtype=np.float64)
            numbers = np.searchsorted(self.ends, np.arange(block.start, block.stop))
            first = numbers[0]
            part = np.bincount(numbers - first, weights=values)
            sums[first : first + len(part)] += part
        return sums

    def _check_structure(self) -> None:
        """Refuse columns and ends that do not fit together, without reading a column."""
        for name in REQUIRED:
            if name not in self.columns:
                raise DatasetError(f"column {name} is missing")
        ends = self.ends
        if ends.ndim != 1 or len(ends) == 0:
            raise DatasetError("there is no trajectory")
        if (np.diff(ends, prepend=-1) < 2).any():
            bad = int(np.argmax(np.diff(ends, prepend=-1) < 2))
            raise DatasetError(f"trajectory {bad} ends at row {ends[bad]}: it has no transition")
        for name, column in self.columns.items():
            canonical(name, column[:0], Source())
            if column.dtype != stored_dtype(name, column.dtype):
                raise DatasetError(
                    f"column {name} holds {column.dtype}, not {stored_dtype(name, column.dtype)}"
                )
            if len(column) != ends[-1] + 1:
                raise DatasetError(
                    f"column {name} has {len(column)} rows, where {ends[-1] + 1} belong to the "
                    "trajectories"
                )


def _check_zero(name: str, values: Array, is_last: Array, source: Source) -> None:
    wrong = is_last & (values.reshape(len(values), -1) != 0).any(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DatasetError(
            f"{source.at(name, row)}: is not zero, though no step begins in a final state"
        )


def _statistics(values: Array) -> dict[str, float]:
    return {
        "min": float(values.min()),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "max": float(values.max()),
    }

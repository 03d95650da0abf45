"""Where rows go: everything that reads or records data hands it to a :class:`RowSink`.

The sink checks what it is given, so that no reader has to, and passes on rows that are as they will
be stored. On its own it only counts: that is how a file is validated without being converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from genpol.data.actions import ActionRange, float_actions
from genpol.data.columns import REQUIRED, Array, Source, checked, verify_finite
from genpol.errors import DatasetError

_NOWHERE = Source()


class RowSink:
    """Takes rows or whole trajectories, checks them and counts them.

    Attributes:
        metadata: Facts about the data, as JSON can say them.
        action_range: Between which bounds the actions lie that are appended, if not in [-1, 1]. If
            it is set before a file is read, what the file itself says of it is not asked for.
        num_rows: Rows taken so far.
        num_trajectories: Trajectories that have ended so far.
        open_rows: Rows since the last trajectory ended.
    """

    def __init__(self, metadata: Mapping[str, Any] | None = None) -> None:
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.action_range: ActionRange | None = None
        self.num_rows = 0
        self.num_trajectories = 0
        self.open_rows = 0
        self._schema: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}

    @property
    def num_transitions(self) -> int:
        """Transitions taken so far, those of an open trajectory included."""
        return self.num_rows - self.num_trajectories - (self.open_rows > 0)

    def append_rows(
        self, columns: Mapping[str, Any], last: Any, *, source: Source = _NOWHERE
    ) -> None:
        """Append rows, which may begin and end in the middle of a trajectory.

        Args:
            columns: Values ``[rows, ...]`` by name, the same columns every time. What describes a
                step (:data:`~genpol.data.columns.TRANSITION`) is ignored in the last row of a
                trajectory.
            last: Which rows are the final states of their trajectories, bool ``[rows]``.
            source: Where the rows come from, for messages.

        Raises:
            DatasetError: If a column or value may not stand there. Nothing is appended then.
        """
        last = np.asarray(last, dtype=bool)
        _check_lengths(columns, len(last), source)
        if len(last) == 0:
            return
        ends = np.flatnonzero(last)
        self._check_trajectories(ends, source)
        if self.action_range is not None:
            actions = self.action_range.normalized(columns["action"], last, source)
            columns = {**columns, "action": actions}
        rows = {name: checked(name, columns[name], last, source) for name in sorted(columns)}
        self._check_schema(rows, source)
        self._accept(rows, ends)
        self.num_rows += len(last)
        self.num_trajectories += len(ends)
        since = self.open_rows + len(last)
        self.open_rows = since if len(ends) == 0 else len(last) - 1 - int(ends[-1])

    def append_trajectory(self, columns: Mapping[str, Any], *, source: Source = _NOWHERE) -> None:
        """Append one whole trajectory of T transitions.

        Args:
            columns: ``"observation"`` ``[T+1, d]``, the final one included; every other column has
                T+1 rows, or T rows and is filled up with zeros.
            source: Where the trajectory comes from, for messages.

        Raises:
            DatasetError: As :meth:`append_rows` does, and if another trajectory is still open.
        """
        if self.open_rows:
            raise DatasetError(
                f"{source.at('observation')}: a trajectory begins before the one that is being "
                f"appended row by row has ended after {self.open_rows} rows"
            )
        _check_required(columns, source)
        arrays = {name: np.asarray(values) for name, values in columns.items()}
        num_rows = len(arrays["observation"]) if arrays["observation"].ndim else 0
        for name, values in arrays.items():
            if values.ndim and len(values) == num_rows - 1:
                arrays[name] = np.concatenate(
                    [values, np.zeros_like(values, shape=(1, *values.shape[1:]))]
                )
        last = np.zeros(num_rows, dtype=bool)
        last[-1:] = True
        self.append_rows(arrays, last, source=source)

    def note_action_range(self) -> None:
        """Put into the metadata in what range the actions were given, once all rows are there."""
        if self.action_range is not None and self._schema:
            (width,) = self._schema["action"][1]
            self.metadata.update(self.action_range.describe(width, self.metadata))

    def check_ended(self, source: Source, column: str, *, num_rows: int | None = None) -> None:
        """Refuse data whose last trajectory has not ended, and data without any trajectory.

        Args:
            source: Where the rows come from.
            column: The column that should have marked the end.
            num_rows: Rows that came from there, if not all.

        Raises:
            DatasetError: If so.
        """
        if self.open_rows:
            begin = (self.num_rows if num_rows is None else num_rows) - self.open_rows
            raise DatasetError(
                f"{source.at(column)}: the last trajectory, {self.open_rows} rows from row {begin} "
                "on, never ends; the data was cut short, or its last row is not marked"
            )
        if self.num_trajectories == 0:
            raise DatasetError(f"{source.at(column)}: there is no trajectory")

    def _accept(self, rows: dict[str, Array], ends: Array) -> None:
        """Keep checked rows; ``ends`` are the places of final states among them."""

    def _check_trajectories(self, ends: Array, source: Source) -> None:
        lengths = np.diff(ends, prepend=-1 - self.open_rows)
        if (lengths < 2).any():
            row = int(ends[np.argmax(lengths < 2)])
            raise DatasetError(
                f"{source.at('observation', row)}: a trajectory of a single state has no "
                "transition; remove it from the data"
            )

    def _check_schema(self, rows: dict[str, Array], source: Source) -> None:
        found = {name: (values.dtype, values.shape[1:]) for name, values in rows.items()}
        if not self._schema:
            self._schema = found
        for name in found.keys() ^ self._schema.keys():
            here, before = ("is", "was not") if name in found else ("is not", "was")
            raise DatasetError(
                f"{source.at(name)}: {here} given for this trajectory but {before} for earlier "
                "ones; all need the same columns"
            )
        for name, (dtype, shape) in found.items():
            if (dtype, shape) != self._schema[name]:
                raise DatasetError(
                    f"{source.at(name)}: {_describe(dtype, shape)} a row, but "
                    f"{_describe(*self._schema[name])} in earlier trajectories"
                )


class MemorySink(RowSink):
    """Keeps the rows in memory, for what is small."""

    def __init__(self, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(metadata)
        self._parts: list[dict[str, Array]] = []
        self._ends: list[Array] = []

    def columns(self) -> dict[str, Array]:
        """Return all rows by column."""
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._schema}

    def ends(self) -> Array:
        """Return the last row of each trajectory."""
        return np.concatenate([np.empty(0, np.int64), *self._ends])

    def _accept(self, rows: dict[str, Array], ends: Array) -> None:
        self._parts.append(rows)
        self._ends.append(self.num_rows + ends.astype(np.int64))


class ActionRangeSink(RowSink):
    """Finds the range of actions in whatever units, and checks all else as usual."""

    def __init__(self) -> None:
        super().__init__()
        self._low: Array | None = None
        self._high: Array | None = None

    def append_rows(
        self, columns: Mapping[str, Any], last: Any, *, source: Source = _NOWHERE
    ) -> None:
        """Append rows, of which only the actions of steps count for the range."""
        self.action_range = None  # that of the file does not matter
        _check_required(columns, source)
        actions = np.asarray(columns["action"])
        super().append_rows({**columns, "action": np.zeros(actions.shape)}, last, source=source)
        last = np.asarray(last, dtype=bool)
        actions = float_actions(actions, source)
        actions[last] = 0
        verify_finite("action", actions, source)
        if not last.all():
            self._extend(actions[~last])

    def found(self) -> ActionRange:
        """Return the least and the greatest value of each dimension."""
        assert self._low is not None
        assert self._high is not None
        return ActionRange(self._low, self._high)

    def _extend(self, actions: Array) -> None:
        low, high = actions.min(axis=0), actions.max(axis=0)
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)


def _check_required(columns: Mapping[str, Any], source: Source) -> None:
    for name in REQUIRED:
        if name not in columns:
            found = ", ".join(sorted(columns)) or "no columns"
            raise DatasetError(f"{source.at(name)}: missing; there are {found}")


def _check_lengths(columns: Mapping[str, Any], num_rows: int, source: Source) -> None:
    _check_required(columns, source)
    for name, values in columns.items():
        shape = np.shape(values)
        if not shape or shape[0] != num_rows:
            found = f"{shape[0]} rows" if shape else "a single value"
            raise DatasetError(
                f"{source.at(name)}: {found}, where {num_rows} are expected; all columns of a "
                "trajectory must be of one length"
            )


def _describe(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"{'x'.join(map(str, shape)) or '1'} {dtype}"

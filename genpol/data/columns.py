"""The columns of a data set: what each may hold, and one line on what is wrong where.

Rows are *states*. A trajectory of T transitions has T+1 rows; row ``i`` holds the state ``s_i``
and, for ``i < T``, what happened between ``s_i`` and ``s_{i+1}``. Some columns describe the state
and have a value in every row; those of :data:`TRANSITION` describe the step and are zero in the
last row of a trajectory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from genpol.errors import DatasetError

Array: TypeAlias = npt.NDArray[Any]

REQUIRED = ("observation", "action")
TRANSITION = frozenset({"action", "reward", "terminated", "success"})
"""Columns of the step that begins in a row; zero where no step does."""
ROUNDING = 1e-5
"""How far an action may lie outside [-1, 1] and still be taken for a rounding error."""

_VECTORS = frozenset({"observation", "action", "goal"})
_SCALARS = frozenset({"reward", "terminated", "success"})
_FLAGS = frozenset({"terminated", "success"})
_FLOAT32 = frozenset({"observation", "action", "goal", "reward"})
# Learners read these or reset simulators to them; what else a file carries is nobody's business.
_FINITE = _FLOAT32 | {"qpos", "qvel"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from, in the words of the file they come from."""

    file: str = ""
    """The file to blame."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What the file calls a column."""
    rows: Sequence[int] | Array | None = None
    """The file's number of each row."""

    def at(self, column: str, row: int | None = None) -> str:
        """Return ``"file: column row 7"``."""
        place = f"{self.file}: " if self.file else ""
        place += self.names.get(column, column)
        if row is None:
            return place
        return f"{place} row {row if self.rows is None else int(self.rows[row])}"


def blocks(num_rows: int, row_bytes: int) -> Iterator[slice]:
    """Cut ``num_rows`` rows into slices of a few megabytes."""
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for begin in range(0, num_rows, step):
        yield slice(begin, min(begin + step, num_rows))


def row_bytes(columns: Mapping[str, Any]) -> int:
    """Return the bytes of one row of all ``columns``, which have ``dtype`` and ``shape``."""
    return sum(
        column.dtype.itemsize * int(np.prod(column.shape[1:])) for column in columns.values()
    )


def canonical(name: str, values: Any, source: Source) -> Array:
    """Return ``values`` with the type and shape that the column ``name`` has in every data set.

    Raises:
        DatasetError: If they are not numbers, or of another shape.
    """
    if name == "truncated":
        raise DatasetError(
            f"{source.at(name)}: is derived from where trajectories end; leave it out"
        )
    if not _NAME.fullmatch(name) or name == "ends":
        raise DatasetError(f"{source.at(name)}: {name!r} cannot be the name of a column")
    values = np.asarray(values)
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise DatasetError(
            f"{source.at(name)}: holds {_kind(values.dtype)}; only numbers of at most 8 bytes are "
            "read"
        )
    if name in _SCALARS and values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    _check_shape(name, values, source)
    if name in _FLAGS and values.dtype != bool:
        _check_flags(name, values, source)
    if name == "action" and values.dtype.kind != "f":
        raise DatasetError(
            f"{source.at(name)}: holds {values.dtype}, codes of discrete actions, which are not "
            "read; if they are counts, give action_low= and action_high= of `genpol data convert`"
        )
    array: Array = values
    if name == "action" and array.dtype.itemsize > 4:
        return array  # rounded once the bounds are checked
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return array.astype(stored_dtype(name, array.dtype), copy=False)


def stored_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which the column ``name`` is stored if it is given as ``dtype``."""
    if name in _FLAGS:
        return np.dtype(bool)
    return np.dtype("<f4") if name in _FLOAT32 else dtype.newbyteorder("<")


def checked(name: str, values: Any, last: Array, source: Source) -> Array:
    """Return ``values`` as they are stored: typed, zero after the end, actions within bounds.

    Args:
        name: Name of the column.
        values: Its values, ``[rows, ...]``.
        last: Which rows are the final states of their trajectories, ``[rows]``.
        source: Whom to blame.

    Raises:
        DatasetError: If a value may not stand there; the message names its row.
    """
    values = canonical(name, values, source)
    if name in TRANSITION and last.any():
        values = values.copy()
        values[last] = 0
    verify(name, values, source)
    if name == "action":
        values = np.clip(values, -1.0, 1.0).astype("<f4", copy=False)
    return np.ascontiguousarray(values)


def verify(name: str, values: Array, source: Source) -> None:
    """Refuse values that are not finite, and actions that lie outside [-1, 1].

    Raises:
        DatasetError: At the first such value.
    """
    verify_finite(name, values, source)
    if name == "action":
        refuse_any(
            np.abs(values) > 1.0 + ROUNDING,
            name,
            values,
            source,
            "outside [-1, 1]",
            "scale the actions to that range, which every environment of genpol has, with "
            "action_low= and action_high= of `genpol data convert`",
        )


def verify_finite(name: str, values: Array, source: Source) -> None:
    """Refuse values that are not finite in a column that learners read.

    Raises:
        DatasetError: At the first such value.
    """
    if name in _FINITE and values.dtype.kind == "f":
        refuse_any(
            ~np.isfinite(values),
            name,
            values,
            source,
            "not a finite number (of 32 bits)" if name in _FLOAT32 else "not a finite number",
            "remove this trajectory from the data",
        )


def refuse_any(bad: Array, name: str, values: Array, source: Source, what: str, mend: str) -> None:
    """Refuse values if one is bad.

    Args:
        bad: Which values are, of their shape.
        name: Name of the column.
        values: Its values, ``[rows, ...]``.
        source: Whom to blame.
        what: What a bad value is.
        mend: What to do about it.

    Raises:
        DatasetError: At the first that is; the message names its row.
    """
    if not bad.any():
        return
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    raise DatasetError(f"{source.at(name, index[0])}: {values[index]:.7g} is {what}; {mend}")


def _check_shape(name: str, values: Array, source: Source) -> None:
    if values.ndim == 0:
        raise DatasetError(f"{source.at(name)}: is a single value; one a row is expected")
    shape = "x".join(map(str, values.shape[1:])) or "a single number"
    if name in _SCALARS and values.ndim != 1:
        raise DatasetError(f"{source.at(name)}: a row is {shape}; a single number is expected")
    if name in _VECTORS and values.ndim > 2:
        raise DatasetError(
            f"{source.at(name)}: a row is {shape}, as images are; only vectors are read"
        )
    if (name in _VECTORS and values.ndim < 2) or 0 in values.shape[1:]:
        raise DatasetError(f"{source.at(name)}: a row is {shape}; [rows, width] is expected")


def _check_flags(name: str, values: Array, source: Source) -> None:
    refuse_any(
        (values != 0) & (values != 1),
        name,
        values,
        source,
        "neither 0 nor 1",
        "store flags as 0, 1",
    )


def _kind(dtype: np.dtype[Any]) -> str:
    kinds = {"O": "Python objects (pickled)", "U": "text", "S": "text", "V": "records"}
    return kinds.get(dtype.kind, str(dtype))

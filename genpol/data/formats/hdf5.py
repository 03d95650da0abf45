"""What the formats in HDF5 share: opening, nested groups, and reading a few rows at a time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genpol.data.columns import Array
from genpol.errors import DatasetError, require

_DAMAGE = re.compile(r"^'?Unable to|Insufficient precision")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def is_hdf5(path: Path) -> bool:
    """Return whether a file begins as HDF5 files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file for reading.

    Raises:
        DatasetError: If the file is damaged, here or where a part of it is read.
        MissingExtraError: If h5py is not installed.
    """
    h5py = require("h5py", "data")
    with _reading(str(path)), h5py.File(path, "r") as file:
        yield file


def member(node: Any, key: str) -> Any:
    """Return a group's or file's member ``key``, which must be there.

    Raises:
        DatasetError: If it is damaged; the message names it.
    """
    with _reading(_place(node, key)):
        return node[key]


def read_rows(array: Any, block: slice) -> Array:
    """Return rows of an array.

    Raises:
        DatasetError: If they are damaged; the message names array and rows.
    """
    if isinstance(array, Joined):
        return array[block]
    with _reading(f"{_place(array)} rows {block.start} to {block.stop - 1}"):
        return np.asarray(array[block])


@contextlib.contextmanager
def _reading(place: str) -> Iterator[None]:
    """Tell what h5py raises where a file is damaged in one line that names the place."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        # h5py has no errors of its own, but words: those of the last two are usually mistakes.
        if not isinstance(error, OSError | RuntimeError) and not _DAMAGE.search(str(error)):
            raise
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"{place}: damaged or cut short ({reason}); copy or download it again"
        ) from error


def _place(node: Any, key: str = "") -> str:
    name = "/".join(part for part in ((node.name or "").strip("/"), key) if part)
    return f"{node.file.filename}: {name}"


def is_group(node: Any) -> bool:
    """Return whether ``node`` holds others, rather than values."""
    return hasattr(node, "keys")


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return all arrays within ``node`` by their paths, sorted as people count."""
    if not is_group(node):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key in sorted(node.keys(), key=natural):
        found |= leaves(member(node, key), f"{prefix}/{key}" if prefix else key)
    return found


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sorting key under which ``demo_10`` follows ``demo_9``."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


class Joined:
    """Arrays of equal length side by side, as one array ``[rows, width]`` that is read in slices.

    Args:
        parts: HDF5 arrays by name; those ``[rows]`` count as ``[rows, 1]``, and matrices are laid
            out row by row.
        place: What messages call them together.

    Raises:
        DatasetError: If they are not numbers, not equally long, or images.
    """

    def __init__(self, parts: dict[str, Any], place: str) -> None:
        self._parts = list(parts.values())
        if not parts:
            raise DatasetError(f"{place}: holds no array")
        for name, part in parts.items():
            _check_part(part, f"{place}/{name}" if name else place)
            if len(part) != len(self._parts[0]):
                raise DatasetError(
                    f"{place}/{name}: {len(part)} rows, but {len(self._parts[0])} in "
                    f"{next(iter(parts))}; all must be of one length"
                )
        widths = [int(np.prod(part.shape[1:])) for part in self._parts]
        self.shape = (len(self._parts[0]), sum(widths))
        self.dtype = np.result_type(*(part.dtype for part in self._parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Array:
        pieces = [read_rows(part, rows) for part in self._parts]
        if len(pieces) == 1 and pieces[0].ndim == 2:
            return np.asarray(pieces[0])
        return np.concatenate([piece.reshape(len(piece), -1) for piece in pieces], axis=1)


def _check_part(part: Any, place: str) -> None:
    if part.dtype.kind not in "biuf":
        raise DatasetError(f"{place}: holds {part.dtype}, not numbers; only vectors are read")
    if part.ndim == 0:
        raise DatasetError(f"{place}: is a single value; one a row is expected")
    if part.ndim > 2 and part.dtype == np.uint8:
        shape = "x".join(map(str, part.shape[1:]))
        raise DatasetError(f"{place}: holds images of {shape}; only vectors are read, leave it out")
    if part.ndim == 1 and part.dtype.kind in "iu":
        raise DatasetError(
            f"{place}: holds {part.dtype}, codes of a discrete space; only vectors are read"
        )

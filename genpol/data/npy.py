"""``.npy`` files whose header has one length for every number of rows, so that they can grow."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np

from genpol.data.columns import Array
from genpol.errors import DatasetError

HEADER_BYTES = 256
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Contents:
    """What a file holds: type, shape and the CRC-32 of the data after the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    crc32: int

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Contents:
        """Invert :meth:`to_json`."""
        shape = tuple(int(length) for length in entry["shape"])
        return cls(np.dtype(entry["dtype"]), shape, int(entry["crc32"]))

    def to_json(self) -> dict[str, Any]:
        """Return what a description says of the file."""
        return {"dtype": self.dtype.str, "shape": list(self.shape), "crc32": self.crc32}

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.dtype.itemsize * int(np.prod(self.shape))


def header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the first :data:`HEADER_BYTES` bytes of a file."""
    descr = np.lib.format.dtype_to_descr(dtype)
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode("latin1")
    room = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n"


def checksum(file: BinaryIO, size: int, crc: int = 0) -> int:
    """Return the CRC-32 of the next ``size`` bytes of ``file``, or of those that there are."""
    while size > 0 and (data := file.read(min(size, _CHUNK_BYTES))):
        crc = zlib.crc32(data, crc)
        size -= len(data)
    return crc


def open_map(file: Path, contents: Contents) -> Array:
    """Map a file into memory, read only, after comparing its size and header with ``contents``.

    Raises:
        DatasetError: If they differ or the file cannot be mapped.
    """
    size = HEADER_BYTES + contents.nbytes
    try:
        found = file.stat().st_size
        if found != size:
            raise DatasetError(
                f"{file}: damaged, {found} bytes instead of {size}; make the data set again"
            )
        array: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DatasetError(f"{file}: missing; make the data set again") from None
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:
        reason = " ".join(str(error).split())
        raise DatasetError(
            f"{file}: damaged, cannot be mapped ({reason}); make the data set again"
        ) from None
    if (array.dtype, array.shape) != (contents.dtype, contents.shape):
        raise DatasetError(
            f"{file}: damaged, its header does not say {contents.dtype} {contents.shape}; make the "
            "data set again"
        )
    return array


def verify_checksum(file: Path, contents: Contents) -> None:
    """Read all of a file and compare it with the recorded CRC-32.

    Raises:
        DatasetError: If they differ.
    """
    with file.open("rb") as opened:
        opened.seek(HEADER_BYTES)
        if checksum(opened, contents.nbytes) != contents.crc32:
            raise DatasetError(
                f"{file}: damaged, its CRC-32 is not the recorded one; make the data set again"
            )

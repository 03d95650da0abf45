"""``.npz`` archives read and written a few rows at a time.

NumPy's own reader loads whole arrays. An archive holds each array as a ``.npy`` stream of its own,
compressed or not, and several streams can be read side by side; zip files check a CRC-32 of each
when its end is read.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from genpol.data.columns import Array, blocks, row_bytes
from genpol.errors import DatasetError

_SIGNATURE = b"PK\x03\x04"
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
_OURS = "genpol"  # the entry of the archive's comment that holds the metadata
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def is_zip(path: Path) -> bool:
    """Return whether a file begins as zip archives do."""
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


class ArrayStream:
    """One array of an archive, to be read once from the first row to the last.

    Attributes:
        dtype: Its type.
        shape: Its shape.
    """

    def __init__(self, stream: IO[bytes], place: str) -> None:
        self._stream = stream
        self._place = place
        self._row = 0
        try:
            self.shape, is_fortran, self.dtype = _READERS[np.lib.format.read_magic(stream)](stream)
        except (KeyError, ValueError, SyntaxError, TokenError):
            raise DatasetError(
                f"{place}: is no array of NumPy's; save it with numpy.savez"
            ) from None
        if self.dtype.hasobject:
            raise DatasetError(
                f"{place}: holds Python objects (pickled), which are never read; save numbers"
            )
        if is_fortran and len(self.shape) > 1:
            raise DatasetError(
                f"{place}: is stored column by column and cannot be read row by row; save "
                "numpy.ascontiguousarray of it"
            )

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def read(self, block: slice) -> Array:
        """Return the rows of ``block``, which must begin where the last one ended."""
        assert block.start == self._row
        self._row = block.stop
        shape = (block.stop - block.start, *self.shape[1:])
        with _reading(self._place, row=block.start):
            data = self._stream.read(self.dtype.itemsize * int(np.prod(shape)))
        if len(data) < self.dtype.itemsize * int(np.prod(shape)):
            raise DatasetError(
                f"{self._place}: ends before row {block.stop} of {len(self)}; download it again"
            )
        return np.frombuffer(data, self.dtype).reshape(shape)

    def finish(self) -> None:
        """Read the end, and with it have the checksum compared.

        Raises:
            DatasetError: If there is more than the header says, or the checksum is another.
        """
        with _reading(self._place):
            rest = self._stream.read(1)
        if rest:
            raise DatasetError(f"{self._place}: holds more than its header says; download it again")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, ArrayStream]]:
    """Open all arrays of an archive for reading.

    Raises:
        DatasetError: If the archive is damaged, here or where a part of it is read.
    """
    with (
        _reading(str(path)),
        zipfile.ZipFile(path) as archive,
        contextlib.ExitStack() as streams,
    ):
        arrays = {}
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            with _reading(f"{path}: {name}"):
                stream = streams.enter_context(archive.open(member))
                arrays[name] = ArrayStream(stream, f"{path}: {name}")
        yield arrays


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what :func:`write_metadata` left in an archive; nothing where it did not.

    Raises:
        DatasetError: If the archive is damaged.
    """
    with _reading(str(path)), zipfile.ZipFile(path) as archive:
        comment = archive.comment
    with contextlib.suppress(KeyError, TypeError, ValueError):  # somebody else's words
        return dict(json.loads(comment)[_OURS]["metadata"])
    return {}


def comment_with(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the comment of an archive says, as JSON, for its metadata to be read."""
    return {_OURS: {"metadata": dict(metadata)}}


def write_metadata(archive: zipfile.ZipFile, metadata: Mapping[str, Any]) -> None:
    """Put metadata into the comment of an archive, if they are not longer than one may be."""
    comment = json.dumps(comment_with(metadata)).encode()
    if len(comment) <= zipfile.ZIP_MAX_COMMENT:
        archive.comment = comment


@contextlib.contextmanager
def _reading(place: str, *, row: int | None = None) -> Iterator[None]:
    """Tell what is raised where an archive is damaged in one line that names the place."""
    try:
        yield
    except _DAMAGE as error:
        # A wrong checksum is only known at the end of an array, and may come from anywhere in it.
        if row is not None and not isinstance(error, zipfile.BadZipFile):
            place = f"{place} from row {row} on"
        reason = " ".join(str(error).split()) or "it ends too early"
        raise DatasetError(
            f"{place}: damaged or cut short ({reason}); copy or download it again"
        ) from error


def write_array(archive: zipfile.ZipFile, name: str, array: Any) -> None:
    """Add an array to an archive that is being written."""
    info = zipfile.ZipInfo(f"{name}.npy")  # always of the same date: equal data, equal files
    info.compress_type = archive.compression
    with archive.open(info, "w", force_zip64=True) as stream:
        header = {
            "descr": np.lib.format.dtype_to_descr(array.dtype),
            "fortran_order": False,
            "shape": array.shape,
        }
        np.lib.format.write_array_header_1_0(stream, header)
        for block in blocks(len(array), row_bytes({name: array})):
            stream.write(np.ascontiguousarray(array[block]).data)

"""The native store: a folder of ``.npy`` files that are mapped into memory, not read.

::

    dataset.json      format, version, and of each column its type, shape and CRC-32; metadata
    <column>.npy      the rows of one column, after a header of 256 bytes
    ends.npy          the last row of each trajectory, int64; the next one begins in the row after

:func:`open_store` compares sizes and types and maps the columns, in a few milliseconds whatever
their size; :func:`verify_checksums` reads them all.

:class:`DatasetWriter` fills a staging folder beside the target and renames it, so that the target
is whole or absent. While it writes, a journal in the staging folder holds, for each whole
trajectory, its last row and the CRC-32 of every column up to there. Whatever happens to the process
or to the machine, :meth:`DatasetWriter.resume` finds the trajectories that did reach the disk.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

import genpol
from genpol.data.columns import Array, Source, blocks, row_bytes
from genpol.data.dataset import OfflineDataset
from genpol.data.npy import HEADER_BYTES, Contents, checksum, header, open_map, verify_checksum
from genpol.data.sink import RowSink
from genpol.data.staging import Staging, flush, writing
from genpol.errors import DatasetError

FORMAT = "genpol-dataset"
VERSION = 1
DESCRIPTION = "dataset.json"
EXPECTED = "a folder with dataset.json"

_ENDS = "ends"
_JOURNAL = ".journal"
_STAGED = ".staging.json"


def matches(path: Path) -> bool:
    """Return whether ``path`` is a native store, or what is left of one."""
    return (path / DESCRIPTION).is_file()


def open_store(path: Path) -> OfflineDataset:
    """Open a native store; its columns are memory maps that cannot be written to.

    Raises:
        DatasetError: If a file is missing, of another size or type than it was written, or of a
            newer format.
    """
    files, metadata = _read_description(path)
    maps = {name: open_map(path / f"{name}.npy", contents) for name, contents in files.items()}
    ends = np.array(maps.pop(_ENDS))
    try:
        return OfflineDataset(maps, ends, metadata)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None


def verify_checksums(path: Path) -> None:
    """Read every file of a native store and compare it with what was written.

    Raises:
        DatasetError: At the first that differs.
    """
    files, _ = _read_description(path)
    for name, contents in files.items():
        open_map(path / f"{name}.npy", contents)
        verify_checksum(path / f"{name}.npy", contents)


def read(path: Path, sink: RowSink) -> None:
    """Copy a native store to ``sink``.

    Raises:
        DatasetError: If the store is damaged or a value may not stand where it stands.
    """
    dataset = open_store(path)
    sink.metadata.update(dataset.metadata)
    copy_rows(dataset, sink, str(path))


def check_target(path: Path) -> None:
    """Accept any name."""


def write(dataset: OfflineDataset, path: Path) -> None:
    """Write ``dataset`` as a native store.

    Raises:
        DatasetError: If ``path`` exists or cannot be written.
    """
    with DatasetWriter(path, metadata=dataset.metadata) as writer:
        copy_rows(dataset, writer)


def copy_rows(dataset: OfflineDataset, sink: RowSink, file: str = "") -> None:
    """Hand all rows of ``dataset`` to ``sink``, a few megabytes at a time."""
    is_last = np.zeros(dataset.num_rows, dtype=bool)
    is_last[dataset.ends] = True
    for block in blocks(dataset.num_rows, row_bytes(dataset.columns)):
        rows = {name: np.asarray(column[block]) for name, column in dataset.columns.items()}
        source = Source(file=file, rows=range(block.start, block.stop))
        sink.append_rows(rows, is_last[block], source=source)


class DatasetWriter(RowSink):
    """Writes a native store as rows or trajectories come, without holding them in memory.

    Used in a ``with`` statement it finishes at the end, and leaves nothing behind if an exception
    ends it. A recording that is to survive interruptions calls :meth:`finish` itself, and
    :meth:`close` if it must stop before.

    Args:
        path: The store to make; it must not exist.
        metadata: See :class:`~genpol.data.dataset.OfflineDataset`. May be added to until the end.
        progress: Called now and then with the number of rows written.
        wait: Wait for another process that is making the same store, instead of refusing.
        keep: Go on where an interrupted writer of this store stopped, see :meth:`resume`.

    Raises:
        DatasetError: If ``path`` exists, is being written by another process, or cannot be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
        wait: bool = False,
        keep: bool = False,
    ) -> None:
        super().__init__(metadata)
        self.path = path
        self._progress = progress
        self._files: dict[str, BinaryIO] = {}
        self._journal: BinaryIO | None = None
        self._crc: dict[str, int] = {}
        self._open = True
        self._staging = Staging(path, wait=wait)
        try:
            if not (keep and self._continue()):
                self._staging.clear()
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(
        cls,
        path: Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> DatasetWriter:
        """Go on after the last whole trajectory that an interrupted writer of ``path`` wrote.

        ``num_trajectories`` and ``num_transitions`` say how far that one came; all of it is read to
        be sure. Where there was none, the new one begins at the beginning.

        Args:
            path: The store that is to be made, as for the interrupted writer.
            metadata: Added to the metadata that the interrupted writer had.
            progress: See the class.

        Raises:
            DatasetError: As the class does.
        """
        return cls(path, metadata=metadata, progress=progress, keep=True)

    def finish(self) -> Path:
        """Write what is missing, move the store to its place and return that.

        Raises:
            DatasetError: If the last trajectory has not ended, there is none, or the store cannot
                be written. What was written can then be resumed.
        """
        self._require_open()
        self.check_ended(Source(file=str(self.path)), "observation")
        folder = self._staging.folder
        with writing(self.path):
            self._write_headers()
            self._write_description()
            self._close_files()  # Windows moves no folder in which a file is open
            for path in (*folder.iterdir(), folder):
                flush(path)
        self._staging.place(folder)
        # Only now: up to here an interrupted writer is resumed with their help.
        for name in (_JOURNAL, _STAGED):
            (self.path / name).unlink(missing_ok=True)
        self.close()
        return self.path

    def close(self) -> None:
        """Stop; what was written of whole trajectories can be resumed."""
        self._close_files()
        self._staging.release()

    def abort(self) -> None:
        """Stop and remove what was written; after :meth:`finish` or :meth:`close`, do nothing."""
        self._close_files()
        self._staging.discard()

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abort()

    def _accept(self, rows: dict[str, Array], ends: Array) -> None:
        self._require_open()
        try:
            with writing(self.path):
                if not self._files:
                    self._create(rows)
                self._write(rows, ends)
        except BaseException:
            self._close_files()  # the columns may differ in length now: only a new writer can tell
            raise
        if self._progress is not None:
            self._progress(self.num_rows + len(rows["observation"]))

    def _close_files(self) -> None:
        for file in (*self._files.values(), self._journal):
            with contextlib.suppress(OSError):  # a full disk, of which the writer was told before
                if file is not None:
                    file.close()
        self._open = False

    def _create(self, rows: dict[str, Array]) -> None:
        folder = self._staging.folder
        for name, values in rows.items():
            self._files[name] = (folder / f"{name}.npy").open("wb")
            self._files[name].write(header(values.dtype, (0, *values.shape[1:])))
            self._crc[name] = 0
        self._journal = (folder / _JOURNAL).open("wb")
        columns = {
            name: {"dtype": values.dtype.str, "shape": list(values.shape[1:])}
            for name, values in rows.items()
        }
        staged = {"version": VERSION, "columns": columns, "metadata": self.metadata}
        text = json.dumps(staged, allow_nan=False)
        (folder / _STAGED).write_text(text, encoding="utf-8")

    def _write(self, rows: dict[str, Array], ends: Array) -> None:
        """Append to each column, then to the journal: it never knows more than the columns."""
        records = np.zeros(len(ends), _record(len(rows)))
        records["end"] = self.num_rows + ends
        for position, name in enumerate(sorted(rows)):
            values = rows[name]
            data = values.reshape(-1).view(np.uint8).data
            self._files[name].write(data)
            self._files[name].flush()
            width = data.nbytes // len(values)
            crc, begin = self._crc[name], 0
            for number, end in enumerate(ends):
                stop = (int(end) + 1) * width
                crc = zlib.crc32(data[begin:stop], crc)
                records["crc"][number, position] = crc
                begin = stop
            self._crc[name] = zlib.crc32(data[begin:], crc)
        assert self._journal is not None
        self._journal.write(records.tobytes())
        self._journal.flush()

    def _write_headers(self) -> None:
        for name, file in self._files.items():
            dtype, shape = self._schema[name]
            file.seek(0)
            file.write(header(dtype, (self.num_rows, *shape)))
            file.flush()

    def _write_description(self) -> None:
        folder = self._staging.folder
        ends = np.fromfile(folder / _JOURNAL, _record(len(self._files)))["end"].astype("<i8")
        data = np.ascontiguousarray(ends).tobytes()
        (folder / f"{_ENDS}.npy").write_bytes(header(ends.dtype, ends.shape) + data)
        description = {
            "format": FORMAT,
            "version": VERSION,
            "genpol_version": genpol.__version__,
            "num_trajectories": self.num_trajectories,
            "columns": {
                name: Contents(dtype, (self.num_rows, *shape), self._crc[name]).to_json()
                for name, (dtype, shape) in sorted(self._schema.items())
            },
            _ENDS: Contents(ends.dtype, ends.shape, zlib.crc32(data)).to_json(),
            "metadata": self.metadata,
        }
        text = json.dumps(description, indent=1, allow_nan=False)
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")

    def _continue(self) -> bool:
        """Take up what an interrupted writer left; return whether there is anything."""
        folder = self._staging.folder
        try:
            staged = json.loads((folder / _STAGED).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # it was interrupted before its first row
            return False
        schema = {
            name: (np.dtype(column["dtype"]), tuple(column["shape"]))
            for name, column in staged["columns"].items()
        }
        with writing(self.path):
            for name in schema:
                self._files[name] = (folder / f"{name}.npy").open("r+b")
            self._journal = (folder / _JOURNAL).open("r+b")
            ends = self._find_intact(schema)
        self._schema = schema
        self.metadata = staged["metadata"] | self.metadata
        self.num_trajectories = len(ends)
        self.num_rows = int(ends[-1]) + 1 if len(ends) else 0
        return True

    def _find_intact(self, schema: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> Array:
        """Cut all files after the last trajectory that is whole in each; return the last rows."""
        assert self._journal is not None
        record = _record(len(schema))
        content = self._journal.read()
        records = np.frombuffer(
            content[: len(content) // record.itemsize * record.itemsize], record
        )
        broken = np.diff(records["end"], prepend=-1) < 2
        kept = int(np.argmax(broken)) if broken.any() else len(records)
        widths = {
            name: dtype.itemsize * int(np.prod(shape)) for name, (dtype, shape) in schema.items()
        }
        for position, name in enumerate(sorted(schema)):
            self._files[name].seek(HEADER_BYTES)
            crc, begin = 0, 0
            for number in range(kept):
                stop = int(records["end"][number]) + 1
                crc = checksum(self._files[name], (stop - begin) * widths[name], crc)
                if crc != records["crc"][number, position]:
                    kept = number
                    break
                begin = stop
        rows = int(records["end"][kept - 1]) + 1 if kept else 0
        for position, name in enumerate(sorted(schema)):
            self._crc[name] = int(records["crc"][kept - 1, position]) if kept else 0
            _cut(self._files[name], HEADER_BYTES + rows * widths[name])
        _cut(self._journal, kept * record.itemsize)
        return np.array(records["end"][:kept])

    def _require_open(self) -> None:
        if not self._open:
            raise DatasetError(f"{self.path}: the writer is closed; DatasetWriter.resume goes on")


def _record(num_columns: int) -> np.dtype[Any]:
    return np.dtype([("end", "<i8"), ("crc", "<u4", (num_columns,))])


def _cut(file: BinaryIO, size: int) -> None:
    file.truncate(size)
    file.seek(size)


def _read_description(path: Path) -> tuple[dict[str, Contents], dict[str, Any]]:
    """Return what each file of a store holds, and the metadata."""
    file = path / DESCRIPTION
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"{file}: missing; {path.name} is no {FORMAT}") from None
    except OSError as error:
        raise DatasetError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError:
        raise DatasetError(f"{file}: damaged, not valid JSON; make the data set again") from None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise DatasetError(f"{file}: does not describe a {FORMAT}")
    try:
        if description["version"] > VERSION:
            raise DatasetError(
                f"{file}: version {description['version']}, this genpol {genpol.__version__} reads "
                f"up to version {VERSION}; run: pip install --upgrade genpol"
            )
        entries = description["columns"] | {_ENDS: description[_ENDS]}
        files = {name: Contents.from_json(entry) for name, entry in entries.items()}
        return files, dict(description["metadata"])
    except (KeyError, TypeError, ValueError):
        raise DatasetError(f"{file}: damaged, it lacks entries; make the data set again") from None

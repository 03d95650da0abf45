"""File formats of data sets, each in a module of its own, and :func:`open_dataset` for them all."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

from genpol.data.actions import ActionRange
from genpol.data.dataset import OfflineDataset
from genpol.data.sink import ActionRangeSink, RowSink
from genpol.data.staging import Staging, refuse_existing
from genpol.data.store import DatasetWriter, open_store, verify_checksums
from genpol.errors import ConfigError, DatasetError, nearest

# One module per format, imported when a path is looked at; the first that matches reads it.
FORMATS = {
    "genpol": "genpol.data.store",
    "lerobot": "genpol.data.formats.lerobot",
    "minari": "genpol.data.formats.minari",
    "ogbench": "genpol.data.formats.ogbench",
    "d4rl": "genpol.data.formats.d4rl",
    "robomimic": "genpol.data.formats.robomimic",
    "mcap": "genpol.data.formats.mcap",
}
WRITABLE = ("genpol", "minari", "ogbench")

# Part of the name of what is cached: raised when a reader comes to read the same file otherwise.
_READERS_VERSION = 2
_STORE = "store"


class Format(Protocol):
    """What the module of a format has."""

    EXPECTED: str

    def matches(self, path: Path) -> bool:
        """Return whether ``path`` looks like this format, at a glance at its content."""

    def read(self, path: Path, sink: RowSink) -> None:
        """Read ``path`` into ``sink``, in bounded memory."""


class WritableFormat(Format, Protocol):
    """What the modules of :data:`WRITABLE` have besides."""

    def check_target(self, path: Path) -> None:
        """Refuse a name that does not suit the format, and a package that is missing."""

    def write(self, dataset: OfflineDataset, path: Path, staging: Staging | None = None) -> None:
        """Write ``dataset`` to ``path``, whole or not at all, by way of :func:`staged`."""


def _module(name: str) -> Format:
    return cast(Format, importlib.import_module(FORMATS[name]))


def _writable(name: str) -> WritableFormat:
    check_writable(name)
    return cast(WritableFormat, importlib.import_module(FORMATS[name]))


def detect(path: Path) -> str:
    """Return the name of the format of ``path``.

    Raises:
        DatasetError: If there is nothing, nothing that can be read, or no known format.
    """
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DatasetError(f"{path}: no such file or folder.{nearest(path.name, beside)}")
    try:
        for name in FORMATS:
            if _module(name).matches(path):
                return name
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from error
    expected = "; ".join(f"{name}: {_module(name).EXPECTED}" for name in FORMATS)
    raise DatasetError(f"{path}: of no known format, or cut short. Known are {expected}")


def read(path: Path, sink: RowSink) -> None:
    """Read ``path``, in whatever format it is, into ``sink``.

    Raises:
        DatasetError: If it cannot be read, or a value in it may not stand where it stands.
    """
    name = detect(path)
    try:
        _module(name).read(path, sink)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error
    sink.note_action_range()


def find_action_range(path: Path) -> ActionRange:
    """Return the least and the greatest value of each dimension of a file's actions.

    Where the format keeps them (LeRobot's ``meta/stats.json``), those; else all rows are read.

    Raises:
        DatasetError: As :func:`read` does.
    """
    stated = getattr(_module(detect(path)), "stated_action_range", None)
    found: ActionRange | None = None if stated is None else stated(path)
    if found is None:
        sink = ActionRangeSink()
        read(path, sink)
        found = sink.found()
    return found


def check_writable(name: str) -> None:
    """Refuse a format that does not exist or is only read.

    Raises:
        ConfigError: If so.
    """
    if name not in WRITABLE:
        what = "is only read, not written" if name in FORMATS else "is no format"
        raise ConfigError(
            f"format = {name!r}: {what}; must be one of {', '.join(WRITABLE)}."
            f"{nearest(name, WRITABLE)}"
        )


def check_target(path: Path, name: str) -> None:
    """Refuse what could not be written in the end, before the work is done that leads there.

    Args:
        path: What is to be made.
        name: Its format.

    Raises:
        ConfigError: If there is no such format, or it is only read.
        DatasetError: If ``path`` exists, or has a name that the format does not allow.
        MissingExtraError: If a package is missing that writes the format.
    """
    _writable(name).check_target(path)
    refuse_existing(path)


def write(dataset: OfflineDataset, path: Path, name: str = "genpol") -> None:
    """Write ``dataset`` in the format ``name``.

    Raises:
        ConfigError: If there is no such format, or it is only read.
        DatasetError: If ``path`` exists, has an unsuitable name, or cannot be written.
        MissingExtraError: If a package is missing that writes the format.
    """
    _writable(name).write(dataset, path)


def place(store: Path, staging: Staging, name: str) -> None:
    """Put the rows of a native store in the place of a target, and remove the staging folder.

    Args:
        store: The store, which lies in the staging folder.
        staging: The staging folder of the target.
        name: Format of the target.

    Raises:
        DatasetError: If the target exists by now or cannot be written; the store is then as it was.
    """
    if name == "genpol":
        staging.place(store)
    else:
        _writable(name).write(open_store(store), staging.target, staging)
    staging.discard()


def convert(
    path: Path, target: Path, name: str = "genpol", *, action_range: ActionRange | None = None
) -> None:
    """Convert ``path`` into ``target``, telling how far it is on a terminal.

    Args:
        path: A data set of any format.
        target: What to make.
        name: Format of ``target``.
        action_range: Bounds of the actions in ``path``; they become -1 and 1.

    Raises:
        ConfigError: If there is no format ``name``, or it is only read.
        DatasetError: As :func:`read` does, and if ``target`` exists or cannot be written.
    """
    check_target(target, name)
    if name == "genpol":
        _convert(path, target, wait=False, action_range=action_range)
    elif action_range is None:
        write(open_dataset(path), target, name)
    else:  # the cache holds what the file says, not what somebody says of it
        staging = Staging.empty(target)
        try:
            _convert(path, staging.folder / _STORE, wait=False, action_range=action_range)
            place(staging.folder / _STORE, staging, name)
        finally:
            staging.discard()


def validate(path: Path) -> tuple[int, int]:
    """Read every value of ``path`` and check it; return how many trajectories and transitions.

    Raises:
        DatasetError: At the first value that may not stand where it stands.
    """
    if detect(path) == "genpol":
        verify_checksums(path)
        dataset = open_store(path)
        dataset.validate(str(path))
        return dataset.num_trajectories, dataset.num_transitions
    sink = RowSink()
    read(path, sink)
    return sink.num_trajectories, sink.num_transitions


def open_dataset(path: str | Path, *, cache: Path | None = None) -> OfflineDataset:
    """Open a data set of any format, memory-mapped.

    A native store is opened as it is. Anything else is converted, once, into the cache; a file that
    has changed since is converted anew.

    Args:
        path: A file or folder.
        cache: The folder to convert into; ``$GENPOL_CACHE/datasets`` or
            ``~/.cache/genpol/datasets`` by default.

    Raises:
        DatasetError: If it cannot be read, or the cache cannot be written.
    """
    path = Path(path).expanduser()
    if detect(path) == "genpol":
        return open_store(path)
    target = (cache or _default_cache()) / _cache_name(path)
    if not target.exists():
        try:
            _convert(path, target, wait=True)
        except DatasetError:
            if not target.exists():  # it does if another process has converted it meanwhile
                raise
    try:
        return open_store(target)
    except DatasetError as error:
        raise DatasetError(f"{error}: remove {target}, it is only a cache of {path}") from None


def _convert(
    path: Path, target: Path, *, wait: bool, action_range: ActionRange | None = None
) -> None:
    with _progress(path) as report, DatasetWriter(target, progress=report, wait=wait) as writer:
        writer.action_range = action_range
        read(path, writer)


def _default_cache() -> Path:
    configured = os.environ.get("GENPOL_CACHE")
    root = Path(configured) if configured else Path.home() / ".cache" / "genpol"
    return root / "datasets"


def _cache_name(path: Path) -> str:
    """Return a name that changes with the path, the sizes and the times of its files."""
    absolute = path.resolve()
    files = sorted(file for file in (absolute, *absolute.rglob("*")) if file.is_file())
    digest = hashlib.sha256(f"{_READERS_VERSION}\0{absolute}".encode())
    for file in files:
        status = file.stat()
        digest.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return f"{absolute.stem}-{digest.hexdigest()[:16]}"


@contextmanager
def _progress(path: Path) -> Iterator[Callable[[int], None] | None]:
    """Show on a terminal how many rows have been read; elsewhere, nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"reading {path.name}", total=None)
        yield lambda rows: progress.update(task, description=f"reading {path.name}: {rows:,} rows")

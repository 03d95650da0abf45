"""Recorded results: one CSV per experiment, one row per evaluation.

A number that the README shows is a row in ``assets/results/NAME.csv``. Files are only ever replaced
whole (written beside, flushed to the disk, renamed), under a lock on the file itself, so that a
crash or a full disk leaves the previous rows as they were and two writers never lose a row.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING

from genpol.errors import ConfigError, DatasetError, nearest

if TYPE_CHECKING:
    import pandas as pd

# Marks, in the command column, rows of a run that had not finished when they were written.
UNFINISHED = "  # unfinished"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One evaluation of one run."""

    experiment: str
    """Name of the experiment, which is the file's name."""
    agent: str
    """The agent's label in the experiment, such as ``gorl`` or ``gorl-identity``."""
    env: str
    """Name of the environment."""
    seed: int
    """Seed of the run."""
    env_steps: int
    """Environment steps (frames) trained on so far, over all environments."""
    agent_steps: int
    """Decisions of the policy among them: fewer where an action is held for several."""
    gradient_steps: int
    """Optimiser steps taken so far."""
    metric: str
    """What ``value`` measures: ``return``, ``success``, ``env_steps_per_s/...``."""
    value: float
    """The mean of the metric over the evaluation's episodes."""
    episodes: int
    """Episodes that the mean is taken over; 0 where there are none."""
    wall_clock_s: float
    """Seconds of training so far."""
    commit: str
    """Commit of the code, with ``+changes`` if the checkout had any."""
    machine: str
    """Processor, cores and memory."""
    command: str
    """The command that repeats the run."""


COLUMNS = tuple(field.name for field in fields(ResultRow))
# Annotations are strings in this module: "str", "int" or "float".
_TYPES = {field.name: str(field.type) for field in fields(ResultRow)}


def append(path: Path, rows: Iterable[ResultRow]) -> None:
    """Add ``rows`` at the end of the file ``path``, which is made if it is not there.

    Raises:
        DatasetError: If the file is not one of results, or cannot be written; it stays as it was.
    """
    replace(path, rows, obsolete=lambda row: False)


def replace(
    path: Path, rows: Iterable[ResultRow], *, obsolete: Callable[[ResultRow], bool]
) -> None:
    """Take the ``obsolete`` rows out of the file and add ``rows`` at its end, in one step.

    Raises:
        DatasetError: If the file is not one of results, or cannot be written; it stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as stream:
            kept = [row for row in _parse(path, stream) if not obsolete(row)]
            _write(path, [*kept, *rows])
    except OSError as error:
        raise DatasetError(f"results {path}: {error.strerror}; no row was added") from None


def rows_of(path: Path) -> list[ResultRow]:
    """Return the rows of the file ``path``; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return _parse(path, stream)


def read(path: Path) -> pd.DataFrame:
    """Read a file of results as a frame with the columns and types of :class:`ResultRow`.

    Raises:
        DatasetError: If the file is missing, has other columns, or a value of the wrong type.
    """
    import pandas as pd

    if not path.exists():
        raise DatasetError(f"results {path}: no such file; genpol reproduce writes it")
    frame = pd.DataFrame([astuple(row) for row in rows_of(path)], columns=list(COLUMNS))
    numbers = {"int": "int64", "float": "float64"}
    return frame.astype({name: numbers[t] for name, t in _TYPES.items() if t in numbers})


def checkout() -> Path | None:
    """Return the folder of the source checkout that genpol runs from, or ``None`` if installed."""
    root = _packaged().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def results_folder() -> Path:
    """Return where results are written: the checkout's ``assets/results``, else ``./results``."""
    return Path("results") if checkout() is None else _packaged()


def find(name: str, folder: Path | None = None) -> Path:
    """Return the file of the experiment ``name``.

    It is looked for in ``folder`` if that is given; otherwise in :func:`results_folder`, then among
    the results that came with the package.

    Raises:
        ConfigError: If there is none; the message names the nearest.
    """
    places = [folder] if folder is not None else [results_folder(), _packaged()]
    known: dict[str, Path] = {}
    for place in places:
        for path in sorted(place.glob("*.csv")):
            known.setdefault(path.stem, path)
    if name not in known:
        raise ConfigError(
            f"no results named {name!r} in {places[0]}.{nearest(name, known)} "
            f"Recorded: {', '.join(known) or 'none yet'}"
        )
    return known[name]


def _packaged() -> Path:
    """Return the folder of results beside the package's other assets."""
    from importlib.resources import files

    return Path(str(files("genpol.assets"))) / "results"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Hold the lock of the file at ``path`` (made empty if missing) and give it open for reading.

    Writers replace the file, so one that waited may find itself holding the lock of a file that is
    no longer at ``path``; it then starts again with the one that is.
    """
    while True:
        with path.open("a+", newline="", encoding="utf-8") as stream:
            _lock(stream)
            try:
                current = path.stat().st_ino == os.fstat(stream.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if current:
                stream.seek(0)
                yield stream
                return


def _lock(stream: IO[str]) -> None:
    """Wait for an exclusive lock, which closing the stream frees; Windows goes without."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(stream.fileno(), fcntl.LOCK_EX)


def _parse(path: Path, stream: IO[str]) -> list[ResultRow]:
    lines = csv.reader(stream)
    try:
        header = next(lines, None)
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not a file of results: it is not text in UTF-8") from None
    if header is None:
        return []
    if "agent_steps" not in header and set(header) | {"agent_steps"} == set(COLUMNS):
        raise DatasetError(
            f"{path} was written before results had agent_steps; move it away, and `genpol "
            "reproduce` writes it anew from the folders of its runs"
        )
    if tuple(header) != COLUMNS:
        raise DatasetError(
            f"{path} is not a file of results: its header is {','.join(header)!r}, "
            f"not {','.join(COLUMNS)!r}; move it away or name another"
        )
    try:
        return [_row(values) for values in lines if values]
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not a file of results: it is not text in UTF-8") from None
    except ValueError as error:
        raise DatasetError(f"{path}, line {lines.line_num}: {error}; mend or delete it") from None


def _row(values: Sequence[str]) -> ResultRow:
    if len(values) != len(COLUMNS):
        raise ValueError(f"{len(values)} values for {len(COLUMNS)} columns")
    convert: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float}
    typed = {name: convert[_TYPES[name]](x) for name, x in zip(COLUMNS, values, strict=True)}
    return ResultRow(**typed)  # type: ignore[arg-type]


def _write(path: Path, rows: Iterable[ResultRow]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(row) for row in rows)
    # Once replaced, the file is another writer's to stage: no name may serve twice.
    staged = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with staged.open("w", newline="", encoding="utf-8") as stream:
            stream.write(text.getvalue())
            stream.flush()
            os.fsync(stream.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)

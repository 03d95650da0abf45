"""LeRobot v3: a folder of Parquet files of frames (Hugging Face LeRobot 0.4 and later).

::

    meta/info.json                               codebase_version, total_frames, features, fps, ...
    meta/stats.json                              least and greatest value of each feature, ...
    meta/episodes/chunk-<c>/file-<f>.parquet     episode_index, length, ... of each episode
    data/chunk-<c>/file-<f>.parquet              one row a frame, episodes one after the other
    videos/...                                   not read

A frame holds what was seen before a step (``observation.state``), the ``action``, and what came of
it (``next.reward``, ``next.done``, ``next.success``); the last frame's next observation is not
stored. Rules, since the format itself leaves them open:

- An episode *terminated* where ``next.done`` is set on its last frame, unless ``next.success``
  exists and is not set there: simulated data mark the end of every episode as done, also where only
  the time was up.
- A terminated episode keeps its last step and with it the reward of success; its final state
  repeats the last observation. Any other loses its last step, and the last frame is its final
  state. See :mod:`genpol.data.formats.transitions`.

Actions are commonly degrees or counts of an encoder, and the format has no place for their bounds.
`genpol data convert` scales them with ``action_low=`` and ``action_high=``, or with
``action_scale=data``, which takes the least and greatest ones of ``meta/stats.json``.

Videos, images, text and arrays of more than one axis are not read; ``metadata["skipped"]`` names
them. Other features, such as ``timestamp``, ``task_index`` or ``observation.environment_state``,
keep their names.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genpol.data.actions import ActionRange
from genpol.data.columns import Array, Source, canonical
from genpol.data.formats.hdf5 import natural
from genpol.data.formats.transitions import TransitionRows
from genpol.data.sink import RowSink
from genpol.errors import DatasetError, require

EXPECTED = "a folder with meta/info.json, meta/episodes/ and data/"

_NAMES = {
    "observation": "observation.state",
    "action": "action",
    "reward": "next.reward",
    "done": "next.done",
    "success": "next.success",
}
_COUNTERS = ("episode_index", "frame_index", "index")
_NUMERIC = ("float16", "float32", "float64", "bool")
_BATCH_BYTES = 4 << 20


def matches(path: Path) -> bool:
    """Return whether ``path`` is a folder with ``meta/info.json``."""
    return (path / "meta" / "info.json").is_file()


def read(path: Path, sink: RowSink) -> None:
    """Read the frames of a LeRobot data set into ``sink``.

    Raises:
        DatasetError: If the folder is of another version, a file is missing or damaged, frames and
            episodes disagree, or a value may not stand where it stands.
    """
    info = _read_info(path / "meta" / "info.json")
    widths, skipped = _features(info, path)
    lengths = _episode_lengths(path)
    facts = {"robot_type": info.get("robot_type"), "fps": info.get("fps"), "skipped": skipped}
    sink.metadata.update({name: fact for name, fact in facts.items() if fact})
    sink.metadata.update(format="lerobot", source=str(path))
    rows = TransitionRows(sink)
    num_frames = 0
    for file in _parquet_files(path, "data"):
        num_frames += _read_file(file, rows, widths, lengths, num_frames)
    if num_frames != lengths.sum():
        raise DatasetError(
            f"{path}: data: {num_frames} frames, but meta/episodes counts {lengths.sum()}; copy or "
            "download the data set again"
        )
    sink.metadata.update(rows.notes())
    sink.check_ended(Source(file=str(path)), "data")


def stated_action_range(path: Path) -> ActionRange | None:
    """Return the least and the greatest action by ``meta/stats.json``, or ``None`` without it.

    Raises:
        DatasetError: If the file is damaged.
    """
    file = path / "meta" / "stats.json"
    if not file.is_file():
        return None
    try:
        stats = json.loads(file.read_text(encoding="utf-8"))
        if _NAMES["action"] not in stats:
            return None
        low, high = (np.array(stats[_NAMES["action"]][key], np.float64) for key in ("min", "max"))
        if low.ndim != 1 or low.shape != high.shape or not (low <= high).all():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DatasetError(
            f"{file}: action: has no min and max of each dimension; give action_low= and "
            "action_high= instead, or remove the file"
        ) from None
    return ActionRange(low, high)


def _read_file(
    file: Path, rows: TransitionRows, widths: dict[str, int], lengths: Array, before: int
) -> int:
    """Read one file of frames, of which ``before`` came in earlier ones; return its number."""
    names = {name: key for name, key in _NAMES.items() if key in widths}
    names |= {key: key for key in widths if key not in _NAMES.values()}
    stops = np.cumsum(lengths)
    num_frames = 0
    for batch in _batches(file, [*widths, "episode_index", "frame_index"], widths):
        source = Source(
            file=str(file),
            names={**names, "terminated": "next.done"},
            rows=range(num_frames, num_frames + len(batch["frame_index"])),
        )
        numbers = before + np.asarray(source.rows)
        episodes = np.searchsorted(stops, numbers, side="right")
        _check_counters(batch, numbers, episodes, stops, lengths, source)
        columns = {name: batch[key] for name, key in names.items()}
        terminated = _derive_terminated(columns, source)
        end = numbers + 1 == stops[episodes]
        rows.append(columns, end=end, terminated=terminated, following=None, source=source)
        num_frames += len(numbers)
    return num_frames


def _derive_terminated(columns: dict[str, Array], source: Source) -> Array:
    """Replace ``done`` by ``terminated``, see the rules above, and return that."""
    done = columns.pop("done", None)
    if done is None:
        return np.zeros(len(columns["action"]), dtype=bool)
    terminated = canonical("terminated", done, source)
    if "success" in columns:
        terminated = terminated & canonical("success", columns["success"], source)
    columns["terminated"] = terminated
    return terminated


def _check_counters(
    batch: dict[str, Array],
    numbers: Array,
    episodes: Array,
    stops: Array,
    lengths: Array,
    source: Source,
) -> None:
    """Refuse frames that are not where the lengths of the episodes put them."""
    if numbers[-1] >= stops[-1]:
        row = int(np.argmax(numbers >= stops[-1]))
        raise DatasetError(
            f"{source.at('frame_index', row)}: is beyond the {stops[-1]} frames that meta/episodes "
            "counts; copy or download the data set again"
        )
    frames = numbers - (stops - lengths)[episodes]
    for name, expected in (("episode_index", episodes), ("frame_index", frames)):
        if (batch[name] != expected).any():
            row = int(np.argmax(batch[name] != expected))
            raise DatasetError(
                f"{source.at(name, row)}: is {batch[name][row]}, but by meta/episodes it is "
                f"{expected[row]}; copy or download the data set again"
            )


# --- the description ---------------------------------------------------------------------------


def _read_info(file: Path) -> dict[str, Any]:
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise DatasetError(f"{file}: damaged, not valid JSON; copy the data set again") from None
    version = str(info.get("codebase_version")) if isinstance(info, dict) else "none"
    if not version.startswith("v3."):
        raise DatasetError(
            f"{file}: codebase_version is {version}, only v3 is read; convert the data set with "
            "lerobot's convert_dataset_v21_to_v30"
        )
    return dict(info)


def _features(info: dict[str, Any], path: Path) -> tuple[dict[str, int], list[str]]:
    """Return the width of each feature that is read, and the names of those that are not."""
    widths, skipped = {}, []
    for name, feature in info.get("features", {}).items():
        shape, dtype = feature.get("shape", [1]), str(feature.get("dtype"))
        if name in _COUNTERS:
            continue
        if len(shape) == 1 and (dtype in _NUMERIC or dtype.lstrip("u").startswith("int")):
            widths[name] = int(shape[0])
        else:
            skipped.append(name)
    for name in ("observation.state", "action"):
        if name not in widths:
            found = "is of a kind that is not read" if name in skipped else "is missing"
            raise DatasetError(
                f"{path / 'meta' / 'info.json'}: feature {name} {found}; vectors "
                "observation.state and action are needed"
            )
    return widths, skipped


def _episode_lengths(path: Path) -> Array:
    """Return the number of frames of each episode."""
    lengths: list[int] = []
    for file in _parquet_files(path, "meta/episodes"):
        for batch in _batches(file, ["episode_index", "length"], {}):
            for row, (episode, length) in enumerate(
                zip(batch["episode_index"], batch["length"], strict=True)
            ):
                if episode != len(lengths) or length < 1:
                    raise DatasetError(
                        f"{file}: row {row}: episode {episode} of {length} frames, where episode "
                        f"{len(lengths)} is expected; copy or download the data set again"
                    )
                lengths.append(int(length))
    return np.array(lengths, dtype=np.int64)


# --- Parquet -----------------------------------------------------------------------------------


def _parquet_files(path: Path, folder: str) -> list[Path]:
    files = sorted((path / folder).glob("chunk-*/file-*.parquet"), key=lambda f: natural(str(f)))
    if not files:
        raise DatasetError(f"{path / folder}: no Parquet file in it; copy the data set again")
    return files


def _batches(file: Path, names: list[str], widths: dict[str, int]) -> Iterator[dict[str, Array]]:
    """Give the columns ``names`` of one file, a few megabytes of rows at a time."""
    size = max(1, _BATCH_BYTES // (8 * (sum(widths.values()) + 2)))
    row = 0
    with _opened(file) as opened:
        for name in names:
            if name not in opened.schema_arrow.names:
                raise DatasetError(f"{file}: {name}: missing; copy or download the data set again")
        batches = opened.iter_batches(batch_size=size, columns=names)
        while True:
            try:
                batch = next(batches, None)
            except _damage() as error:
                raise _damaged(f"{file}: {_damaged_part(opened, names, row)}", error) from error
            if batch is None:
                return
            yield {
                name: _values(batch.column(name), widths.get(name), f"{file}: {name}", row)
                for name in names
            }
            row += len(batch)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    parquet = require("pyarrow.parquet", "data")
    try:
        # Otherwise pyarrow holds whole row groups, which may be whole files.
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as opened:
            yield opened
    except _damage() as error:
        raise _damaged(str(file), error) from error


def _damage() -> tuple[type[Exception], ...]:
    """Return what pyarrow raises where a file is damaged."""
    arrow = require("pyarrow", "data")
    return (arrow.ArrowException, OSError)


def _damaged(place: str, error: Exception) -> DatasetError:
    reason = " ".join(str(error).split())
    return DatasetError(f"{place}: damaged or cut short ({reason}); copy or download it again")


def _damaged_part(opened: Any, names: list[str], row: int) -> str:
    """Return which column of which row group cannot be read from ``row`` on: nothing else tells."""
    begin = 0
    for group in range(opened.num_row_groups):
        stop = begin + opened.metadata.row_group(group).num_rows
        for name in names if stop > row else ():
            try:
                opened.read_row_group(group, columns=[name], use_threads=False)
            except _damage():
                return f"{name} row group {group}, from row {max(row, begin)} on"
        begin = stop
    return f"from row {row} on"


def _values(column: Any, width: int | None, place: str, first_row: int) -> Array:
    """Return a column as ``[rows]``, or ``[rows, width]`` if it is a list."""
    if column.null_count:
        row = first_row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DatasetError(f"{place} row {row}: is empty; copy or download the data set again")
    if not hasattr(column, "flatten"):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    flat = column.flatten()
    counts = column.value_lengths().to_numpy(zero_copy_only=False)
    if width is not None and (counts != width).any():
        row = int(np.argmax(counts != width))
        raise DatasetError(
            f"{place} row {first_row + row}: has {counts[row]} values, but meta/info.json says "
            f"{width}; copy or download the data set again"
        )
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), -1)

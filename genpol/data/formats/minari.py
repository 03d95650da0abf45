"""Minari 0.5: a folder with one HDF5 group an episode (Farama Foundation).

::

    <id>/data/metadata.json     total_episodes, total_steps, spaces, env_spec, dataset_id, ...
    <id>/data/main_data.hdf5
        episode_<i>             attributes: id, total_steps, perhaps seed and options
            observations        [T+1, d], or groups of such for Dict and Tuple spaces
            actions             [T, A]
            rewards, terminations, truncations [T]
            infos/<key>         [T+1], from the reset on; T where the reset gave none

Observations of several parts are laid side by side in the order of their names, which
``metadata["observation_keys"]`` records. ``infos/qpos``, ``infos/qvel`` and ``infos/button_states``
keep their names and ``infos/success`` is moved to the step that led to it; others become
``infos.<key>`` if they are numbers of T+1 or T rows, and are named in ``metadata["skipped"]`` if
not.

Actions are scaled to [-1, 1] by the bounds of the action space in ``metadata.json``, which are -0.4
and 0.4 of Humanoid's; ``metadata["action_low"]`` and ``metadata["action_high"]`` record them.

What is written can be read by the minari package and comes back here as it was: columns that
Minari has no place for are stored as infos, and ``metadata.json`` names them in an entry
``genpol``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from genpol.data.actions import ActionRange
from genpol.data.columns import Array, Source, blocks, row_bytes
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import hdf5
from genpol.data.sink import RowSink
from genpol.data.staging import Staging, staged
from genpol.errors import DatasetError, require

EXPECTED = "a folder with data/main_data.hdf5 and data/metadata.json"

_DATA = "main_data.hdf5"
_METADATA = "metadata.json"
_VERSION = "0.5.3"  # of the layout written; Minari refuses versions that it does not know
_NAME = re.compile(r"[-_\w]+-v\d+")  # with a version, or Minari fails without a word on it
_NAMES = {
    "observation": "observations",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminations",
}
_UNBOUNDED = 1e30  # the greatest numbers of a type stand for no bound, too
_SIMULATOR = ("qpos", "qvel", "button_states")


def matches(path: Path) -> bool:
    """Return whether ``path`` is a Minari data set, or its ``data`` folder or main file."""
    return _data_folder(path) is not None


def read(path: Path, sink: RowSink) -> None:
    """Read a Minari data set into ``sink``.

    Raises:
        DatasetError: If a file is missing or damaged, episodes are missing, spaces are not vectors,
            or a value may not stand where it stands; the message names the episode.
    """
    folder = _data_folder(path) or path
    metadata = _read_metadata(folder / _METADATA)
    file_path = folder / _DATA
    if not file_path.is_file():
        raise DatasetError(f"{file_path}: missing; copy or download the data set again")
    sink.metadata.update(_facts(metadata, path))
    if sink.action_range is None:
        sink.action_range = _action_range(metadata, folder / _METADATA)
    with hdf5.opened(file_path) as file:
        episodes = sorted(file.keys(), key=hdf5.natural)
        if len(episodes) != metadata.get("total_episodes", len(episodes)):
            raise DatasetError(
                f"{file_path}: {len(episodes)} episodes, but {_METADATA} says "
                f"{metadata['total_episodes']}; copy or download the data set again"
            )
        reader = _Episodes(file_path, sink, metadata.get("genpol", {}))
        for episode in episodes:
            reader.read(hdf5.member(file, episode), episode)
    sink.check_ended(Source(file=str(file_path)), "episodes")


def check_target(path: Path) -> None:
    """Refuse a name that Minari would not find.

    Raises:
        DatasetError: If the name of the folder has no version.
        MissingExtraError: If h5py is not installed.
    """
    if not _NAME.fullmatch(path.name):
        raise DatasetError(
            f"{path}: Minari's names are letters, digits, _ and -, and end in a version, such as "
            f"{re.sub(r'[^-_0-9A-Za-z]', '_', path.stem) or 'data'}-v0"
        )
    require("h5py", "data")


def write(dataset: OfflineDataset, path: Path, staging: Staging | None = None) -> None:
    """Write ``dataset`` so that ``minari.load_dataset`` finds it.

    Args:
        dataset: What to write. Rewards and terminations that it lacks are written as zeros.
        path: The folder of the data set, ``~/.minari/datasets/<id>`` for instance. Its name ends in
            a version, ``-v0``.
        staging: See :func:`~genpol.data.staging.staged`.

    Raises:
        DatasetError: If the name has no version, or ``path`` exists or cannot be written.
        MissingExtraError: If h5py is not installed.
    """
    check_target(path)
    h5py = require("h5py", "data")
    with staged(path, staging) as made:
        (made / "data").mkdir(parents=True)
        with h5py.File(made / "data" / _DATA, "w") as file:
            for number in range(dataset.num_trajectories):
                group = file.create_group(f"episode_{number}")
                group.attrs["id"] = number
                _write_episode(group, dataset, number)
        size_mb = round((made / "data" / _DATA).stat().st_size / 1e6, 1)
        text = json.dumps(_describe(dataset, path, size_mb))
        (made / "data" / _METADATA).write_text(text, encoding="utf-8")


# --- reading -----------------------------------------------------------------------------------


def _data_folder(path: Path) -> Path | None:
    if path.name == _DATA:
        path = path.parent
    folders = (path / "data", path)
    return next((folder for folder in folders if (folder / _METADATA).is_file()), None)


def _read_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{file}: missing; {EXPECTED} is expected") from None
    except ValueError:
        raise DatasetError(f"{file}: damaged, not valid JSON; copy the data set again") from None
    if not isinstance(metadata, dict):
        raise DatasetError(f"{file}: damaged, not a JSON object; copy the data set again")
    stored = metadata.get("data_format", "hdf5")
    if stored != "hdf5":
        raise DatasetError(
            f"{file}: data_format is {stored!r}, only 'hdf5' is read; create the data set with "
            "minari and data_format='hdf5'"
        )
    return metadata


def _facts(metadata: dict[str, Any], path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = dict(metadata.get("genpol", {}).get("metadata", {}))
    if not facts:
        keys = ("dataset_id", "algorithm_name", "author", "code_permalink", "description")
        facts = {key: metadata[key] for key in keys if key in metadata}
        with contextlib.suppress(KeyError, TypeError, ValueError):  # it is not known then
            facts["env"] = str(json.loads(metadata["env_spec"])["id"])
    return facts | {"format": "minari", "source": str(path)}


def _action_range(metadata: dict[str, Any], file: Path) -> ActionRange | None:
    """Return the bounds of the action space, or ``None`` where they are -1 and 1 or unknown.

    A dimension without bounds is read as it is.
    """
    if "action_space" not in metadata:
        return None
    try:
        boxes = _boxes(json.loads(metadata["action_space"]))
        if boxes is None:  # its actions are refused as what they are
            return None
        low, high = (np.concatenate(bounds) for bounds in zip(*boxes, strict=True))
        if low.shape != high.shape or (low > high).any():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise DatasetError(
            f"{file}: action_space: is no space as minari writes it, with low <= high; copy the "
            "data set again"
        ) from None
    is_bounded = (np.abs(low) < _UNBOUNDED) & (np.abs(high) < _UNBOUNDED)
    low, high = np.where(is_bounded, low, -1.0), np.where(is_bounded, high, 1.0)
    if (low == -1).all() and (high == 1).all():
        return None
    return ActionRange(low, high)


def _boxes(space: dict[str, Any]) -> list[tuple[Array, Array]] | None:
    """Return the bounds of a space's parts in the order in which actions are laid side by side."""
    if space["type"] == "Box":
        low, high = (np.asarray(space[bound], np.float64).ravel() for bound in ("low", "high"))
        return [(low, high)]
    if space["type"] not in ("Dict", "Tuple"):
        return None
    parts = space["subspaces"]
    if isinstance(parts, dict):
        parts = [parts[key] for key in sorted(parts, key=hdf5.natural)]
    found = [_boxes(part) for part in parts]
    return None if None in found else [box for boxes in found for box in boxes or ()]


class _Episodes:
    """Hands the episodes of one file to a sink, all with the infos of the first."""

    def __init__(self, file: Path, sink: RowSink, ours: dict[str, Any]) -> None:
        self._file = file
        self._sink = sink
        self._ours: list[str] | None = ours.get("columns")
        self._infos: dict[str, str] | None = None  # names of columns by keys of infos

    def read(self, group: Any, episode: str) -> None:
        """Append one episode."""
        for key in (*_NAMES.values(), "truncations"):
            if key not in group:
                raise DatasetError(f"{self._file}: {episode}/{key}: missing; copy the data again")
        arrays: dict[str, Any] = {name: hdf5.member(group, key) for name, key in _NAMES.items()}
        if hdf5.is_group(arrays["observation"]):
            keys = list(hdf5.leaves(arrays["observation"]))
            self._sink.metadata["observation_keys"] = keys
        for name in ("observation", "action"):
            place = f"{self._file}: {episode}/{_NAMES[name]}"
            arrays[name] = hdf5.Joined(hdf5.leaves(arrays[name]), place)
        truncations = hdf5.member(group, "truncations")
        num_rows = len(arrays["observation"])
        self._check_steps(arrays | {"truncated": truncations}, episode, num_rows)
        self._check_truncations(truncations, episode, num_rows)
        names = {name: f"{episode}/{key}" for name, key in _NAMES.items()}
        for key, name in self._find_infos(group, num_rows).items():
            names[name] = f"{episode}/infos/{key}"
            there = f"infos/{key}" in group
            arrays[name] = hdf5.member(group, f"infos/{key}") if there else None
            if not there or len(arrays[name]) not in (num_rows, num_rows - 1):
                raise DatasetError(
                    f"{self._file}: {names[name]}: {num_rows} rows are expected, as the first "
                    "episode has them; create the data set without it"
                )
        if self._ours is not None:
            arrays = {name: array for name, array in arrays.items() if name in self._ours}
        for block in blocks(num_rows, row_bytes(arrays)):
            rows = {name: _rows(name, array, block, num_rows) for name, array in arrays.items()}
            last = np.arange(block.start, block.stop) == num_rows - 1
            source = Source(file=str(self._file), names=names, rows=range(block.start, block.stop))
            self._sink.append_rows(rows, last, source=source)

    def _check_steps(self, arrays: dict[str, Any], episode: str, num_rows: int) -> None:
        for name, array in arrays.items():
            if name != "observation" and (not array.shape or len(array) != num_rows - 1):
                found = len(array) if array.shape else 1
                raise DatasetError(
                    f"{self._file}: {episode}/{_NAMES.get(name, 'truncations')}: {found} rows, "
                    f"where {num_rows - 1} are expected, one less than observations; copy or "
                    "create the data set again"
                )

    def _check_truncations(self, truncations: Any, episode: str, num_rows: int) -> None:
        early = hdf5.read_rows(truncations, slice(0, max(0, num_rows - 2)))
        if early.any():
            raise DatasetError(
                f"{self._file}: {episode}/truncations row {int(np.argmax(early))}: is set, but the "
                f"episode goes on to row {num_rows - 1}; split it there"
            )

    def _find_infos(self, group: Any, num_rows: int) -> dict[str, str]:
        if self._infos is None:
            self._infos = {}
            skipped = []
            for key, array in _infos(group).items():
                numeric = array.dtype.kind in "biuf" and array.shape and 0 not in array.shape
                if numeric and len(array) in (num_rows, num_rows - 1):
                    own = self._ours is not None or key in (*_SIMULATOR, "success")
                    self._infos[key] = key if own else f"infos.{key.replace('/', '.')}"
                else:
                    skipped.append(f"infos/{key}")
            if skipped:
                self._sink.metadata["skipped"] = skipped
        return self._infos


def _infos(group: Any) -> dict[str, Any]:
    return hdf5.leaves(hdf5.member(group, "infos")) if "infos" in group else {}


def _rows(name: str, array: Any, block: slice, num_rows: int) -> Array:
    """Return rows of one array, with zeros where it has none."""
    # An info after a step stands one row below the step.
    shift = 1 if name == "success" and len(array) == num_rows else 0
    stop = min(block.stop + shift, len(array))
    values = hdf5.read_rows(array, slice(block.start + shift, stop))
    lacking = block.stop - block.start - len(values)
    return np.concatenate([values, np.zeros((lacking, *values.shape[1:]), values.dtype)])


# --- writing -----------------------------------------------------------------------------------


def _write_episode(group: Any, dataset: OfflineDataset, number: int) -> None:
    rows = slice(int(dataset.starts[number]), int(dataset.ends[number]) + 1)
    steps = slice(rows.start, rows.stop - 1)
    num_steps = steps.stop - steps.start
    group.attrs["total_steps"] = num_steps
    columns = dict(dataset.columns)
    _create(group, "observations", columns.pop("observation")[rows])
    _create(group, "actions", columns.pop("action")[steps])
    reward, terminated = columns.pop("reward", None), columns.pop("terminated", None)
    nothing = np.zeros(num_steps)
    _create(group, "rewards", nothing if reward is None else reward[steps].astype(np.float64))
    _create(
        group, "terminations", nothing.astype(bool) if terminated is None else terminated[steps]
    )
    _create(group, "truncations", dataset.truncated[steps])
    for name, column in columns.items():
        values = column[rows]
        if name == "success":  # an info after a step stands one row below the step
            values = np.concatenate([[False], values[:-1]])
        _create(group, f"infos/{name}", values)


def _create(group: Any, name: str, values: Array) -> None:
    """Make one array as minari does: in chunks, so that it can be appended to."""
    shape = (None, *values.shape[1:])
    array = group.create_dataset(
        name, values.shape, dtype=values.dtype, chunks=True, maxshape=shape
    )
    for block in blocks(len(values), row_bytes({name: values})):
        array[block] = np.asarray(values[block])


def _describe(dataset: OfflineDataset, path: Path, size_mb: float) -> dict[str, Any]:
    """Return what ``metadata.json`` says."""
    described: dict[str, Any] = {
        "total_episodes": dataset.num_trajectories,
        "total_steps": dataset.num_transitions,
        "data_format": "hdf5",
        "observation_space": _box(dataset.observation_dim, math.inf),
        "action_space": _box(dataset.action_dim, 1.0),
        "dataset_id": _dataset_id(path),
        "minari_version": _VERSION,
        "dataset_size": size_mb,
        "genpol": {"columns": sorted(dataset.columns), "metadata": dataset.metadata},
    }
    keys = ("algorithm_name", "author", "code_permalink", "description")
    return described | {key: dataset.metadata[key] for key in keys if key in dataset.metadata}


def _box(width: int, bound: float) -> str:
    """Return a space as minari serialises it; its JSON knows infinities."""
    low, high = [-bound] * width, [bound] * width
    space = {"type": "Box", "dtype": "float32", "shape": [width], "low": low, "high": high}
    return json.dumps(space)


def _dataset_id(path: Path) -> str:
    """Return the id under which minari looks for ``path``, with its namespace."""
    default = Path.home() / ".minari" / "datasets"
    root = Path(os.environ.get("MINARI_DATASETS_PATH", default)).absolute()
    absolute = path.absolute()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else path.name

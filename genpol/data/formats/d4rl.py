"""D4RL: one flat HDF5 file of transitions (Fu et al. 2020, arXiv 2004.07219).

::

    observations [N, d], actions [N, A], rewards [N], terminals [N], timeouts [N]
    next_observations [N, d]                      in some
    infos/qpos, infos/qvel, infos/goal, ... [N]   in some
    metadata/...                                  how it was made; not read

``terminals`` marks the task's own end and ``timeouts`` the end of a recording; both end a
trajectory, and so does the end of the file. Where there are next observations, a trajectory ends
too before a row whose observation is not the next observation of the row above, as it is done to
find the ends that the AntMaze files do not mark (Kostrikov et al. 2021, arXiv 2110.06169, code).
Final states: see :mod:`genpol.data.formats.transitions`.

``infos/qpos`` and ``infos/qvel`` become ``qpos`` and ``qvel``; others keep the prefix, as
``infos.goal`` does: there it is where the task wants to get, and no statement of the row's state.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from genpol.data.columns import Array, Source, blocks, canonical, row_bytes
from genpol.data.formats import hdf5
from genpol.data.formats.transitions import TransitionRows
from genpol.data.sink import RowSink
from genpol.errors import DatasetError

EXPECTED = "an HDF5 file with observations, actions, rewards, terminals, timeouts"

_NAMES = {
    "observation": "observations",
    "action": "actions",
    "reward": "rewards",
    "terminated": "terminals",
}
_STATES = ("qpos", "qvel")
_TOLERANCE = 1e-6  # between an observation and the next one of the row above, as IQL has it


def matches(path: Path) -> bool:
    """Return whether ``path`` is an HDF5 file with flat observations and actions."""
    if not hdf5.is_hdf5(path):
        return False
    with hdf5.opened(path) as file:
        return "observations" in file and "actions" in file


def read(path: Path, sink: RowSink) -> None:
    """Read a D4RL file into ``sink``.

    Raises:
        DatasetError: If the file is damaged, columns are missing or of unequal length, no
            trajectory ever ends, or a value may not stand where it stands.
    """
    with hdf5.opened(path) as file:
        arrays, names = _columns(file, path)
        timeouts, following = (
            hdf5.member(file, key) if key in file else None
            for key in ("timeouts", "next_observations")
        )
        extra = {"timeouts": timeouts, "next_observations": following}
        _check_lengths(arrays | {k: v for k, v in extra.items() if v is not None}, names, path)
        sink.metadata.update(format="d4rl", source=str(path))
        rows = TransitionRows(sink)
        num_ends = 0
        for block in blocks(len(arrays["observation"]), row_bytes(arrays)):
            columns = {name: hdf5.read_rows(array, block) for name, array in arrays.items()}
            source = Source(file=str(path), names=names, rows=range(block.start, block.stop))
            terminated = canonical("terminated", columns["terminated"], source)
            end = terminated.copy()
            if timeouts is not None:
                as_timeouts = replace(source, names={"terminated": "timeouts"})
                end |= canonical("terminated", hdf5.read_rows(timeouts, block), as_timeouts)
            after = None if following is None else hdf5.read_rows(following, block)
            if after is not None:
                end |= _breaks(arrays["observation"], after, block)
            num_ends += int(end.sum())
            if block.stop == len(arrays["observation"]):
                end[-1] = True
            rows.append(columns, end=end, terminated=terminated, following=after, source=source)
        if num_ends == 0:
            raise DatasetError(
                f"{path}: terminals, timeouts: no row of {sink.num_rows} is set, so "
                "no trajectory ever ends; mark the last row of each"
            )
        sink.metadata.update(rows.notes())
        sink.check_ended(Source(file=str(path)), "observations")


def _columns(file: Any, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arrays to read and what the file calls them."""
    for name in ("observations", "actions", "terminals"):
        if name not in file:
            raise DatasetError(f"{path}: {name}: missing; {EXPECTED} is expected")
    names = {name: key for name, key in _NAMES.items() if key in file}
    if "infos" in file:
        for key, array in hdf5.leaves(hdf5.member(file, "infos")).items():
            if array.dtype.kind in "biuf" and array.ndim:
                name = key if key in _STATES else f"infos.{key.replace('/', '.')}"
                names[name] = f"infos/{key}"
    arrays = {name: hdf5.member(file, key) for name, key in names.items()}
    for name, array in arrays.items():
        if not hasattr(array, "shape") or array.dtype.kind not in "biuf":
            raise DatasetError(f"{path}: {names[name]}: is no array of numbers")
    return arrays, names


def _check_lengths(arrays: dict[str, Any], names: dict[str, str], path: Path) -> None:
    expected = len(arrays["observation"])
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) != expected:
            found = len(array) if array.ndim else 1
            raise DatasetError(
                f"{path}: {names.get(name, name)}: {found} rows, but observations has {expected}; "
                "the file is inconsistent, download it again"
            )
    following, before = arrays.get("next_observations"), arrays["observation"]
    if following is not None and following.shape != before.shape:
        raise DatasetError(
            f"{path}: next_observations: shape {following.shape}, but observations has "
            f"{before.shape}; the file is inconsistent, download it again"
        )
    if expected == 0:
        raise DatasetError(f"{path}: observations: holds no row")


def _breaks(observations: Any, following: Array, block: slice) -> Array:
    """Return the rows whose next observation is not the observation of the row below."""
    below = hdf5.read_rows(
        observations, slice(block.start + 1, min(block.stop + 1, len(observations)))
    )
    differs = np.zeros(len(following), dtype=bool)
    gap = np.abs(below.astype(np.float64) - following[: len(below)])
    differs[: len(below)] = (gap > _TOLERANCE).any(axis=1)
    return differs

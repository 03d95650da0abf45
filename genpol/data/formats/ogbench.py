"""OGBench: one ``.npz`` file of states (Park et al. 2025, arXiv 2410.20092), or a folder of them.

::

    observations [N, d], actions [N, A], terminals [N]
    qpos [N, ...], qvel [N, ...], button_states [N, ...]      in some

Rows are states already: ``terminals`` is 1 at the final state of a trajectory, whose action is not
used. It marks where the recording ends and says nothing of the task. There are no rewards: tasks
are given to the data later.

A folder is read as one data set, file after file in the order of their names, as the data of more
than 10M transitions come; files that end in ``-val.npz`` are left out, and read by themselves.

What is written can be read by ogbench, and comes back here as it was: other columns are stored
under their own names, rewards as ``rewards``, and the metadata as JSON in the archive's comment.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from genpol.data.columns import Source, blocks, canonical, row_bytes
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import npz
from genpol.data.sink import RowSink
from genpol.data.staging import Staging, staged
from genpol.errors import DatasetError

EXPECTED = "an .npz file with observations, actions, terminals, or a folder of them"

_NAMES = {"observation": "observations", "action": "actions", "reward": "rewards"}
_VALIDATION = "-val.npz"
# The middle says how the data was collected: cube-single-play-v0 is of cube-single-v0.
_ENV = re.compile(
    r"(?P<env>.+)-(?:navigate|stitch|explore|play|noisy)(?:-\d+[mb])?(?P<version>-v\d+)(?:-.*)?"
)


def matches(path: Path) -> bool:
    """Return whether ``path`` is a zip archive, or a folder of ``.npz`` files."""
    files = _files(path)
    return bool(files) and npz.is_zip(files[0])


def read(path: Path, sink: RowSink) -> None:
    """Read one file, or all files of a folder, into ``sink``.

    Raises:
        DatasetError: If a file is damaged, a column is missing, the last trajectory never ends, or
            a value may not stand where it stands.
    """
    env = _ENV.fullmatch(path.stem)
    if env is not None:
        sink.metadata["env"] = env["env"] + env["version"]
    sink.metadata.update(npz.read_metadata(_files(path)[0]))
    sink.metadata.update(format="ogbench", source=str(path))
    for file in _files(path):
        _read_file(file, sink)


def check_target(path: Path) -> None:
    """Refuse a name that is not that of an archive.

    Raises:
        DatasetError: If ``path`` does not end in ``.npz``.
    """
    if path.suffix != ".npz":
        raise DatasetError(f"{path}: must end in .npz, as OGBench's files do")


def write(dataset: OfflineDataset, path: Path, staging: Staging | None = None) -> None:
    """Write ``dataset`` as a compressed ``.npz`` file.

    Args:
        dataset: What to write.
        path: The file.
        staging: See :func:`~genpol.data.staging.staged`.

    Raises:
        DatasetError: If ``path`` does not end in ``.npz``, exists, or cannot be written.
    """
    check_target(path)
    terminals = np.zeros(dataset.num_rows, dtype=bool)
    terminals[dataset.ends] = True
    arrays = {_NAMES.get(name, name): column for name, column in dataset.columns.items()}
    if "terminals" in arrays:
        raise DatasetError(f"{path}: a column named terminals has no place in the file; rename it")
    with (
        staged(path, staging) as made,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        npz.write_metadata(archive, dataset.metadata)
        for name, array in {**arrays, "terminals": terminals}.items():
            npz.write_array(archive, name, array)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = path.glob("*.npz")
        return sorted(file for file in found if not file.name.endswith(_VALIDATION))
    return [path] if path.is_file() else []


def _read_file(file: Path, sink: RowSink) -> None:
    with npz.opened(file) as arrays:
        for name in ("observations", "actions", "terminals"):
            if name not in arrays:
                raise DatasetError(f"{file}: {name}: missing; {EXPECTED} is expected")
        if "next_observations" in arrays:
            raise DatasetError(
                f"{file}: next_observations: rows of this file are transitions, those of OGBench "
                "are states; save what ogbench's download has, not what its loader returns"
            )
        num_rows = len(arrays["observations"])
        for name, array in arrays.items():
            if array.shape[:1] != (num_rows,):
                found = len(array) if array.shape else 1
                raise DatasetError(
                    f"{file}: {name}: {found} rows, but observations has {num_rows}; the file is "
                    "inconsistent, download it again"
                )
        ours = {theirs: name for name, theirs in _NAMES.items()}
        as_terminals = {"terminated": "terminals"}  # of the recording, but flags like those
        for block in blocks(num_rows, row_bytes(arrays)):
            rows = {ours.get(name, name): array.read(block) for name, array in arrays.items()}
            source = Source(file=str(file), names=_NAMES, rows=range(block.start, block.stop))
            flags = replace(source, names=as_terminals)
            last = canonical("terminated", rows.pop("terminals"), flags)
            sink.append_rows(rows, last, source=source)
        for array in arrays.values():
            array.finish()
    sink.check_ended(Source(file=str(file)), "terminals", num_rows=num_rows)

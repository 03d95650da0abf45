"""Dumps: the batch and the metrics of an update that went wrong, kept for a look at them later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genpol.training.checkpoint import State, read_folder, write_folder

FORMAT = "genpol.dump"


def write_dump(folder: Path, state: Mapping[str, Any]) -> Path:
    """Write what led to a ``NonFiniteError`` to ``folder``, usually ``RUN/dump-<env steps>``.

    The files are those of a checkpoint under another format tag, so that nothing ever resumes from
    a dump: ``checkpoint.load`` refuses it.

    Args:
        folder: The folder to make; an earlier dump there is replaced.
        state: The batch and the metrics. A ``TensorDict`` is a mapping and may be given as it is;
            it comes back as nested dictionaries.

    Raises:
        CheckpointError: If ``state`` cannot be saved or the folder cannot be written.
    """
    write_folder(folder, state, tag=FORMAT, metadata={})
    return folder


def read_dump(folder: Path) -> State:
    """Read what :func:`write_dump` wrote.

    Raises:
        CheckpointError: If it is damaged or no dump.
    """
    return read_folder(folder, tag=FORMAT)

"""Data sets of several tasks as one, with the observations of :mod:`genpol.envs.multitask`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from genpol.data.columns import Array
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import open_dataset
from genpol.envs.settings import MultiTaskSettings
from genpol.errors import DatasetError

_COLUMNS = ("reward", "terminated")


def open_folder(
    folder: Path, settings: MultiTaskSettings, observation_width: int, action_width: int
) -> OfflineDataset:
    """Open the data of every task that is played, which lie in one folder, as one data set.

    Those of ``WalkerRun`` are called ``WalkerRun``, or that and more behind a dot or a hyphen
    (``WalkerRun.npz``, ``WalkerRun-expert-v0``); if there are several, all are taken. The rows are
    copied into memory.

    Args:
        folder: Where the data sets are.
        settings: The tasks.
        observation_width: Width of the environment's observations, with the tasks' numbers.
        action_width: Width of its actions.

    Raises:
        DatasetError: If a task has no data, or they do not suit it.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; give one with a data set for each task")
    found = {name: _of_task(folder, name) for name in settings.played}
    missing = [name for name, paths in found.items() if not paths]
    if missing:
        raise DatasetError(
            f"{folder}: has no data set for {', '.join(missing)}; call one {missing[0]}, or leave "
            "the task out with env.tasks"
        )
    opened = {name: [open_dataset(path) for path in paths] for name, paths in found.items()}
    return joined(opened, settings.tasks, observation_width, action_width)


def _of_task(folder: Path, name: str) -> list[Path]:
    pattern = re.compile(rf"{re.escape(name)}([.-].*)?")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def joined(
    datasets: Mapping[str, Sequence[OfflineDataset]],
    tasks: Sequence[str],
    observation_width: int,
    action_width: int,
) -> OfflineDataset:
    """Return data sets of several tasks as one.

    Args:
        datasets: By task.
        tasks: All tasks of the environment, in the order of their numbers.
        observation_width: See :func:`open_folder`.
        action_width: See :func:`open_folder`.

    Raises:
        DatasetError: If observations or actions are too wide, a column is missing, or actions are
            not held for equally long.
    """
    columns: dict[str, list[Array]] = {name: [] for name in ("observation", "action", *_COLUMNS)}
    ends: list[Array] = []
    before = 0
    for name, parts in datasets.items():
        for data in parts:
            _check(data, name, observation_width - len(tasks), action_width)
            wide = np.zeros((data.num_rows, observation_width), np.float32)
            wide[:, : data.observation_dim] = data.columns["observation"]
            wide[:, observation_width - len(tasks) + tasks.index(name)] = 1.0
            columns["observation"].append(wide)
            action = np.zeros((data.num_rows, action_width), np.float32)
            action[:, : data.action_dim] = data.columns["action"]
            columns["action"].append(action)
            for column in _COLUMNS:
                columns[column].append(np.asarray(data.columns[column]))
            ends.append(data.ends + before)
            before += data.num_rows
    metadata: dict[str, Any] = {"tasks": list(datasets), **_action_repeat(datasets)}
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return OfflineDataset(whole, np.concatenate(ends), metadata)


def _action_repeat(datasets: Mapping[str, Sequence[OfflineDataset]]) -> dict[str, int]:
    """Return for how many steps actions are held, where any of the data sets says so.

    Raises:
        DatasetError: If they do not say the same.
    """
    told: dict[int, list[str]] = {}
    for name, parts in datasets.items():
        for data in parts:
            if (repeat := data.metadata.get("action_repeat")) is not None:
                told.setdefault(int(repeat), []).append(name)
    if len(told) > 1:
        each = "; ".join(f"{x} in those of {', '.join(dict.fromkeys(told[x]))}" for x in told)
        raise DatasetError(
            f"data of several tasks: actions are held for different numbers of steps ({each}); "
            "record them anew with one env.action_repeat, or leave tasks out with env.tasks"
        )
    return {"action_repeat": next(iter(told))} if told else {}


def _check(data: OfflineDataset, name: str, observation_width: int, action_width: int) -> None:
    for what, found, most in (
        ("observations", data.observation_dim, observation_width),
        ("actions", data.action_dim, action_width),
    ):
        if found > most:
            raise DatasetError(
                f"data of {name}: {what} of width {found} do not fit in the {most} of env.tasks"
            )
    for column in _COLUMNS:
        if column not in data.columns:
            raise DatasetError(f"data of {name}: has no column {column!r}, which learning needs")

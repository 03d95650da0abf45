"""robomimic: an HDF5 file of demonstrations (Mandlekar et al. 2021, arXiv 2108.03298).

Read as ``dataset_states_to_obs.py`` of robomimic 0.2 to 0.5 writes it::

    data                    attributes: total, env_args (JSON: env_name, type, env_kwargs)
    data/demo_<i>           attributes: num_samples, model_file
        obs/<key>           [T, ...] before each step
        next_obs/<key>      [T, ...] after it; left out by --exclude-next-obs
        actions, rewards, dones [T], states [T, s] (flattened simulator state before each step)
    mask/<split>            names of the demonstrations of a split

Assumptions:

- The low-dimensional observations are laid side by side in the order of their names, as
  ``metadata["observation_keys"]`` records; ``env_args`` names none. Files with images are refused.
- Rewards are 1 where a step solves the task, unless ``env_args`` says ``reward_shaping``. Then they
  are also ``success``.
- ``dones`` marks solving steps, ends of demonstrations, or both (``--done_mode``). An unsolved
  demonstration does not end the task, so with success known ``terminated`` is ``dones`` where the
  step succeeds. With shaped rewards it is ``dones`` as it stands.
- Demonstrations may go on after success; ``terminated`` then stands inside a trajectory.

Final states: see :mod:`genpol.data.formats.transitions`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from genpol.data.columns import Array, Source, blocks, canonical, row_bytes
from genpol.data.formats import hdf5
from genpol.data.formats.transitions import TransitionRows
from genpol.data.sink import RowSink
from genpol.errors import DatasetError

EXPECTED = "an HDF5 file with data/demo_<i>/obs, actions, rewards, dones"

_NAMES = {"action": "actions", "reward": "rewards", "done": "dones", "states": "states"}


def matches(path: Path) -> bool:
    """Return whether ``path`` is an HDF5 file of demonstrations."""
    if not hdf5.is_hdf5(path):
        return False
    with hdf5.opened(path) as file:
        return "data" in file and hdf5.is_group(file["data"]) and "observations" not in file


def read(path: Path, sink: RowSink) -> None:
    """Read the low-dimensional part of a robomimic file into ``sink``.

    Raises:
        DatasetError: If the file is damaged, has images, lacks observations, or a value may not
            stand where it stands; the message names the demonstration.
    """
    with hdf5.opened(path) as file:
        data = hdf5.member(file, "data")
        demos = sorted(data.keys(), key=hdf5.natural)
        if not demos:
            raise DatasetError(f"{path}: data: holds no demonstration")
        env_args = _env_args(data, path)
        is_sparse = not env_args.get("env_kwargs", {}).get("reward_shaping", False)
        sink.metadata.update(format="robomimic", source=str(path))
        if "env_name" in env_args:
            sink.metadata["env"] = str(env_args["env_name"])
        splits = _splits(file, demos)
        if splits:
            sink.metadata["splits"] = splits
        rows = TransitionRows(sink)
        for demo in demos:
            _read_demo(hdf5.member(data, demo), f"data/{demo}", path, rows, is_sparse)
        first = data[demos[0]]["obs"]
        sink.metadata["observation_keys"] = list(hdf5.leaves(first))
        sink.metadata.update(rows.notes())
        sink.check_ended(Source(file=str(path)), "data")


def _read_demo(demo: Any, place: str, path: Path, rows: TransitionRows, is_sparse: bool) -> None:
    for key in ("obs", "actions"):
        if key not in demo:
            raise DatasetError(
                f"{path}: {place}/{key}: missing; extract observations with robomimic's "
                "dataset_states_to_obs.py"
            )
    arrays: dict[str, Any] = {"observation": _observations(demo, "obs", f"{path}: {place}")}
    arrays |= {name: hdf5.member(demo, key) for name, key in _NAMES.items() if key in demo}
    following = None
    if "next_obs" in demo:
        following = _observations(demo, "next_obs", f"{path}: {place}")
        if following.shape != arrays["observation"].shape:
            raise DatasetError(f"{path}: {place}/next_obs: differs in shape from obs")
    names = {name: f"{place}/{_NAMES.get(name, 'obs')}" for name in ("observation", *_NAMES)}
    names |= {"terminated": names["done"], "success": names["reward"]}
    num_steps = len(arrays["observation"])
    for name, array in arrays.items():
        if len(array) != num_steps:
            raise DatasetError(
                f"{path}: {names[name]}: {len(array)} rows, but {num_steps} in obs; the file is "
                "inconsistent, extract it again"
            )
    for block in blocks(num_steps, row_bytes(arrays)):
        source = Source(file=str(path), names=names, rows=range(block.start, block.stop))
        columns = {name: hdf5.read_rows(array, block) for name, array in arrays.items()}
        _derive_flags(columns, is_sparse, source)
        end = np.zeros(block.stop - block.start, dtype=bool)
        end[-1] = block.stop == num_steps
        rows.append(
            columns,
            end=end,
            terminated=columns.get("terminated", np.zeros_like(end)),
            following=None if following is None else following[block],
            source=source,
        )


def _observations(demo: Any, key: str, place: str) -> hdf5.Joined:
    return hdf5.Joined(hdf5.leaves(hdf5.member(demo, key)), f"{place}/{key}")


def _derive_flags(columns: dict[str, Array], is_sparse: bool, source: Source) -> None:
    """Replace ``done`` by what it and the reward say of success and of the end."""
    done = columns.pop("done", None)
    if is_sparse and "reward" in columns:
        columns["success"] = np.asarray(columns["reward"]) > 0
    if done is not None:
        columns["terminated"] = canonical("terminated", done, source)
        if "success" in columns:
            columns["terminated"] &= columns["success"]


def _env_args(data: Any, path: Path) -> dict[str, Any]:
    text = data.attrs.get("env_args", "{}")
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        raise DatasetError(f"{path}: data: attribute env_args is not valid JSON") from None
    return found if isinstance(found, dict) else {}


def _splits(file: Any, demos: list[str]) -> dict[str, list[int]]:
    """Return the trajectories of each split, by their numbers in the order they are read."""
    if "mask" not in file:
        return {}
    numbers = {demo: number for number, demo in enumerate(demos)}
    splits = {}
    for name, entries in file["mask"].items():
        listed = [entry.decode() if isinstance(entry, bytes) else str(entry) for entry in entries]
        splits[name] = [numbers[demo] for demo in listed if demo in numbers]
    return splits

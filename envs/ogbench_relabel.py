"""Rewards, ends and goals of OGBench's tasks for data that was recorded without a task.

OGBench's data sets hold states and actions only. What a task makes of them follows from the
simulator's state, which they keep in the columns ``qpos`` and ``button_states``:

- A single task rewards a step with the number of its subtasks that are solved minus the number of
  all; it ends, with success, where all are. Which of a step's two states is judged is the
  environment's ``success_timing``.
- A goal is the oracle representation of a state: positions of cubes, states of buttons, positions
  of drawer and window, scaled as OGBench scales them.

The numbers are those of OGBench's own ``relabel_utils``, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from genpol.data.columns import Array, blocks, row_bytes
from genpol.data.dataset import OfflineDataset
from genpol.envs.ogbench_simulation import make_simulation
from genpol.envs.settings import OGBenchSettings, label
from genpol.errors import DatasetError

# In `qpos`: arm and gripper come first, then the cubes by position and quaternion.
_FIRST_OBJECT = 14
_CUBE_WIDTH = 7
_TOLERANCE = 0.04
# Of goals: metres are centred and scaled to numbers of order 1.
_CENTRE = np.array([0.425, 0.0, 0.0])
_CUBE_SCALE = 10.0
_DRAWER_SCALE = 18.0
_WINDOW_SCALE = 15.0


def relabel(dataset: OfflineDataset, settings: OGBenchSettings) -> OfflineDataset:
    """Return ``dataset`` with the columns that learning ``settings`` needs.

    Its other columns are shared, not copied, and read a few megabytes at a time.

    Args:
        dataset: Data of the environment ``settings.name``, of whatever kind.
        settings: A single task, for which ``reward`` float32, ``terminated`` and ``success`` bool,
            ``[rows]``, are made, or a goal-conditioned environment, for which ``goal`` float32
            ``[rows, g]`` is.

    Raises:
        DatasetError: If a column is missing or belongs to another environment.
        MissingExtraError: If OGBench is not installed.
    """
    columns = goals(dataset, settings) if settings.goal_conditioned else task(dataset, settings)
    return OfflineDataset(
        {**dataset.columns, **columns},
        dataset.ends,
        {**dataset.metadata, "relabelled": label(settings)},
    )


def task(
    dataset: OfflineDataset, settings: OGBenchSettings, out: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Return ``reward``, ``terminated`` and ``success`` of a single task, each ``[rows]``.

    Args:
        dataset: See :func:`relabel`.
        settings: The task; its ``success_timing`` says which state of a step is judged.
        out: Arrays to fill, memory maps for instance, instead of new ones.

    Raises:
        DatasetError: As :func:`relabel` does.
    """
    target = _target(settings)
    _check(dataset, settings, target)
    types = {"reward": np.float32, "terminated": np.bool_, "success": np.bool_}
    made = {
        name: np.zeros(dataset.num_rows, dtype) if out is None else out[name]
        for name, dtype in types.items()
    }
    # The state that decides on the step from row i is that of row i, or of the next one.
    ahead = 0 if settings.success_timing == "pre" else 1
    for block, columns in _state_blocks(dataset, target):
        solved = target.solved(columns)
        begin = max(0, block.start - ahead)
        rows = slice(begin, block.stop - ahead)
        solved = solved[rows.start - (block.start - ahead) :]
        made["reward"][rows] = solved.sum(axis=-1) - solved.shape[-1]
        made["success"][rows] = made["terminated"][rows] = solved.all(axis=-1)
    for column in made.values():
        column[dataset.ends] = 0  # no step begins there
    return made


def goals(
    dataset: OfflineDataset, settings: OGBenchSettings, out: Array | None = None
) -> dict[str, Array]:
    """Return ``goal``, the oracle representation of each state, ``[rows, g]``.

    Args:
        dataset: See :func:`relabel`.
        settings: The environment.
        out: The array to fill, a memory map for instance, instead of a new one.

    Raises:
        DatasetError: As :func:`relabel` does.
    """
    target = _target(settings)
    _check(dataset, settings, target)
    for block, columns in _state_blocks(dataset, target):
        goal = target.represent(columns)
        if out is None:
            out = np.zeros((dataset.num_rows, goal.shape[-1]), np.float32)
        out[block] = goal
    assert out is not None
    return {"goal": out}


@dataclass(frozen=True, kw_only=True)
class _Target:
    """The state in which a task is solved.

    Attributes:
        cubes: Positions of the cubes ``[C, 3]``.
        buttons: States of the buttons ``[B]``.
        sliders: Positions of drawer and window, or none.
        qpos_width: Width of the simulator's ``qpos``.
    """

    cubes: Array
    buttons: Array
    sliders: tuple[float, ...]
    qpos_width: int

    @property
    def columns(self) -> dict[str, int]:
        """The width of each column that is read."""
        qpos = {"qpos": self.qpos_width} if len(self.cubes) else {}
        buttons = {"button_states": len(self.buttons)} if len(self.buttons) else {}
        return qpos | buttons

    def solved(self, columns: Mapping[str, Array]) -> Array:
        """Return which subtasks are solved, ``[rows, subtasks]``."""
        parts = []
        if len(self.cubes):
            distance = np.linalg.norm(self.cubes - self._cubes(columns["qpos"]), axis=-1)
            parts.append(distance <= _TOLERANCE)
        if len(self.buttons):
            parts.append(columns["button_states"] == self.buttons)
        # One by one: a float32 minus one of Python's numbers is a float32, as it is for OGBench.
        for position, wanted in zip(self._sliders(columns), self.sliders, strict=True):
            parts.append(np.abs(position - wanted)[:, None] <= _TOLERANCE)
        return np.concatenate(parts, axis=-1)

    def represent(self, columns: Mapping[str, Array]) -> Array:
        """Return the oracle representations of states, ``[rows, g]``."""
        parts = []
        if len(self.cubes):
            cubes = (self._cubes(columns["qpos"]) - _CENTRE) * _CUBE_SCALE
            parts.append(cubes.reshape(len(cubes), -1))
        if len(self.buttons):
            parts.append(columns["button_states"])
        if self.sliders:
            drawer, window = self._sliders(columns)
            parts += [(drawer * _DRAWER_SCALE)[:, None], (window * _WINDOW_SCALE)[:, None]]
        return np.concatenate(parts, axis=-1).astype(np.float32)

    def _cubes(self, qpos: Array) -> Array:
        width = len(self.cubes) * _CUBE_WIDTH
        cubes = qpos[:, _FIRST_OBJECT : _FIRST_OBJECT + width]
        return cubes.reshape(len(qpos), len(self.cubes), _CUBE_WIDTH)[..., :3]

    def _sliders(self, columns: Mapping[str, Array]) -> list[Array]:
        first = _FIRST_OBJECT + len(self.cubes) * _CUBE_WIDTH + len(self.buttons)
        return [columns["qpos"][:, first + number] for number, _ in enumerate(self.sliders)]


def _target(settings: OGBenchSettings) -> _Target:
    """Read from OGBench when a task is solved; for goals, any task of the environment will do."""
    simulation = make_simulation(settings.name, task=settings.task)
    number = simulation._reward_task_id  # 0, the default task, is replaced by its number
    info: dict[str, Any] = simulation.task_infos[number - 1]
    sliders: tuple[float, ...]
    if "goal_xyzs" in info:
        cubes, buttons, sliders = info["goal_xyzs"], np.zeros(0), ()
    elif "goal_button_states" in info:
        cubes, buttons, sliders = np.zeros((0, 3)), info["goal_button_states"], ()
    else:
        goal = info["goal"]
        cubes, buttons = goal["block_xyzs"], goal["button_states"]
        sliders = (goal["drawer_pos"], goal["window_pos"])
    objects = len(cubes) * _CUBE_WIDTH + len(buttons) + len(sliders)
    return _Target(
        cubes=cubes, buttons=buttons, sliders=sliders, qpos_width=_FIRST_OBJECT + objects
    )


def _check(dataset: OfflineDataset, settings: OGBenchSettings, target: _Target) -> None:
    for name, width in target.columns.items():
        column = dataset.columns.get(name)
        if column is None:
            raise DatasetError(
                f"column {name} is missing: {label(settings)} needs it for rewards and goals; use "
                "a data set of OGBench that keeps the simulator's state, such as `genpol data "
                "generate` makes"
            )
        if column.shape[1:] != (width,):
            raise DatasetError(
                f"column {name} has shape {column.shape[1:]} a row, but {settings.name} has "
                f"({width},): the data set belongs to another environment; set env="
            )


def _state_blocks(
    dataset: OfflineDataset, target: _Target
) -> Iterator[tuple[slice, dict[str, Array]]]:
    read = {name: dataset.columns[name] for name in target.columns}
    for block in blocks(dataset.num_rows, row_bytes(read)):
        yield block, {name: np.asarray(column[block]) for name, column in read.items()}

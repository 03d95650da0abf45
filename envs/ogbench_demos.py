"""One demonstration of a task of OGBench by its scripted oracles, with or without noise.

OGBench's own data are play: oracles that go for one random target after the other. Here they go for
the targets of a task, one after the other in an order in which they can be reached, in the very
environment in which an agent will be judged (``genpol.envs.ogbench``): the same start states,
rewards and end. How noise disturbs them is told in ``genpol.envs.demonstrations``.

An episode is a function of the recipe's seed and its own number alone, as that of
``genpol.envs.ogbench_data``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from genpol.envs.demonstrations import NoisyRecipe, play
from genpol.envs.ogbench import Task
from genpol.envs.ogbench_data import global_random, make_oracles
from genpol.envs.ogbench_simulation import ACTION_DIM, max_episode_steps
from genpol.envs.settings import OGBenchSettings, label
from genpol.errors import require
from genpol.seeding import derive
from genpol.settings import within

_ABOVE_M = 0.16  # from where oracles move sideways
_REACHED_M = 0.04  # OGBench's tolerance for drawer and window
_DRAWER_OPEN_M = -0.16
_IN_DRAWER_Y_M = -0.3
_SLIDES = ("drawer", "window")


@dataclass(frozen=True, kw_only=True)
class Recipe(NoisyRecipe):
    """What determines the episodes of a data set."""

    packages: ClassVar[tuple[str, ...]] = ("ogbench",)

    settings: OGBenchSettings
    """Environment and task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        within("task", self.settings.task, 1, 5)

    @property
    def name(self) -> str:
        """The environment's name and task: cube-single-play-task1."""
        return label(self.settings)

    @property
    def dataset_name(self) -> str:
        """A name for such a set: cube-single-task1-demos, cube-single-task1-noise0.5."""
        kind = f"noise{self.noise:g}" if self.noise else "demos"
        return f"{self.settings.name}-task{self.settings.task}-{kind}"

    def provenance(self) -> dict[str, Any]:
        """Return all that the data depend on, as JSON can say it.

        Raises:
            MissingExtraError: If OGBench is not installed.
        """
        require("ogbench", "ogbench")
        return super().provenance()

    def demonstrator(self) -> Demonstrator:
        """Return the environment with its oracles."""
        return Demonstrator(self)


class Demonstrator:
    """An environment with the oracles that solve its task.

    Args:
        recipe: What is played.

    Raises:
        MissingExtraError: If OGBench is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._task = Task(recipe.settings)
        self._limit = max_episode_steps(recipe.settings.name)
        self._oracles = make_oracles(recipe.settings.name, "noisy", self._task.simulation)

    def episode(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Play one episode.

        Args:
            split: ``"train"`` or ``"val"``, which share no episode.
            index: Number of the episode within its split.

        Returns:
            The columns of :func:`~genpol.envs.demonstrations.play`, and the simulator's state:
            ``qpos`` and ``qvel`` float32 and, where there are buttons, ``button_states`` int64.
        """
        seeds = np.random.SeedSequence((derive(self.recipe.seed, f"demos-{split}"), index))
        world, oracles, own = seeds.spawn(3)
        with global_random(oracles):  # which is where OGBench's oracles draw from
            return play(
                self._task,
                lambda: _Player(self._task.simulation, self._oracles).act,
                noise=self.recipe.noise,
                rng=np.random.default_rng(own),
                seed=int(world.generate_state(1)[0]),
                max_steps=self._limit,
                state=self._state,
            )

    def _state(self) -> dict[str, np.ndarray]:
        """Return the simulator's state, from which other tasks' rewards and goals follow."""
        simulation = self._task.simulation
        state = {
            "qpos": simulation._data.qpos.astype(np.float32),
            "qvel": simulation._data.qvel.astype(np.float32),
        }
        if hasattr(simulation, "_cur_button_states"):
            state["button_states"] = np.array(simulation._cur_button_states, dtype=np.int64)
        return state


class _Player:
    """Goes for the targets of a task, one after the other."""

    def __init__(self, simulation: Any, oracles: dict[str, Any]) -> None:
        self._simulation = simulation
        self._oracles = oracles
        self._aim: _Aim | None = None

    def act(self, _: np.ndarray) -> np.ndarray:
        """Return the action of the oracle whose turn it is; it sees the simulator itself."""
        info = self._simulation.compute_ob_info()
        if self._aim is None or self._is_over(self._aim, info):
            self._aim = _next_aim(self._simulation, info)
            if self._aim is None:  # all is done, and yet it is not over: let it come to rest
                return np.zeros(ACTION_DIM)
            self._oracle = self._oracles[self._aim.kind]
            self._oracle.reset(None, info | self._aim.facts)
        action: np.ndarray = self._oracle.select_action(None, info | self._aim.facts)
        return action

    def _is_over(self, aim: _Aim, info: dict[str, Any]) -> bool:
        """Whether the arm is free for another target, or this one took too long."""
        if self._oracle.done:
            return True
        if aim.kind in _SLIDES:  # it may still be in the hand
            return False
        following = _next_aim(self._simulation, info)
        reached = following is None or following[:2] != aim[:2]
        return reached and info["proprio/effector_pos"][2] > _ABOVE_M


class _Aim(NamedTuple):
    """A target: its kind, what tells it from others, and what its oracle must know of it."""

    kind: str
    mark: tuple[float, ...]
    facts: dict[str, Any]


def _next_aim(simulation: Any, info: dict[str, Any]) -> _Aim | None:
    """Return what to go for next, if anything is left."""
    if hasattr(simulation, "_target_drawer_pos"):
        return _next_of_scene(simulation, info)
    if hasattr(simulation, "_target_button_states"):
        presses = _presses(simulation)
        return _press(simulation, presses[0]) if presses else None
    return _next_cube(simulation)


def _next_cube(simulation: Any, moved: np.ndarray | float = 0.0) -> _Aim | None:
    """Return the cube to move next: of those out of place the one whose place is the lowest.

    Args:
        simulation: Of the task.
        moved: From the cubes' targets to where they belong for the time being, in meters.
    """
    places = {
        index: simulation._data.mocap_pos[target] + moved
        for index, target in enumerate(simulation._cube_target_mocap_ids)
    }
    out = [
        index
        for index, place in places.items()
        if np.linalg.norm(simulation._data.joint(f"object_joint_{index}").qpos[:3] - place)
        > _REACHED_M
    ]
    if not out:
        return None
    block = min(out, key=lambda index: places[index][2])
    w, _, _, z = simulation._data.mocap_quat[simulation._cube_target_mocap_ids[block]]
    return _Aim(
        "cube",
        (block,),
        {
            "privileged/target_block": block,
            "privileged/target_block_pos": places[block],
            "privileged/target_block_yaw": np.array([2 * np.arctan2(z, w)]),
        },
    )


def _next_of_scene(simulation: Any, info: dict[str, Any]) -> _Aim | None:
    """Return what to do next: unlock what must move, move it, and lock at last."""
    unlocked = simulation._cur_button_states
    drawer, wanted = info["privileged/drawer_pos"][0], simulation._target_drawer_pos
    inside = simulation._data.mocap_pos[simulation._cube_target_mocap_ids[0]][1] < _IN_DRAWER_Y_M
    # A cube that belongs into the drawer moves along with it.
    moved = (drawer - wanted) * _axis(simulation, "drawer") if inside else np.zeros(3)
    cube = _next_cube(simulation, moved)
    if inside and cube is not None:
        wanted = _DRAWER_OPEN_M
    if abs(drawer - wanted) > _REACHED_M:
        return _slide("drawer", wanted, simulation, info) if unlocked[0] else _press(simulation, 0)
    if cube is not None:
        return cube
    _, buttons, _, window_solved = simulation._compute_successes()
    if not window_solved:
        wanted = simulation._target_window_pos
        return _slide("window", wanted, simulation, info) if unlocked[1] else _press(simulation, 1)
    return _press(simulation, buttons.index(False)) if False in buttons else None


def _axis(simulation: Any, what: str) -> np.ndarray:
    """Return the direction in which the drawer's or the window's joint counts."""
    axis: np.ndarray = simulation._data.joint(f"{what}_slide").xaxis
    return axis


def _slide(what: str, wanted: float, simulation: Any, info: dict[str, Any]) -> _Aim:
    """Return how to move the drawer or the window, ``wanted`` meters along its joint."""
    distance = wanted - info[f"privileged/{what}_pos"][0]
    return _Aim(
        what,
        (wanted,),
        {
            f"privileged/target_{what}_pos": np.array([wanted]),
            f"privileged/target_{what}_handle_pos": info[f"privileged/{what}_handle_pos"]
            + distance * _axis(simulation, what),
        },
    )


def _press(simulation: Any, button: int) -> _Aim:
    state = int(simulation._cur_button_states[button])
    return _Aim(
        "button",
        (button, state),
        {
            "privileged/target_button": button,
            "privileged/target_button_state": 1 - state,
            "privileged/target_button_top_pos": simulation._data.site_xpos[
                simulation._button_site_ids[button]
            ].copy(),
        },
    )


def _presses(simulation: Any) -> list[int]:
    """Return the fewest buttons that solve the puzzle; a press also turns over the neighbours."""
    rows, columns = simulation._num_rows, simulation._num_cols
    wrong = np.asarray(simulation._cur_button_states) != np.asarray(
        simulation._target_button_states
    )
    places = list(itertools.product(range(rows), range(columns)))
    effect = np.array(
        [[abs(a - x) + abs(b - y) <= 1 for a, b in places] for x, y in places], dtype=np.uint8
    )
    return _solve_lights_out(effect, wrong.astype(np.uint8))


def _solve_lights_out(effect: np.ndarray, wrong: np.ndarray) -> list[int]:
    """Return the fewest presses with ``presses @ effect = wrong`` modulo 2.

    Args:
        effect: ``[n, n]``, which buttons a press of each turns over.
        wrong: ``[n]``, which are to be turned over.
    """
    number = len(wrong)
    # Gauss-Jordan elimination over the field of two elements.
    table = np.concatenate((effect.T, wrong[:, None]), axis=1)
    pivots: list[int] = []
    for column in range(number):
        row = len(pivots)
        found = next((r for r in range(row, number) if table[r, column]), None)
        if found is None:
            continue
        table[[row, found]] = table[[found, row]]
        others = table[:, column].astype(bool)
        others[row] = False
        table[others] ^= table[row]
        pivots.append(column)
    free = [column for column in range(number) if column not in pivots]
    best: np.ndarray | None = None
    for choice in itertools.product((0, 1), repeat=len(free)):
        presses = np.zeros(number, dtype=np.uint8)
        presses[free] = choice
        moved = table[: len(pivots), :number][:, free] @ np.array(choice, dtype=np.uint8)
        presses[pivots] = (table[: len(pivots), number] + moved) % 2
        if best is None or presses.sum() < best.sum():
            best = presses
    assert best is not None
    return [int(x) for x in best.nonzero()[0]]

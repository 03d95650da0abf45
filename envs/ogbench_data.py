"""One episode of OGBench's data: the recipe by which its "play" and "noisy" sets are made.

Park et al. (arXiv 2410.20092, appendix): scripted oracles move the arm to one random target after
the other. "play" follows open-loop plans with smooth noise, "noisy" closed-loop oracles with noise
of a level drawn for each episode, and random actions now and then. The constants are those of the
generator script of OGBench's repository, which its package lacks.

An episode is a function of the recipe's seed and its own number alone: whoever makes it, and after
whatever others, it is the same to the bit with the same versions of OGBench, MuJoCo and NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from genpol import __version__
from genpol.envs.ogbench_simulation import ACTION_DIM, make_simulation
from genpol.envs.settings import OGBENCH_NAMES
from genpol.errors import require
from genpol.seeding import derive
from genpol.settings import at_least, one_of, within

KINDS = ("play", "noisy")

_PLAN_NOISE = 0.1
_PLAN_SMOOTHING = 0.5
_MIN_NORM = 0.4
_MAX_NOISE = 0.1
_NOISE_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
# Chance that a target is on top of another cube: bounds between which each episode draws one.
_STACKING = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
_DEFAULT_STACKING = (0.5, 0.5)  # heeded nowhere: neither scene nor puzzles have two cubes
# In `qpos` of the scene: behind arm and gripper.
_CUBE = slice(14, 17)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What determines the episodes of a data set."""

    name: str
    """Environment: cube-single, scene, puzzle-3x3, ..."""
    kind: str = "play"
    """play: plans with smooth noise; noisy: closed-loop oracles with noise."""
    seed: int = 0
    """Seed of all episodes."""
    episode_rows: int = 1001
    """States of an episode, one more than its transitions."""

    def __post_init__(self) -> None:
        one_of("env", self.name, OGBENCH_NAMES)
        one_of("kind", self.kind, KINDS)
        within("seed", self.seed, 0, 2**63 - 1)
        at_least("episode_rows", self.episode_rows, 2)

    @property
    def dataset_name(self) -> str:
        """Name that OGBench gives to such a set: cube-single-play-v0."""
        return f"{self.name}-{self.kind}-v0"

    def episodes(self, num_transitions: int) -> int:
        """Return how many episodes have so many transitions, or some more."""
        return -(-num_transitions // (self.episode_rows - 1))

    def provenance(self) -> dict[str, Any]:
        """Return all that the data depend on, as JSON can say it."""
        require("ogbench", "ogbench")
        versions = {package: version(package) for package in ("ogbench", "mujoco", "numpy")}
        return {
            "env": self.name,
            "kind": self.kind,
            "seed": self.seed,
            "episode_rows": self.episode_rows,
            "versions": {"genpol": __version__, **versions},
        }

    def comment(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the provenance and further facts side by side."""
        return {**self.provenance(), **facts}

    def demonstrator(self) -> Demonstrator:
        """Return the environment with its oracles."""
        return Demonstrator(self)


class Demonstrator:
    """An environment with the oracles that play in it.

    Args:
        recipe: What is played.

    Raises:
        MissingExtraError: If OGBench is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._simulation = make_simulation(
            recipe.name, mode="data_collection", terminate_at_goal=False
        )
        self._oracles = make_oracles(recipe.name, recipe.kind, self._simulation)

    def episode(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Play one episode.

        Args:
            split: ``"train"`` or ``"val"``, which share no episode.
            index: Number of the episode within its split.

        Returns:
            ``observations``, ``actions``, ``qpos`` and ``qvel`` float32, ``terminals`` bool (True
            in the last row, whose action leads nowhere) and, where there are buttons,
            ``button_states`` int64; all ``[episode_rows, ...]``.
        """
        role = f"{self.recipe.kind}-{split}"
        seeds = np.random.SeedSequence((derive(self.recipe.seed, role), index))
        world, oracles, own = seeds.spawn(3)
        rng = np.random.default_rng(own)
        world_seed: int | None = int(world.generate_state(1, np.uint64)[0])
        with global_random(oracles):  # which is where OGBench's oracles draw from
            while True:
                rows = self._play(rng, world_seed)
                if self._is_sound(rows):
                    return _typed(rows)
                world_seed = None  # go on where its generator stands

    def _play(self, rng: np.random.Generator, seed: int | None) -> dict[str, np.ndarray]:
        """Play until the last row, whatever happens."""
        name, simulation = self.recipe.name, self._simulation
        observation, info = simulation.reset(seed=seed)
        stacking = rng.uniform(*_STACKING.get(name, _DEFAULT_STACKING))
        noise = rng.uniform(0, _MAX_NOISE)
        oracle = self._oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        rows: dict[str, list[Any]] = {}
        for row in range(self.recipe.episode_rows):
            action = self._act(oracle, observation, info, rng, noise)
            following, _, _, _, info = simulation.step(action)
            if oracle.done:
                # The oracle reads the new target, but its next action sees the old `info`: so
                # does the script of OGBench.
                oracle = self._aim(stacking)
            stored = {
                "observations": observation,
                "actions": action,
                "terminals": row == self.recipe.episode_rows - 1,
                "qpos": info["prev_qpos"],
                "qvel": info["prev_qvel"],
                "time": info["time"],
            }
            if "prev_button_states" in info:
                stored["button_states"] = info["prev_button_states"]
            for key, value in stored.items():
                rows.setdefault(key, []).append(value)
            observation = following
        return {key: np.array(values) for key, values in rows.items()}

    def _act(
        self,
        oracle: Any,
        observation: np.ndarray,
        info: dict[str, Any],
        rng: np.random.Generator,
        noise: float,
    ) -> np.ndarray:
        if self.recipe.kind == "noisy":
            if rng.uniform() < (0.2 if "puzzle" in self.recipe.name else 0.1):
                return rng.uniform(-1.0, 1.0, ACTION_DIM)
            action = oracle.select_action(observation, info)
            action = action + noise * _NOISE_SCALE * rng.standard_normal(ACTION_DIM)
        else:
            action = oracle.select_action(observation, info)
        return np.clip(action, -1.0, 1.0)

    def _aim(self, stacking: float) -> Any:
        """Choose a new target and return the oracle that goes for it."""
        observation, info = self._simulation.set_new_target(p_stack=stacking)
        oracle = self._oracles[info["privileged/target_task"]]
        oracle.reset(observation, info)
        return oracle

    def _is_sound(self, rows: dict[str, np.ndarray]) -> bool:
        """Return whether the physics held and the scene's cube stayed in view or in the drawer.

        OGBench plays the episode anew if the cube did not, because pictures of such a state would
        not tell it from others.
        """
        passed_s = np.diff(rows["time"], axis=0, prepend=0.0)
        if (passed_s < 0.99 * self._simulation.control_timestep()).any():
            return False  # it diverged, and MuJoCo started it anew
        if self.recipe.name != "scene":
            return True
        _, y, z = rows["qpos"][:, _CUBE].T
        out_of_view = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
        return not (out_of_view | (y >= 0.29)).any()


def make_oracles(name: str, kind: str, simulation: Any) -> dict[str, Any]:
    """Return the oracle of each kind of target that an environment can ask for.

    Args:
        name: Environment: cube-single, scene, puzzle-3x3, ...
        kind: Of the oracles, one of :data:`KINDS`.
        simulation: What they act in.
    """
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    kinds: dict[str, dict[str, Any]] = {
        "play": {
            "cube": CubePlanOracle,
            "button": ButtonPlanOracle,
            "drawer": DrawerPlanOracle,
            "window": WindowPlanOracle,
        },
        "noisy": {
            "cube": CubeMarkovOracle,
            "button": ButtonMarkovOracle,
            "drawer": DrawerMarkovOracle,
            "window": WindowMarkovOracle,
        },
    }
    options: dict[str, Any] = (
        {"noise": _PLAN_NOISE, "noise_smoothing": _PLAN_SMOOTHING}
        if kind == "play"
        else {"min_norm": _MIN_NORM}
    )
    family = name.partition("-")[0]
    closed = {"gripper_always_closed": True} if family == "puzzle" else {}
    targets = {"cube": ["cube"], "puzzle": ["button"], "scene": list(kinds["play"])}[family]
    return {
        target: kinds[kind][target](
            env=simulation, **options, **(closed if target == "button" else {})
        )
        for target in targets
    }


@contextmanager
def global_random(seeds: np.random.SeedSequence) -> Iterator[None]:
    """Seed NumPy's global generator, and put it back where it stood."""
    before = np.random.get_state()
    np.random.seed(seeds.generate_state(8))
    try:
        yield
    finally:
        np.random.set_state(before)


def _typed(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the rows that are stored, in the types in which OGBench stores them."""
    types = {"terminals": np.bool_, "button_states": np.int64}
    return {
        key: values.astype(types.get(key, np.float32))
        for key, values in rows.items()
        if key != "time"
    }

"""An expert's episode with noise on the actions, whatever the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from genpol.envs.demonstrations import NoisyRecipe, play
from genpol.errors import ConfigError


class Counter:
    """Counts steps; solved at ``goal``, out of time at ``limit``, broken at ``breaks``, once."""

    def __init__(self, *, goal: int = 0, limit: int = 0, breaks: int = 0) -> None:
        self.goal, self.limit, self.breaks = goal, limit, breaks
        self.seeds: list[int | None] = []
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None) -> tuple[dict[str, np.ndarray], Any]:
        self.seeds.append(seed)
        self.count = 0
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, Any]:
        self.actions.append(action)
        self.count += 1
        seen, solved = self._seen(), self._is_solved()
        if self.count == self.breaks:
            self.breaks = 0
            seen["observation"][:] = np.nan
        return seen, float(solved) - 1, solved, self.count == self.limit, {}

    def _seen(self) -> dict[str, np.ndarray]:
        observation = np.array([self.count, len(self.seeds)], np.float32)
        return {"observation": observation, "success": np.array([self._is_solved()])}

    def _is_solved(self) -> bool:
        return self.count == self.goal > 0


def steadily(observation: np.ndarray) -> np.ndarray:
    return np.array([0.5, -0.25 * observation[0]])


def record(task: Counter, noise: float = 0.0, **options: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return play(task, lambda: steadily, noise=noise, rng=rng, seed=7, **options)


def test_rows_are_what_the_task_gives() -> None:
    task = Counter(goal=3)
    rows = record(task)
    assert rows["observations"].tolist() == [[0, 1], [1, 1], [2, 1], [3, 1]]
    assert rows["actions"].tolist() == [[0.5, 0], [0.5, -0.25], [0.5, -0.5], [0, 0]]
    assert rows["rewards"].tolist() == [-1, -1, 0, 0]
    for key in ("terminated", "success"):
        assert rows[key].tolist() == [False, False, True, False]
    assert rows["terminals"].tolist() == [False, False, False, True]
    assert task.seeds == [7]
    np.testing.assert_array_equal(np.array(task.actions), rows["actions"][:-1])


def test_columns_have_the_types_of_data_sets() -> None:
    types = {key: str(values.dtype) for key, values in record(Counter(goal=2)).items()}
    assert types == {
        **dict.fromkeys(("observations", "actions", "rewards"), "float32"),
        **dict.fromkeys(("terminated", "success", "terminals"), "bool"),
    }


@pytest.mark.parametrize(
    ("task", "options"), [(Counter(limit=5), {}), (Counter(), {"max_steps": 5})]
)
def test_time_ends_an_episode_without_success(task: Counter, options: dict[str, int]) -> None:
    rows = record(task, **options)
    assert rows["terminals"].tolist() == [False] * 5 + [True]
    assert not (rows["terminated"] | rows["success"]).any()


def test_broken_physics_is_played_anew_from_where_the_seed_led() -> None:
    task = Counter(goal=3, breaks=2)
    rows = record(task)
    assert task.seeds == [7, None]
    assert rows["observations"].tolist() == [[0, 2], [1, 2], [2, 2], [3, 2]]


def test_noise_has_the_level_that_the_episode_draws() -> None:
    rows = record(Counter(limit=4000), noise=0.1)
    rng = np.random.default_rng(0)
    level = rng.uniform(0, 0.1)
    spread = rows["actions"][:-1, 0].std()
    assert spread == pytest.approx(level, rel=0.05)
    assert rows["actions"][:-1, 0].mean() == pytest.approx(0.5, abs=0.01)


def test_actions_are_cut_to_their_bounds() -> None:
    rows = record(Counter(limit=50), noise=50.0)
    assert np.abs(rows["actions"]).max() == 1


def test_every_attempt_has_an_expert_of_its_own() -> None:
    begun: list[Callable[[np.ndarray], np.ndarray]] = []

    def begin() -> Callable[[np.ndarray], np.ndarray]:
        begun.append(steadily)
        return steadily

    rng = np.random.default_rng(0)
    play(Counter(goal=3, breaks=1), begin, noise=0.0, rng=rng, seed=0)
    assert len(begun) == 2


class Recipe(NoisyRecipe):
    name = "toy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.5}, "noise = -0.5: must be >= 0"),
        ({"noise": float("nan")}, "noise = nan: must be >= 0"),
        ({"noise": float("inf")}, "noise = inf: must be >= 0"),
        ({"seed": -1}, "seed = -1: must lie in"),
    ],
)
def test_impossible_recipes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**options)

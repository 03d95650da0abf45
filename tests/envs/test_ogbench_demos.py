"""Demonstrations of OGBench's tasks: they succeed, are what the environment says, and repeat."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from genpol.data.formats import open_dataset
from genpol.envs import relabel
from genpol.envs.ogbench_demos import Recipe, _solve_lights_out
from genpol.envs.settings import OGBenchSettings
from genpol.errors import ConfigError


def crosses(rows: int, columns: int) -> np.ndarray:
    """Return which buttons a press of each turns over, written out cell by cell."""
    effect = np.zeros((rows, columns, rows, columns), dtype=np.uint8)
    for row, column in itertools.product(range(rows), range(columns)):
        for down, right in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            if 0 <= row + down < rows and 0 <= column + right < columns:
                effect[row, column, row + down, column + right] = 1
    return effect.reshape(rows * columns, rows * columns)


@pytest.mark.parametrize("shape", [(2, 2), (2, 3), (3, 3)])
def test_lights_out_takes_the_fewest_presses(shape: tuple[int, int]) -> None:
    effect = crosses(*shape)
    every = np.array(list(itertools.product((0, 1), repeat=len(effect))), dtype=np.uint8)
    fewest: dict[bytes, int] = {}
    for wrong, presses in zip(every @ effect % 2, every.sum(1), strict=True):
        fewest[wrong.tobytes()] = min(fewest.get(wrong.tobytes(), 99), int(presses))
    for wrong, number in fewest.items():
        state = np.frombuffer(wrong, dtype=np.uint8)
        presses = _solve_lights_out(effect, state)
        np.testing.assert_array_equal(effect[presses].sum(0) % 2, state)
        assert len(presses) == number


def test_lights_out_knows_the_combinations_that_change_nothing() -> None:
    effect = crosses(4, 4)  # 16 of its combinations do
    presses = np.random.default_rng(0).integers(0, 2, (20, 16)).astype(np.uint8)
    for chosen in presses:
        state = chosen @ effect % 2
        found = _solve_lights_out(effect, state.astype(np.uint8))
        np.testing.assert_array_equal(effect[found].sum(0) % 2, state)
        assert len(found) <= 7  # no state of 4 by 4 needs more


def recipe(name: str, task: int, noise: float = 0.0) -> Recipe:
    return Recipe(settings=OGBenchSettings(name=name, task=task), noise=noise, seed=1)


@pytest.mark.parametrize(("task", "noise"), [(0, 0.0), (6, 0.0), (1, -1.0)])
def test_recipe_is_of_one_task_with_noise_of_a_size(task: int, noise: float) -> None:
    with pytest.raises(ConfigError, match=r"must (be|lie)"):
        recipe("cube-single", task, noise)


@pytest.mark.parametrize(
    ("name", "task"), [("cube-single", 1), ("cube-double", 2), ("puzzle-3x3", 1), ("scene", 2)]
)
def test_oracles_solve_the_task(name: str, task: int) -> None:
    pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")
    demonstrator = recipe(name, task).demonstrator()
    episodes = [demonstrator.episode("train", index) for index in range(2)]
    wins = [episode["success"][-2] for episode in episodes]
    assert any(wins)
    for episode, won in zip(episodes, wins, strict=True):
        assert episode["terminated"].sum() == won
        assert episode["terminals"].tolist() == [False] * (len(episode["terminals"]) - 1) + [True]
        assert np.abs(episode["actions"]).max() <= 1.0


@pytest.mark.parametrize("name", ["cube-single", "puzzle-3x3", "scene"])
def test_rewards_are_those_that_the_states_give(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")
    episode = recipe(name, 1).demonstrator().episode("train", 0)
    np.savez(tmp_path / "demos.npz", **episode)
    dataset = open_dataset(tmp_path / "demos.npz", cache=tmp_path / "cache")
    again = relabel(dataset, OGBenchSettings(name=name, task=1))
    for column in ("reward", "terminated", "success"):
        np.testing.assert_array_equal(again.columns[column], dataset.columns[column])
    assert dataset.columns["reward"].min() < 0


def test_scene_puts_the_cube_into_the_drawer_and_closes_it() -> None:
    pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")
    demonstrator = recipe("scene", 5).demonstrator()
    episode = demonstrator.episode("train", 0)
    assert episode["success"][-2]
    assert episode["rewards"][-2] == 0.0


def test_episode_depends_on_its_number_alone_and_noise_changes_it() -> None:
    pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")
    demonstrator = recipe("cube-single", 1, noise=1.0).demonstrator()
    first, second = (demonstrator.episode("train", index) for index in (0, 1))
    again = recipe("cube-single", 1, noise=1.0).demonstrator().episode("train", 1)
    for key, values in second.items():
        np.testing.assert_array_equal(values, again[key])
    quiet = recipe("cube-single", 1).demonstrator().episode("train", 0)
    np.testing.assert_array_equal(first["observations"][0], quiet["observations"][0])
    assert not np.array_equal(first["actions"][0], quiet["actions"][0])

"""Data of Meta-World's experts: what they do, and what becomes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genpol import envs
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import open_dataset, validate
from genpol.envs.generation import Generation, Plan
from genpol.envs.metaworld_data import Demonstrator, Recipe
from genpol.envs.settings import MetaWorldSettings
from genpol.errors import ConfigError, DatasetError

Episode = dict[str, np.ndarray]
REACH = MetaWorldSettings(name="reach-v3")
RECIPE = Recipe(settings=REACH, noise=0.5, seed=3)
PLAN = Plan(RECIPE, {"train": 2, "val": 1})
needs_metaworld = pytest.mark.metaworld


@pytest.fixture(scope="module")
def demonstrator() -> Demonstrator:
    pytest.importorskip("metaworld", reason="needs Meta-World: make test-metaworld")
    return Demonstrator(RECIPE)


@pytest.fixture(scope="module")
def episodes(demonstrator: Demonstrator) -> dict[str, Episode]:
    """Return the episodes of the plan by file name, made in this process in reverse order."""
    backwards = reversed(list(PLAN.files()))
    return {name: demonstrator.episode(split, index) for split, index, name in backwards}


@needs_metaworld
def test_rows_are_what_the_environment_gives(episodes: dict[str, Episode]) -> None:
    rows = episodes["train-0000000.npz"]
    steps = len(rows["actions"]) - 1
    assert {len(values) for values in rows.values()} == {steps + 1}
    assert rows["terminals"].tolist() == [False] * steps + [True]
    assert rows["rewards"].tolist() == [-1.0] * (steps - 1) + [0.0, 0.0]
    for key in ("terminated", "success"):
        assert np.flatnonzero(rows[key]).tolist() == [steps - 1]
    assert np.abs(rows["actions"]).max() == 1  # the expert means more, and is cut to that
    # Each observation holds the one before, so rows are in order and none is left out.
    np.testing.assert_array_equal(rows["observations"][1:-1, :18], rows["observations"][2:, 18:36])


@needs_metaworld
def test_episodes_depend_on_nothing_but_numbers_splits_and_seeds(
    demonstrator: Demonstrator, episodes: dict[str, Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = demonstrator.episode("train", 1)
    for key, values in episodes["train-0000001.npz"].items():
        np.testing.assert_array_equal(again[key], values)
    goals = {name: tuple(episode["observations"][0, -3:]) for name, episode in episodes.items()}
    monkeypatch.setattr(demonstrator, "recipe", Recipe(settings=REACH, seed=4))
    goals["another seed"] = tuple(demonstrator.episode("train", 0)["observations"][0, -3:])
    assert len(set(goals.values())) == 4


@needs_metaworld
def test_noise_is_of_a_level_that_each_episode_draws(
    demonstrator: Demonstrator, episodes: dict[str, Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    def roughness(episode: Episode) -> float:
        # Of the vertical movement, which the expert makes smoothly.
        return float(np.abs(np.diff(episode["actions"][:-1, 2], n=2)).mean())

    noisy = sorted(roughness(episode) for episode in episodes.values())
    monkeypatch.setattr(demonstrator, "recipe", Recipe(settings=REACH, seed=3))
    assert noisy[0] > 3 * roughness(demonstrator.episode("train", 0))
    assert noisy[-1] > 1.2 * noisy[0]


@needs_metaworld
def test_a_broken_simulation_is_played_anew(
    demonstrator: Demonstrator, episodes: dict[str, Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = demonstrator._task.step, []

    def break_once(action: np.ndarray) -> object:
        calls.append(action)
        if len(calls) == 4:
            demonstrator._task.simulation.data.qvel[:] = 1e12
        return step(action)

    monkeypatch.setattr(demonstrator._task, "step", break_once)
    rows = demonstrator.episode("train", 0)
    assert len(rows["actions"]) - 1 == len(calls) - 4
    assert np.isfinite(rows["observations"]).all()
    first = episodes["train-0000000.npz"]
    assert (rows["observations"][0] != first["observations"][0]).any()


@needs_metaworld
def test_the_expert_inserts_pegs() -> None:
    pytest.importorskip("metaworld", reason="needs Meta-World: make test-metaworld")
    recipe = Recipe(settings=MetaWorldSettings(name="peg-insert-side-v3"))
    player = Demonstrator(recipe)
    lengths = [len(player.episode("train", index)["actions"]) - 1 for index in range(4)]
    assert sum(length < 500 for length in lengths) >= 3


@needs_metaworld
def test_workers_and_interruptions_do_not_matter(
    episodes: dict[str, Episode], tmp_path: Path
) -> None:
    output = tmp_path / "reach.npz"
    stopped = Generation(PLAN, output)
    done: list[int] = []
    assert not stopped.run(1, on_episode=lambda: done.append(1), stop=lambda: bool(done))
    stopped.close()
    other = Recipe(settings=REACH, noise=0.25, seed=3)
    with pytest.raises(ConfigError, match=r"of noise 0\.5 and not 0\.25; repeat that command"):
        Generation(Plan(other, PLAN.episodes), output)
    resumed = Generation(PLAN, output)
    assert len(resumed.missing()) == 2
    assert resumed.run(1)
    resumed.finish()
    with np.load(output) as arrays:
        for key in arrays.files:
            parts = [episodes[f"train-{index:07d}.npz"][key] for index in range(2)]
            np.testing.assert_array_equal(arrays[key], np.concatenate(parts))
    assert validate(output)[0] == 2
    dataset = open_dataset(output, cache=tmp_path / "cache")
    assert dataset.metadata["env"] == "reach-v3"
    assert dataset.metadata["versions"]["mujoco"] == "3.3.0"
    assert dataset.info()["success_rate"] == 1
    assert envs.relabel(dataset, REACH) is dataset


def test_data_with_the_other_reward_are_refused() -> None:
    columns = {"observation": np.zeros((3, 39), np.float32), "action": np.zeros((3, 4), np.float32)}
    dense = MetaWorldSettings(name="reach-v3", reward="dense")
    for made_for, used_for in ((REACH, dense), (dense, REACH)):
        dataset = OfflineDataset(columns, [2], {"env": envs.label(made_for)})
        assert envs.relabel(dataset, made_for) is dataset
        with pytest.raises(DatasetError, match=f"set env.reward={made_for.reward}, or make"):
            envs.relabel(dataset, used_for)

"""Episodes of whatever player become a data set, also where they differ in length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genpol.data import formats
from genpol.data.formats import npz
from genpol.envs import generation
from genpol.envs.generation import Generation, Plan


@dataclass(frozen=True)
class Recipe:
    """Plays episodes of ``index + 1`` transitions, the last of which solves the task."""

    seed: int = 0
    name: str = "toy"

    def provenance(self) -> dict[str, Any]:
        return {"env": self.name, "seed": self.seed}

    def comment(self, facts: dict[str, Any]) -> dict[str, Any]:
        return npz.comment_with({**self.provenance(), **facts})

    def demonstrator(self) -> Recipe:
        return self

    def episode(self, split: str, index: int) -> dict[str, np.ndarray]:
        num_rows = index + 2
        is_step = np.arange(num_rows) < num_rows - 1
        solves = np.arange(num_rows) == num_rows - 2
        return {
            "observations": np.full((num_rows, 2), index, np.float32),
            "actions": np.full((num_rows, 1), 0.5, np.float32) * is_step[:, None],
            "rewards": (-1.0 * (is_step & ~solves)).astype(np.float32),
            "terminated": solves,
            "success": solves,
            "terminals": ~is_step,
        }


PLAN = Plan.of_size(Recipe(), 3)


def stage(generation_: Generation, count: int) -> None:
    """Leave the first episodes in the staging folder, as workers do."""
    player = PLAN.recipe.demonstrator()
    for split, index, name in list(PLAN.files())[:count]:
        generation._save(generation_.folder / name, player.episode(split, index))


@pytest.fixture
def finished(tmp_path: Path) -> dict[Path, int]:
    made = Generation(PLAN, tmp_path / "toy.npz")
    stage(made, 4)
    assert made.run(1)
    return made.finish()


def test_a_tenth_is_for_validation() -> None:
    sizes = [tuple(Plan.of_size(Recipe(), size).episodes.values()) for size in (1, 9, 25)]
    assert sizes == [(1, 1), (9, 1), (25, 2)]


def test_episodes_of_unequal_lengths_are_one_data_set(
    finished: dict[Path, int], tmp_path: Path
) -> None:
    assert finished == {tmp_path / "toy.npz": 6, tmp_path / "toy-val.npz": 1}
    dataset = formats.open_dataset(tmp_path / "toy.npz", cache=tmp_path / "cache")
    assert dataset.ends.tolist() == [1, 4, 8]
    assert dataset.columns["observation"][:, 0].tolist() == [0] * 2 + [1] * 3 + [2] * 4
    assert dataset.columns["reward"].tolist() == [0, 0, -1, 0, 0, -1, -1, 0, 0]
    solving = [0, 3, 7]
    for name in ("terminated", "success"):
        assert np.flatnonzero(dataset.columns[name]).tolist() == solving
    assert not dataset.truncated.any()


def test_result_is_valid_and_says_how_it_came_about(
    finished: dict[Path, int], tmp_path: Path
) -> None:
    assert formats.validate(tmp_path / "toy.npz") == (3, 6)
    info = formats.open_dataset(tmp_path / "toy.npz", cache=tmp_path / "cache").info()
    assert info["success_rate"] == 1
    expected = {"env": "toy", "seed": 0, "split": "train", "episodes": 3}
    assert expected.items() <= info["metadata"].items()


def test_what_is_missing_is_known(tmp_path: Path) -> None:
    begun = Generation(PLAN, tmp_path / "toy.npz")
    stage(begun, 2)
    begun.close()
    assert Generation(PLAN, tmp_path / "toy.npz").missing() == list(PLAN.files())[2:]

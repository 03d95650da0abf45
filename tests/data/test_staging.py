"""Staging folders: what an interrupted command left is gone on with by the same one only."""

from __future__ import annotations

import json

import numpy as np
import pytest

from genpol.data.dataset import OfflineDataset
from genpol.data.formats import write
from genpol.data.staging import Staging, staged
from genpol.errors import ConfigError, DatasetError

RECIPE = {"seed": 1, "runs": ("a", "b"), "torch": "2.11"}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data-v0"


def interrupted(target):
    """Leave what an interrupted command leaves, and return the folder."""
    staging = Staging(target)
    staging.claim(RECIPE)
    (staging.folder / "episodes").write_text("work of an hour")
    staging.release()
    return staging.folder


def test_the_same_recipe_goes_on(target):
    folder = interrupted(target)
    Staging(target).claim(RECIPE)
    assert (folder / "episodes").read_text() == "work of an hour"


def test_leftovers_without_a_recipe_are_removed(target):
    folder = interrupted(target)
    (folder / "recipe.json").unlink()
    Staging(target).claim(RECIPE)
    assert [entry.name for entry in folder.iterdir()] == ["recipe.json"]


def test_another_recipe_is_refused_with_the_differences(target):
    folder = interrupted(target)
    with pytest.raises(ConfigError) as caught:
        Staging(target).claim({**RECIPE, "seed": 2, "runs": ["a"], "more": True})
    assert str(caught.value) == (
        f"{folder}: holds what an interrupted command made of seed 1 and not 2, runs ['a', 'b'] "
        "and not ['a'], more None and not True; repeat that command, remove the folder to begin "
        "anew, or choose another output"
    )
    assert (folder / "episodes").exists()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_recipe_is_refused(target, content):
    folder = interrupted(target)
    (folder / "recipe.json").write_text(content)
    with pytest.raises(ConfigError, match=f"recipe.json: damaged; remove {folder} to begin anew"):
        Staging(target).claim(RECIPE)
    assert (folder / "episodes").exists()


@pytest.mark.parametrize("name", ["genpol", "minari"])
def test_no_other_command_removes_what_can_be_gone_on_with(target, name):
    folder = interrupted(target)
    data = OfflineDataset.from_trajectories(
        [{"observation": np.zeros((2, 1)), "action": np.zeros((1, 1))}]
    )
    with pytest.raises(DatasetError, match=f"{folder}: holds what an interrupted command made"):
        write(data, target, name)
    assert (folder / "episodes").exists()
    assert json.loads((folder / "recipe.json").read_text())["seed"] == 1


def test_what_is_made_in_a_folder_leaves_the_rest_of_it(target):
    interrupted(target)
    staging = Staging(target)

    def fail():
        with staged(target, staging) as made:
            made.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not target.exists()
    with staged(target, staging) as made:
        assert not made.exists()
        made.write_text("all")
    assert target.read_text() == "all"
    left = sorted(entry.name for entry in staging.folder.iterdir())
    assert left == ["episodes", "recipe.json"]
    staging.discard()
    assert not staging.folder.exists()

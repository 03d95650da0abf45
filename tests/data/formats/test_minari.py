"""Minari's folders, read as minari writes them and written so that minari reads them."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from genpol.data import formats
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import minari
from genpol.errors import DatasetError


@pytest.fixture
def folder(minari_folder, minari_episode):
    return minari_folder([minari_episode(3, 0, terminated=True), minari_episode(2, 1)])


def test_an_episode_is_a_trajectory(folder, load, steps):
    data = load(folder)
    assert formats.detect(folder) == "minari"
    assert data.ends.tolist() == [3, 6]
    assert np.array_equal(data.columns["observation"][:4], steps(3, 0)["observation"])
    assert np.array_equal(data.columns["action"][4:6], steps(2, 1)["action"])
    assert np.array_equal(data.columns["reward"][4:6], steps(2, 1)["reward"])
    assert np.flatnonzero(data.columns["terminated"]).tolist() == [2]
    assert np.flatnonzero(data.truncated).tolist() == [5]
    assert (data.metadata["env"], data.metadata["dataset_id"]) == ("Toy-v0", "toy-v0")


def test_infos_are_of_states_and_success_of_steps(folder, load):
    data = load(folder)
    assert data.columns["qpos"][:4, 0].tolist() == [0, 2, 4, 6]
    assert np.flatnonzero(data.columns["success"]).tolist() == [2, 5]
    assert "goal" not in data.columns
    assert data.columns["infos.goal"].shape == (7, 2)


@pytest.mark.parametrize("block_bytes", [1, 100])
def test_blocks_do_not_show(folder, load, monkeypatch, block_bytes):
    whole = load(folder)
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", block_bytes)
    pieces = load(folder)
    assert pieces.ends.tolist() == whole.ends.tolist()
    for name, column in whole.columns.items():
        assert np.array_equal(pieces.columns[name], column), name


def test_infos_without_the_reset_are_of_steps(minari_folder, minari_episode, load):
    episode = minari_episode(3, 0)
    episode["infos"] = {"success": np.array([0, 0, 1]), "x": np.array([1, 2, 3])}
    data = load(minari_folder([episode]))
    assert np.flatnonzero(data.columns["success"]).tolist() == [2]
    assert data.columns["infos.x"].tolist() == [1, 2, 3, 0]


def test_infos_that_are_no_numbers_are_left_out_and_named(minari_folder, minari_episode, load):
    episode = minari_episode(3, 0)
    episode["infos"] |= {"text": [b"a"] * 4, "short": np.zeros(2), "deep": {"x": np.arange(4)}}
    data = load(minari_folder([episode]))
    assert data.metadata["skipped"] == ["infos/short", "infos/text"]
    assert data.columns["infos.deep.x"].tolist() == [0, 1, 2, 3]


def test_parts_stand_in_the_order_of_their_names(minari_folder, minari_episode, load):
    episode = minari_episode(2, 0)
    parts = {"observation": np.full((3, 2), 3.0), "achieved_goal": np.full((3, 1), 1.0)}
    episode["observations"] = parts | {"desired_goal": {"b": np.full((3, 1), 2.0)}}
    data = load(minari_folder([episode]))
    assert data.columns["observation"][0].tolist() == [1, 2, 3, 3]
    keys = ["achieved_goal", "desired_goal/b", "observation"]
    assert data.metadata["observation_keys"] == keys


def test_the_tenth_part_of_a_tuple_follows_the_ninth(minari_folder, minari_episode, load):
    episode = minari_episode(1, 0)
    episode["observations"] = {f"_index_{i}": np.full((2, 1), i) * 1.0 for i in range(11)}
    data = load(minari_folder([episode]))
    assert data.columns["observation"][0].tolist() == list(range(11))


def test_episodes_are_read_in_the_order_of_their_numbers(minari_folder, minari_episode, load):
    data = load(minari_folder([minari_episode(1 + i % 3, i) for i in range(11)]))
    assert (data.ends - data.starts).tolist() == [1 + i % 3 for i in range(11)]


@pytest.mark.parametrize("inside", ["data", "data/main_data.hdf5"])
def test_a_path_inside_will_do(folder, load, inside):
    assert load(folder / inside).num_transitions == 5


def change(folder, key, values):
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        if key in file:
            del file[key]
        if values is not None:
            file[key] = values


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        (
            "episode_1/actions",
            np.full((2, 2), 2.0),
            "episode_1/actions row 0: 2 is outside [-1, 1]",
        ),
        ("episode_1/actions", np.zeros((3, 2)), "episode_1/actions: 3 rows, where 2 are expected"),
        ("episode_1/actions", np.zeros(2, int), "episode_1/actions: holds int64, codes of a discr"),
        ("episode_1/actions", None, "episode_1/actions: missing"),
        (
            "episode_1/rewards",
            np.array([0, np.inf]),
            "episode_1/rewards row 1: inf is not a finite",
        ),
        ("episode_1/rewards", 1.0, "episode_1/rewards: 1 rows, where 2 are expected"),
        ("episode_1/terminations", np.array([0, 9]), "episode_1/terminations row 1: 9 is neither"),
        ("episode_1/truncations", np.array([1, 0]), "episode_1/truncations row 0: is set, but the"),
        ("episode_1/observations", np.zeros((3, 32, 32, 3), np.uint8), "holds images of 32x32x3"),
        ("episode_1/observations", np.array([b"a"] * 3), "episode_1/observations: holds |S1, not"),
        ("episode_1/infos/qpos", None, "episode_1/infos/qpos: 3 rows are expected, as the first"),
        ("episode_1", None, "1 episodes, but metadata.json says 2"),
    ],
)
def test_refusals_name_file_and_episode(folder, refusal, key, values, expected):
    change(folder, key, values)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'data' / 'main_data.hdf5'}: ")
    assert expected in message


def describe(folder, **changes):
    file = folder / "data" / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_other_storage_is_refused(folder, refusal):
    describe(folder, data_format="arrow")
    assert "data_format is 'arrow', only 'hdf5' is read" in refusal(folder)


def test_missing_data_is_named(folder, refusal):
    (folder / "data/main_data.hdf5").unlink()
    assert "main_data.hdf5: missing" in refusal(folder)


def test_what_is_written_has_the_layout_of_minari(tmp_path, steps):
    columns = steps(2, 0) | {
        "terminated": [False, True],
        "success": [True, False],
        "qpos": np.zeros((3, 1)),
    }
    data = OfflineDataset.from_trajectories([columns, columns], {"author": ["me"]})
    minari.write(data, tmp_path / "toy-v3")
    with h5py.File(tmp_path / "toy-v3/data/main_data.hdf5") as file:
        assert sorted(file) == ["episode_0", "episode_1"]
        episode = file["episode_1"]
        assert dict(episode.attrs) == {"id": 1, "total_steps": 2}
        found = {
            key: (array.shape, str(array.dtype))
            for key, array in minari.hdf5.leaves(episode).items()
        }
        assert episode["observations"].maxshape == (None, 3)
        assert episode["infos/success"][()].tolist() == [False, True, False]
        assert episode["terminations"][()].tolist() == [False, True]
    assert found == {
        "actions": ((2, 2), "float32"),
        "infos/qpos": ((3, 1), "float64"),
        "infos/success": ((3,), "bool"),
        "observations": ((3, 3), "float32"),
        "rewards": ((2,), "float64"),
        "terminations": ((2,), "bool"),
        "truncations": ((2,), "bool"),
    }
    metadata = json.loads((tmp_path / "toy-v3/data/metadata.json").read_text())
    assert metadata["total_steps"] == 4
    assert (metadata["dataset_id"], metadata["author"]) == ("toy-v3", ["me"])
    space = json.loads(metadata["action_space"])
    assert space == {
        "type": "Box",
        "dtype": "float32",
        "shape": [2],
        "low": [-1, -1],
        "high": [1, 1],
    }


def test_the_id_includes_the_namespace(tmp_path, steps, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = OfflineDataset.from_trajectories([steps(2, 0)])
    minari.write(data, tmp_path / "lab" / "toy-v0")
    metadata = json.loads((tmp_path / "lab/toy-v0/data/metadata.json").read_text())
    assert metadata["dataset_id"] == "lab/toy-v0"


@pytest.mark.parametrize("name", ["toy", "toy-v", "to.y-v0"])
def test_a_name_that_minari_cannot_parse_is_refused(tmp_path, steps, name):
    with pytest.raises(DatasetError, match="end in a version, such as to"):
        minari.write(OfflineDataset.from_trajectories([steps(2, 0)]), tmp_path / name)
    assert list(tmp_path.iterdir()) == []

"""Minari's folders, read as minari writes them and written so that minari reads them."""

from __future__ import annotations

import json
import math

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


# --- action spaces -----------------------------------------------------------------------------


def box(low, high):
    """Return a box as minari serialises it."""
    bounds = {"low": low, "high": high}
    return {"type": "Box", "dtype": "float32", "shape": list(np.shape(low)), **bounds}


def with_space(folder, space):
    describe(folder, action_space=json.dumps(space))
    return folder


def test_actions_are_scaled_by_their_space(folder, load):
    """Humanoid's lie in [-0.4, 0.4]; a clone of them as they stand acts at 40 % of strength."""
    bound = float(np.float32(0.4))
    given = {}
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        for episode in file.values():
            episode["actions"][...] *= np.float32(0.4)
            given[episode.name] = episode["actions"][...]
        file["episode_1/actions"][0] = [bound, -bound]
    data = load(with_space(folder, box([-bound] * 2, [bound] * 2)))
    found = data.columns["action"]
    np.testing.assert_allclose(found[:3], given["/episode_0"] / bound, rtol=1e-6)
    assert found[4].tolist() == [1, -1]
    assert np.abs(found).max() == 1
    assert data.metadata["action_low"] == [-bound] * 2
    assert data.metadata["action_high"] == [bound] * 2


def test_larger_and_shifted_spaces_are_scaled_by_dimension(folder, load):
    change(folder, "episode_1/actions", np.array([[3.0, 1.0], [-1.5, 0.5]]))
    change(folder, "episode_0/actions", np.zeros((3, 2)))
    data = load(with_space(folder, box([-3, 0], [3, 2])))
    assert data.columns["action"][4:6].tolist() == [[1, 0], [-0.5, -0.5]]
    assert data.columns["action"][:4].tolist() == [[0, -1]] * 3 + [[0, 0]]
    assert (data.metadata["action_low"], data.metadata["action_high"]) == ([-3, 0], [3, 2])


def test_a_cached_data_set_is_scaled_too(folder, tmp_path):
    change(folder, "episode_1/actions", np.full((2, 2), 2.0))
    with_space(folder, box([-2, -2], [2, 2]))
    data = formats.open_dataset(folder, cache=tmp_path / "cache")
    assert data.columns["action"][4:6].tolist() == [[1, 1], [1, 1]]
    assert data.metadata["action_high"] == [2, 2]


@pytest.mark.parametrize(
    "space",
    [
        box([-1, -1], [1, 1]),
        box([-math.inf, -math.inf], [math.inf, math.inf]),
        box([-3.4028234663852886e38] * 2, [3.4028234663852886e38] * 2),
        {"type": "Discrete", "dtype": "int64", "start": 0, "n": 4},
    ],
)
def test_spaces_without_other_bounds_change_no_bit(folder, load, space):
    before = load(folder)
    after = load(with_space(folder, space))
    assert after.columns["action"].tobytes() == before.columns["action"].tobytes()
    assert "action_low" not in after.metadata


def test_a_dimension_without_bounds_is_read_as_it_is(folder, load):
    before = load(folder).columns["action"]
    change(folder, "episode_0/actions", before[:3] * [4, 1])
    change(folder, "episode_1/actions", before[4:6] * [4, 1])
    data = load(with_space(folder, box([-4, -math.inf], [4, 0])))
    assert np.array_equal(data.columns["action"], before)
    assert (data.metadata["action_low"], data.metadata["action_high"]) == ([-4, -1], [4, 1])


def test_parts_of_a_space_stand_where_their_actions_do(minari_folder, minari_episode, load):
    episode = minari_episode(1, 0)
    episode["actions"] = {
        "wrist": {f"_index_{i}": np.full((1, 1), i + 1.0) for i in range(11)},
        "arm": np.array([[50.0, 25.0]]),
    }
    folder = minari_folder([episode])
    wrist = {"type": "Tuple", "subspaces": [box([0], [i + 1]) for i in range(11)]}
    space = {"type": "Dict", "subspaces": {"wrist": wrist, "arm": box([0, 0], [50, 50])}}
    assert load(with_space(folder, space)).columns["action"][0].tolist() == [1, 0] + [1] * 11


@pytest.mark.parametrize(
    "space",
    [
        {"type": "Box", "low": [-1, -1]},
        {"type": "Box", "low": [1, 1], "high": [-1, -1]},
        {"type": "Box", "low": [-1], "high": [1, 1]},
        {"type": "Box", "low": ["a"], "high": ["b"]},
        {"type": "Tuple", "subspaces": []},
        {"low": [-1], "high": [1]},
        [],
    ],
)
def test_a_space_that_is_none_is_refused(folder, refusal, space):
    assert "metadata.json: action_space: is no space as minari writes it" in refusal(
        with_space(folder, space)
    )


def test_actions_beyond_their_space_are_refused(folder, refusal):
    change(folder, "episode_1/actions", np.array([[0.0, 0.0], [0.0, 0.5]]))
    change(folder, "episode_0/actions", np.zeros((3, 2)))
    message = refusal(with_space(folder, box([-0.4, -0.4], [0.4, 0.4])))
    assert (
        "episode_1/actions row 1: 0.5 is outside [-0.4, 0.4], the range of dimension 1" in message
    )
    assert "action_low= and action_high= of `genpol data convert`" in message


def test_a_space_of_another_width_is_refused(folder, refusal):
    message = refusal(with_space(folder, box([-0.4] * 3, [0.4] * 3)))
    assert "episode_0/actions: is of width 2, but its range is given by 3 numbers" in message


def test_what_was_scaled_is_written_as_it_is_and_remembers_its_units(folder, load, tmp_path):
    change(folder, "episode_1/actions", np.full((2, 2), 2.0))
    data = load(with_space(folder, box([-2, -2], [2, 2])))
    minari.write(data, tmp_path / "copy-v0")
    again = load(tmp_path / "copy-v0")
    assert again.columns["action"].tobytes() == data.columns["action"].tobytes()
    assert again.metadata["action_low"] == [-2, -2]


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["episode_1", "episode_1/actions", "episode_1/infos/qpos"])
def test_damage_names_the_array(folder, refusal, key):
    file = folder / "data/main_data.hdf5"
    with h5py.File(file) as opened:
        address = h5py.h5o.get_info(opened[key].id).addr
    content = bytearray(file.read_bytes())
    content[address] = 77  # the version of its header
    file.write_bytes(content)
    assert refusal(folder).startswith(f"{file}: {key}: damaged or cut short (")


@pytest.mark.parametrize("name", ["toy", "toy-v", "to.y-v0"])
def test_a_name_that_minari_cannot_parse_is_refused(tmp_path, steps, name):
    with pytest.raises(DatasetError, match="end in a version, such as to"):
        minari.write(OfflineDataset.from_trajectories([steps(2, 0)]), tmp_path / name)
    assert list(tmp_path.iterdir()) == []

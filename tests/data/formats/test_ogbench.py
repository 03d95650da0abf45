"""OGBench's files: rows are states, and ogbench itself reads what is written."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest

from genpol.data import formats
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import ogbench
from genpol.errors import DatasetError


def test_rows_are_states(ogbench_file, ogbench_arrays, load):
    data = load(ogbench_file)
    assert formats.detect(ogbench_file) == "ogbench"
    assert data.ends.tolist() == [3, 6]
    for name, theirs in (("observation", "observations"), ("qpos", "qpos"), ("qvel", "qvel")):
        assert np.array_equal(data.columns[name], ogbench_arrays[theirs])
    assert data.columns["button_states"].dtype == np.int64
    actions = ogbench_arrays["actions"] * ~ogbench_arrays["terminals"][:, None]
    assert np.array_equal(data.columns["action"], actions)


def test_terminals_are_not_taken_for_ends_of_the_task(ogbench_file, load):
    data = load(ogbench_file)
    assert "terminated" not in data.columns
    assert np.flatnonzero(data.truncated).tolist() == [2, 5]


def test_transitions_are_those_of_ogbench(ogbench_file, load):
    utils = pytest.importorskip("ogbench.utils")
    theirs = utils.load_dataset(ogbench_file, add_info=True)
    data = load(ogbench_file)
    rows = data.transition_row(np.arange(data.num_transitions))
    assert np.array_equal(data.columns["observation"][rows], theirs["observations"])
    assert np.array_equal(data.columns["observation"][rows + 1], theirs["next_observations"])
    assert np.array_equal(data.columns["action"][rows], theirs["actions"])
    assert np.array_equal(data.columns["button_states"][rows], theirs["button_states"])
    assert np.array_equal(np.isin(rows + 1, data.ends), theirs["terminals"])


def test_what_is_written_is_read_by_ogbench(ogbench_file, load, tmp_path):
    utils = pytest.importorskip("ogbench.utils")
    ogbench.write(load(ogbench_file), tmp_path / "copy.npz")
    ours = utils.load_dataset(tmp_path / "copy.npz", add_info=True)
    theirs = utils.load_dataset(ogbench_file, add_info=True)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        assert np.array_equal(ours[name], values), name


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("cube-single-play-v0", "cube-single-v0"),
        ("puzzle-4x4-noisy-v0-val", "puzzle-4x4-v0"),
        ("antmaze-large-navigate-v0", "antmaze-large-v0"),
        ("cube-quadruple-play-100m-v0", "cube-quadruple-v0"),
        ("mine", None),
    ],
)
def test_the_environment_is_read_from_the_name(tmp_path, ogbench_arrays, load, name, env):
    np.savez(tmp_path / f"{name}.npz", **ogbench_arrays)
    assert load(tmp_path / f"{name}.npz").metadata.get("env") == env


def test_blocks_do_not_show(ogbench_file, ogbench_arrays, load, monkeypatch):
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", 200)
    data = load(ogbench_file)
    assert np.array_equal(data.columns["observation"], ogbench_arrays["observations"])
    assert data.ends.tolist() == [3, 6]


def test_a_folder_is_one_data_set_without_its_validation(tmp_path, ogbench_arrays, load):
    for name in ("b-v0-001", "b-v0-000", "b-v0-val"):
        shifted = ogbench_arrays | {"qpos": np.full((7, 1), len(name) + int(name[-1] == "1"))}
        np.savez(tmp_path / f"{name}.npz", **shifted)
    data = load(tmp_path)
    assert data.num_trajectories == 4
    assert data.columns["qpos"][[0, 7], 0].tolist() == [8, 9]


def test_a_file_of_a_folder_is_named_when_it_is_refused(tmp_path, ogbench_arrays, refusal):
    np.savez(tmp_path / "a-000.npz", **ogbench_arrays)
    ogbench_arrays["terminals"][-1] = False
    np.savez(tmp_path / "a-001.npz", **ogbench_arrays)
    assert "a-001.npz: terminals: the last trajectory, 3 rows from row 4 on" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"actions": None}, "actions: missing"),
        ({"terminals": None}, "terminals: missing"),
        ({"terminals": np.zeros(7)}, "terminals: the last trajectory, 7 rows from row 0 on, never"),
        ({"terminals": np.r_[np.zeros(5), 1, 0]}, "1 rows from row 6 on, never ends; the data was"),
        ({"terminals": np.r_[1, np.zeros(5), 1]}, "observations row 0: a trajectory of a single"),
        ({"terminals": np.r_[0, 0, 2, 0, 0, 0, 1]}, "terminals row 2: 2 is neither 0 nor 1"),
        ({"qpos": np.zeros((6, 1))}, "qpos: 6 rows, but observations has 7"),
        ({"actions": np.full((7, 2), 1.5)}, "actions row 0: 1.5 is outside [-1, 1]"),
        ({"actions": np.zeros((7, 2), int)}, "actions: holds int64, codes of discrete"),
        (
            {"observations": np.zeros((7, 4, 4, 3), np.uint8)},
            "observations: a row is 4x4x3, as images are",
        ),
        ({"observations": np.full((7, 3), np.nan)}, "observations row 0: nan is not a finite"),
        ({"qvel": np.array([{}] * 7)}, "qvel: holds Python objects (pickled)"),
        ({"qvel": np.array(["a"] * 7)}, "qvel: holds text"),
        ({"next_observations": np.zeros((7, 3))}, "rows of this file are transitions"),
        ({"observations": np.zeros((3, 7)).T}, "observations: is stored column by column"),
    ],
)
def test_refusals_name_file_column_and_row(tmp_path, ogbench_arrays, refusal, changes, expected):
    arrays = {k: v for k, v in (ogbench_arrays | changes).items() if v is not None}
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_changed_byte_is_found(tmp_path, ogbench_arrays, refusal):
    path = tmp_path / "data.npz"
    np.savez(path, **ogbench_arrays)
    content = bytearray(path.read_bytes())
    place = content.find(ogbench_arrays["observations"].tobytes())
    content[place + 5] ^= 1
    path.write_bytes(content)
    assert "data.npz: observations: damaged or cut short (Bad CRC-32" in refusal(path)


def test_a_damaged_stream_is_named_with_its_row(tmp_path, ogbench_arrays, refusal, monkeypatch):
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", 100_000)
    path = tmp_path / "data.npz"
    qpos = np.random.default_rng(0).integers(0, 9, (40_000, 8)) / 8  # which can be compressed
    terminals = np.arange(len(qpos)) % 100 == 99
    few = {"observations": np.zeros((len(qpos), 1)), "actions": np.zeros((len(qpos), 1))}
    np.savez_compressed(path, **few, terminals=terminals, qpos=qpos)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("qpos.npy")
    content = bytearray(path.read_bytes())
    middle = member.header_offset + member.compress_size // 2
    content[middle : middle + 5000] = np.random.default_rng(1).bytes(5000)
    path.write_bytes(content)
    found = re.match(
        rf"{path}: qpos from row (\d+) on: damaged or cut short \(Error", refusal(path)
    )
    assert found is not None
    assert 10_000 < int(found[1]) < 21_000


def test_a_damaged_entry_is_named(ogbench_file, refusal):
    with zipfile.ZipFile(ogbench_file) as archive:
        member = archive.getinfo("qvel.npy")
    content = bytearray(ogbench_file.read_bytes())
    content[member.header_offset] = 0
    ogbench_file.write_bytes(content)
    assert refusal(ogbench_file).startswith(
        f"{ogbench_file}: qvel: damaged or cut short (Bad magic"
    )


def test_more_than_the_header_says_is_refused(ogbench_file, tmp_path, refusal):
    path = tmp_path / "long.npz"
    with zipfile.ZipFile(ogbench_file) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) + (b"more" if name == "qpos.npy" else b""))
    assert "long.npz: qpos: holds more than its header says" in refusal(path)


def test_a_zip_of_something_else_is_refused(tmp_path, refusal):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "a.zip: readme.txt: is no array" in refusal(tmp_path / "a.zip")


def test_only_npz_is_written(ogbench_file, load, tmp_path):
    with pytest.raises(DatasetError, match=r"must end in \.npz"):
        ogbench.write(load(ogbench_file), tmp_path / "data.zip")


def test_equal_data_makes_equal_files(ogbench_file, load, tmp_path):
    for name in ("a.npz", "b.npz"):
        ogbench.write(load(ogbench_file), tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_column_that_would_pass_for_the_ends_is_refused(tmp_path, steps):
    data = OfflineDataset.from_trajectories([steps(2, 0) | {"terminals": np.zeros(3)}])
    with pytest.raises(DatasetError, match="a column named terminals has no place"):
        ogbench.write(data, tmp_path / "data.npz")


def test_the_name_tells_the_environment_only_where_the_metadata_do_not(
    ogbench_file, load, tmp_path
):
    data = load(ogbench_file)
    data.metadata["env"] = "mine"
    ogbench.write(data, tmp_path / "cube-single-play-v0" / "cube-double-play-v0.npz")
    again = load(tmp_path / "cube-single-play-v0" / "cube-double-play-v0.npz")
    assert again.metadata["env"] == "mine"
    assert again.metadata["source"].endswith("cube-double-play-v0.npz")


@pytest.mark.parametrize("comment", [b"hello", b"[1]", b'{"genpol": 3}', b'{"seed": 1}', b"\xff"])
def test_comments_of_others_are_not_read(ogbench_file, load, comment):
    with zipfile.ZipFile(ogbench_file, "a") as archive:
        archive.comment = comment
    assert load(ogbench_file).metadata["env"] == "cube-single-v0"


def test_metadata_that_are_too_long_for_a_comment_are_left_out(ogbench_file, load, tmp_path):
    data = load(ogbench_file)
    data.metadata["note"] = "x" * 70_000
    ogbench.write(data, tmp_path / "data.npz")
    assert "note" not in load(tmp_path / "data.npz").metadata

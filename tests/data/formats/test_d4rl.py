"""D4RL's flat files: where trajectories end, and what becomes of their final states."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from genpol.data import formats


def rows_of(data, name):
    """Return the rows of each trajectory."""
    return [data.columns[name][s : e + 1] for s, e in zip(data.starts, data.ends, strict=True)]


def test_next_observations_give_the_final_states(d4rl_file, d4rl_arrays, load):
    path = d4rl_file(d4rl_arrays)
    data = load(path)
    assert formats.detect(path) == "d4rl"
    assert (data.ends - data.starts).tolist() == [3, 3, 2]
    rows = data.transition_row(np.arange(8))
    assert np.array_equal(data.columns["observation"][rows], d4rl_arrays["observations"])
    assert np.array_equal(data.columns["observation"][rows + 1], d4rl_arrays["next_observations"])
    assert np.array_equal(data.columns["action"][rows], d4rl_arrays["actions"])
    assert np.array_equal(data.columns["reward"][rows], d4rl_arrays["rewards"])
    assert {"dropped_transitions", "repeated_states"} & data.metadata.keys() == set()


def test_only_terminals_end_the_task(d4rl_file, d4rl_arrays, load):
    data = load(d4rl_file(d4rl_arrays))
    assert np.flatnonzero(data.columns["terminated"]).tolist() == [2]
    assert np.flatnonzero(data.truncated).tolist() == [6, 9]


def without_next(arrays):
    return {name: array for name, array in arrays.items() if name != "next_observations"}


def test_without_next_observations_a_cut_loses_its_last_transition(d4rl_file, d4rl_arrays, load):
    data = load(d4rl_file(without_next(d4rl_arrays)))
    assert (data.ends - data.starts).tolist() == [3, 2, 1]
    given, first = d4rl_arrays["observations"], rows_of(data, "observation")
    assert np.array_equal(first[0], given[[0, 1, 2, 2]])
    assert np.array_equal(first[1], given[[3, 4, 5]])
    assert np.array_equal(first[2], given[[6, 7]])
    assert np.array_equal(rows_of(data, "reward")[0][:3], d4rl_arrays["rewards"][:3])
    assert data.metadata["dropped_transitions"] == 2
    assert data.metadata["repeated_states"] == 1
    assert np.flatnonzero(data.columns["terminated"]).tolist() == [2]


def test_a_cut_after_one_step_leaves_nothing(d4rl_file, d4rl_arrays, load):
    arrays = without_next(d4rl_arrays)
    arrays["timeouts"] = np.array([0, 0, 0, 1, 0, 1, 0, 0], dtype=bool)
    data = load(d4rl_file(arrays))
    assert (data.ends - data.starts).tolist() == [3, 1, 1]
    assert np.array_equal(rows_of(data, "observation")[1], arrays["observations"][[4, 5]])


@pytest.mark.parametrize("block_bytes", [1, 150, 250])
@pytest.mark.parametrize("keep_next", [True, False])
def test_blocks_do_not_show(d4rl_file, d4rl_arrays, load, monkeypatch, block_bytes, keep_next):
    path = d4rl_file(d4rl_arrays if keep_next else without_next(d4rl_arrays))
    whole = load(path)
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", block_bytes)
    pieces = load(path)
    assert pieces.ends.tolist() == whole.ends.tolist()
    assert pieces.metadata == whole.metadata
    for name, column in whole.columns.items():
        assert np.array_equal(pieces.columns[name], column), name


def test_a_gap_in_the_observations_ends_a_trajectory(d4rl_file, d4rl_arrays, load):
    d4rl_arrays["timeouts"][5] = False  # the observation of row 6 does not follow from row 5
    data = load(d4rl_file(d4rl_arrays))
    assert (data.ends - data.starts).tolist() == [3, 3, 2]
    assert np.flatnonzero(data.columns["terminated"]).tolist() == [2]


def test_a_gap_between_blocks_is_seen(d4rl_file, d4rl_arrays, load, monkeypatch):
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", 1)
    d4rl_arrays["timeouts"][5] = False
    assert load(d4rl_file(d4rl_arrays)).num_trajectories == 3


def test_where_the_task_wants_to_get_is_not_the_goal_column(d4rl_file, d4rl_arrays, load):
    data = load(d4rl_file(d4rl_arrays))
    assert "goal" not in data.columns
    assert data.columns["infos.goal"][:4, 0].tolist() == [100, 102, 104, 104]
    assert data.columns["qpos"][:4, 0].tolist() == [0, 2, 4, 4]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"actions": np.full((8, 2), -1.5)}, "actions row 0: -1.5 is outside [-1, 1]"),
        ({"actions": np.zeros((7, 2))}, "actions: 7 rows, but observations has 8"),
        ({"timeouts": np.zeros(7)}, "timeouts: 7 rows, but observations has 8"),
        ({"next_observations": np.zeros((7, 3))}, "next_observations: 7 rows, but"),
        ({"rewards": np.r_[np.zeros(6), np.nan, 0]}, "rewards row 6: nan is not a finite"),
        ({"terminals": np.full(8, 3)}, "terminals row 0: 3 is neither 0 nor 1"),
        ({"timeouts": np.full(8, 0.5)}, "timeouts row 0: 0.5 is neither 0 nor 1"),
        ({"terminals": None}, "terminals: missing"),
        ({"next_observations": np.zeros((8, 4))}, "shape (8, 4), but observations has (8, 3)"),
        (
            {"observations": np.zeros((8, 4, 4, 3)), "next_observations": None},
            "observations: a row is 4x4x3, as images are",
        ),
        ({"observations": np.array([b"a"] * 8)}, "observations: is no array of numbers"),
        (
            {"terminals": np.zeros(8), "timeouts": None, "next_observations": None},
            "terminals, timeouts: no row of 8 is set, so no trajectory ever ends",
        ),
    ],
)
def test_refusals_name_file_column_and_row(d4rl_file, d4rl_arrays, refusal, changes, expected):
    arrays = {k: v for k, v in (d4rl_arrays | changes).items() if v is not None}
    message = refusal(d4rl_file(arrays))
    assert "hopper_medium-v2.hdf5: " in message
    assert expected in message


def test_rows_are_counted_as_the_file_counts_them(d4rl_file, d4rl_arrays, refusal, monkeypatch):
    """Final states are put in between, and blocks begin anew."""
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", 150)
    d4rl_arrays["rewards"][7] = np.inf
    assert "rewards row 7: inf" in refusal(d4rl_file(d4rl_arrays))


def test_a_file_without_its_end_is_refused(d4rl_file, d4rl_arrays, refusal):
    path = d4rl_file(d4rl_arrays)
    path.write_bytes(path.read_bytes()[:-1])
    assert "damaged or cut short" in refusal(path)


def test_a_damaged_header_within_is_refused(d4rl_file, d4rl_arrays, refusal):
    path = d4rl_file(d4rl_arrays)
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["rewards"].id).addr
    content = bytearray(path.read_bytes())
    content[address] = 77  # the version of the header
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: rewards: damaged or cut short (")


@pytest.mark.parametrize("key", ["rewards", "infos/qpos"])
def test_a_damaged_chunk_is_named(d4rl_file, d4rl_arrays, refusal, key):
    path = d4rl_file(d4rl_arrays)
    with h5py.File(path) as file:
        chunk = file[key].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: {key} rows 0 to 7: damaged or cut short (")


def test_another_hdf5_file_is_of_no_known_format(tmp_path, refusal):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    assert "of no known format" in refusal(path)
    assert "d4rl: an HDF5 file with observations" in refusal(path)

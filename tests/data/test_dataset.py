"""Rows are states: what may stand in them, and how transitions are found among them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.data.dataset import OfflineDataset
from genpol.errors import DatasetError


def trajectory(num_steps, *, start=0.0, **columns):
    """Return a trajectory whose observations count up from ``start``."""
    observation = start + np.arange(num_steps + 1, dtype=np.float32)[:, None]
    return {"observation": observation, "action": np.full((num_steps, 1), 0.5)} | columns


def refusal(*trajectories):
    with pytest.raises(DatasetError) as caught:
        OfflineDataset.from_trajectories(trajectories)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_next_observation_is_the_following_row():
    data = OfflineDataset.from_trajectories([trajectory(2), trajectory(3, start=10)])
    assert data.columns["observation"][:, 0].tolist() == [0, 1, 2, 10, 11, 12, 13]
    assert (data.starts.tolist(), data.ends.tolist()) == ([0, 3], [2, 6])
    assert (data.num_rows, data.num_trajectories, data.num_transitions) == (7, 2, 5)


def test_no_step_begins_in_a_final_state():
    steps = {"reward": [1.0, 2.0], "terminated": [False, True], "success": [True, True]}
    data = OfflineDataset.from_trajectories([trajectory(2, **steps)])
    assert data.columns["action"][:, 0].tolist() == [0.5, 0.5, 0]
    assert data.columns["reward"].tolist() == [1, 2, 0]
    assert data.columns["terminated"].tolist() == [False, True, False]
    assert data.columns["success"].tolist() == [True, True, False]


def test_what_is_given_for_a_final_state_is_ignored():
    action = np.array([[0.5], [np.nan]])
    data = OfflineDataset.from_trajectories([trajectory(1) | {"action": action}])
    assert data.columns["action"][:, 0].tolist() == [0.5, 0]


def test_types_are_those_of_every_data_set():
    columns = {
        "reward": np.array([1, 2]),
        "terminated": np.array([0.0, 1.0]),
        "success": np.array([[0], [1]]),
        "qpos": np.zeros((3, 4)),
        "button_states": np.zeros((3, 2), dtype=">i8"),
    }
    data = OfflineDataset.from_trajectories([trajectory(2, **columns)])
    assert {name: column.dtype.str for name, column in data.columns.items()} == {
        "observation": "<f4",
        "action": "<f4",
        "reward": "<f4",
        "terminated": "|b1",
        "success": "|b1",
        "qpos": "<f8",
        "button_states": "<i8",
    }


def test_a_trajectory_is_truncated_unless_its_last_step_terminates():
    data = OfflineDataset.from_trajectories(
        [
            trajectory(2, terminated=[False, True]),
            trajectory(2, terminated=[True, False]),
            trajectory(1, terminated=[False]),
        ]
    )
    assert np.flatnonzero(data.truncated).tolist() == [4, 6]


def test_without_terminations_all_trajectories_are_truncated():
    data = OfflineDataset.from_trajectories([trajectory(2), trajectory(1)])
    assert np.flatnonzero(data.truncated).tolist() == [1, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_transitions_are_numbered_through(lengths):
    data = OfflineDataset.from_trajectories([trajectory(length) for length in lengths])
    rows = [row for row in range(data.num_rows) if row not in data.ends]
    assert data.transition_row(np.arange(data.num_transitions)).tolist() == rows


def test_transition_numbers_may_have_any_shape():
    data = OfflineDataset.from_trajectories([trajectory(2), trajectory(2)])
    assert data.transition_row([[0, 1], [2, 3]]).tolist() == [[0, 1], [3, 4]]
    assert data.transition_row(3) == 4


@pytest.mark.parametrize("index", [-1, 4])
def test_there_is_no_other_transition(index):
    data = OfflineDataset.from_trajectories([trajectory(2), trajectory(2)])
    with pytest.raises(IndexError, match="numbered 0 to 3"):
        data.transition_row([0, index])


def test_actions_are_clipped_by_no_more_than_rounding():
    data = OfflineDataset.from_trajectories([trajectory(1) | {"action": [[1.000009]]}])
    assert data.columns["action"][0, 0] == 1
    message = refusal(trajectory(1), trajectory(3) | {"action": [[0.5], [-1.00002], [7.0]]})
    assert message == (
        "trajectory 1: action row 1: -1.00002 is outside [-1, 1]; scale the actions to that range, "
        "which every environment of genpol has, with action_low= and action_high= of `genpol data "
        "convert`"
    )


@pytest.mark.parametrize("name", ["observation", "action", "reward", "qpos"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_must_be_finite(name, value):
    given = trajectory(3, reward=np.zeros(3), qpos=np.zeros((4, 2)))
    given[name] = np.array(given[name], dtype=np.float64)
    given[name][2] = value
    assert f"trajectory 0: {name} row 2: {value} is not a finite number" in refusal(given)


def test_numbers_must_fit_their_type():
    message = refusal(trajectory(2, reward=[0.0, 1e39]))
    assert "reward row 1: inf is not a finite number (of 32 bits)" in message


def test_a_column_that_nobody_reads_may_hold_anything():
    data = OfflineDataset.from_trajectories([trajectory(1, note=np.array([np.nan, 1]))])
    assert np.isnan(data.columns["note"][0])
    assert data.info()["columns"]["note"]["max"] == 1


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"action": None}, "action: missing; there are observation"),
        ({"reward": np.zeros(5)}, "reward: 5 rows, where 3 are expected"),
        ({"reward": 1.0}, "reward: a single value, where 3 are expected"),
        ({"reward": np.zeros((2, 2))}, "reward: a row is 2; a single number is expected"),
        ({"action": np.zeros(2)}, "action: a row is a single number; [rows, width] is expected"),
        ({"action": np.zeros((2, 0))}, "action: a row is 0; [rows, width] is expected"),
        ({"action": np.zeros((2, 1), int)}, "action: holds int64, codes of discrete actions"),
        ({"observation": np.zeros((3, 8, 8))}, "observation: a row is 8x8, as images are"),
        ({"terminated": [0.0, 0.5]}, "terminated row 1: 0.5 is neither 0 nor 1"),
        ({"reward": np.array(["a", "b"])}, "reward: holds text"),
        ({"x": np.array([{}, {}, {}])}, "x: holds Python objects (pickled)"),
        ({"x": np.zeros(3, complex)}, "x: holds complex128"),
        ({"x": np.zeros((3, 0))}, "x: a row is 0; [rows, width]"),
        ({"truncated": [False, True]}, "truncated: is derived from where trajectories end"),
        ({"a/b": np.zeros(3)}, "'a/b' cannot be the name of a column"),
        ({"ends": np.zeros(3)}, "'ends' cannot be the name of a column"),
    ],
)
def test_a_malformed_column_is_refused(columns, expected):
    given = {k: v for k, v in (trajectory(2) | columns).items() if v is not None}
    message = refusal(trajectory(2), given)
    assert message.startswith("trajectory 1: ")
    assert expected in message


def test_all_trajectories_need_the_same_columns():
    message = refusal(trajectory(1, reward=[0.0]), trajectory(1))
    assert message.startswith("trajectory 1: reward: is not given for this trajectory")
    message = refusal(trajectory(1), trajectory(1, reward=[0.0]))
    assert message.startswith("trajectory 1: reward: is given for this trajectory but was not")


def test_columns_keep_their_width():
    wide = trajectory(1) | {"action": np.zeros((1, 2))}
    assert "action: 2 float32 a row, but 1 float32 in earlier" in refusal(trajectory(1), wide)


def test_a_trajectory_has_a_transition():
    alone = {"observation": np.zeros((1, 1)), "action": np.zeros((0, 1))}
    assert "observation row 0: a trajectory of a single state" in refusal(alone)
    assert "observation: there is no trajectory" in refusal()


def damaged(name, row, value):
    data = OfflineDataset.from_trajectories(
        [
            trajectory(2, reward=[1.0, 2.0], terminated=[False, True]),
            trajectory(2, reward=[1, 1], terminated=[0, 0]),
        ]
    )
    data.columns[name][row] = value
    return data


def test_a_sound_data_set_is_valid():
    damaged("reward", 0, 5.0).validate()


@pytest.mark.parametrize(
    ("name", "row", "value", "expected"),
    [
        ("observation", 4, np.nan, "observation row 4: nan is not a finite number"),
        ("action", 3, 1.5, "action row 3: 1.5 is outside [-1, 1]"),
        ("action", 2, 0.5, "action row 2: is not zero"),
        ("reward", 5, 1.0, "reward row 5: is not zero"),
        ("terminated", 5, True, "terminated row 5: is not zero"),
    ],
)
def test_validation_names_column_and_row(name, row, value, expected):
    with pytest.raises(DatasetError) as caught:
        damaged(name, row, value).validate()
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("columns", "ends", "expected"),
    [
        ({}, [1, 3], "column action has 5 rows, where 4 belong to the trajectories"),
        ({}, [0, 4], "trajectory 0 ends at row 0: it has no transition"),
        ({}, [3, 4], "trajectory 1 ends at row 4: it has no transition"),
        ({}, [4, 2], "trajectory 1 ends at row 2: it has no transition"),
        ({}, [], "there is no trajectory"),
        ({"reward": np.zeros(5)}, [4], "column reward holds float64, not float32"),
        ({"reward": np.zeros(4, np.float32)}, [4], "column reward has 4 rows"),
    ],
)
def test_columns_and_ends_belong_together(columns, ends, expected):
    sound = {"action": np.zeros((5, 1), np.float32), "observation": np.zeros((5, 1), np.float32)}
    with pytest.raises(DatasetError) as caught:
        OfflineDataset(sound | columns, np.array(ends, dtype=np.int64))
    assert expected in str(caught.value)


def test_info_counts_each_trajectory_by_itself():
    data = OfflineDataset.from_trajectories(
        [
            trajectory(2, reward=[-1.0, -2.0], success=[False, True], terminated=[False, True]),
            trajectory(4, reward=[-1.0] * 4, success=[False] * 4, terminated=[False] * 4),
        ],
        {"env": "toy"},
    )
    info = data.info()
    assert info["length"] == {"min": 2, "mean": 3, "std": 1, "max": 4}
    assert info["return"] == {"min": -4, "mean": -3.5, "std": 0.5, "max": -3}
    assert (info["success_rate"], info["terminated_rate"]) == (0.5, 0.5)
    assert info["metadata"] == {"env": "toy"}
    json.dumps(info, allow_nan=False)


def test_ranges_leave_out_the_zeros_of_final_states():
    data = OfflineDataset.from_trajectories([trajectory(2, start=3, reward=[-1.0, -2.0])])
    columns = data.info()["columns"]
    assert (columns["reward"]["min"], columns["reward"]["max"]) == (-2, -1)
    assert (columns["observation"]["min"], columns["observation"]["max"]) == (3, 5)


def test_sums_do_not_depend_on_the_blocks_they_are_read_in(monkeypatch):
    data = OfflineDataset.from_trajectories(
        [trajectory(n, reward=np.arange(n) + 1.0) for n in (1, 3, 2, 5)]
    )
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", 24)
    assert data._sums("reward").tolist() == [1, 6, 3, 15]


def test_what_is_not_recorded_is_none():
    info = OfflineDataset.from_trajectories([trajectory(1)]).info()
    assert (info["return"], info["success_rate"], info["terminated_rate"]) == (None, None, None)

"""Actions of other units become numbers in [-1, 1], and what they were is written down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.data.actions import ActionRange
from genpol.data.columns import Source
from genpol.data.dataset import OfflineDataset
from genpol.data.sink import ActionRangeSink, MemorySink
from genpol.errors import DatasetError

SOURCE = Source(file="a.hdf5", names={"action": "actions"}, rows=range(100, 1000))


def bounds(low, high):
    return ActionRange(np.atleast_1d(np.float64(low)), np.atleast_1d(np.float64(high)))


def normalized(found, actions, last=None):
    actions = np.asarray(actions)
    last = np.zeros(len(actions), dtype=bool) if last is None else np.array(last)
    return found.normalized(actions, last, SOURCE)


def refused(found, actions):
    with pytest.raises(DatasetError) as caught:
        normalized(found, actions)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trajectory(actions):
    observation = np.zeros((len(actions) + 1, 1))
    return {"observation": observation, "action": np.asarray(actions)}


def test_bounds_become_minus_one_and_one():
    found = normalized(bounds([0, -2], [1, 4]), [[0, -2], [0.5, 1], [1, 4], [0.25, 2.5]])
    assert found.tolist() == [[-1, -1], [0, 0], [1, 1], [-0.5, 0.5]]


def test_bounds_of_float32_are_met_exactly():
    bound = float(np.float32(0.4))
    assert normalized(bounds(-bound, bound), np.float32([[0.4, -0.4, 0]])).tolist() == [[1, -1, 0]]


def test_one_number_is_for_all_dimensions():
    assert normalized(bounds(-2, 2), [[2, 1, -1]]).tolist() == [[1, 0.5, -0.5]]


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=8))
@settings(deadline=None)
def test_bounds_of_minus_one_and_one_change_no_bit(values):
    actions = np.array(values, np.float32)[:, None]
    found = normalized(bounds(-1, 1), actions).astype(np.float32)
    assert found.tobytes() == actions.tobytes()


@given(
    low=st.floats(-1e3, 1e3),
    width=st.floats(1e-3, 1e3),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=8),
)
@settings(deadline=None)
def test_the_metadata_lead_back(low, width, shares):
    actions = (low + width * np.array(shares))[:, None]
    given_range = bounds(low, low + width)
    entries = given_range.describe(1, {})
    low, high = entries["action_low"][0], entries["action_high"][0]
    found = normalized(given_range, actions)
    assert (np.abs(found) <= 1).all()
    back = (low + high) / 2 + (high - low) / 2 * found
    np.testing.assert_allclose(back, actions, atol=1e-9 * (abs(low) + abs(high)))


def test_a_constant_dimension_becomes_zero():
    found = bounds([3, -1], [3, 1])
    assert normalized(found, [[3, 0.5], [3, -0.5]]).tolist() == [[0, 0.5], [0, -0.5]]
    assert normalized(found, [[3.00001, 0]])[0, 0] == 0  # a rounding error of it, no less
    assert "3.1 is outside [3, 3], the range of dimension 0" in refused(found, [[3.1, 0]])


def test_integers_are_counts_if_a_range_is_given():
    found = normalized(bounds(0, 4096), np.array([[0, 2048, 4096]], np.uint16))
    assert found.tolist() == [[-1, 0, 1]]


def test_rounding_is_clipped_and_no_more_than_that():
    found = bounds([-100, -1], [100, 1])
    assert normalized(found, [[100.0009, -1.000009]]).tolist() == [[1, -1]]
    message = refused(found, [[0, 0], [0, 0], [0, -1.1]])
    assert message.startswith(
        "a.hdf5: actions row 102: -1.1 is outside [-1, 1], the range of dimension 1; give another "
        "with action_low= and action_high= of `genpol data convert`"
    )
    assert "100.002 is outside [-100, 100], the range of dimension 0" in refused(
        found, [[100.002, 0]]
    )


def test_what_is_not_finite_is_refused_as_such():
    assert "actions row 101: nan is not a finite number" in refused(bounds(-9, 9), [[0], [np.nan]])
    assert "actions row 100: inf is not a finite number" in refused(bounds(-9, 9), [[np.inf]])


def test_final_states_have_no_action():
    found = normalized(bounds(1, 3), [[2.5], [np.nan], [9]], last=[False, True, True])
    assert found.tolist() == [[0.5], [0], [0]]


def test_a_range_of_another_width_is_refused():
    message = refused(bounds([0, 0], [1, 1]), [[0, 0, 0]])
    assert message.startswith("a.hdf5: actions: is of width 3, but its range is given by 2 numbers")


def test_a_sink_scales_and_writes_it_down():
    sink = MemorySink({"env": "toy"})
    sink.action_range = bounds(0, 10)
    sink.append_trajectory(trajectory([[0, 5], [10, 2.5]]))
    sink.note_action_range()
    data = OfflineDataset(sink.columns(), sink.ends(), sink.metadata)
    assert data.columns["action"].tolist() == [[-1, 0], [1, -0.5], [0, 0]]
    assert data.columns["action"].dtype == np.float32
    assert data.metadata == {"env": "toy", "action_low": [0, 0], "action_high": [10, 10]}
    data.validate()


def test_actions_that_are_scaled_twice_keep_the_first_units():
    first = bounds([0, -4], [10, 4]).describe(2, {})
    second = bounds(-0.5, [0.5, 0]).describe(2, first)
    assert second == {"action_low": [2.5, -2], "action_high": [7.5, 0]}


def test_the_range_of_data_is_that_of_its_steps():
    sink = ActionRangeSink()
    sink.action_range = bounds(0, 1)  # what the file says
    sink.append_trajectory(trajectory([[3, -7], [5, -7]]))
    rows = {"observation": np.zeros((3, 1)), "action": np.array([[4, -7], [8, -7], [99, 99]])}
    sink.append_rows(rows, [False, False, True])
    found = sink.found()
    assert (found.low.tolist(), found.high.tolist()) == ([3, -7], [8, -7])
    assert sink.num_trajectories == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_range_of_data_that_is_not_finite_is_refused(value):
    with pytest.raises(DatasetError, match=r"actions row 101: (nan|inf) is not a finite number"):
        ActionRangeSink().append_trajectory(trajectory([[1.0], [value]]), source=SOURCE)

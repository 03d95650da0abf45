"""Chunks that overlap in time: which action is due when, and what binds a chunk to the last one."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.deploy.chunks import ChunkPlayer, kept_weights
from genpol.errors import ConfigError


def ramp(first: float, length: int = 4) -> list[list[float]]:
    """Return a chunk whose actions tell what they are: first, first + 1, ..."""
    return [[first + i] for i in range(length)]


def flat(value: float, length: int = 8) -> list[list[float]]:
    return [[value]] * length


def played(player: ChunkPlayer, ticks: range) -> list[float | None]:
    found = [player.action(tick) for tick in ticks]
    return [None if action is None else action[0] for action in found]


# --- when to ask -------------------------------------------------------------------------------


def test_a_chunk_is_due_at_once_and_then_every_so_many_actions() -> None:
    player = ChunkPlayer(3)
    asked = []
    for tick in range(10):
        if player.due(tick):
            player.asked(tick)
            asked.append(tick)
    assert asked == [0, 3, 6, 9]


def test_a_question_that_comes_late_moves_those_behind_it() -> None:
    player = ChunkPlayer(3)
    player.asked(0)
    assert player.due(5)  # ticks 3 and 4 were skipped
    player.asked(5)
    assert [player.due(tick) for tick in range(6, 9)] == [False, False, True]


def test_nothing_is_played_before_there_is_a_chunk() -> None:
    player = ChunkPlayer(2)
    assert player.action(0) is None
    player.asked(0)
    assert player.action(0) is None


# --- which action ------------------------------------------------------------------------------


def test_each_tick_has_its_action_and_none_is_invented_behind_the_end() -> None:
    player = ChunkPlayer(2)
    player.give(5, ramp(10.0), 5)
    assert played(player, range(4, 11)) == [None, 10.0, 11.0, 12.0, 13.0, None, None]


def test_a_late_chunk_skips_the_actions_that_are_past() -> None:
    player = ChunkPlayer(4)
    player.give(0, ramp(10.0), 3)
    assert played(player, range(3, 5)) == [13.0, None]


def test_a_chunk_that_is_late_altogether_has_nothing_to_play() -> None:
    player = ChunkPlayer(4)
    player.give(0, ramp(10.0), 4)
    assert played(player, range(4, 6)) == [None, None]


def test_the_old_chunk_goes_on_while_the_new_one_is_on_its_way() -> None:
    player = ChunkPlayer(2)
    player.give(0, ramp(10.0), 0)
    player.asked(2)  # which takes until tick 4
    assert played(player, range(4)) == [10.0, 11.0, 12.0, 13.0]
    player.give(2, ramp(20.0), 4)
    assert played(player, range(4, 7)) == [22.0, 23.0, None]


def test_all_numbers_of_an_action_belong_together() -> None:
    player = ChunkPlayer(1)
    player.give(0, [[1.0, -1.0, 0.5], [2.0, -2.0, 0.25]], 0)
    assert player.action(1) == [2.0, -2.0, 0.25]


def test_who_changes_an_action_does_not_change_the_chunk() -> None:
    player = ChunkPlayer(1)
    chunk = ramp(1.0)
    player.give(0, chunk, 0)
    action = player.action(0)
    assert action is not None
    action[0] = 99.0
    assert player.action(0) == [1.0]
    assert chunk == ramp(1.0)


def test_forgetting_begins_anew() -> None:
    player = ChunkPlayer(4, blend_steps=3)
    player.asked(0)
    player.give(0, flat(1.0), 0)
    player.asked(4)
    player.give(4, flat(2.0), 4)
    player.forget()
    assert player.action(5) is None
    assert player.due(5)
    player.give(5, flat(7.0), 5)  # and nothing of before is blended in
    assert player.action(5) == [7.0]


# --- blending ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_a_chunk_takes_over_linearly(steps: int) -> None:
    player = ChunkPlayer(2, blend_steps=steps)
    player.give(0, flat(-1.0), 0)
    player.give(2, flat(1.0), 2)
    found = played(player, range(2, 8))
    wanted = [-1.0 + 2.0 * min(1.0, (i + 1) / (steps + 1)) for i in range(6)]
    assert found == pytest.approx(wanted)
    # From the old value, which was played before, to the new one in steps of one size.
    path = np.array([-1.0, *found[: steps + 1]], dtype=float)
    np.testing.assert_allclose(np.diff(path), 2.0 / (steps + 1))


def test_blending_begins_where_the_chunk_comes_not_where_it_was_asked_for() -> None:
    player = ChunkPlayer(2, blend_steps=3)
    player.give(0, flat(0.0, 12), 0)
    player.give(2, flat(4.0, 12), 6)
    assert played(player, range(6, 11)) == pytest.approx([1.0, 2.0, 3.0, 4.0, 4.0])


def test_blending_follows_both_chunks_as_they_move() -> None:
    player = ChunkPlayer(2, blend_steps=1)
    player.give(0, ramp(0.0, 8), 0)
    player.give(2, ramp(100.0, 8), 2)
    assert played(player, range(2, 5)) == pytest.approx([0.5 * (2.0 + 100.0), 101.0, 102.0])


def test_where_the_old_chunk_ends_the_new_one_goes_on() -> None:
    player = ChunkPlayer(2, blend_steps=6)
    player.give(0, flat(0.0, 3), 0)
    player.give(2, flat(7.0), 2)
    found = played(player, range(2, 9))
    assert found[0] == pytest.approx(1.0)
    assert all(a is not None and 1.0 <= a <= 7.0 for a in found)
    assert found[-1] == 7.0


def test_the_first_chunk_is_not_blended_with_anything() -> None:
    player = ChunkPlayer(2, blend_steps=4)
    player.give(0, flat(3.0), 0)
    assert played(player, range(3)) == [3.0, 3.0, 3.0]


def test_blending_that_takes_longer_than_a_chunk_is_played_does_not_jump() -> None:
    """The next chunk comes before the last one has taken over."""
    values = [0.0, 1.0, 0.0, 1.0, 0.0]
    player = ChunkPlayer(2, blend_steps=5)
    found: list[float] = []
    for tick in range(10):
        if tick % 2 == 0:
            player.give(tick, flat(values[tick // 2], 12), tick)
        action = player.action(tick)
        assert action is not None
        found.append(action[0])
    # A chunk that takes over in six equal steps changes an action by a sixth of what lies between.
    assert max(abs(b - a) for a, b in pairwise(found)) <= 1.0 / 6.0 + 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [({"action_steps": 0}, "action_steps"), ({"action_steps": 1, "blend_steps": -1}, "blend")],
)
def test_numbers_out_of_bounds_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ChunkPlayer(**options)


# --- how much a chunk is bound -----------------------------------------------------------------


def published(horizon: int, delay: int, carried_out: int) -> list[float]:
    """Return the soft mask of equation 5 of arXiv 2506.07339, as it is printed there.

    W_i = 1 for i < d; c_i (e^{c_i} - 1)/(e - 1) for d <= i < H - s; 0 for i >= H - s, where
    c_i = (H - s - i)/(H - s - d + 1).
    """
    weights = []
    for i in range(horizon):
        c = (horizon - carried_out - i) / (horizon - carried_out - delay + 1)
        soft = c * (math.exp(c) - 1.0) / (math.e - 1.0)
        where = [i < delay, i < horizon - carried_out]
        weights.append(float(np.select(where, [1.0, soft], 0.0)))
    return weights


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_weights_are_those_of_equation_5(horizon: int, data: st.DataObject) -> None:
    carried_out = data.draw(st.integers(0, horizon))
    delay = data.draw(st.integers(0, horizon - carried_out))
    found = kept_weights(horizon, delay=delay, left=horizon - carried_out)
    assert found == pytest.approx(published(horizon, delay, carried_out), abs=1e-12)


def test_weights_are_known_numbers() -> None:
    """H = 6, s = 2, d = 1: c = 3/4, 2/4, 1/4."""
    found = kept_weights(6, delay=1, left=4)
    assert found == pytest.approx([1.0, 0.48756, 0.18877, 0.04132, 0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("left", range(1, 9))
@pytest.mark.parametrize("delay", range(9))
def test_weights_fall_from_one_to_zero(left: int, delay: int) -> None:
    delay = min(delay, left)
    found = kept_weights(8, delay=delay, left=left)
    assert found[:delay] == [1.0] * delay
    assert found[left:] == [0.0] * (8 - left)
    between = found[delay:left]
    assert all(0.0 < x < 1.0 for x in between)
    assert all(a > b for a, b in pairwise(between))


def test_a_policy_without_delay_is_bound_softly_from_the_first_action_on() -> None:
    found = kept_weights(4, delay=0, left=4)
    assert 0.5 < found[0] < 1.0
    assert found[3] > 0.0


@pytest.mark.parametrize("delay", [0, 3])
def test_nothing_that_is_left_binds_nothing(delay: int) -> None:
    assert kept_weights(5, delay=delay, left=0) == [0.0] * 5


def test_what_is_all_carried_out_meanwhile_is_bound_wholly() -> None:
    assert kept_weights(5, delay=3, left=3) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert kept_weights(3, delay=3, left=3) == [1.0, 1.0, 1.0]

"""The control loop in time: ticks, chunks and episodes, by a clock that is not real."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from genpol.deploy.contract import Channel, loosest
from genpol.deploy.links import Observed
from genpol.deploy.safety import Mode

PERIOD = 2.0**-6  # of the rig
HOLD = 3  # ticks
Make = Callable[..., Any]

# --- the clock ---------------------------------------------------------------------------------


def test_ticks_begin_at_their_deadlines(make_rig: Make) -> None:
    rig = make_rig()
    report = rig.run(500)
    assert rig.robot.reads[:499] == list(range(1, 500))
    assert [tick.number for tick in rig.ticks] == list(range(500))
    assert [tick.time_s for tick in rig.ticks] == [k * PERIOD for k in range(500)]
    assert (report.ticks, report.skipped, report.late) == (500, 0, 0)
    assert set(report.jitter_s) == {0.0}


def test_late_wake_ups_do_not_add_up(make_rig: Make) -> None:
    draw = random.Random(0)
    late: list[float] = [0.0]  # the first tick does not sleep

    def oversleep() -> float:
        late.append(draw.randrange(0, 64) * PERIOD / 256)
        return late[-1]

    rig = make_rig(oversleep=oversleep)
    report = rig.run(2000)
    begins = [0.0, *rig.robot.reads[:1999]]
    assert begins == [k + late[k] / PERIOD for k in range(2000)]
    assert list(report.jitter_s) == late[:2000]
    assert (report.skipped, report.late) == (0, 0)


def test_what_a_tick_takes_does_not_move_the_next(make_rig: Make) -> None:
    rig = make_rig(periods=lambda tick: (tick % 5) / 16)
    report = rig.run(100)
    assert rig.robot.reads[:99] == list(range(1, 100))
    assert list(report.work_s) == [(k % 5) / 16 * PERIOD for k in range(100)]


@pytest.mark.parametrize(("seconds", "ticks"), [(0.0, 0), (1.0, 64), (1.001, 65), (0.3, 20)])
def test_a_run_has_as_many_ticks_as_its_time_asks_for(
    make_rig: Make, seconds: float, ticks: int
) -> None:
    rig = make_rig()
    assert rig.run(seconds / PERIOD).ticks == len(rig.ticks) == ticks


def test_every_tick_sends_exactly_one_command(make_rig: Make) -> None:
    """Whatever is wrong in it."""

    def shown(tick: int) -> Sequence[float] | None:
        return {1: None, 2: (math.nan, 0.0), 3: (0.0,), 4: None}.get(tick % 8, (0.0, float(tick)))

    rig = make_rig(shown, periods=lambda tick: (tick % 7) / 2)
    rig.robot.stops[40] = "enough"
    rig.robot.resets.add(60)
    report = rig.run(90)
    assert report.ticks == len(rig.ticks) == 90
    assert [math.floor(at) for at, _ in rig.robot.sent if at < 90] == list(range(90))
    assert all(math.isfinite(x) for _, command in rig.robot.sent for x in command.values)


# --- a tick that takes too long ----------------------------------------------------------------


def test_a_tick_that_takes_too_long_skips_ticks_and_the_grid_stays(
    make_rig: Make, elbow: Make
) -> None:
    rig: Any = make_rig(
        contract=elbow(20, 20),
        while_looking=lambda tick: rig.clock.sleep(2.5 * PERIOD * (tick.number == 3)),
    )
    report = rig.run(10)
    assert [tick.number for tick in rig.ticks] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert rig.robot.reads[:8] == [1, 2, 3, 5.5, 6, 7, 8, 9]
    assert (report.ticks, report.skipped, report.late) == (9, 1, 1)
    # The chunk goes on where it would be by now.
    assert rig.values == pytest.approx([1e-3 * tick.number for tick in rig.ticks])


def test_a_long_pause_is_not_made_up_for(make_rig: Make) -> None:
    rig: Any = make_rig(
        while_looking=lambda tick: rig.clock.sleep(30 * PERIOD * (tick.number == 3)),
        link_timeout_s=10.0,
        policy_timeout_s=10.0,
    )
    report = rig.run(50)
    assert (report.ticks, report.skipped, report.late) == (50 - 29, 29, 1)
    after = [at for at, _ in rig.robot.sent[4 : len(rig.ticks)]]
    assert set(np.diff(after)) == {1.0}


# --- the policy is slow ------------------------------------------------------------------------


@pytest.mark.parametrize(("horizon", "action_steps"), [(6, 2), (6, 6), (2, 1), (1, 1)])
def test_without_an_answer_the_chunk_is_played_out_then_held_then_damped(
    make_rig: Make, elbow: Make, horizon: int, action_steps: int
) -> None:
    rig = make_rig(
        contract=elbow(horizon, action_steps),
        periods=lambda tick: 0.25 if tick == 0 else math.inf,
        policy_timeout_s=100.0,
    )
    report = rig.run(20)
    rest = 20 - horizon - HOLD
    assert rig.modes == [Mode.RUN] * horizon + [Mode.HOLD] * HOLD + [Mode.DAMP] * rest
    assert rig.values[:horizon] == pytest.approx([1e-3 * i for i in range(horizon)])
    assert set(rig.values[horizon:]) == {rig.values[horizon - 1]}
    assert [tick for tick, _ in rig.policy.asked] == [0, action_steps]
    assert report.unanswered == 20 - horizon
    assert report.interventions == {"hold": HOLD, "damp": rest}
    assert report.stop_reason == ""


def test_an_answer_that_comes_at_last_ends_the_silence_where_it_is_by_then(
    make_rig: Make, elbow: Make
) -> None:
    rig = make_rig(
        contract=elbow(8, 1),
        periods=lambda tick: 0.25 if tick != 2 else 12.0,
        chunk=lambda tick, _: [[0.01 * tick + 1e-3 * i] for i in range(8)],
        policy_timeout_s=100.0,
    )
    rig.run(18)
    # The chunk of tick 1 goes to tick 8; that of tick 2 comes when all of it is past.
    assert rig.modes == [Mode.RUN] * 9 + [Mode.HOLD] * 3 + [Mode.DAMP] * 2 + [Mode.RUN] * 4
    assert rig.values[8] == pytest.approx(0.017)
    assert rig.values[14:] == pytest.approx([0.14, 0.15, 0.16, 0.17])


@pytest.mark.parametrize("wait", [0.0, 0.5])
@pytest.mark.parametrize("periods", [0.25, 0.75, 1.25, 1.75, 2.25, 4.5])
def test_the_policy_is_told_the_delay_with_which_its_chunk_comes(
    make_rig: Make, elbow: Make, periods: float, wait: float
) -> None:
    """As real-time chunking needs it: the actions that are carried out before."""
    rig = make_rig(
        contract=elbow(16, 6),
        periods=lambda tick: periods,
        chunk=lambda tick, _: [[1e-3 * tick]] * 16,
        policy_wait=wait,
    )
    rig.run(60)
    came: dict[int, int] = {}
    for tick in rig.ticks:
        if tick.target is not None:
            came.setdefault(round(1e3 * tick.target[0]), tick.number)
    asked = [tick for tick in rig.policy.delays if tick in came]
    assert len(asked) > 5
    assert rig.policy.delays[0] == 0  # nothing is known yet
    for tick in asked[1:]:
        assert rig.policy.delays[tick] == came[tick] - tick, tick


def test_the_policy_may_take_its_share_of_a_period_and_no_more(make_rig: Make) -> None:
    rig = make_rig(periods=lambda tick: 100.0, policy_wait=0.25, policy_timeout_s=100.0)
    report = rig.run(10)
    assert set(report.work_s) == {0.25 * PERIOD}


def test_a_policy_that_never_answers_stops_the_robot(make_rig: Make) -> None:
    rig = make_rig(periods=lambda tick: math.inf, policy_timeout_s=10 * PERIOD)
    report = rig.run(20)
    assert report.stop_reason == f"the policy has not answered for {10 * PERIOD:g} s"
    assert rig.modes[:10] == [Mode.HOLD] * HOLD + [Mode.DAMP] * (10 - HOLD)
    assert set(rig.modes[10:]) == {Mode.STOP}


def test_chunks_blend_as_the_settings_say(make_rig: Make, elbow: Make) -> None:
    rig = make_rig(
        contract=elbow(8, 4),
        chunk=lambda tick, _: [[0.3 if tick >= 4 else 0.0]] * 8,
        blend_steps=2,
    )
    rig.run(8)
    assert rig.values == pytest.approx([0.0] * 4 + [0.1, 0.2, 0.3, 0.3])


def test_commands_are_in_the_robot_s_units(make_rig: Make, elbow: Make) -> None:
    contract = elbow(
        1,
        1,
        action=(loosest("elbow", 10.0, 30.0, PERIOD, unit="N m", interface="effort"),),
        commands=((10.0, 30.0),),
    )
    actions = [-1.0, 0.0, 0.5, 1.0]
    rig = make_rig(contract=contract, chunk=lambda tick, _: [[actions[tick]]])
    rig.run(4)
    assert rig.values == pytest.approx([10.0, 20.0, 25.0, 30.0])


# --- episodes ----------------------------------------------------------------------------------


def test_an_answer_that_belongs_to_the_episode_before_is_ignored(
    make_rig: Make, elbow: Make
) -> None:
    def shown(tick: int) -> Observed:
        return Observed((0.0, float(tick)), float(tick), tick == 5)

    rig = make_rig(
        shown,
        contract=elbow(6, 2),
        periods=lambda tick: {4: 1.75, 6: 0.75}.get(tick, 0.25),
        chunk=lambda tick, _: [[0.1 * (tick + 1)]] * 6,
    )
    rig.run(12)
    targets = [None if tick.target is None else round(tick.target[0], 6) for tick in rig.ticks]
    # The question of tick 4 is answered in tick 6, and what is needed is asked for only then; which
    # takes until tick 7.
    assert targets == [0.1, 0.1, 0.3, 0.3, 0.3, None, None, 0.7, 0.9, 0.9, 1.1, 1.1]
    assert rig.policy.anew == [0, 6]


def test_an_episode_that_begins_forgets_the_chunk_and_asks_at_once(
    make_rig: Make, elbow: Make
) -> None:
    def shown(tick: int) -> Observed:
        return Observed((0.0, float(tick)), float(tick), tick == 5)

    rig = make_rig(shown, contract=elbow(8, 4))
    rig.run(12)
    assert [tick for tick, _ in rig.policy.asked] == [0, 4, 5, 9]
    assert rig.policy.anew == [0, 5]


def test_an_episode_that_begins_with_a_bad_observation_begins_with_the_next(
    make_rig: Make, elbow: Make
) -> None:
    def shown(tick: int) -> Observed:
        x = math.nan if tick == 5 else 0.0
        return Observed((x, float(tick)), float(tick), tick == 5)

    rig = make_rig(shown, contract=elbow(8, 4))
    rig.run(12)
    assert rig.policy.anew == [0, 6]


# --- history -----------------------------------------------------------------------------------


def test_the_policy_sees_the_last_observations_with_the_goal_behind_them(
    make_rig: Make, elbow: Make
) -> None:
    contract = elbow(
        1,
        1,
        observation=tuple(Channel(name=x) for x in ("a", "b", "goal[0]", "goal[1]")),
        observation_steps=3,
        goal_dim=2,
        inputs={"observation": (8,), "noise": (0,)},
    )

    def shown(tick: int) -> Observed:
        values = (float(tick), 10.0 + tick, 100.0 + tick, 200.0 + tick)
        if tick == 3:
            values = (math.nan, *values[1:])
        return Observed(values, float(tick), tick == 6)

    rig = make_rig(shown, contract=contract)
    rig.run(8, first=(0.0, 10.0, 100.0, 200.0))
    pairs = {tick: (seen[:6], seen[6:]) for tick, seen in rig.policy.asked}
    assert pairs == {
        0: ((0, 10, 0, 10, 0, 10), (100, 200)),
        1: ((0, 10, 0, 10, 1, 11), (101, 201)),
        2: ((0, 10, 1, 11, 2, 12), (102, 202)),
        4: ((1, 11, 2, 12, 4, 14), (104, 204)),  # what is not sound is not remembered
        5: ((2, 12, 4, 14, 5, 15), (105, 205)),
        6: ((6, 16, 6, 16, 6, 16), (106, 206)),  # an episode begins
        7: ((6, 16, 6, 16, 7, 17), (107, 207)),
    }


def test_a_history_is_kept_between_questions(make_rig: Make, elbow: Make) -> None:
    contract = elbow(4, 3, observation_steps=2, inputs={"observation": (4,), "noise": (0,)})
    rig = make_rig(contract=contract)
    rig.run(7)
    assert rig.policy.asked[1:] == [(3, (0.0, 2.0, 0.0, 3.0)), (6, (0.0, 5.0, 0.0, 6.0))]

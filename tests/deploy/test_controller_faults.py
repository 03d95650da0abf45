"""The control loop when something is wrong: it holds, it damps, it stops, and it says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from genpol.deploy.contract import Channel
from genpol.deploy.links import Observed
from genpol.deploy.safety import JointLimits, Mode

PERIOD = 2.0**-6  # of the rig
HOLD = 3  # ticks
SLOW = JointLimits(name="elbow", unit="rad", low=-1.0, high=1.0, velocity=2.0, acceleration=16.0)

Show = Callable[[int], Sequence[float] | Observed | None]
Make = Callable[..., Any]

# --- observations that must not be acted on ----------------------------------------------------

BAD_FROM, BAD_TO = 10, 20


def aged(periods: float) -> Callable[[int], Observed]:
    def shown(tick: int) -> Observed:
        return Observed((0.0, float(tick)), tick - periods)

    return shown


BAD: dict[str, tuple[Show, str]] = {
    "nan": (lambda tick: (math.nan, float(tick)), "observation: not finite"),
    "inf": (lambda tick: (0.0, math.inf), "observation: not finite"),
    "minus inf": (lambda tick: (-math.inf, 0.0), "observation: not finite"),
    "too short": (lambda tick: (float(tick),), "observation: size"),
    "too long": (lambda tick: (0.0, 0.0, float(tick)), "observation: size"),
    "empty": (lambda tick: (), "observation: size"),
    "too old": (aged(2.5), "observation: too old"),
    "ancient": (aged(1e6), "observation: too old"),
    "from the future": (aged(-2.5), "observation: from the future"),
    "of no time": (
        lambda tick: Observed((0.0, float(tick)), math.nan),
        "observation: from the future",
    ),
    "none": (lambda tick: None, "observation: none"),
}


def spell(bad: Show) -> Show:
    """Return observations that are bad for ten ticks."""
    return lambda tick: bad(tick) if BAD_FROM <= tick < BAD_TO else (0.0, float(tick))


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(("horizon", "action_steps"), [(1, 1), (4, 2)])
def test_what_is_wrong_with_an_observation_is_told_and_it_is_not_acted_on(
    make_rig: Make, elbow: Make, name: str, horizon: int, action_steps: int
) -> None:
    bad, reason = BAD[name]
    contract = elbow(horizon, action_steps, action=(SLOW,))

    def run(shown: Show) -> Any:
        rig = make_rig(
            spell(shown),
            contract=contract,
            chunk=lambda tick, _: [[0.04 * (tick + i)] for i in range(horizon)],
            link_timeout_s=100.0,
        )
        rig.run(30)
        return rig

    rig, silent = run(bad), run(lambda tick: None)
    assert not {tick for tick, _ in rig.policy.asked} & set(range(BAD_FROM, BAD_TO))
    assert all(math.isfinite(x) for _, seen in rig.policy.asked for x in seen)
    assert rig.controller.report.interventions[reason] == BAD_TO - BAD_FROM
    # It moves when that begins; a bad observation does what none does: nothing but hold and damp.
    assert rig.values == silent.values
    assert rig.modes == silent.modes
    left = horizon - action_steps
    wanted = [Mode.RUN] * left + [Mode.HOLD] * HOLD + [Mode.DAMP] * (10 - left - HOLD)
    assert rig.modes[BAD_FROM:BAD_TO] == wanted
    assert rig.modes[BAD_TO:] == [Mode.RUN] * 10
    assert rig.controller.report.stop_reason == ""


def test_ages_within_the_bound_are_acted_on_and_told(make_rig: Make) -> None:
    rig = make_rig(aged(1.5))
    report = rig.run(10)
    assert rig.modes == [Mode.RUN] * 10
    assert list(report.age_s) == [0.0] + [1.5 * PERIOD] * 9


def test_a_frozen_sensor_is_not_acted_on_until_it_moves_again(make_rig: Make) -> None:
    rig = make_rig(
        lambda tick: (0.5, 0.5) if 10 <= tick < 30 else (0.0, float(tick)), frozen_s=5 * PERIOD
    )
    report = rig.run(40)
    asked = {tick for tick, _ in rig.policy.asked}
    assert asked == set(range(15)) | set(range(30, 40))
    assert rig.modes[15:30] == [Mode.HOLD] * HOLD + [Mode.DAMP] * (15 - HOLD)
    assert rig.modes[30:] == [Mode.RUN] * 10
    assert report.interventions["observation: frozen"] == 15
    assert set(rig.values[14:30]) == {rig.values[14]}


def test_a_robot_that_is_not_told_to_freeze_may_stand_still(make_rig: Make) -> None:
    rig = make_rig(lambda tick: (0.5, 0.5), frozen_s=0.0)
    rig.run(200)
    assert rig.modes == [Mode.RUN] * 200


@pytest.mark.parametrize("name", ["nan", "none", "too old", "too short"])
def test_the_policy_is_not_blamed_for_answers_that_nobody_fetched(
    make_rig: Make, elbow: Make, name: str
) -> None:
    """It answers within two periods, and then there is nothing to ask it about for long."""
    rig = make_rig(
        spell(BAD[name][0]),
        contract=elbow(6, 2),
        periods=lambda tick: 1.75,
        policy_timeout_s=5 * PERIOD,
        link_timeout_s=100.0,
    )
    report = rig.run(30)
    assert report.stop_reason == ""
    assert rig.modes[-1] is Mode.RUN


# --- stops and resets --------------------------------------------------------------------------


def test_a_silent_robot_is_stopped_and_stays_so_when_it_is_heard_again(make_rig: Make) -> None:
    rig = make_rig(
        lambda tick: None if 10 <= tick < 20 else (0.0, float(tick)), link_timeout_s=5 * PERIOD
    )
    report = rig.run(40)
    assert rig.modes[:10] == [Mode.RUN] * 10
    stopped = rig.modes.index(Mode.STOP)
    assert 14 <= stopped <= 15  # the last one was heard in tick 9
    assert set(rig.modes[10:stopped]) <= {Mode.HOLD, Mode.DAMP}
    assert set(rig.modes[stopped:]) == {Mode.STOP}
    assert "the link is lost" in report.stop_reason
    assert report.interventions["observation: none"] == 10
    assert set(rig.values[stopped:]) == {rig.values[stopped]}


def test_silence_that_is_shorter_than_the_timeout_does_not_stop(make_rig: Make) -> None:
    rig = make_rig(lambda tick: None if tick % 5 else (0.0, float(tick)), link_timeout_s=5 * PERIOD)
    report = rig.run(40)
    assert report.stop_reason == ""
    assert Mode.STOP not in rig.modes


def test_a_reset_at_rest_goes_on_and_the_policy_begins_anew(make_rig: Make, elbow: Make) -> None:
    rig = make_rig(contract=elbow(8, 4))
    rig.robot.stops[10] = "somebody pressed the button"
    rig.robot.resets.add(20)
    report = rig.run(30)
    assert rig.modes == [Mode.RUN] * 10 + [Mode.STOP] * 10 + [Mode.RUN] * 10
    assert report.interventions["stop: somebody pressed the button"] == 1
    assert report.interventions["reset"] == 1
    assert report.stop_reason == ""
    assert rig.policy.anew == [0, 20]
    assert [tick for tick, _ in rig.policy.asked if tick >= 20] == [20, 24, 28]
    assert rig.values[20:] == pytest.approx([1e-3 * k for k in range(20, 30)])


def test_a_reset_is_refused_while_the_robot_moves(make_rig: Make, elbow: Make) -> None:
    contract = elbow(1, 1, action=(replace(SLOW, acceleration=4.0),))
    rig = make_rig(contract=contract, chunk=lambda tick, _: [[1.0]])
    rig.robot.stops[20] = "halt"
    rig.robot.resets |= {21, 22}
    report = rig.run(40)
    assert rig.values[21] > rig.values[20]  # it was moving
    assert set(rig.modes[20:]) == {Mode.STOP}
    refused = [what for what in report.interventions.elements() if "reset refused" in what]
    assert len(refused) == 2
    assert "still moves" in refused[0]
    assert report.stop_reason == "halt"
    assert rig.policy.anew == [0]


def test_a_reset_without_an_observation_does_not_go_on_with_the_old_chunk(
    make_rig: Make, elbow: Make
) -> None:
    """What was planned before the stop is of another time."""
    rig = make_rig(
        lambda tick: None if 20 <= tick < 25 else (0.0, float(tick)),
        contract=elbow(100, 50),
        link_timeout_s=100.0,
    )
    rig.robot.stops[10] = "halt"
    rig.robot.resets.add(20)
    rig.run(30)
    assert set(rig.modes[10:25]) == {Mode.STOP}  # until it is known where the robot stands
    assert rig.modes[25:] == [Mode.RUN] * 5
    assert rig.policy.anew == [0, 25]


def test_a_robot_that_was_moved_while_it_was_stopped_goes_on_from_there(
    make_rig: Make, elbow: Make
) -> None:
    """A joint that is told positions, which somebody moves by hand from 0 to 0.8."""
    joint = JointLimits(name="elbow", unit="rad", low=-1.0, high=1.0, velocity=1.0)
    contract = elbow(
        observation=(Channel(name="elbow.position", unit="rad"), Channel(name="clock")),
        action=(joint,),
        commands=((-1.0, 1.0),),
    )
    rig = make_rig(
        lambda tick: (0.8 if tick >= 15 else 0.0, float(tick)),
        contract=contract,
        chunk=lambda tick, _: [[0.0]] * contract.horizon,
    )
    rig.robot.stops[10] = "halt"
    rig.robot.resets.add(25)
    rig.run(40)
    assert rig.modes[10:25] == [Mode.STOP] * 15
    assert rig.modes[25:] == [Mode.RUN] * 15
    assert rig.values[25] == pytest.approx(0.8 - 1.0 * PERIOD)
    steps = np.abs(np.diff(rig.values[25:]))
    assert steps.max() <= 1.0 * PERIOD + 1e-9


def test_delay_that_lasts_is_a_stop(make_rig: Make) -> None:
    """Or it would be taken for new once the fast messages are forgotten."""

    def late(tick: int) -> Observed:
        return Observed((0.0, float(tick)), tick - 20.0 * (10 <= tick < 60))

    report = make_rig(late, link_timeout_s=10 * PERIOD).run(80)
    assert report.stop_reason.startswith("observations are too old")
    assert report.interventions["damp"] < 12


def test_a_reset_does_not_help_while_what_stopped_it_lasts(make_rig: Make) -> None:
    rig = make_rig()
    rig.policy.fails[10] = "the policy's process ended (SIGKILL)"
    rig.robot.resets |= set(range(30, 40))
    report = rig.run(50)
    stopped = rig.modes.index(Mode.STOP)
    assert set(rig.modes[stopped:]) == {Mode.STOP}
    assert report.stop_reason == "the policy's process ended (SIGKILL)"


def test_a_request_of_the_robot_s_side_stops_it_with_its_reason(make_rig: Make) -> None:
    rig = make_rig()
    rig.robot.stops[5] = "the robot's side asked for it"
    report = rig.run(10)
    assert rig.modes == [Mode.RUN] * 5 + [Mode.STOP] * 5
    assert report.stop_reason == "the robot's side asked for it"
    assert set(rig.values[5:]) == {rig.values[4]}


def test_the_first_reason_is_the_one_that_is_told(make_rig: Make) -> None:
    rig = make_rig()
    rig.robot.stops |= {5: "first", 6: "second"}
    assert rig.run(10).stop_reason == "first"


def test_a_policy_that_ended_stops_the_robot_and_is_not_asked_again(
    make_rig: Make, elbow: Make
) -> None:
    rig = make_rig(contract=elbow(8, 4))
    rig.policy.fails[10] = "the policy's process ended (SIGSEGV)"
    report = rig.run(40)
    stopped = rig.modes.index(Mode.STOP)
    # It looks every tenth of a second.
    assert 10 <= stopped <= 10 + math.ceil(0.1 / PERIOD)
    assert set(rig.modes[stopped:]) == {Mode.STOP}
    assert report.stop_reason == "the policy's process ended (SIGSEGV)"
    assert report.interventions["stop: the policy's process ended (SIGSEGV)"] == 1
    assert max(tick for tick, _ in rig.policy.asked) < stopped

"""A run of the control loop: where it begins, how it ends, and what is told of it."""

from __future__ import annotations

import gc
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from genpol.deploy import controller as controlling
from genpol.deploy.contract import Channel, Contract
from genpol.deploy.controller import ControllerSettings, Tick
from genpol.deploy.links import Link, Observed
from genpol.deploy.safety import Command, JointLimits, Mode
from genpol.deploy.start import LinkError, await_robot, start_commands, take_priority
from genpol.errors import ConfigError

PERIOD = 2.0**-6  # of the rig
SLOW = JointLimits(name="elbow", unit="rad", low=-1.0, high=1.0, velocity=2.0, acceleration=16.0)

Make = Callable[..., Any]

# --- where it begins ---------------------------------------------------------------------------

JOINTS = (
    replace(SLOW, name="waist"),
    replace(SLOW, name="wheel", interface="velocity", neutral=0.25),
    replace(SLOW, name="motor", interface="effort"),
)


def robot_with(elbow: Make, *names: str) -> Contract:
    made: Contract = elbow(
        observation=tuple(Channel(name=name) for name in names),
        action=JOINTS,
        commands=((-1.0, 1.0),) * 3,
        inputs={"observation": (len(names),), "noise": (0,)},
    )
    return made


def test_positions_begin_where_the_robot_stands_others_at_what_does_nothing(elbow: Make) -> None:
    contract = robot_with(elbow, "wheel.position", "waist.velocity", "waist.position")
    assert start_commands(contract, Observed((9.0, 8.0, -0.5), 0.0)) == [-0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("wheel.position", "waist.velocity"), (0.0, 0.0)),
        (("waist.position",), (math.nan,)),
        (("x", "waist.position"), (0.0,)),
    ],
)
def test_a_robot_that_does_not_tell_where_it_stands_is_refused(
    elbow: Make, names: tuple[str, ...], values: tuple[float, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"'waist': is told positions, but.*start=") as caught:
        start_commands(robot_with(elbow, *names), Observed(values, 0.0))
    assert "\n" not in str(caught.value)


def test_the_first_command_goes_on_from_where_the_robot_stands(make_rig: Make, elbow: Make) -> None:
    """Which the policy wants elsewhere."""
    contract = elbow(1, 1, action=(SLOW,))
    first = Observed((-0.75, 0.0), 0.0)
    start = start_commands(contract, first)
    rig = make_rig(contract=contract, chunk=lambda tick, _: [[1.0]], start=start)
    rig.run(4, first)
    sent = [command.values[0] for _, command in rig.robot.sent]
    assert abs(sent[0] + 0.75) <= 16.0 * PERIOD**2 * (1 + 1e-9)


def test_tidying_up_before_the_first_tick_costs_no_tick(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has much loaded takes a quarter of a second to collect its garbage."""
    rig = make_rig()
    monkeypatch.setattr("gc.collect", lambda *_: rig.clock.sleep(16 * PERIOD))
    report = rig.run(50)
    assert (report.ticks, report.skipped, report.late) == (50, 0, 0)


# --- how it ends -------------------------------------------------------------------------------


@pytest.fixture
def moving(make_rig: Make, elbow: Make) -> Make:
    """Return a maker of rigs whose joint moves as fast as it may."""
    contract = elbow(action=(SLOW,))
    return lambda **options: make_rig(contract=contract, chunk=lambda tick, _: [[1.0]], **options)


def test_a_run_ends_at_rest_within_the_limits(moving: Make) -> None:
    rig = moving()
    report = rig.run(12)
    sent = np.array([0.0, 0.0, *(command.values[0] for _, command in rig.robot.sent)])
    speed = np.abs(np.diff(sent)) / PERIOD
    assert speed[12] > 1.0  # it was moving
    assert speed.max() <= SLOW.velocity * (1 + 1e-9)
    assert (np.abs(np.diff(sent, 2)) / PERIOD**2).max() <= SLOW.acceleration * (1 + 1e-9)
    assert sent[-1] == sent[-2]
    assert rig.safety.at_rest
    assert {command.mode for command in rig.settling} == {Mode.STOP}
    times = [at for at, _ in rig.robot.sent]
    assert np.diff(times) == pytest.approx(1.0)
    assert report.ticks == 12


def test_to_end_is_no_intervention(make_rig: Make) -> None:
    rig = make_rig()
    report = rig.run(20)
    assert report.stop_reason == ""
    assert report.events == []
    assert report.interventions == {}


def test_a_robot_at_rest_is_let_go_at_once(make_rig: Make) -> None:
    rig = make_rig(chunk=lambda tick, _: [[0.5]])
    rig.run(20)
    assert len(rig.settling) <= 3


def test_a_joint_that_brakes_slowly_comes_to_rest_all_the_same(make_rig: Make, elbow: Make) -> None:
    """Here it takes four seconds."""
    joint = JointLimits(name="elbow", unit="rad", low=-1e3, high=1e3, velocity=2.0)
    joint = replace(joint, acceleration=0.5)
    contract = elbow(1, 1, action=(joint,), commands=((-1e3, 1e3),))
    rig = make_rig(contract=contract, chunk=lambda tick, _: [[1.0]])
    rig.run(300)
    assert rig.values[-1] - rig.values[-2] == pytest.approx(2.0 * PERIOD)
    assert rig.safety.at_rest


def test_whoever_looks_on_may_end_the_run(moving: Make) -> None:
    rig: Any = moving(
        while_looking=lambda tick: rig.controller.stop() if tick.number == 7 else None
    )
    report = rig.run(math.inf)
    assert report.ticks == 8
    assert report.stop_reason == ""
    assert rig.safety.at_rest


def test_a_fault_of_whoever_looks_on_does_not_leave_the_robot_moving(moving: Make) -> None:
    class WriteError(Exception):
        pass

    def fail(tick: Tick) -> None:
        if tick.number == 12:
            raise WriteError

    rig = moving(while_looking=fail)
    with pytest.raises(WriteError):
        rig.run(30)
    assert rig.safety.at_rest
    assert rig.robot.sent[-1][1].values == rig.robot.sent[-2][1].values


@contextmanager
def collecting(enabled: bool) -> Iterator[int]:
    """Have the garbage collector on or off; give the number of objects that it leaves alone."""
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    yield gc.get_freeze_count()
    (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_as_before(make_rig: Make, enabled: bool) -> None:
    during = []
    rig = make_rig(while_looking=lambda tick: during.append(gc.isenabled()))
    with collecting(enabled) as frozen:
        rig.run(3)
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == frozen
    assert during == [False] * 3


def test_the_garbage_collector_is_as_before_if_the_loop_fails(make_rig: Make) -> None:
    def fail(tick: Tick) -> None:
        raise RuntimeError("a bug")

    with collecting(True) as frozen:
        with pytest.raises(RuntimeError, match="a bug"):
            make_rig(while_looking=fail).run(3)
        assert gc.isenabled()
        assert gc.get_freeze_count() == frozen


# --- what is told ------------------------------------------------------------------------------


def test_the_report_counts_what_happened(make_rig: Make) -> None:
    def shown(tick: int) -> Sequence[float] | None:
        return {3: None, 4: (math.nan, 0.0), 5: (0.0,)}.get(tick, (0.0, float(tick)))

    rig: Any = make_rig(
        shown,
        periods=lambda tick: 0.25 if tick != 8 else 2.75,
        while_looking=lambda tick: rig.clock.sleep(1.5 * PERIOD * (tick.number == 14)),
    )
    report = rig.run(20)
    assert report.period_s == PERIOD
    assert report.ticks == 20  # tick 15 begins late, and none is skipped
    assert (report.skipped, report.late) == (0, 1)
    assert report.interventions == {
        "observation: none": 1,
        "observation: not finite": 1,
        "observation: size": 1,
        # Ticks 3, 4 and 5; 8, 9 and 10 without an answer; 15, whose share of the period is over.
        "hold": 7,
    }
    assert report.unanswered == 4
    assert len(report.work_s) == len(report.jitter_s) == 20
    assert len(report.age_s) == 17
    assert len(report.answer_s) == len(rig.policy.asked)
    assert max(report.answer_s) == 2.75 * PERIOD
    assert report.jitter_s[15] == 0.75 * PERIOD
    assert report.link == {"lost": 3}
    assert [event.what for event in report.events][:2] == ["observation: none", "hold"]


def test_every_intervention_is_told_in_the_tick_that_it_was_made_in_and_only_there(
    make_rig: Make, elbow: Make
) -> None:
    def shown(tick: int) -> Sequence[float] | None:
        return {5: None, 6: (math.nan, 0.0), 30: None}.get(tick, (0.0, float(tick)))

    rig = make_rig(
        shown,
        contract=elbow(1, 1, action=(SLOW,)),
        chunk=lambda tick, _: [[math.sin(tick)]],
        periods=lambda tick: 0.25 if tick % 9 else 3.0,
    )
    rig.robot.stops[40] = "halt"
    rig.robot.resets.add(55)
    report = rig.run(80)
    told = Counter(event.what for tick in rig.ticks for event in tick.events)
    assert told == report.interventions
    assert told["motion"] > 10
    assert told["stop: halt"] == told["reset"] == 1
    for tick in rig.ticks:
        assert {event.tick for event in tick.events} <= {tick.number}
    assert rig.ticks[5].events[0].what == "observation: none"
    assert all(event.what != "halt" for event in rig.ticks[41].events)


def test_a_tick_tells_what_was_seen_wanted_and_sent(make_rig: Make, elbow: Make) -> None:
    rig = make_rig(contract=elbow(1, 1, action=(SLOW,)), chunk=lambda tick, _: [[0.75]])
    rig.run(5)
    tick = rig.ticks[3]
    assert tick.observed == rig.robot.observed(Observed((0.0, 3.0), 3.0))
    assert tick.target == [0.75]
    assert 0.0 < tick.command.values[0] < 0.75
    assert tick.command == rig.robot.sent[3][1]


# --- before it begins --------------------------------------------------------------------------


class Waiting(Link):
    """A robot that says nothing for a while."""

    def __init__(self, silent: int) -> None:
        self.silent = silent
        self.waited: list[float] = []

    def open(self) -> None:
        raise AssertionError("it is open")

    def read(self, timeout_s: float) -> Observed | None:
        self.waited.append(timeout_s)
        return Observed((1.0,), 0.0) if len(self.waited) > self.silent else None

    def write(self, command: Command) -> None:
        raise AssertionError("nothing is known of where it stands")

    def close(self) -> None:
        raise AssertionError("that is for who opened it")


def test_the_first_observation_is_waited_for() -> None:
    robot = Waiting(3)
    assert await_robot(robot, 10.0).values == (1.0,)
    assert len(robot.waited) == 4
    assert max(robot.waited) <= 0.1  # so that a link can greet again


def test_a_robot_that_never_answers_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    robot = Waiting(1 << 60)
    now = iter(np.arange(0.0, 100.0, 0.5).tolist())
    monkeypatch.setattr(controlling, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(LinkError, match="no observation within 3 s; see that") as caught:
        await_robot(robot, 3.0)
    assert "\n" not in str(caught.value)
    assert all(x >= 0.0 for x in robot.waited)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda *given: calls.append(given))
    return calls


def test_priority_is_taken_where_it_is_allowed(asked: list[tuple[Any, ...]]) -> None:
    assert take_priority() == ""
    ((process, policy, parameters),) = asked
    assert (process, policy) == (0, os.SCHED_FIFO)
    assert parameters.sched_priority > 0


def test_priority_that_is_refused_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert "Operation not permitted" in take_priority()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("observation_wait", 1.5),
        ("policy_wait", -0.1),
        ("blend_steps", -1),
        ("max_age", 0.0),
        ("frozen_s", -1.0),
        ("hold_s", -1.0),
        ("link_timeout_s", 0.0),
        ("policy_timeout_s", 0.0),
        ("connect_s", 0.0),
    ],
)
def test_settings_out_of_bounds_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        ControllerSettings(**{name: value})

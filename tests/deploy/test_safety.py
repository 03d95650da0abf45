"""The filter sends finite commands within bounds, whatever comes, and falls back step by step."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.deploy.safety import JointLimits, Mode, ObservationGuard, SafetyFilter, Watchdog
from genpol.errors import ConfigError

DT = 0.02
ARM = JointLimits(
    name="elbow", unit="rad", low=-1.0, high=2.0, velocity=3.0, acceleration=30.0, jerk=900.0
)
WHEEL = JointLimits(
    name="wheel", unit="rad/s", interface="velocity", low=-5.0, high=5.0, velocity=50.0
)
MOTOR = JointLimits(
    name="motor", unit="N m", interface="effort", low=-2.0, high=3.0, velocity=200.0, neutral=0.5
)
JOINTS = (ARM, WHEEL, MOTOR)


def make(**options) -> SafetyFilter:
    return SafetyFilter(JOINTS, DT, [0.0, 0.0, 0.5], **options)


anything = st.one_of(
    st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0.0])
)
vectors = st.lists(anything, min_size=3, max_size=3)
calls = st.one_of(
    st.none(),
    vectors,
    st.lists(st.floats(-6, 6), min_size=3, max_size=3),
    st.lists(anything, max_size=5),
    st.sampled_from(["stop", "reset"]),
)


def assert_within(commands: np.ndarray) -> None:
    assert np.isfinite(commands).all()
    for column, joint in zip(commands.T, JOINTS, strict=True):
        assert column.min() >= joint.low
        assert column.max() <= joint.high
        bounds = (joint.velocity, joint.acceleration, joint.jerk)
        for order, most in enumerate(bounds, start=1):
            if math.isfinite(most) and len(column) > order:
                assert np.abs(np.diff(column, order)).max() <= most * DT**order * (1 + 1e-6) + 1e-13


@settings(max_examples=200, deadline=None)
@given(st.lists(calls, min_size=1, max_size=60))
def test_commands_are_finite_and_within_bounds_whatever_is_called(wanted: list) -> None:
    safety = make()
    sent = [safety.sent] * 3
    for call in wanted:
        if call == "stop":
            safety.stop("test")
        elif call == "reset":
            if all(joint.at_rest for joint in safety._joints):
                safety.reset()
        else:
            sent.append(safety.step(call).values)
    assert_within(np.array(sent))


@pytest.mark.slow
def test_a_million_random_ticks() -> None:
    draw = np.random.default_rng(0)
    safety = make()
    sent = [safety.sent] * 3
    odd = [math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0]
    for tick in range(1_000_000):
        kind = draw.integers(0, 20)
        wanted: list[float] | None = (
            draw.standard_normal(3) * 10.0 ** draw.integers(-3, 3)
        ).tolist()
        if kind == 0:
            wanted = None
        elif kind == 1:
            wanted[draw.integers(3)] = odd[draw.integers(len(odd))]
        elif kind == 2 and tick % 7 == 0:
            safety.stop("test")
        if safety.stop_reason and all(joint.at_rest for joint in safety._joints):
            safety.reset()
        sent.append(safety.step(wanted).values)
    assert_within(np.array(sent))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_target_that_is_not_finite_is_refused_whole(bad: float) -> None:
    safety = make()
    command = safety.step([0.01, bad, 1.0])
    assert command.mode is Mode.HOLD
    assert command.values == [0.0, 0.0, 0.5]
    assert safety.counts == {"not finite": 1, "hold": 1}


@pytest.mark.parametrize("bad", [[], [0.0] * 2, [0.0] * 4, ["a", 0.0, 0.0]])
def test_a_target_of_another_kind_is_refused(bad: list) -> None:
    assert make().step(bad).mode is Mode.HOLD


def test_what_is_allowed_passes_without_a_word() -> None:
    safety = make()
    command = safety.step([0.001, 0.5, 1.0])
    assert command.values == [0.001, 0.5, 1.0]
    assert command.mode is Mode.RUN
    assert not safety.counts


def test_what_is_changed_is_noted_with_its_numbers() -> None:
    safety = make()
    safety.step([0.0, 9.0, 0.5])
    (event,) = safety.events
    assert (event.tick, event.what, event.joint) == (0, "position", "wheel")
    assert (event.asked, event.sent) == (9.0, 1.0)
    safety.step([0.0, 4.0, 0.5])
    assert safety.events[-1].what == "motion"


def test_silence_holds_and_then_damps() -> None:
    safety = make(hold_s=3 * DT)
    for _ in range(20):
        safety.step([0.0, 4.0, 2.0])
    modes, wheels = [], []
    for _ in range(10):
        command = safety.step(None)
        modes.append(command.mode)
        wheels.append(command.values[1])
    assert modes == [Mode.HOLD] * 3 + [Mode.DAMP] * 7
    assert wheels[:3] == [4.0] * 3
    assert wheels[3:] == pytest.approx([3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert command.values[2] == 0.5  # neutral


def test_a_moving_position_brakes_in_silence() -> None:
    safety = make()
    for tick in range(30):
        safety.step([0.05 * tick, 0.0, 0.5])
    before = safety.sent[0]
    after = [safety.step(None).values[0] for _ in range(40)]
    assert after[0] > before
    assert after[-1] == after[-2]
    assert safety._joints[0].at_rest


def test_a_target_ends_the_silence() -> None:
    safety = make(hold_s=0.0)
    assert safety.step(None).mode is Mode.DAMP
    assert safety.step([0.0, 0.0, 0.5]).mode is Mode.RUN


def test_a_stop_is_latched_until_it_is_reset_at_rest() -> None:
    safety = make()
    for tick in range(30):
        safety.step([0.05 * tick, 3.0, 0.5])
    safety.stop("operator")
    safety.stop("again")
    assert safety.stop_reason == "operator"
    with pytest.raises(ConfigError, match="still moves"):
        safety.reset()
    modes = {safety.step([1.0, 3.0, 0.5]).mode for _ in range(60)}
    assert modes == {Mode.STOP}
    assert safety.sent[1] == 0.0
    safety.reset()
    assert safety.step(safety.sent).mode is Mode.RUN
    assert safety.counts["stop: operator"] == safety.counts["reset"] == 1


def test_without_limits_what_is_finite_is_sent_as_it_is() -> None:
    safety = make(limited=False)
    assert safety.step([100.0, -100.0, 1e9]).values == [100.0, -100.0, 1e9]
    assert safety.step([math.nan, 0.0, 0.0]).values == [100.0, -100.0, 1e9]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"interface": "torque"}, "interface"), ({"neutral": 9.0}, "neutral"), ({"low": 9.0}, "low")],
)
def test_wrong_limits_name_the_joint(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"joint 'knee'.*{message}"):
        JointLimits(**({"name": "knee", "unit": "rad", "low": -1.0, "high": 1.0} | options))


def test_start_has_a_command_for_each_joint() -> None:
    with pytest.raises(ConfigError, match="2 commands for 3 joints"):
        SafetyFilter(JOINTS, DT, [0.0, 0.0])


ANY = (-math.inf, math.inf)


def test_observations_beyond_their_limits_are_refused() -> None:
    guard = ObservationGuard([ANY, (-1.0, 2.0), (0.0, math.inf)], max_age_s=1.0)
    assert guard.refusal([1e9, -1.0, 0.0], 0.0) == ""
    assert guard.refusal([1e9, 2.0, 1e9], 0.0) == ""
    for wrong in ([1e39, 0.0, 0.0], [-1e39, 0.0, 0.0]):  # infinite in single precision
        assert guard.refusal(wrong, 0.0) == "observation: not finite"
    for wrong in ([0.0, 2.1, 0.0], [0.0, -1.1, 0.0], [0.0, 0.0, -1e-9]):
        assert guard.refusal(wrong, 0.0) == "observation: beyond its limits"


def test_observations_are_checked_for_size_numbers_and_age() -> None:
    guard = ObservationGuard([ANY, ANY], max_age_s=0.1)
    assert guard.refusal([0.0, 1.0], 0.05) == ""
    assert guard.refusal([0.0], 0.05) == "observation: size"
    assert guard.refusal([0.0, math.nan], 0.05) == "observation: not finite"
    assert guard.refusal([0.0, 1.0], 0.2) == "observation: too old"
    assert guard.refusal([0.0, 1.0], -5.0) == "observation: from the future"
    assert guard.refusal([0.0, 1.0], math.nan) != ""


def test_a_sensor_that_never_changes_is_frozen() -> None:
    guard = ObservationGuard([ANY], max_age_s=1.0, frozen_ticks=3)
    found = [guard.refusal([value], 0.0) for value in (1.0, 1.0, 1.0, 1.0, 2.0)]
    assert found == ["", "", "", "observation: frozen", ""]


def test_watchdog_expires_in_silence() -> None:
    dog = Watchdog(0.5, now_s=10.0)
    assert not dog.expired(10.5)
    assert dog.expired(10.6)
    dog.beat(10.6)
    dog.beat(3.0)  # a clock that jumps back keeps nobody quiet
    assert not dog.expired(11.0)
    assert dog.expired(11.2)


def test_filter_does_not_import_torch() -> None:
    program = "import sys, genpol.deploy.safety; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

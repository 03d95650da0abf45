"""Commands keep to all bounds whatever is asked for, and are what is asked within them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.deploy.motion import Joint, MotionBounds
from genpol.errors import ConfigError

DT = 0.02
TOLERANCE = 1e-6

some = st.floats(1e-2, 1e4)
limits = st.one_of(some, st.just(math.inf))
targets = st.one_of(
    st.floats(-3.0, 3.0),
    st.sampled_from([-1.0, 1.0, 0.0, 1e300, -1e300, 5e-324, -0.0]),
    st.floats(allow_nan=False, allow_infinity=False),
)


def run(
    bounds: MotionBounds, wanted: list[float], start: float = 0.0, dt: float = DT
) -> np.ndarray:
    joint = Joint(bounds, dt, start)
    return np.array([joint.position] * 3 + [joint.step(x) for x in wanted])


def excess(bounds: MotionBounds, commands: np.ndarray, dt: float = DT) -> float:
    """Return the greatest share by which a bound is broken."""
    assert np.isfinite(commands).all()
    span = bounds.high - bounds.low
    worst = max(bounds.low - commands.min(), commands.max() - bounds.high) / span
    for order, most in enumerate((bounds.velocity, bounds.acceleration, bounds.jerk), start=1):
        if math.isfinite(most):
            found = np.abs(np.diff(commands, order)).max() / dt**order
            # Differences of numbers of the span's size cannot be told from zero below this.
            noise = 2**order * 4 * np.finfo(float).eps * span / dt**order
            worst = max(worst, (found - noise) / most - 1.0)
    return float(worst)


@settings(max_examples=300, deadline=None)
@given(
    velocity=limits,
    acceleration=limits,
    jerk=limits,
    wanted=st.lists(targets, min_size=1, max_size=80),
    start=st.floats(-1.0, 1.0),
    dt=st.sampled_from([1e-3, 0.02, 0.1]),
)
def test_all_bounds_are_kept_whatever_is_asked_for(
    velocity: float, acceleration: float, jerk: float, wanted: list[float], start: float, dt: float
) -> None:
    bounds = MotionBounds(
        low=-1.0, high=1.0, velocity=velocity, acceleration=acceleration, jerk=jerk
    )
    assert excess(bounds, run(bounds, wanted, start, dt), dt) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_bounds_are_kept_for_long(seed: int) -> None:
    draw = np.random.default_rng(seed)
    bounds = MotionBounds(low=-1.0, high=1.0, velocity=3.0, acceleration=20.0, jerk=400.0)
    # Far targets for many periods, which bring it to its bounds at full speed, and sudden turns.
    wanted = np.repeat(draw.uniform(-2.0, 2.0, 400), draw.integers(1, 40, 400))
    commands = run(bounds, wanted.tolist())
    assert excess(bounds, commands) < TOLERANCE
    assert commands.max() > 0.95
    assert commands.min() < -0.95


def test_target_within_the_bounds_is_sent_as_it_is() -> None:
    bounds = MotionBounds(low=-1.0, high=1.0, velocity=3.0, acceleration=20.0, jerk=400.0)
    wanted = (0.4 * (1.0 - np.cos(np.arange(200) * DT * 3.0))).tolist()
    assert run(bounds, wanted)[3:].tolist() == wanted


def test_bounds_that_cannot_bind_change_nothing() -> None:
    span = 2.0
    bounds = MotionBounds(
        low=-1.0,
        high=1.0,
        velocity=span / DT,
        acceleration=2 * span / DT**2,
        jerk=4 * span / DT**3,
    )
    wanted = np.random.default_rng(0).choice([-1.0, 1.0, 0.3], 500).tolist()
    assert run(bounds, wanted)[3:].tolist() == wanted


def test_far_target_is_reached_with_hardly_any_overshoot_and_held() -> None:
    bounds = MotionBounds(low=-1.0, high=1.0, velocity=1.0, acceleration=5.0, jerk=60.0)
    commands = run(bounds, [0.7] * 150)
    assert commands.max() <= 0.7 + 0.01
    assert commands[-1] == pytest.approx(0.7, abs=1e-3)
    # No slower than half again the time of a trapezoid of velocity with the same jerk.
    needed = 0.7 / 1.0 + 1.0 / 5.0 + 5.0 / 60.0
    assert np.argmax(commands > 0.69) * DT < 1.5 * needed


@pytest.mark.parametrize("speed", [0.3, 1.0, -0.8])
def test_target_that_moves_is_caught_up_with_and_then_followed(speed: float) -> None:
    bounds = MotionBounds(low=-3.0, high=3.0, velocity=2.0, acceleration=20.0, jerk=400.0)
    wanted = 0.5 + speed * np.arange(100) * DT
    commands = run(bounds, wanted.tolist())[3:]
    assert excess(bounds, run(bounds, wanted.tolist())) < TOLERANCE
    assert abs(commands[0] - wanted[0]) > 0.4
    # After the time that the catching up takes at twice its speed, exactly there.
    np.testing.assert_allclose(commands[60:], wanted[60:], atol=1e-12)


def test_sine_within_the_bounds_is_followed_after_a_start_elsewhere() -> None:
    bounds = MotionBounds(low=-2.0, high=2.0, velocity=2.0, acceleration=20.0, jerk=400.0)
    wanted = np.sin(0.8 * np.arange(500) * DT + 2.0)
    commands = run(bounds, wanted.tolist())[3:]
    assert np.abs(commands - wanted)[100:].max() < 1e-3
    assert excess(bounds, run(bounds, wanted.tolist())) < TOLERANCE


def test_velocity_bound_alone_is_a_slope() -> None:
    bounds = MotionBounds(low=-1.0, high=1.0, velocity=2.0)
    commands = run(bounds, [1.0] * 30)[3:]
    np.testing.assert_allclose(commands[:10], 0.04 * np.arange(1, 11), atol=1e-12)
    assert commands[-1] == 1.0


def test_turn_before_the_bound_at_full_speed() -> None:
    bounds = MotionBounds(low=-1.0, high=1.0, velocity=2.0, acceleration=8.0, jerk=200.0)
    commands = run(bounds, [5.0] * 40 + [-5.0] * 80)
    assert excess(bounds, commands) < TOLERANCE
    assert commands[-1] == pytest.approx(-1.0, abs=1e-3)


def test_start_is_cut_to_the_bounds_and_at_rest() -> None:
    joint = Joint(MotionBounds(low=-1.0, high=1.0), DT, 7.0)
    assert joint.position == 1.0
    assert joint.at_rest
    joint.step(0.5)
    assert not joint.at_rest
    joint.begin(0.25)
    assert (joint.position, joint.at_rest) == (0.25, True)


@pytest.mark.parametrize("start", [math.nan, math.inf])
def test_start_must_be_finite(start: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Joint(MotionBounds(low=-1.0, high=1.0), DT, start)


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 1.0},
        {"high": math.inf},
        {"velocity": 0.0},
        {"jerk": -1.0},
        {"acceleration": math.nan},
    ],
)
def test_bounds_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="limits"):
        MotionBounds(**({"low": -1.0, "high": 1.0} | wrong))


@pytest.mark.parametrize("period_s", [0.0, -1.0, math.nan, math.inf])
def test_period_must_be_positive(period_s: float) -> None:
    with pytest.raises(ConfigError, match="period_s"):
        Joint(MotionBounds(low=-1.0, high=1.0), period_s, 0.0)

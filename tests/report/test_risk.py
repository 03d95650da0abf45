from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.errors import ConfigError, DatasetError
from genpol.report import risk

HUNDRED = np.arange(1.0, 101.0)
LEVELS = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.29, 0.3, 0.5, 0.75, 1.0])
# Whole numbers are shifted and scaled by powers of two without rounding.
RETURNS = st.lists(st.integers(-1000, 1000), min_size=1, max_size=40).map(np.array)


@pytest.mark.parametrize(
    ("level", "linear", "conditional"), [(0.1, 10.9, 5.5), (0.05, 5.95, 3.0), (0.3, 30.7, 15.5)]
)
def test_one_to_a_hundred(level: float, linear: float, conditional: float) -> None:
    assert risk.value_at_risk(HUNDRED, level) == pytest.approx(linear, abs=1e-12)
    assert risk.conditional_value_at_risk(HUNDRED, level) == pytest.approx(conditional, abs=1e-12)


def test_the_inverse_distribution_function_is_one_of_the_returns() -> None:
    assert risk.value_at_risk(HUNDRED, 0.1, method="inverted_cdf") == 10.0
    assert risk.conditional_value_at_risk(HUNDRED, 0.1, method="inverted_cdf") == 5.5


@pytest.mark.parametrize(
    ("level", "quantile", "conditional"),
    [(0.05, -1.645, -2.063), (0.1, -1.282, -1.755), (0.3, -0.524, -1.159)],
)
def test_standard_normal(level: float, quantile: float, conditional: float) -> None:
    returns = np.random.default_rng(0).normal(size=1_000_000)
    assert risk.value_at_risk(returns, level) == pytest.approx(quantile, abs=0.01)
    assert risk.conditional_value_at_risk(returns, level) == pytest.approx(conditional, abs=0.01)


def test_a_quantile_that_is_a_return_is_in_its_own_tail() -> None:
    # 0.29 * 100 is a little less than 29, so that numpy's quantile is a little less than 29.
    returns = np.arange(101.0)
    assert np.quantile(returns, 0.29) < 29.0
    assert risk.conditional_value_at_risk(returns, 0.29) == pytest.approx(14.5)


@settings(deadline=None, max_examples=50)
@given(returns=RETURNS, level=LEVELS)
def test_the_conditional_value_lies_between_the_worst_and_the_value_at_risk(
    returns: np.ndarray, level: float
) -> None:
    limit = risk.value_at_risk(returns, level)
    tail = risk.conditional_value_at_risk(returns, level)
    assert returns.min() <= tail <= limit + 1e-9
    assert tail <= returns.mean() + 1e-9


@settings(deadline=None, max_examples=50)
@given(half=RETURNS, level=st.sampled_from([0.05, 0.1, 0.3, 0.5]))
def test_of_symmetric_returns_the_value_at_risk_is_at_most_the_mean(
    half: np.ndarray, level: float
) -> None:
    returns = np.concatenate([half, -half])
    assert risk.value_at_risk(returns, level) <= returns.mean() + 1e-9


@settings(deadline=None, max_examples=50)
@given(returns=RETURNS, level=LEVELS, method=st.sampled_from(risk.METHODS))
def test_both_follow_a_shift_and_a_positive_scale(
    returns: np.ndarray, level: float, method: str
) -> None:
    for measure in (risk.value_at_risk, risk.conditional_value_at_risk):
        value = measure(returns, level, method=method)
        shifted = measure(returns + 512, level, method=method)
        scaled = measure(4 * returns, level, method=method)
        assert shifted == pytest.approx(value + 512, abs=1e-9)
        assert scaled == pytest.approx(4 * value, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(returns=RETURNS, level=LEVELS, seed=st.integers(0, 9))
def test_the_order_of_the_episodes_does_not_matter(
    returns: np.ndarray, level: float, seed: int
) -> None:
    other = np.random.default_rng(seed).permutation(returns)
    assert risk.value_at_risk(returns, level) == risk.value_at_risk(other, level)
    assert risk.conditional_value_at_risk(returns, level) == pytest.approx(
        risk.conditional_value_at_risk(other, level), abs=1e-9
    )


@settings(deadline=None, max_examples=50)
@given(returns=RETURNS)
def test_a_greater_share_is_no_riskier(returns: np.ndarray) -> None:
    for measure in (risk.value_at_risk, risk.conditional_value_at_risk):
        values = [measure(returns, level) for level in (0.05, 0.25, 0.5, 1.0)]
        assert all(a <= b + 1e-9 for a, b in pairwise(values))
    assert risk.conditional_value_at_risk(returns, 1.0) == pytest.approx(returns.mean())


def test_the_interval_of_the_mean_is_that_of_the_central_limit() -> None:
    returns = np.random.default_rng(1).normal(10.0, 2.0, size=400)
    found = risk.estimate(returns, risk.mean())
    half = 1.96 * returns.std() / 20.0
    assert found.value == returns.mean()
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)


@pytest.mark.parametrize(
    ("measure", "truth"),
    [(risk.mean(), 0.0), (risk.var(0.25), -0.6745), (risk.cvar(0.25), -1.2711)],
)
def test_intervals_hold_the_truth_about_as_often_as_they_say(
    measure: risk.Measure, truth: float
) -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(60):
        found = risk.estimate(random.normal(size=80), measure, repetitions=300)
        held += found.low <= truth <= found.high
    assert 50 <= held <= 60


def test_a_wider_interval_is_asked_for_by_confidence() -> None:
    few, most = (risk.estimate(HUNDRED, risk.cvar(0.25), confidence=c) for c in (0.5, 0.99))
    assert most.low < few.low < few.value < few.high < most.high


def test_the_same_seed_gives_the_same_interval() -> None:
    ends = [risk.estimate(HUNDRED, risk.var(0.05), seed=seed) for seed in (0, 0, 1)]
    assert ends[0] == ends[1] != ends[2]


@pytest.mark.parametrize("measure", [risk.mean(), risk.var(0.05), risk.cvar(0.05)])
def test_equal_returns_have_an_interval_without_width(measure: risk.Measure) -> None:
    assert risk.estimate([3.0, 3.0, 3.0], measure) == risk.Estimate(value=3.0, low=3.0, high=3.0)


def test_pairs_take_the_start_states_out_of_a_difference() -> None:
    random = np.random.default_rng(3)
    starts = random.normal(0.0, 100.0, size=200)
    better = starts + 1.0 + random.normal(0.0, 0.5, size=200)
    found = risk.difference(better, starts, risk.mean())
    assert found.value == pytest.approx(np.mean(better - starts))
    assert 0.85 < found.low < found.value < found.high < 1.15
    shuffled = risk.difference(better, random.permutation(starts), risk.mean())
    assert shuffled.high - shuffled.low > 20.0


@pytest.mark.parametrize("measure", [risk.var(0.25), risk.cvar(0.25)])
def test_a_difference_of_tails_is_that_of_the_measures(measure: risk.Measure) -> None:
    random = np.random.default_rng(4)
    base = random.normal(size=100)
    found = risk.difference(base + 0.5, base, measure)
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))  # every resample moves alike


@pytest.mark.parametrize(
    ("episodes", "level", "enough"),
    [(19, 0.05, 20), (3, 0.25, 4), (2, 0.3, 4), (9, 0.1, 10)],
)
def test_a_tail_of_less_than_one_episode_is_told(episodes: int, level: float, enough: int) -> None:
    assert f"episodes={enough} or more" in risk.few(episodes, level)
    assert risk.few(enough, level) == ""
    assert "\n" not in risk.few(episodes, level)


@pytest.mark.parametrize("level", [0.0, -0.1, 1.1, math.nan])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    for measure in (risk.value_at_risk, risk.conditional_value_at_risk):
        with pytest.raises(ConfigError, match="must be > 0 and at most 1"):
            measure(HUNDRED, level)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="'linaer': must be one of linear"):
        risk.value_at_risk(HUNDRED, 0.1, method="linaer")


@pytest.mark.parametrize(
    ("returns", "message"),
    [([], "at least 1"), ([[1.0]], "at least 1"), ([1.0, math.nan], "episode 1 is nan")],
)
def test_returns_without_a_tail_are_refused(returns: list[float], message: str) -> None:
    for measure in (risk.value_at_risk, risk.conditional_value_at_risk):
        with pytest.raises(DatasetError, match=message):
            measure(returns, 0.1)


def test_one_episode_has_no_interval() -> None:
    assert risk.conditional_value_at_risk([7.0], 0.05) == 7.0
    with pytest.raises(DatasetError, match="at least 2"):
        risk.estimate([7.0], risk.mean())


def test_unequally_many_returns_are_no_pairs() -> None:
    with pytest.raises(DatasetError, match="3 and 2 returns make no pairs"):
        risk.difference([1.0, 2.0, 3.0], [1.0, 2.0], risk.mean())

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import trim_mean

from genpol.errors import ConfigError, DatasetError
from genpol.report import statistics


def frame(
    values: dict[int, list[float]],
    *,
    agent: str = "gorl",
    env: str = "HopperStand",
    steps: tuple[int, ...] = (10, 20),
) -> pd.DataFrame:
    """Return rows of one agent: the values of each seed at ``steps``, a second per step."""
    rows = [
        {
            "agent": agent,
            "env": env,
            "seed": seed,
            "env_steps": step,
            "agent_steps": step // 2,
            "metric": "return",
            "value": value,
            "episodes": 100,
            "wall_clock_s": float(step),
        }
        for seed, curve in values.items()
        for step, value in zip(steps, curve, strict=False)
    ]
    return pd.DataFrame(rows)


def test_iqm_is_the_trimmed_mean_over_seeds_and_envs() -> None:
    values = np.random.default_rng(0).normal(size=(5, 3, 4))
    expected = trim_mean(values.reshape(15, 4), 0.25, axis=0)
    np.testing.assert_allclose(statistics.iqm(values), expected, rtol=1e-12)


def test_iqm_ignores_an_outlier() -> None:
    table = statistics.summarise(
        frame({0: [0, 1.0], 1: [0, 2.0], 2: [0, 3.0], 3: [0, 1000.0]}), repetitions=50
    )
    assert table["iqm"][0] == 2.5
    assert table["mean"][0] == pytest.approx(251.5)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(100.0, 10.0, size=(20, 1, 200))  # 200 experiments of 20 seeds
    low, high = statistics.iqm_interval(samples, repetitions=300)
    coverage = ((low < 100.0) & (high > 100.0)).mean()
    assert 0.87 < coverage < 0.99


def test_the_interval_depends_on_its_seed_only_and_leaves_numpys_generator_alone() -> None:
    values = np.random.default_rng(0).normal(size=(5, 1))
    np.random.seed(3)
    first = statistics.iqm_interval(values, repetitions=100, seed=1)
    np.random.seed(4)
    state = np.random.get_state()[1].copy()
    assert statistics.iqm_interval(values, repetitions=100, seed=1) == first
    assert (np.random.get_state()[1] == state).all()
    assert statistics.iqm_interval(values, repetitions=100, seed=2) != first


def test_one_seed_has_no_interval() -> None:
    table = statistics.summarise(frame({0: [1.0, 2.0]}))
    assert table["seeds"][0] == 1
    assert math.isnan(table["low"][0])
    assert math.isnan(table["high"][0])
    assert math.isnan(table["std"][0])
    assert table["iqm"][0] == 2.0


def test_a_failed_evaluation_is_not_hidden() -> None:
    table = statistics.summarise(frame({0: [1.0, math.nan], 1: [1.0, 5.0], 2: [1.0, 6.0]}))
    assert math.isnan(table["mean"][0])
    assert math.isnan(table["low"][0])


def test_the_last_evaluation_counts_and_not_the_best() -> None:
    table = statistics.summarise(frame({0: [900.0, 100.0], 1: [900.0, 200.0]}), repetitions=20)
    assert table["mean"][0] == 150.0
    assert table["env_steps"][0] == 20


@pytest.mark.parametrize("limit", [{"at": 19}, {"budget_s": 19.5}])
def test_limits_take_the_last_evaluation_at_or_under(limit: dict[str, float]) -> None:
    table = statistics.summarise(frame({0: [1.0, 5.0], 1: [3.0, 7.0]}), repetitions=20, **limit)
    assert table["mean"][0] == 2.0
    assert table["env_steps"][0] == 10


def test_unequal_runs_are_reported_at_the_steps_all_have_made() -> None:
    table = statistics.summarise(frame({0: [1.0, 5.0], 1: [3.0]}), repetitions=20)
    assert table["env_steps"][0] == 10


def test_nothing_within_the_limits_is_an_error() -> None:
    with pytest.raises(DatasetError, match="within 5 environment steps"):
        statistics.summarise(frame({0: [1.0, 2.0]}), at=5)


def test_an_unknown_metric_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'return'"):
        statistics.summarise(frame({0: [1.0]}), metric="retrun")


def test_curves_span_what_all_seeds_have_reached_and_interpolate() -> None:
    data = pd.concat(
        [
            frame({0: [0.0, 10.0, 20.0]}, steps=(0, 10, 20)),
            frame({1: [0.0, 15.0]}, steps=(0, 15)),
        ]
    )
    curve = statistics.curves(data, repetitions=20)
    assert curve["env_steps"].tolist() == [0, 10, 15]
    assert curve["iqm"].tolist() == [0.0, 10.0, 15.0]


def test_probability_of_improvement_counts_pairs_and_halves_ties() -> None:
    data = pd.concat(
        [
            frame({0: [0, 3.0], 1: [0, 5.0]}, agent="gorl"),
            frame({0: [0, 3.0], 1: [0, 4.0]}, agent="ppo"),
        ]
    )
    chance, low, high = statistics.probability_of_improvement(data, "gorl", "ppo", repetitions=100)
    assert chance == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert 0 <= low <= chance <= high <= 1


def test_probability_of_improvement_needs_known_agents() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gorl'"):
        statistics.probability_of_improvement(frame({0: [1.0]}), "gorll", "gorl")

from __future__ import annotations

import pytest
import torch

from genpol.errors import ConfigError
from genpol.objectives.advantages import (
    QuantileTracker,
    brax_gae,
    dvao,
    gae,
    gdpo,
    group_relative,
    group_std,
    mixed_value_at_risk,
    normalize_advantage,
)

# GoRL oracle 6: U = 3, gamma = 0.9, lambda = 0.5, bootstrap 2.
REWARD = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
VALUE = torch.tensor([[0.5, 1.0, 1.5]], dtype=torch.float64)
NEXT_VALUE = torch.tensor([[1.0, 1.5, 2.0]], dtype=torch.float64)
NEVER = torch.zeros(1, 3, dtype=torch.bool)
SECOND = torch.tensor([[False, True, False]])


def check(actual: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_gae_without_ends_is_the_decayed_sum():
    advantage, target = gae(REWARD, VALUE, NEXT_VALUE, NEVER, NEVER, 0.9, 0.5)
    check(advantage, 3.12575, 3.835, 3.3)
    check(target, 3.62575, 4.835, 4.8)


def test_brax_gae_without_ends():
    advantage, target = brax_gae(REWARD, VALUE, NEXT_VALUE, NEVER, NEVER, 0.9, 0.5)
    check(advantage, 4.8515, 5.32, 3.3)
    check(target, 3.62575, 4.835, 4.8)


def test_brax_gae_gives_truncated_steps_no_advantage():
    advantage, target = brax_gae(REWARD, VALUE, NEXT_VALUE, NEVER, SECOND, 0.9, 0.5)
    check(advantage, 1.4, 0.0, 3.3)
    check(target, 0.5 + 1.4, 1.0, 1.5 + 3.3)


def test_gae_bootstraps_where_truncated():
    next_value = NEXT_VALUE.clone()
    next_value[0, 1] = 10.0  # the value of the observation lost to the reset
    advantage, _ = gae(REWARD, VALUE, next_value, NEVER, SECOND, 0.9, 0.5)
    check(advantage, 1.4 + 0.45 * 10.0, 2.0 + 9.0 - 1.0, 3.3)


def test_neither_bootstraps_where_terminated():
    next_value = NEXT_VALUE.clone()
    next_value[0, 1] = torch.nan  # must not leak through 0 x NaN
    for estimate in (gae, brax_gae):
        advantage, _ = estimate(REWARD, VALUE, next_value, SECOND, SECOND, 0.9, 0.5)
        first = 1.4 + (0.9 if estimate is brax_gae else 0.45) * 1.0
        check(advantage, first, 1.0, 3.3)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.rand(2, 4, 6, generator=generator).unbind(0)
    next_value = torch.cat((value[:, 1:], torch.zeros(4, 1)), 1)
    never = torch.zeros(4, 6, dtype=torch.bool)
    _, target = gae(reward, value, next_value, never, never, 0.97, 1.0)
    discount = 0.97 ** torch.arange(6)
    torch.testing.assert_close(target[:, 0], (reward * discount).sum(1))


def test_estimates_carry_no_gradient():
    value = VALUE.clone().requires_grad_()
    advantage, target = gae(REWARD, value, NEXT_VALUE, NEVER, NEVER, 0.9, 0.5)
    assert not advantage.requires_grad
    assert not target.requires_grad


def test_normalised_advantage_ignores_masked_entries():
    advantage = torch.tensor([1.0, 3.0, torch.nan])
    out = normalize_advantage(advantage, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 1.0, 0.0]))


def test_normalised_advantage_has_zero_mean_and_unit_std():
    out = normalize_advantage(5 + 3 * torch.randn(100, 7))
    assert abs(out.mean()) < 1e-5
    torch.testing.assert_close(out.std(correction=0), torch.tensor(1.0))


# The streams of the published example: K = 2, G = 4.
STREAMS = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 2.0, 4.0, 2.0]], dtype=torch.float64)
HALVES = (0.5, 0.5)
COMBINED = (-1.18322, -0.50709, 1.52128, 0.16903)  # the sum of the streams, normalised
SUMMED = (-0.41843, -0.86603, 0.99578, 0.28868)  # the normalised streams, summed


def near(actual: torch.Tensor, *expected: float) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), wanted, atol=1e-5, rtol=0)


def test_group_relative_divides_by_the_sample_std():
    near(group_relative(torch.tensor([1.0, 1.0, 1.0, 0.0])), 0.5, 0.5, 0.5, -1.5)


def test_median_of_a_majority_is_the_majority():
    near(group_relative(torch.tensor([1.0, 1.0, 1.0, 0.0]), centre="median"), 0.0, 0.0, 0.0, -2.0)


def test_median_of_an_even_group_lies_midway():
    out = group_relative(torch.tensor([0.0, 1.0, 3.0, 9.0]), centre="median", scale=False)
    near(out, -2.0, -1.0, 1.0, 7.0)


def test_groups_do_not_mix():
    returns = torch.randn(3, 5, 4)
    together = group_relative(returns)
    torch.testing.assert_close(together[1, 2], group_relative(returns[1, 2]))


@pytest.mark.parametrize("centre", ["mean", "median"])
def test_singleton_groups_have_no_advantage(centre):
    out = group_relative(torch.tensor([[3.0], [-7.0]]), centre=centre)
    assert torch.equal(out, torch.zeros(2, 1))


@pytest.mark.parametrize("centre", ["mean", "median"])
def test_equal_returns_have_exactly_no_advantage(centre):
    returns = 1000 * torch.rand(50, 1).expand(50, 7)  # many means of which round to another number
    assert not group_relative(returns, centre=centre).any()


@pytest.mark.parametrize("centre", ["mean", "median"])
def test_masked_returns_do_not_count_in_groups(centre):
    returns = torch.tensor([1.0, torch.nan, 4.0, torch.inf, 2.0])
    mask = torch.tensor([True, False, True, False, True])
    out = group_relative(returns, centre=centre, mask=mask)
    torch.testing.assert_close(out[mask], group_relative(returns[mask], centre=centre))
    assert torch.equal(out[~mask], torch.zeros(2))


def test_unknown_centre_is_refused():
    with pytest.raises(ConfigError, match="centre"):
        group_relative(torch.zeros(3), centre="mode")


def test_gdpo_on_the_published_example():
    # In units so small that the epsilons do not show.
    out = gdpo(1e6 * STREAMS, (1e6, 1e6))
    near(out, -0.59175, -1.22474, 1.40825, 0.40825)


def test_dvao_on_the_published_example():
    near(dvao(STREAMS, HALVES), -0.94737, -0.40601, 1.21804, 0.13534)


def test_dvao_of_one_stream_is_that_stream_normalised():
    near(dvao(0.5 * STREAMS.sum(0, keepdim=True), (1.0,)), *COMBINED)


def test_dvao_of_normalised_streams_is_their_sum():
    near(dvao(STREAMS / group_std(STREAMS), HALVES), *SUMMED)


def test_dvao_is_never_larger_than_the_normalised_sum():
    streams, weights = torch.randn(3, 100, 8), torch.tensor([0.2, 0.3, 0.5])
    total = torch.tensordot(weights, streams, dims=1)
    whole = dvao(total.unsqueeze(0), (1.0,))
    part = dvao(streams, weights)
    assert (part.abs() <= whole.abs() + 1e-6).all()
    assert (part.abs() < 0.9 * whole.abs()).any()


def test_dvao_divides_by_running_stds_where_given():
    std = torch.tensor([1.0, 3.0], dtype=torch.float64)
    near(dvao(STREAMS, HALVES, std=std), *(x / 2 for x in (-0.875, -0.375, 1.125, 0.125)))


def test_dvao_treats_each_group_by_itself():
    streams = torch.randn(2, 3, 6)
    together = dvao(streams, HALVES)
    torch.testing.assert_close(together[1], dvao(streams[:, 1], HALVES))


def test_gdpo_whitens_over_all_groups_and_normalises_within_each():
    streams = torch.randn(2, 3, 50) * torch.tensor([1.0, 1e3, 1e6]).view(3, 1)
    out = gdpo(streams, (1.0, 2.0))
    assert abs(out.mean()) < 1e-5
    assert out.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    each = group_std(out).flatten()  # of one size, because each group was normalised
    assert each.max() < 1.5 * each.min()


def test_gdpo_keeps_apart_what_the_normalised_sum_merges():
    streams = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    merged = group_relative(streams.sum(0))
    assert merged[0] == merged[1]
    out = gdpo(streams, (1.0, 1.0))
    assert out[0] > out[1] + 0.3


@pytest.mark.parametrize("combine", [gdpo, dvao])
def test_streams_without_variance_drop_out(combine):
    constant = torch.full((1, 4), 1000.1)
    streams = torch.cat((STREAMS[:1].float(), constant))
    alone = combine(STREAMS[:1].float(), (1.0,))
    torch.testing.assert_close(combine(streams, (1.0, 1.0)), alone)


@pytest.mark.parametrize("combine", [gdpo, dvao])
def test_streams_all_without_variance_give_zero(combine):
    assert torch.equal(combine(torch.full((2, 3, 4), 0.1), HALVES), torch.zeros(3, 4))


@pytest.mark.parametrize("combine", [gdpo, dvao])
def test_masked_entries_do_not_count_in_streams(combine):
    mask = torch.tensor([True, True, False, True, True])
    streams = torch.full((2, 5), torch.nan, dtype=torch.float64)
    streams[:, mask] = STREAMS
    out = combine(streams, HALVES, mask=mask)
    torch.testing.assert_close(out[mask], combine(STREAMS, HALVES))
    assert out[2] == 0


@pytest.mark.parametrize("combine", [gdpo, dvao])
def test_streams_want_one_weight_each(combine):
    with pytest.raises(ConfigError, match="one weight for each stream"):
        combine(STREAMS, (0.2, 0.3, 0.5))


def risk(mixing: float, **options: bool) -> torch.Tensor:
    returns, low, high = torch.arange(6.0), torch.tensor(1.0), torch.tensor(4.0)
    levels = {"low_level": 0.2, "high_level": 0.8}
    return mixed_value_at_risk(returns, low, high, mixing=mixing, **levels, **options)


def test_value_at_risk_on_the_published_example():
    near(risk(1.5), -5.0, -2.0, -4 / 3, -2 / 3, 0.0, 0.0)


def test_value_at_risk_without_mixing_is_the_middle():
    near(risk(0.0), -5.0, -5.0, -10 / 3, -5 / 3, 0.0, 0.0)


def test_value_at_risk_tends_to_the_tail():
    near(risk(1e7), -5.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_value_at_risk_without_baseline_counts_from_the_low_quantile():
    near(risk(0.0, baseline=False), 0.0, 0.0, 5 / 3, 10 / 3, 5.0, 5.0)


@pytest.mark.parametrize("levels", [(0.8, 0.2), (0.0, 0.8), (0.2, 1.0)])
def test_levels_out_of_order_are_refused(levels):
    low, high = levels
    with pytest.raises(ConfigError, match="levels"):
        mixed_value_at_risk(
            torch.zeros(3),
            torch.tensor(0.0),
            torch.tensor(1.0),
            low_level=low,
            high_level=high,
            mixing=1.5,
        )
    with pytest.raises(ConfigError, match="levels"):
        QuantileTracker(levels, 0.1)


def test_tracker_starts_at_the_first_batch_and_then_steps():
    tracker = QuantileTracker((0.25, 0.5), 0.1)
    assert tracker.quantile.isnan().all()
    tracker.update(torch.tensor([[3.0, 1.0], [2.0, 5.0]]))
    near(tracker.quantile, 1.75, 2.5)
    tracker.update(torch.tensor([1.0, 2.5, 9.0, 9.0, 9.0]))  # 2.5 is not below 2.5
    near(tracker.quantile, 1.75 + 0.1 * (0.25 - 0.2), 2.5 + 0.1 * (0.5 - 0.2))


def test_tracker_settles_at_the_quantile():
    """RiskPO's rule: the 0.2-quantile of N(0, 1), batches of 20, rate 0.05."""
    tracker = QuantileTracker((0.2,), 0.05)
    tracker.update(torch.tensor([1.0]))
    path = []
    for batch in torch.randn(1000, 20):
        tracker.update(batch)
        path.append(tracker.quantile.item())
    assert sum(path[400:]) / 600 == pytest.approx(-0.84, abs=0.05)


def test_tracker_with_a_window_does_not_care_for_the_unit():
    plain, scaled = (QuantileTracker((0.2, 0.8), 0.1, iqr_window=30) for _ in range(2))
    for batch in torch.randn(20, 7):
        plain.update(batch)
        scaled.update(1000 * batch + 5)
    torch.testing.assert_close(scaled.quantile, 1000 * plain.quantile + 5)


def test_tracker_learns_from_one_return_at_a_time():
    tracker = QuantileTracker((0.2, 0.8), 0.05, iqr_window=100)
    path = []
    for batch in 1000 * torch.randn(600, 1):
        tracker.update(batch)
        path.append(tracker.quantile.clone())
    low, high = torch.stack(path[200:]).mean(0)
    assert low.item() == pytest.approx(-842, abs=150)
    assert high.item() == pytest.approx(842, abs=150)


def test_tracker_ignores_masked_returns_and_empty_batches():
    tracker = QuantileTracker((0.5,), 0.1)
    never = torch.zeros(2, dtype=torch.bool)
    tracker.update(torch.randn(2), never)
    assert tracker.quantile.isnan()
    tracker.update(torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([True, False, True]))
    near(tracker.quantile, 2.0)
    tracker.update(torch.randn(2), never)
    near(tracker.quantile, 2.0)


def test_tracked_quantiles_do_not_cross():
    tracker = QuantileTracker((0.4, 0.6), 10.0)
    tracker.update(torch.tensor([0.0, 1.0]))
    tracker.update(torch.full((5,), 0.5))  # above the one, below the other
    near(tracker.quantile, 0.6 + 10 * (0.6 - 1.0), 0.4 + 10 * 0.4)


def test_tracker_resumes_exactly():
    straight = QuantileTracker((0.2, 0.8), 0.1, iqr_window=10)
    for batch in torch.randn(3, 4):
        straight.update(batch)
    resumed = QuantileTracker((0.2, 0.8), 0.1, iqr_window=10)
    resumed.load_state_dict({name: x.clone() for name, x in straight.state_dict().items()})
    for batch in torch.randn(5, 4):
        straight.update(batch)
        resumed.update(batch)
    assert torch.equal(straight.quantile, resumed.quantile)

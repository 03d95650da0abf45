"""Losses of world models (MBDPO specification, oracles 10, 12, 13 and 15)."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.nn.two_hot import TwoHot
from genpol.objectives.world_model import (
    as_pairs,
    consistency_loss,
    density_ratio_loss,
    hardest,
    over_horizon,
    policy_prior_loss,
    scaled_entropy,
    td_target,
    two_hot_loss,
    value_range,
)

ALL = torch.ones(3, 2, dtype=torch.bool)


def test_later_steps_count_less():
    values = torch.tensor([[1.0, 3.0], [10.0, 10.0], [100.0, 300.0]])
    assert over_horizon(values, ALL, 0.5).item() == pytest.approx((2 + 5 + 50) / 3)


def test_steps_that_do_not_count_are_left_out_of_their_mean():
    values = torch.tensor([[1.0, 3.0], [10.0, float("nan")], [float("nan"), float("nan")]])
    valid = ~values.isnan()
    assert over_horizon(values, valid, 0.5).item() == pytest.approx((2 + 5 + 0) / 3)


def test_consistency_is_a_mean_over_features_and_leaves_its_target_alone():
    predicted = torch.zeros(3, 2, 4, requires_grad=True)
    encoded = torch.full((3, 2, 4), 2.0, requires_grad=True)
    loss = consistency_loss(predicted, encoded, ALL, 0.5)
    assert loss.item() == pytest.approx(4.0 * (1 + 0.5 + 0.25) / 3)
    gradients = torch.autograd.grad(loss, (predicted, encoded), allow_unused=True)
    assert (gradients[0] != 0).all()
    assert gradients[1] is None


def test_two_hot_loss_is_a_mean_over_members():
    scalar, target = TwoHot(), torch.randn(3, 2)
    logits = torch.randn(5, 3, 2, 101)
    together = two_hot_loss(scalar, logits, target, ALL, 0.5)
    alone = [two_hot_loss(scalar, x, target, ALL, 0.5) for x in logits]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_target_takes_the_least_value_and_none_after_the_end():
    """Oracle 13."""
    reward = torch.tensor([[1.0, 2.0]])
    values = torch.tensor([[[10.0, 20.0]], [[30.0, float("inf")]]])
    target = td_target(reward, torch.tensor([[False, True]]), values, 0.5)
    assert target.tolist() == [[6.0, 2.0]]
    by_task = td_target(reward, torch.zeros(1, 2).bool(), values, torch.tensor([0.1, 0.5]))
    assert by_task.tolist() == [[2.0, 12.0]]
    assert td_target(reward, torch.zeros(1, 2).bool(), 0 * reward[None], 0.9).equal(reward)


def test_pairs_stay_together():
    """Oracle 12: fault 1 of the released code pairs other windows' actions."""
    step, window = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    tags = torch.stack((step, window), -1)
    latents, actions = as_pairs(tags, tags)
    assert latents.equal(actions)
    mixed = as_pairs(tags, tags, legacy=True)
    assert (mixed[0] == mixed[1]).all(-1).sum() == 2
    large = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(256), indexing="ij"), -1)
    assert (torch.eq(*as_pairs(large, large, legacy=True))).all(-1).sum() == 2  # of 768


# -- energy --------------------------------------------------------------------------------------


def fit(positive, negative):
    """Return w of ``F = w0 + w1 a + w2 a^2`` with the least loss, and that loss."""
    weights = torch.zeros(3, requires_grad=True)

    def logits(a):
        return weights[0] + weights[1] * a + weights[2] * a.square()

    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss, _ = density_ratio_loss(logits(positive), logits(negative))
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach().double(), closure().item()


def test_the_best_classifier_is_the_log_ratio_of_densities():
    """Oracle 10: normal positives, uniform negatives."""
    draw = torch.Generator().manual_seed(0)
    positive = 0.3 + 0.2 * torch.randn(200_000, generator=draw)
    negative = 2.0 * torch.rand(200_000, generator=draw) - 1.0
    inside = positive.abs() < 1  # as actions are
    w, _ = fit(positive[inside], negative[: int(inside.sum())])
    a = torch.linspace(-0.1, 0.7, 9, dtype=torch.float64)
    log_density = -0.5 * ((a - 0.3) / 0.2) ** 2 - math.log(0.2 * math.sqrt(2 * math.pi))
    found = w[0] + w[1] * a + w[2] * a**2
    assert (found - log_density - math.log(2.0)).abs().max() < 0.1
    slope = w[1] + 2 * w[2] * a
    torch.testing.assert_close(slope, -(a - 0.3) / 0.04, rtol=0, atol=0.4)


def test_nothing_is_learned_from_equal_distributions():
    """Oracle 10."""
    draws = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    w, loss = fit(draws[0], draws[1])
    assert w.abs().max() < 0.05
    assert loss == pytest.approx(math.log(2.0), abs=1e-3)


def test_the_drift_of_values_is_bounded_by_the_divergence_that_the_classifier_tells():
    """Oracle 15, with the three actions' frequencies as rows: 7, 2, 1 and 5, 3, 2 of ten."""
    p, b = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    logits = (p / b).log().requires_grad_()
    rows = [logits.repeat_interleave((10 * x).round().long()) for x in (p, b)]
    loss, _ = density_ratio_loss(*rows)
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.abs().max() < 1e-6  # the log ratio is the optimum
    divergence = rows[0].mean()
    q = torch.tensor([10.0, -3.0, 4.0])
    drift = ((p - b) * q).sum().abs()
    bound = q.abs().max() * (2 * divergence).sqrt()
    assert drift.item() == pytest.approx(1.9)
    assert bound.item() == pytest.approx(4.126, abs=1e-3)
    assert drift <= bound


def test_rows_that_do_not_count_teach_nothing():
    positive = torch.tensor([1.0, float("nan")])
    negative = torch.tensor([-2.0, float("nan")])
    loss, accuracy = density_ratio_loss(positive, negative, torch.tensor([True, False]))
    expected = 0.5 * (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-2.0)))
    assert loss.item() == pytest.approx(expected)
    assert accuracy.item() == 1.0


def test_the_hardest_negative_is_the_likeliest():
    logits = torch.tensor([[0.0, 3.0], [1.0, 2.0], [-1.0, 2.5]])
    candidates = torch.arange(12.0).view(3, 2, 2)
    assert hardest(logits, candidates).tolist() == [[4.0, 5.0], [2.0, 3.0]]


# -- policy prior --------------------------------------------------------------------------------


def test_scaled_entropy_is_that_of_the_draws_before_the_tanh():
    noise, log_std = torch.randn(5, 3), torch.randn(5, 3)
    normal = torch.distributions.Normal(0.0, log_std.exp())
    expected = -3 * normal.log_prob(noise * log_std.exp()).sum(-1)
    torch.testing.assert_close(scaled_entropy(noise, log_std), expected)


def test_dimensions_that_a_task_does_not_use_have_no_entropy():
    noise, log_std = torch.randn(5, 3), torch.randn(5, 3)
    mask = torch.tensor([True, False, True])
    alone = scaled_entropy(noise[:, mask], log_std[:, mask])
    torch.testing.assert_close(scaled_entropy(noise, log_std, mask.expand(5, 3)), alone)


def test_the_policy_follows_scaled_values_and_entropy():
    values = torch.tensor([[4.0, 8.0], [2.0, 2.0]])
    entropy = torch.tensor([[10.0, 10.0], [20.0, 40.0]])
    loss = policy_prior_loss(
        values, entropy, ALL[:2], scale=torch.tensor(2.0), entropy_weight=0.1, decay=0.5
    )
    assert loss.item() == pytest.approx(-((3.0 + 1.0) + 0.5 * (1.0 + 3.0)) / 2)


def test_the_range_of_values_leaves_small_ones_alone():
    values = torch.linspace(0.0, 100.0, 101)
    assert value_range(values).item() == pytest.approx(90.0)
    assert value_range(values / 1000).item() == 1.0

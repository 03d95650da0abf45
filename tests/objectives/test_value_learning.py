"""Expectiles, quantiles and chunked values against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from genpol.objectives.value_learning import (
    advantage_weight,
    aggregate,
    aggregate_probability,
    bounded_logit,
    critic_loss,
    cross_entropy,
    expectile_cross_entropy,
    expectile_loss,
    flow_q_loss,
    quantile_loss,
)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def minimise(loss, start, steps=4000, rate=0.05):
    """Return where plain gradient descent on ``loss`` ends."""
    x = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    for step in range(steps):
        (gradient,) = torch.autograd.grad(loss(x), x)
        x = (x - rate / (1 + 0.002 * step) * gradient).detach().requires_grad_()
    return x.detach()


def two_point_expectile(tau, high, low, share):
    return (tau * share * high + (1 - tau) * (1 - share) * low) / (
        tau * share + (1 - tau) * (1 - share)
    )


# --- expectiles --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_the_value_of_two_equally_likely_actions_is_the_expectile(tau):
    q = vector(1.0, 0.0)
    found = minimise(lambda v: expectile_loss(v.expand(2), q, tau), 0.3)
    assert found.item() == pytest.approx(tau, abs=1e-3)
    assert two_point_expectile(tau, 1.0, 0.0, 0.5) == pytest.approx(tau)


FORK = {0.5: 0.74925, 0.8: 0.77529, 0.9: 0.78975, 0.93: 0.79508, 0.99: 0.80762}


@pytest.mark.parametrize(("kappa", "expected"), FORK.items())
def test_both_losses_distil_the_fork_to_the_known_values(kappa, expected):
    """Of the data a quarter takes the short way (0.81), the others wait once (0.729)."""
    chunks = vector(0.81, 0.729, 0.729, 0.729)
    assert two_point_expectile(kappa, 0.81, 0.729, 0.25) == pytest.approx(expected, abs=1e-5)
    logit = minimise(
        lambda z: expectile_cross_entropy(z.expand(4), torch.logit(chunks), kappa), 1.0, rate=20.0
    )
    assert torch.sigmoid(logit).item() == pytest.approx(expected, abs=1e-4)
    squared = minimise(lambda v: expectile_loss(v.expand(4), chunks, kappa), 0.7, rate=1.0)
    assert squared.item() == pytest.approx(expected, abs=1e-4)


def test_one_step_values_are_optimistic_and_n_step_values_are_not():
    gamma, waits = 0.9, vector(0.81, 0.729, 0.729, 0.729)
    n_step = minimise(lambda z: cross_entropy(z.expand(4), waits), 1.0, rate=20.0).sigmoid()
    assert n_step.item() == pytest.approx(0.74925, abs=1e-4)
    assert gamma * 0.9 == pytest.approx(0.81)  # one step back from V(s1) = 0.9


def test_members_are_distilled_apart():
    logits = torch.zeros(2, 1, dtype=torch.float64)
    target = vector(-1.0, 2.0)[:, None]

    def loss(z):
        return expectile_cross_entropy(z, target, 0.8)

    found = minimise(loss, logits.tolist(), rate=20.0)
    assert found.flatten().tolist() == pytest.approx([-1.0, 2.0], abs=1e-3)
    least = aggregate_probability(found, "min").sigmoid().item()
    assert least == pytest.approx(1 / (1 + math.e), abs=1e-3)


# --- quantiles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("space", ["probability", "logit"])
def test_the_implicit_backup_is_a_quantile_in_either_space(kappa, space):
    # Ten values would leave a flat stretch between two of them.
    values = torch.linspace(0.1, 0.9, 1001, dtype=torch.float64)
    target = values if space == "probability" else torch.logit(values)
    found = minimise(lambda u: quantile_loss(u.expand(1001), target, kappa), 0.3, rate=2.0)
    found = found if space == "probability" else found.sigmoid()
    assert found.item() == pytest.approx(0.1 + 0.8 * kappa, abs=3e-3)


@pytest.mark.parametrize(("kappa", "value"), [(0.5, 0.5), (0.7, 0.7), (0.9, 0.9)])
def test_nine_equal_values_have_the_published_quantiles(kappa, value):
    values = torch.arange(1, 10, dtype=torch.float64) / 10
    u = torch.tensor(value, dtype=torch.float64, requires_grad=True)

    def slope(at):
        point = (u.detach() + at).requires_grad_()
        return torch.autograd.grad(quantile_loss(point.expand(9), values, kappa), point)[0].item()

    assert slope(-1e-3) <= 1e-12  # downhill to the published value from the left
    assert slope(1e-3) >= -1e-12  # and from the right


# --- heads -------------------------------------------------------------------------------------


def test_aggregates_rank_probabilities_and_not_logits():
    logits = vector(0.0, 8.0, 3.0, 3.0).view(2, 2).T  # columns are candidates
    mean = aggregate_probability(logits, "mean")
    assert mean.sigmoid().tolist() == pytest.approx([0.7498, 0.9526], abs=1e-4)
    assert aggregate(logits, "mean").tolist() == [4.0, 3.0]
    assert aggregate_probability(logits, "min").tolist() == [0.0, 3.0]


def test_mean_probabilities_do_not_saturate():
    logits = vector(60.0, 40.0, -60.0, -40.0).view(2, 2)[:, :, None]
    found = aggregate_probability(logits.transpose(0, 1), "mean").flatten()
    assert found.isfinite().all()
    assert found.tolist() == pytest.approx([40 + math.log(2), -40 - math.log(2)], abs=1e-6)


@pytest.mark.parametrize("y", [0.0, 1.0])
def test_certain_targets_are_learned_without_nan(y):
    logits = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    loss = cross_entropy(logits, torch.full((3,), y))
    loss.backward()
    assert torch.isfinite(loss)
    torch.testing.assert_close(logits.grad, (logits.detach().sigmoid() - y) / 3)


def test_the_cross_entropy_is_least_at_the_entropy_of_the_target():
    y = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropy = -(y * y.log() + (1 - y) * (1 - y).log()).mean()
    assert cross_entropy(torch.logit(y), y).item() == pytest.approx(entropy.item())
    assert cross_entropy(torch.logit(y) + 0.5, y) > entropy


def test_saturated_backups_teach_finitely():
    target = bounded_logit(torch.tensor([float("inf"), float("-inf"), 2.0]))
    assert target[2] == 2.0
    u = torch.zeros(3, requires_grad=True)
    quantile_loss(u, target, 0.9).backward()
    assert u.grad.isfinite().all()
    assert target[:2].sigmoid().tolist() == pytest.approx([1 - 1e-6, 1e-6], rel=0.05)


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda v, y, w: critic_loss(v, y, w),
        lambda v, y, w: cross_entropy(v, y.sigmoid(), w),
        lambda v, y, w: expectile_loss(v, y, 0.8, w),
        lambda v, y, w: expectile_cross_entropy(v, y, 0.8, w),
        lambda v, y, w: quantile_loss(v, y, 0.8, w),
    ],
)
def test_rows_of_weight_zero_count_as_zero_and_may_be_anything(loss):
    values = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], requires_grad=True)
    target = torch.tensor([1.0, -1.0, float("nan")])
    weight = torch.tensor([1.0, 1.0, 0.0])
    found = loss(values, target, weight)
    expected = loss(values[:, :2], target[:2], None) * 2 / 3
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, values)
    assert gradient.isfinite().all()


def test_the_critics_error_is_a_mean_over_members_and_rows():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert critic_loss(values, torch.tensor([1.0, 1.0])).item() == (0 + 1 + 4 + 9) / 4


def test_targets_get_no_gradient():
    target = torch.ones(2, requires_grad=True)
    values = torch.zeros(2, requires_grad=True)
    for loss in (
        critic_loss(values, target),
        cross_entropy(values, target),
        expectile_loss(values, target, 0.8),
        expectile_cross_entropy(values, target, 0.8),
        quantile_loss(values, target, 0.8),
    ):
        assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None


def test_advantage_weights_are_bounded():
    found = advantage_weight(vector(0.0, 1.0, 9.0), inverse_temperature=2.0, maximum=100.0)
    assert found.tolist() == pytest.approx([1.0, math.e**2, 100.0])


# --- one-step policies -------------------------------------------------------------------------


def test_a_linear_value_moves_the_one_step_policy_by_the_known_distance():
    dim, alpha = 25, 300.0
    slope = torch.linspace(-1, 1, dim, dtype=torch.float64)
    flow = torch.zeros(1, dim, dtype=torch.float64)

    def loss(x):
        return flow_q_loss(x[None], flow, (slope * x).sum()[None], alpha=alpha)[0]

    found = minimise(loss, [0.0] * dim, steps=400, rate=0.03)
    torch.testing.assert_close(found, dim * slope / (2 * alpha), atol=1e-6, rtol=1e-4)
    assert dim / (2 * alpha) == pytest.approx(0.0417, abs=1e-4)


def test_normalised_values_move_it_by_their_scale():
    action = torch.zeros(2, 3, requires_grad=True)
    values = (4 * action).sum(-1) + torch.tensor([3.0, -5.0])
    loss, _ = flow_q_loss(action, torch.zeros(2, 3), values, alpha=1.0, normalize=True)
    (gradient,) = torch.autograd.grad(loss, action)
    torch.testing.assert_close(gradient, torch.full((2, 3), -4 / 2 / 4.0))


def test_beyond_the_bound_only_the_flow_is_heard():
    action = torch.tensor([[1.2, 0.5]], requires_grad=True)
    values = action.clamp(-1, 1).sum(-1)
    flow = torch.tensor([[1.0, 0.5]])
    (gradient,) = torch.autograd.grad(flow_q_loss(action, flow, values, alpha=1.0)[0], action)
    torch.testing.assert_close(gradient, torch.tensor([[0.2, -1.0]]))


def test_losses_are_means_of_torchs_own():
    z, y = torch.randn(4), torch.rand(4)
    torch.testing.assert_close(cross_entropy(z, y), F.binary_cross_entropy_with_logits(z, y))

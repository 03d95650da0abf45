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


def minimise(loss, *size, within=15.0):
    """Return where a loss is least that is convex in each entry, by bisection of its slope."""
    low = torch.full(size, -within, dtype=torch.float64)
    high = -low
    for _ in range(45):
        middle = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(loss(middle), middle)
        low = torch.where(slope < 0, middle.detach(), low)
        high = torch.where(slope < 0, high, middle.detach())
    return (low + high) / 2


def two_point_expectile(tau, high, low, share):
    return (tau * share * high + (1 - tau) * (1 - share) * low) / (
        tau * share + (1 - tau) * (1 - share)
    )


# --- expectiles --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_the_value_of_two_equally_likely_actions_is_the_expectile(tau):
    q = vector(1.0, 0.0)
    found = minimise(lambda v: expectile_loss(v.expand(2), q, tau))
    assert found.item() == pytest.approx(tau, abs=1e-6)
    assert two_point_expectile(tau, 1.0, 0.0, 0.5) == pytest.approx(tau)


FORK = {0.5: 0.74925, 0.8: 0.77529, 0.9: 0.78975, 0.93: 0.79508, 0.99: 0.80762}


@pytest.mark.parametrize(("kappa", "expected"), FORK.items())
def test_both_losses_distil_the_fork_to_the_known_values(kappa, expected):
    """Of the data a quarter takes the short way (0.81), the others wait once (0.729)."""
    chunks = vector(0.81, 0.729, 0.729, 0.729)
    assert two_point_expectile(kappa, 0.81, 0.729, 0.25) == pytest.approx(expected, abs=1e-5)
    logit = minimise(lambda z: expectile_cross_entropy(z.expand(4), torch.logit(chunks), kappa))
    assert torch.sigmoid(logit).item() == pytest.approx(expected, abs=1e-5)
    squared = minimise(lambda v: expectile_loss(v.expand(4), chunks, kappa))
    assert squared.item() == pytest.approx(expected, abs=1e-5)


def test_at_a_fork_one_step_values_are_optimistic_and_n_step_values_are_not():
    """One step on, the better of two ways is known (0.9): there optimism costs nothing."""
    after = minimise(lambda u: quantile_loss(u.expand(7), vector(*[0.9] * 4, *[0.81] * 3), 0.9))
    one_step = minimise(lambda z: cross_entropy(z.expand(4), 0.9 * after.expand(4)))
    assert one_step.sigmoid().item() == pytest.approx(0.81, abs=1e-6)
    waits = vector(0.81, 0.729, 0.729, 0.729)
    n_step = minimise(lambda z: cross_entropy(z.expand(4), waits))
    assert n_step.sigmoid().item() == pytest.approx(0.74925, abs=1e-6)


def test_members_are_distilled_apart():
    target = vector(-1.0, 2.0)[:, None]

    def loss(z):
        return expectile_cross_entropy(z, target, 0.8)

    found = minimise(loss, 2, 1)
    assert found.flatten().tolist() == pytest.approx([-1.0, 2.0], abs=1e-6)
    least = aggregate_probability(found, "min").sigmoid().item()
    assert least == pytest.approx(1 / (1 + math.e), abs=1e-6)


# --- quantiles ---------------------------------------------------------------------------------


NINTHS = torch.arange(1, 10, dtype=torch.float64) / 10


@pytest.mark.parametrize("kappa", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("space", ["probability", "logit"])
def test_the_implicit_backup_is_a_quantile_in_either_space(kappa, space):
    target = NINTHS if space == "probability" else torch.logit(NINTHS)
    found = minimise(lambda u: quantile_loss(u.expand(9), target, kappa))
    found = found if space == "probability" else found.sigmoid()
    assert found.item() == pytest.approx(kappa, abs=1e-6)


def test_without_optimism_the_expectile_of_values_is_their_mean():
    squares = NINTHS.square()
    found = minimise(lambda z: expectile_cross_entropy(z.expand(9), torch.logit(squares), 0.5))
    assert found.sigmoid().item() == pytest.approx(squares.mean().item(), abs=1e-6)
    assert squares.mean() > squares.median() + 0.05


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


@pytest.mark.parametrize("alpha", [3.0, 300.0, 1e6])
def test_a_linear_value_moves_the_one_step_policy_by_the_known_distance(alpha):
    """The further the smaller the weight of the flow: of a very large one nothing else is left."""
    dim = 25
    slope = torch.linspace(-1, 1, dim, dtype=torch.float64)
    flow = torch.linspace(0.3, -0.3, dim, dtype=torch.float64)[None]

    def loss(x):
        return flow_q_loss(x[None], flow, (slope * x).sum()[None], alpha=alpha)[0]

    found = minimise(loss, dim)
    torch.testing.assert_close(found, flow[0] + dim * slope / (2 * alpha), atol=1e-9, rtol=0)


def test_the_published_weight_allows_a_twenty_fourth_of_the_slope():
    slope = vector(*[1.0] * 25)
    flow = torch.zeros(1, 25, dtype=torch.float64)
    found = minimise(lambda x: flow_q_loss(x[None], flow, (slope * x).sum(), alpha=300.0)[0], 25)
    assert found.tolist() == pytest.approx([0.0417] * 25, abs=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_without_a_flow_nothing_holds_the_policy_back(size):
    action = torch.full((1, 3), size, requires_grad=True)
    loss, _ = flow_q_loss(action, torch.zeros(1, 3), 2.0 * action.sum(-1), alpha=0.0)
    (gradient,) = torch.autograd.grad(loss, action)
    assert gradient.tolist() == [[-2.0] * 3]


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

"""Losses of soft actor-critics (MDPO specification, section 9)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genpol.objectives.actor_critic import (
    entropy_term,
    mdpo_actor_loss,
    soft_bellman_target,
    temperature_loss,
)
from genpol.policies.gaussian import gaussian_kl, log_prob
from genpol.policies.squashed import squashed_log_prob

float64 = {"dtype": torch.float64}


def minimise(loss_of, mean: Tensor, log_scale: Tensor) -> tuple[float, float]:
    """Return mean and variance of the Gaussian that minimises a loss of reparameterised draws."""
    # Standard normal quantiles: with them the expectation of a quadratic is exact up to 1e-4.
    levels = (torch.arange(4000, **float64) + 0.5) / 4000
    noise = torch.special.ndtri(levels)
    noise = (noise / noise.std(correction=0)).unsqueeze(-1)
    optimizer = torch.optim.LBFGS(
        [mean, log_scale], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        scale = log_scale.exp().expand_as(noise)
        action = mean + scale * noise
        loss = loss_of(action, log_prob(mean, scale, action).unsqueeze(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(mean), float(log_scale.detach().exp().square())


@pytest.mark.parametrize(
    ("temperature", "variance", "mean"),
    [(0.0, 0.2, 0.2), (0.2, 0.217391, 0.217391)],
)
def test_the_mirror_step_of_a_gaussian_is_exact(temperature, variance, mean):
    """Oracle 5: N(0, 1/4), Q = -(a - 1)^2, t = 1/c = 1/2."""
    old_mean, old_scale = torch.zeros(1, **float64), torch.full((1,), 0.5, **float64)

    def loss(action: Tensor, new: Tensor) -> Tensor:
        old = log_prob(old_mean, old_scale, action).unsqueeze(-1)
        value = -(action - 1).square().squeeze(-1)
        return mdpo_actor_loss(new, old, value, kl_coefficient=2.0, temperature=temperature)

    found = minimise(
        loss,
        torch.zeros(1, **float64, requires_grad=True),
        torch.zeros(1, **float64, requires_grad=True),
    )
    assert found == pytest.approx((mean, variance), abs=1e-5)


def test_a_linear_value_shifts_the_mean_alone():
    """Oracle 5: the mean moves by t s^2 g, the variance stays."""
    old_mean, old_scale = torch.zeros(1, **float64), torch.full((1,), 0.5, **float64)

    def loss(action: Tensor, new: Tensor) -> Tensor:
        old = log_prob(old_mean, old_scale, action).unsqueeze(-1)
        value = 3.0 * action.squeeze(-1)
        return mdpo_actor_loss(new, old, value, kl_coefficient=2.0, temperature=0.0)

    found = minimise(
        loss,
        torch.ones(1, **float64, requires_grad=True),
        torch.ones(1, **float64, requires_grad=True),
    )
    assert found == pytest.approx((0.5 * 0.25 * 3.0, 0.25), abs=1e-5)


@pytest.mark.parametrize("index", [1.0, 1.5, 2.0])
def test_at_equal_coefficients_it_is_the_loss_of_sac(index):
    """Oracle 6: loss and gradients are those of SAC, whatever the old policy."""
    draw = torch.Generator().manual_seed(0)
    new = torch.randn(64, 3, generator=draw, requires_grad=True)
    old = torch.randn(64, 3, generator=draw, requires_grad=True)
    value = torch.randn(64, generator=draw, requires_grad=True)
    loss = mdpo_actor_loss(
        new, old, value, kl_coefficient=0.3, temperature=0.3, tsallis_index=index
    )
    gradients = torch.autograd.grad(loss, (new, old, value))
    sac = (0.3 * entropy_term(new, index) - value).mean()
    expected = torch.autograd.grad(sac, (new, value))
    torch.testing.assert_close(loss, sac, rtol=0, atol=1e-7)
    torch.testing.assert_close((gradients[0], gradients[2]), expected, rtol=0, atol=1e-9)
    assert (gradients[1] == 0).all()


def test_below_the_divergence_pulls_towards_the_old_policy():
    new, value = torch.zeros(4, 1), torch.zeros(4)
    near = mdpo_actor_loss(new, new, value, kl_coefficient=1.0, temperature=0.2)
    far = mdpo_actor_loss(new, new - 2.0, value, kl_coefficient=1.0, temperature=0.2)
    assert far > near


def test_the_closed_form_divergence_is_what_draws_have_on_average():
    draw = torch.Generator().manual_seed(0)
    mean, scale = torch.tensor([0.3, -0.2], **float64), torch.tensor([0.4, 0.7], **float64)
    old_mean, old_scale = torch.zeros(2, **float64), torch.tensor([0.5, 0.6], **float64)
    noise = torch.randn(400_000, 2, generator=draw, **float64)
    u = mean + scale * noise
    new, old = (squashed_log_prob(m, s, u) for m, s in ((mean, scale), (old_mean, old_scale)))
    value = -u.square().sum(-1)
    weights = {"kl_coefficient": 2.0, "temperature": 0.3}
    exact = gaussian_kl(mean, scale, old_mean, old_scale).expand(len(u))
    sampled = mdpo_actor_loss(new, old, value, **weights)
    closed = mdpo_actor_loss(new, old, value, **weights, divergence=exact)
    torch.testing.assert_close(closed, sampled, rtol=0, atol=5e-3)


def test_entropies_of_index_one_are_the_limit():
    log_prob_rows = torch.randn(32, 3, generator=torch.Generator().manual_seed(0), **float64)
    torch.testing.assert_close(
        entropy_term(log_prob_rows, 1.0001), entropy_term(log_prob_rows), rtol=0, atol=1e-2
    )
    assert torch.equal(entropy_term(log_prob_rows), log_prob_rows.sum(-1))


def test_an_index_of_two_is_density_minus_one():
    density = torch.tensor([[0.5, 2.0]], **float64)
    torch.testing.assert_close(entropy_term(density.log(), 2.0), (density - 1).sum(-1))


def test_tiny_densities_stay_finite_and_have_no_gradient():
    log_density = torch.tensor([[-1e4, -1.0]], requires_grad=True)
    entropy_term(log_density, 1.5).sum().backward()
    assert log_density.grad is not None
    assert log_density.grad[0, 0] == 0
    assert torch.isfinite(log_density.grad).all()


def test_only_true_ends_stop_the_bootstrap():
    """Oracle 10."""
    reward = torch.tensor([1.0, 1.0])
    terminated = torch.tensor([False, True])
    next_value = torch.tensor([10.0, float("nan")])
    target = soft_bellman_target(reward, terminated, next_value, 0.9)
    assert target.tolist() == [10.0, 1.0]


@pytest.mark.parametrize(("entropy", "sign"), [(3.0, 1), (-3.0, -1)])
def test_the_temperature_falls_where_entropy_is_ample(entropy, sign):
    log_temperature = torch.zeros((), requires_grad=True)
    temperature_loss(log_temperature, -entropy * torch.ones(8), 0.5).backward()
    assert log_temperature.grad is not None
    assert torch.sign(log_temperature.grad) == sign  # descent goes the other way

from __future__ import annotations

import math

import pytest
import torch

from genpol.objectives.regularisers import (
    ridge,
    standard_normal_kl,
    tanh_entropy_correction,
    value_loss,
)
from genpol.policies.gaussian import entropy


def test_value_loss_is_the_weighted_mean_square():
    value, target = torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([2.0, 4.0, 0.0])
    loss, _ = value_loss(value, target, torch.tensor([1.0, 3.0, 0.0]))
    assert loss.item() == pytest.approx((1 + 3 * 4) / 4)


def test_ridge_of_the_prior_is_one():
    assert ridge(torch.zeros(5, 4), torch.ones(5, 4))[0] == 1


def test_prior_kl_agrees_with_torch_distributions():
    mean, scale = torch.randn(50, 4), torch.rand(50, 4) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, scale), normal(0.0, 1.0))
    torch.testing.assert_close(standard_normal_kl(mean, scale)[0], expected.sum(-1).mean())


def test_prior_kl_of_the_prior_is_zero():
    assert standard_normal_kl(torch.zeros(5, 4), torch.ones(5, 4))[0] == 0


@pytest.mark.parametrize("term", [ridge, standard_normal_kl])
def test_masked_rows_do_not_count_in_regularisers(term):
    mean, scale = torch.randn(3, 2), torch.rand(3, 2) + 0.1
    expected = term(mean[:2], scale[:2])[0]
    mean[2], scale[2] = torch.nan, 0.0
    mean.requires_grad_()
    loss, _ = term(mean, scale, torch.tensor([1.0, 1.0, 0.0]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected)
    assert torch.equal(mean.grad[2], torch.zeros(2))


def test_ridge_and_entropy_balance_at_the_predicted_scale():
    """GoRL oracle 9: sigma^2 = c_H d / (2 lambda), 4.47 at d = 4, c_H = 0.01, lambda = 1e-3."""
    log_scale = torch.full((1, 4), math.log(0.01 * 4 / (2 * 1e-3)) / 2, requires_grad=True)
    mean = torch.zeros(1, 4)
    loss = 1e-3 * ridge(mean, log_scale.exp())[0] - 0.01 * entropy(mean, log_scale.exp()).mean()
    loss.backward()
    assert log_scale.exp()[0, 0].item() == pytest.approx(4.4721, abs=1e-4)
    assert log_scale.grad.abs().max() < 1e-8


def test_tanh_correction_agrees_with_the_plain_formula_and_does_not_saturate():
    x = torch.randn(100, 3, dtype=torch.float64)
    expected = (1 - x.tanh().square()).log().sum(-1).mean()
    torch.testing.assert_close(tanh_entropy_correction(x)[0], expected)
    far = tanh_entropy_correction(torch.tensor([[50.0], [-50.0]]))[0]
    assert far.item() == pytest.approx(2 * (math.log(2) - 50), rel=1e-6)

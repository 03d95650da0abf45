from __future__ import annotations

import math

import pytest
import torch

from genpol.policies.gaussian import GaussianPolicy, entropy, log_prob


@pytest.fixture
def policy() -> GaussianPolicy:
    return GaussianPolicy(5, 3, (32, 32), generator=torch.Generator().manual_seed(0))


def test_log_prob_and_entropy_agree_with_torch_distributions():
    mean, scale, x = torch.randn(3, 7, 4).unbind(0)
    scale = scale.exp()
    normal = torch.distributions.Independent(torch.distributions.Normal(mean, scale), 1)
    torch.testing.assert_close(log_prob(mean, scale, x), normal.log_prob(x))
    torch.testing.assert_close(entropy(mean, scale), normal.entropy())


def test_fresh_scale_is_state_dependent_and_near_softplus_of_zero():
    """GoRL oracle 7, `fresh`: sigma in about 0.5 .. 0.9 with the published encoder of 4 x 32."""
    policy = GaussianPolicy(15, 4, (32,) * 4, generator=torch.Generator().manual_seed(0))
    _, scale = policy(torch.randn(1000, 15))
    assert scale.quantile(0.05) > 0.5
    assert scale.quantile(0.95) < 0.9
    assert scale.std(0).min() > 1e-3


def test_scale_stays_within_its_bounds(policy):
    with torch.no_grad():
        policy.net.linears[-1].bias[3:] = torch.tensor([-100.0, 0.0, 100.0])
    _, scale = policy(torch.randn(10, 5))
    torch.testing.assert_close(scale[:, 0], torch.full((10,), 1e-3))
    torch.testing.assert_close(scale[:, 2], torch.full((10,), 10.0))


def one_scale():
    generator = torch.Generator().manual_seed(0)
    return GaussianPolicy(5, 3, (32, 32), state_dependent_scale=False, generator=generator)


def test_one_scale_for_all_states_begins_at_one_and_is_learned():
    policy, observation = one_scale(), torch.randn(10, 5)
    mean, scale = policy(observation)
    assert mean.shape == scale.shape == (10, 3)
    assert torch.equal(scale, torch.ones(10, 3))
    policy.bc_loss(observation, mean.detach() + 0.1)[0].backward()
    # d/d log(scale) of the negative log-likelihood is 1 - (a - mean)^2 / scale^2.
    torch.testing.assert_close(policy.log_scale.grad, torch.full((3,), 1 - 0.01))


def test_one_scale_stays_within_its_bounds_and_is_reset():
    policy = one_scale()
    with torch.no_grad():
        policy.log_scale.copy_(torch.tensor([-100.0, 0.0, 100.0]))
    _, scale = policy(torch.randn(10, 5))
    torch.testing.assert_close(scale[0], torch.tensor([1e-3, 1.0, 10.0]))
    policy.reset_to_prior()
    mean, scale = policy(torch.randn(10, 5))
    assert torch.equal(mean, torch.zeros(10, 3))
    assert torch.equal(scale, torch.ones(10, 3))
    with torch.no_grad():
        policy.log_scale.fill_(-1.0)
    policy.reset(torch.Generator().manual_seed(0))
    assert torch.equal(policy.log_scale, torch.zeros(3))


def test_prior_is_standard_normal_at_every_observation(policy):
    """GoRL oracle 7, `gaussian`: mean 0, sigma 1 to 1e-5, entropy 1.41894 a dimension."""
    policy.reset_to_prior()
    mean, scale = policy(100 * torch.randn(1000, 5))
    assert torch.equal(mean, torch.zeros(1000, 3))
    assert (scale - 1).abs().max() < 1e-5
    assert entropy(mean, scale)[0].item() / 3 == pytest.approx(1.41894, abs=1e-5)
    assert policy.net.linears[-1].bias[-1].item() == pytest.approx(0.5397, abs=1e-4)


def test_sample_is_the_mode_at_zero_noise(policy):
    observation = torch.randn(4, 5)
    assert torch.equal(policy.sample(observation, torch.zeros(4, 3)), policy.mode(observation))


def test_score_is_the_gradient_of_the_log_density(policy):
    observation, action = torch.randn(4, 5), torch.randn(4, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(log_prob(*policy(observation), action).sum(), action)
    torch.testing.assert_close(policy.score(observation, action), expected)


def test_chain_is_one_step_with_the_policys_density(policy):
    observation, noise, draw = torch.randn(4, 5), torch.randn(4, 3), torch.randn(4, 1, 3)
    chain = policy.chain(observation, noise, draw)
    assert torch.equal(chain[:, 0], noise)
    assert torch.equal(chain[:, 1], policy.sample(observation, draw[:, 0]))
    expected = log_prob(*policy(observation), chain[:, 1]).unsqueeze(-1)
    assert torch.equal(policy.chain_log_prob(observation, chain), expected)


def test_bc_loss_is_the_weighted_negative_log_likelihood(policy):
    observation, action = torch.randn(3, 5), torch.randn(3, 3)
    expected = -log_prob(*policy(observation), action)[:2].mean()
    action[2] = math.nan
    loss, _ = policy.bc_loss(observation, action, weight=torch.tensor([1.0, 1.0, 0.0]))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())

"""The Gaussian behind a tanh."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from genpol.policies.squashed import SquashedGaussianPolicy, squashed_log_prob


@pytest.fixture
def policy() -> SquashedGaussianPolicy:
    return SquashedGaussianPolicy(3, 2, [16], generator=torch.Generator().manual_seed(0))


def test_density_is_that_of_the_squashed_action(policy: SquashedGaussianPolicy) -> None:
    observation = torch.randn(32, 3)
    drawn = policy.draw(observation, torch.randn(32, 2))
    mean, scale = policy(observation)
    reference = TransformedDistribution(Normal(mean, scale), [TanhTransform(cache_size=1)])
    torch.testing.assert_close(
        drawn.log_prob, reference.log_prob(drawn.action), rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(policy.log_prob(observation, drawn.pre_squash), drawn.log_prob)


def test_density_integrates_to_one() -> None:
    action = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]
    density = squashed_log_prob(
        torch.tensor(0.3, dtype=torch.float64),
        torch.tensor(0.8, dtype=torch.float64),
        torch.atanh(action),
    ).exp()
    torch.testing.assert_close(
        torch.trapezoid(density, action), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-4
    )


def test_density_far_out_is_finite() -> None:
    pre_squash = torch.tensor([-60.0, 60.0], requires_grad=True)
    log_prob = squashed_log_prob(torch.zeros(2), torch.ones(2), pre_squash)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(pre_squash.grad).all()


def test_scale_keeps_within_its_bounds(policy: SquashedGaussianPolicy) -> None:
    with torch.no_grad():
        policy.net.linears[-1].bias[2:] = torch.tensor([-100.0, 100.0])
    scale = policy(torch.randn(4, 3))[1].log()
    torch.testing.assert_close(scale, torch.tensor([[-5.0, 2.0]]).expand(4, 2))


def test_sample_and_mode(policy: SquashedGaussianPolicy) -> None:
    observation, noise = torch.randn(5, 3), torch.randn(5, 2)
    drawn = policy.draw(observation, noise)
    torch.testing.assert_close(policy.sample(observation, noise), drawn.action)
    torch.testing.assert_close(
        policy.mode(observation), policy.sample(observation, torch.zeros(5, 2))
    )

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.schedules import (
    diffusers_schedule,
    gorl_cosine_schedule,
    gorl_linear_schedule,
)

SCHEDULE = diffusers_schedule(num_levels=20, num_steps=10)
PREDICTIONS = ("epsilon", "epsilon_delta", "sample", "v_prediction")


def make(**options) -> DiffusionPolicy:
    options = {"schedule": SCHEDULE, "zero_init": False, **options}
    return DiffusionPolicy(5, 3, (16, 16), generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (7, 3), (2, 7, 3)])
def test_zero_epsilon_delta_network_is_the_identity_bit_for_bit(shape):
    """GoRL oracle 10, epsilon-delta on the linear schedule."""
    policy = make(
        schedule=gorl_linear_schedule(),
        prediction="epsilon_delta",
        output_scale=0.25,
        zero_init=True,
    )
    noise = torch.randn(shape)
    assert torch.equal(policy.sample(torch.randn(*shape[:-1], 5), noise), noise)


def test_zero_cosine_network_scales_the_noise():
    policy = make(schedule=gorl_cosine_schedule(), zero_init=True)
    noise = torch.randn(7, 3)
    decoded = policy.sample(torch.randn(7, 5), noise)
    torch.testing.assert_close(decoded, 6.4427 * noise, rtol=1e-4, atol=0)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("horizon", [1, 4])
def test_fast_path_equals_an_eager_diffusers_loop(horizon, clip):
    # In double precision, since the nearly signal-free first levels amplify rounding.
    policy = make(horizon=horizon, clip=clip).double()
    policy.normalizer.update(2 * torch.randn(100, 5) + 1)
    observation = torch.randn(8, 5, dtype=torch.float64)
    noise = torch.randn(8, *policy.action_shape, dtype=torch.float64)
    scheduler = DDIMScheduler(
        20,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=clip is not None,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    x = noise.flatten(1)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            embedding = policy.denoiser.embedding(policy.level_time[timestep].expand(8, 1))
            features = torch.cat((policy.normalizer(observation), x, embedding), -1)
            output = policy.denoiser.mlp(features)
            x = scheduler.step(output, timestep, x, use_clipped_model_output=True).prev_sample
        fast = policy.sample(observation, noise)
    torch.testing.assert_close(fast, x.view_as(noise), rtol=0, atol=1e-6)


def test_gradient_flows_through_the_sampler():
    policy, noise = make(), torch.randn(8, 3, requires_grad=True)
    policy.sample(torch.randn(8, 5), noise).square().sum().backward()
    assert noise.grad.isfinite().all()
    assert all(parameter.grad.abs().max() > 0 for parameter in policy.parameters())


def test_fewer_steps_visit_a_subset_of_the_levels():
    policy = make(prediction="epsilon")
    observation, noise = torch.randn(8, 5), torch.randn(8, 3)
    once = policy.sample(observation, noise, num_steps=1)
    level = torch.full((8, 1), 19)
    expected = policy.denoised(observation, noise, level)
    torch.testing.assert_close(once, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bc_loss_regresses_what_the_steps_expect(prediction):
    """At the loss's optimum for one (action, noise), every estimate recovers them."""
    policy = make(prediction=prediction)
    observation, action, noise = torch.randn(8, 5), torch.randn(8, 3), torch.randn(8, 3)
    time = torch.randint(1, 12, (8, 1))
    abar = policy.alpha_bar[time]
    x = abar.sqrt() * action + (1 - abar).sqrt() * noise

    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.target = torch.nn.Parameter(torch.zeros(8, 3))

        def forward(self, observation, x, time):
            return self.target

    policy.denoiser = Told()
    loss, _ = policy.bc_loss(observation, action, noise, time)
    loss.backward()
    with torch.no_grad():  # the mean square over 24 entries: one full Newton step
        policy.denoiser.target -= 12 * policy.denoiser.target.grad
    assert policy.bc_loss(observation, action, noise, time)[0] < 1e-10
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(policy.noise_estimate(observation, x, time), noise, **close)
    torch.testing.assert_close(policy.denoised(observation, x, time), action, **close)
    expected = -noise / (1 - abar).sqrt()
    torch.testing.assert_close(policy.score(observation, x, time), expected, **close)


def test_score_of_an_exact_gaussian_epsilon():
    policy = make()

    class Exact(torch.nn.Module):
        def forward(self, observation, x, time):
            abar = policy.alpha_bar[(time * 20).round().long()]
            return (1 - abar).sqrt() * (x - abar.sqrt() * 0.5) / (abar * 0.09 + 1 - abar)

    policy.denoiser = Exact()
    x, time = torch.randn(19, 3), torch.arange(19).unsqueeze(-1)
    abar = policy.alpha_bar[time]
    expected = -(x - abar.sqrt() * 0.5) / (abar * 0.09 + 1 - abar)
    torch.testing.assert_close(policy.score(torch.zeros(19, 5), x, time), expected)


def test_score_at_a_clean_level_is_finite():
    policy = make(schedule=gorl_cosine_schedule())
    level = torch.zeros(8, 1, dtype=torch.int64)
    assert policy.score(torch.randn(8, 5), torch.randn(8, 3), level).isfinite().all()


def test_zero_network_loses_the_power_of_the_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50_000, 3, generator=generator)
    time = make().draw_time((50_000,), generator)
    loss, _ = make(zero_init=True).bc_loss(torch.zeros(50_000, 5), 0 * noise, noise, time)
    assert loss.item() == pytest.approx(1.0, abs=0.02)


def test_weight_zero_rows_may_hold_nan():
    policy, observation, noise = make(), torch.randn(4, 5), torch.randn(6, 4, 3)
    action, time = torch.randn(4, 3), torch.randint(0, 20, (6, 4, 1))
    expected, _ = policy.bc_loss(observation[:3], action[:3], noise[:, :3], time[:, :3])
    action[3] = math.nan
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, _ = policy.bc_loss(observation, action, noise, time, weight=weight)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())


def test_drawn_levels_cover_the_schedule():
    time = make().draw_time((1000,), torch.Generator().manual_seed(0))
    assert time.shape == (1000, 1)
    assert time.unique().tolist() == list(range(20))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_chain_ends_where_the_sampler_does(sampler):
    policy = make(sampler=sampler, eta=0.7, clip=1.0)
    observation, noise, draws = torch.randn(8, 5), torch.randn(8, 3), torch.randn(8, 10, 3)
    chain = policy.chain(observation, noise, draws, 0.0)
    assert torch.equal(chain[:, 0], noise)
    assert torch.equal(chain[:, -1], policy.sample(observation, noise, draws))


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_rescoring_recovers_the_drawn_noise(sampler, eta, horizon, clip):
    policy = make(sampler=sampler, eta=eta, horizon=horizon, clip=clip).double()
    observation = torch.randn(6, 8, 5, dtype=torch.float64)
    noise = torch.randn(6, 8, *policy.action_shape, dtype=torch.float64)
    draws = torch.randn(6, 8, 10, *policy.action_shape, dtype=torch.float64)
    chain = policy.chain(observation, noise, draws, 0.1)
    std = torch.tensor([max(step.std, 0.1) for step in policy.steps], dtype=torch.float64)
    dims = 3 * horizon
    constant = dims * (std.log() + 0.5 * math.log(2 * math.pi))
    expected = -0.5 * draws.reshape(6, 8, 10, dims).square().sum(-1) - constant
    actual = policy.chain_log_prob(observation, chain, 0.1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)

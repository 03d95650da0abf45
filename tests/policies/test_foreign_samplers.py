"""What samplers of other libraries have: unclipped epsilon, closed times, noise of the steps."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from genpol.policies.diffusion import DiffusionPolicy, transition_mean
from genpol.policies.flow import FlowPolicy, time_grid
from genpol.policies.schedules import denoising_steps, diffusers_schedule


@pytest.mark.parametrize("betas", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_without_clipped_epsilon_is_that_of_diffusers(betas, prediction, clip):
    scheduler = DDIMScheduler(
        num_train_timesteps=20,
        beta_schedule=betas,
        prediction_type=prediction,
        clip_sample=clip,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = diffusers_schedule(betas, num_levels=20, num_steps=10, spacing="leading")
    steps = denoising_steps(schedule, prediction=prediction, sampler="ddim_unclipped")
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        x, output = torch.randn(2, 8, 4, dtype=torch.float64).unbind(0)
        expected = scheduler.step(output, timestep, x).prev_sample
        found = transition_mean(x, output, step, 1.0 if clip else None)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def make(sampler="ddpm"):
    return DiffusionPolicy(
        3,
        2,
        (8,),
        schedule=diffusers_schedule(num_levels=4, num_steps=4),
        sampler=sampler,
        clip=1.0,
        zero_init=False,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim_unclipped"])
def test_a_chain_without_noise_is_the_sample(sampler):
    policy = make(sampler)
    observation, noise = torch.randn(5, 3), torch.randn(5, 2)
    chain = policy.chain(observation, noise, torch.zeros(5, 4, 2), sigma=0.1)
    torch.testing.assert_close(chain[:, -1], policy.sample(observation, noise))
    means, _ = policy.chain_transitions(observation, chain, 0.1)
    torch.testing.assert_close(means, chain[:, 1:])


def test_draws_are_counted_where_steps_have_noise():
    assert make("ddpm").num_draws == 5
    assert make("ddim").num_draws == 1
    assert FlowPolicy(3, 2, (8,)).num_draws == 1


def test_a_closed_grid_asks_at_the_end():
    assert time_grid(4, "closed").squeeze(-1).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert time_grid(1, "closed").squeeze(-1).tolist() == [0, 1]
    assert time_grid(4).squeeze(-1).tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_states_are_clipped_behind_every_step():
    policy = FlowPolicy(3, 2, (8,), num_steps=2, state_clip=0.5)  # its velocity is zero
    noise = torch.tensor([[2.0, -0.2]])
    assert policy.sample(torch.zeros(1, 3), noise).tolist() == [[0.5, pytest.approx(-0.2)]]

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from genpol.errors import ConfigError
from genpol.policies.diffusion import denoise, transition_mean
from genpol.policies.schedules import (
    Schedule,
    delta_slopes,
    denoising_steps,
    diffusers_schedule,
    gorl_cosine_schedule,
    gorl_linear_schedule,
)

PREDICTIONS = ("epsilon", "sample", "v_prediction")
BETAS = ("squaredcos_cap_v2", "linear")


def diffusers_scheduler(kind, betas, prediction, clip, *, num_levels=20, num_steps=10):
    """Build diffusers' scheduler in double precision; in float32 its 1 - abar loses digits."""
    scheduler = kind(
        num_train_timesteps=num_levels,
        beta_schedule=betas,
        prediction_type=prediction,
        clip_sample=clip,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(num_steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_equal_those_of_diffusers(betas, prediction, clip, eta):
    scheduler = diffusers_scheduler(DDIMScheduler, betas, prediction, clip)
    schedule = diffusers_schedule(betas, num_levels=20, num_steps=10)
    steps = denoising_steps(schedule, prediction=prediction, eta=eta)
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        assert step.level == timestep
        x, output, draw = torch.randn(3, 8, 4, dtype=torch.float64).unbind(0)
        expected = scheduler.step(
            output, timestep, x, eta=eta, use_clipped_model_output=True, variance_noise=draw
        ).prev_sample
        actual = transition_mean(x, output, step, 1.0 if clip else None) + step.std * draw
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("num_levels", "num_steps"), [(20, 20), (20, 10)])
def test_ddpm_steps_equal_those_of_diffusers(betas, prediction, clip, num_levels, num_steps):
    scheduler = diffusers_scheduler(
        DDPMScheduler, betas, prediction, clip, num_levels=num_levels, num_steps=num_steps
    )
    schedule = diffusers_schedule(betas, num_levels=num_levels, num_steps=num_steps)
    steps = denoising_steps(schedule, prediction=prediction, sampler="ddpm")
    for step, timestep in zip(steps, scheduler.timesteps, strict=True):
        x, output = torch.randn(2, 8, 4, dtype=torch.float64).unbind(0)
        expected = scheduler.step(
            output, timestep, x, generator=torch.Generator().manual_seed(0)
        ).prev_sample
        draw = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        actual = transition_mean(x, output, step, 1.0 if clip else None) + step.std * draw
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_last_step_adds_no_noise():
    for sampler in ("ddim", "ddpm"):
        steps = denoising_steps(diffusers_schedule(), sampler=sampler, eta=1.0)
        assert steps[-1].std == 0.0
        assert all(step.std > 0 for step in steps[:-1])


def test_gorl_cosine_levels():
    schedule = gorl_cosine_schedule()
    assert schedule.alpha_bar[0] == 1.0
    assert schedule.alpha_bar[9] == pytest.approx(0.0241, abs=1e-4)
    assert schedule.steps == (9, 8, 7, 6, 5, 4, 3, 2, 1)


def test_gorl_linear_levels():
    schedule = gorl_linear_schedule()
    assert schedule.time == pytest.approx([k / 10 for k in range(1, 11)])
    assert schedule.alpha_bar[9] == pytest.approx(1e-3)
    assert len(schedule.steps) == 10


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        (gorl_cosine_schedule(), 6.4427),
        (diffusers_schedule("linear", num_levels=10, num_steps=10), 1.0519),
    ],
)
def test_zero_epsilon_scales_the_noise(schedule, factor):
    """GoRL oracle 10: direct epsilon prediction is no identity."""
    z = torch.ones(1)
    end = denoise(lambda x, step: torch.zeros_like(x), z, denoising_steps(schedule))[-1]
    assert end.item() == pytest.approx(factor, abs=1e-4)


@pytest.mark.parametrize(
    ("schedule", "std", "offset", "gain"),
    [
        (gorl_linear_schedule(), 0.3, 0.4969, 0.1933),
        (gorl_linear_schedule(), 1.0, 0.4864, 0.8603),
        (gorl_cosine_schedule(), 0.3, 0.4814, 0.2395),
        (gorl_cosine_schedule(), 1.0, 0.4306, 0.8943),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "epsilon_delta"])
def test_ddim_with_the_exact_gaussian_epsilon(schedule, std, offset, gain, prediction):
    """GoRL oracle 15, mean 0.5; whatever the network predicts."""

    def output(x, step):
        level = schedule.steps[step]
        abar = schedule.alpha_bar[level]
        residual = x - math.sqrt(abar) * 0.5
        epsilon = math.sqrt(1 - abar) * residual / (abar * std**2 + 1 - abar)
        slope = delta_slopes(schedule)[level] if prediction == "epsilon_delta" else 0.0
        return epsilon - slope * x

    z = torch.tensor([0.0, 1.0], dtype=torch.float64)
    zero, one = denoise(output, z, denoising_steps(schedule, prediction=prediction))[-1].tolist()
    assert zero == pytest.approx(offset, abs=1e-4)
    assert one - zero == pytest.approx(gain, abs=1e-4)


def ddpm_moments(num_levels, betas):
    """Mean and std that DDPM gives N(0.5, 0.3^2) with its exact epsilon, in closed form."""
    schedule = diffusers_schedule(betas, num_levels=num_levels, num_steps=num_levels)
    ends, variance = torch.tensor([0.0, 1.0], dtype=torch.float64), 1.0
    mean = 0.0
    for step in denoising_steps(schedule, sampler="ddpm"):
        abar = schedule.alpha_bar[step.level]
        residual = ends - math.sqrt(abar) * 0.5
        epsilon = math.sqrt(1 - abar) * residual / (abar * 0.09 + 1 - abar)
        offset, one = transition_mean(ends, epsilon, step, None).tolist()
        mean = offset + (one - offset) * mean
        variance = (one - offset) ** 2 * variance + step.std**2
    return mean, math.sqrt(variance)


def test_ddpm_keeps_the_moments_of_a_gaussian_as_levels_grow():
    errors = []
    for num_levels in (100, 1000):
        mean, std = ddpm_moments(num_levels, "squaredcos_cap_v2")
        assert mean == pytest.approx(0.5, abs=1e-3)
        errors.append(abs(std - 0.3))
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 0.003


def test_subset_keeps_the_noisiest_level():
    schedule = diffusers_schedule(num_levels=100, num_steps=10)
    assert schedule.steps == (99, 89, 79, 69, 59, 49, 39, 29, 19, 9)
    assert schedule.subset(5) == (99, 79, 59, 39, 19)
    assert schedule.subset(1) == (99,)
    with pytest.raises(ConfigError, match=r"\[1, 10\]"):
        schedule.subset(11)


def test_steps_that_do_not_divide_the_levels_are_refused():
    with pytest.raises(ConfigError, match="divide"):
        diffusers_schedule(num_levels=100, num_steps=30)


def test_visiting_a_clean_level_is_refused():
    schedule = Schedule(alpha_bar=(1.0, 0.5), time=(0.0, 1.0), steps=(1, 0))
    with pytest.raises(ConfigError, match="level 0"):
        denoising_steps(schedule)


def test_importing_policies_does_not_import_diffusers():
    code = "import sys, genpol.policies.diffusion; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

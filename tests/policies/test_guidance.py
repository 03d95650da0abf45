"""Guidance against closed forms: Gaussian and mixture data with their exact velocities."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from genpol.errors import ConfigError
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy, euler_steps
from genpol.policies.guidance import (
    ESTIMATORS,
    BestOf,
    ClassifierFreePolicy,
    GuidanceSettings,
    GuidedPolicy,
    ascend,
    best_of,
    classifier_free,
    gradient_of,
    guided_sample,
)
from genpol.policies.schedules import diffusers_schedule

# What only the noise decides: the samplers below are affine in it, so two draws give mean and std.
ZERO_AND_ONE = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def gaussian_field(mean, std, num_steps):
    """Return the velocity of the linear path from N(0, 1) to N(mean, std^2)."""

    def field(x, step):
        t = step / num_steps
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return field


def mixture_field(modes, std, num_steps):
    """Return that of a mixture of equal weights: the velocities of its parts by responsibility."""
    modes = torch.tensor(modes, dtype=torch.float64)

    def field(x, step):
        t = step / num_steps
        variance = (1 - t) ** 2 + (t * std) ** 2
        distance = x - t * modes
        share = torch.softmax(-(distance**2) / (2 * variance), -1)
        parts = modes + (t * std**2 - (1 - t)) / variance * distance
        return (share * parts).sum(-1, keepdim=True)

    return field


def sampled(field, gradient, num_steps=10, weight=1.0, noise=ZERO_AND_ONE, **options):
    return guided_sample(
        field, euler_steps(num_steps), gradient, noise, weight=weight, clip=None, **options
    )


def mean_and_std(*arguments, **options):
    ends = sampled(*arguments, **options).squeeze(-1).tolist()
    return ends[0], abs(ends[1] - ends[0])


def linear(slope):
    return gradient_of(lambda a: (slope * a).sum(-1))


def quadratic(k, best):
    return gradient_of(lambda a: (-k / 2 * (a - best) ** 2).sum(-1))


# --- Gaussian data -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("std", "expected"), [(1.0, (0.8790, 0.9872)), (0.5, (0.4308, 0.4927)), (0.1, (0.0617, 0.0956))]
)
def test_euler_steps_shrink_a_gaussian_by_the_known_factor(std, expected):
    for steps, value in zip((10, 100), expected, strict=True):
        field = gaussian_field(0.0, std, steps)
        found = mean_and_std(field, linear(0.0), steps, weight=0.0)
        assert found == (pytest.approx(0.0), pytest.approx(value, abs=1e-4))


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("std", [0.1, 1.0])
def test_the_clean_estimate_is_the_posterior_mean(std, step):
    x, mean, t = torch.tensor([0.7], dtype=torch.float64), 0.2, step / 10
    coefficients = euler_steps(10)[step]
    velocity = gaussian_field(mean, std, 10)(x, step)
    clean = coefficients.clean_x * x + coefficients.clean_o * velocity
    gain = t * std**2 / ((1 - t) ** 2 + (t * std) ** 2)
    torch.testing.assert_close(clean, mean + gain * (x - t * mean))


SHIFTS = {
    ("denoised", 1.0): 1.1741,
    ("denoised", 0.5): 0.8112,
    ("denoised", 0.1): 0.2603,
    ("noisy", 1.0): 1.1741,
    ("jacobian", 1.0): 0.8790,
    ("jacobian", 0.5): 0.4308,
    ("jacobian", 0.1): 0.0617,
    ("rollout", 1.0): 1.1741,
}


@pytest.mark.parametrize(("estimator", "std"), SHIFTS)
def test_a_linear_value_shifts_the_mean_and_leaves_the_spread(estimator, std):
    field = gaussian_field(0.0, std, 10)
    mean, spread = mean_and_std(field, linear(2.0), weight=0.5, estimator=estimator)
    assert mean == pytest.approx(SHIFTS[estimator, std], abs=1e-4)  # weight times slope is 1
    assert spread == pytest.approx(mean_and_std(field, linear(0.0))[1])


def steepness(std, num_steps):
    """Return ``1 + dv/dx / K`` of the Euler steps of N(0, std^2)."""
    times = [step / num_steps for step in range(num_steps)]
    return [1 + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2) / num_steps for t in times]


@pytest.mark.parametrize("std", [1.0, 0.5, 0.1])
def test_through_the_remaining_steps_a_linear_value_shifts_by_their_product(std):
    factors = steepness(std, 10)
    later = [math.prod(factors[step + 1 :]) for step in range(10)]
    expected = sum(f * x * x for f, x in zip(factors, later, strict=True)) / 10
    found = mean_and_std(gaussian_field(0.0, std, 10), linear(1.0), estimator="bptt")[0]
    assert found == pytest.approx(expected, rel=1e-9)
    many = mean_and_std(gaussian_field(0.0, std, 100), linear(1.0), 100, estimator="bptt")[0]
    assert many == pytest.approx(std * math.pi / 2, rel=0.1)


def exact_end(x, t, mean, std):
    """Return where the exact flow takes x from time t."""
    return mean + std * (x - t * mean) / math.sqrt((1 - t) ** 2 + (t * std) ** 2)


@pytest.mark.parametrize(("std", "expected"), [(1.0, 1.4773), (0.5, 0.7235), (0.1, 0.1211)])
def test_a_gradient_through_the_exact_flow_gives_the_known_shift(std, expected):
    clock = iter(range(10))

    def gradient(x):
        t = next(clock) / 10
        return gradient_of(lambda y: exact_end(y, t, 0.0, std).sum(-1))(x)

    found = mean_and_std(gaussian_field(0.0, std, 10), gradient, estimator="noisy")[0]
    assert found == pytest.approx(expected, abs=1e-4)


def test_guidance_overshoots_the_tilt_of_narrow_data_thirtyfold():
    field = gaussian_field(0.0, 0.1, 400)
    shift = mean_and_std(field, linear(1.0), 400)[0]
    assert shift == pytest.approx(0.3083, abs=2e-3)
    assert shift / 0.1**2 > 30  # p(a) exp(a) has its mean at std^2


QUADRATICS = [
    # mean, std, k, best, weight: then estimator, steps, guided mean and std
    ((0.0, 1.0, 1.0, 1.0, 1.0), "denoised", 10, 0.7686, 0.4153),
    ((0.0, 1.0, 1.0, 1.0, 1.0), "jacobian", 10, 0.6225, 0.4172),
    ((0.0, 1.0, 1.0, 1.0, 1.0), "noisy", 10, 0.7760, 0.3010),
    ((0.0, 1.0, 1.0, 1.0, 0.1), "denoised", 10, 0.1125, 0.8182),
    ((0.0, 1.0, 1.0, 1.0, 0.1), "jacobian", 10, 0.0849, 0.8190),
    ((0.0, 1.0, 1.0, 1.0, 0.1), "noisy", 10, 0.1125, 0.7937),
    ((0.2, 0.5, 2.0, 0.8, 0.5), "denoised", 10, 0.5684, 0.2677),
    ((0.2, 0.5, 2.0, 0.8, 0.5), "jacobian", 10, 0.4199, 0.3001),
    ((0.2, 0.5, 2.0, 0.8, 0.5), "noisy", 10, 0.5800, 0.1358),
]


BPTT = [
    ((0.0, 1.0, 1.0, 1.0, 1.0), 0.7819, 0.1553),
    ((0.0, 1.0, 1.0, 1.0, 0.1), 0.1379, 0.7491),
    ((0.2, 0.5, 2.0, 0.8, 0.5), 0.5125, 0.1865),
]


@pytest.mark.parametrize(("problem", "mean", "std"), BPTT)
def test_through_the_exact_flow_a_quadratic_value_gives_them_too(problem, mean, std):
    centre, width, k, best, weight = problem
    clock = iter(range(10))

    def gradient(x):
        t = next(clock) / 10
        return gradient_of(
            lambda y: (-k / 2 * (exact_end(y, t, centre, width) - best) ** 2).sum(-1)
        )(x)

    field = gaussian_field(centre, width, 10)
    found = mean_and_std(field, gradient, weight=weight, estimator="noisy")
    assert found == (pytest.approx(mean, abs=1e-3), pytest.approx(std, abs=1e-3))


@pytest.mark.parametrize(("problem", "estimator", "steps", "mean", "std"), QUADRATICS)
def test_a_quadratic_value_gives_the_known_mean_and_spread(problem, estimator, steps, mean, std):
    centre, width, k, best, weight = problem
    field = gaussian_field(centre, width, steps)
    found = mean_and_std(field, quadratic(k, best), steps, weight=weight, estimator=estimator)
    assert found == (pytest.approx(mean, abs=1e-3), pytest.approx(std, abs=1e-3))


def test_many_steps_reach_the_known_spread_of_continuous_time():
    field = gaussian_field(0.0, 1.0, 2000)
    mean, std = mean_and_std(field, quadratic(1.0, 1.0), 2000)
    assert (mean, std) == (
        pytest.approx(0.7751, abs=1e-3),
        pytest.approx(math.exp(-math.pi / 4), abs=1e-3),
    )


def test_a_weight_for_each_step_gives_the_exact_tilt():
    """The factor ``(1 - t) / t J``, damped by the curvature that is left, is exact guidance."""
    steps, k, best = 100, 1.0, 1.0
    times = [step / steps for step in range(steps)]
    variances = [(1 - t) ** 2 + t**2 for t in times]
    left = [(1 - t) ** 2 / s for t, s in zip(times, variances, strict=True)]
    weights = [(1 - t) / s / (1 + k * v) for t, s, v in zip(times, variances, left, strict=True)]
    field = gaussian_field(0.0, 1.0, steps)
    mean, std = mean_and_std(field, quadratic(k, best), steps, weight=weights)
    assert (mean, std) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.6977, abs=1e-3))


def test_weights_must_be_one_for_each_step():
    with pytest.raises(ConfigError, match=r"guidance\.weight has 3 entries: must have 10"):
        mean_and_std(gaussian_field(0.0, 1.0, 10), linear(1.0), weight=[1.0] * 3)


# --- a mixture ---------------------------------------------------------------------------------

MODES = (-1.0, 0.0, 1.0)
# Quantiles of a standard normal stand for its draws.
NOISES = math.sqrt(2) * torch.erfinv(torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None])


def shares(weight, gradient, estimator="denoised"):
    ends = sampled(
        mixture_field(MODES, 0.05, 10), gradient, weight=weight, noise=NOISES, estimator=estimator
    )
    nearest = (ends - torch.tensor(MODES, dtype=torch.float64)).abs().argmin(-1)
    return (torch.bincount(nearest, minlength=3) / len(ends)).tolist(), ends


TOWARDS_ONE = gradient_of(lambda a: -((a - 1) ** 2).sum(-1))


def misled(action):
    """The gradient of a critic that is wrong where there are no data."""
    return torch.where(action < -1.3, TOWARDS_ONE(action) - 12.0, TOWARDS_ONE(action))


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.0, (0.308, 0.383, 0.309)),
        (0.1, (0.212, 0.412, 0.376)),
        (0.3, (0.064, 0.405, 0.531)),
        (1.0, (0.0, 0.015, 0.985)),
    ],
)
def test_guidance_chooses_among_modes(weight, expected):
    assert shares(weight, TOWARDS_ONE)[0] == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_errors_of_the_critic_off_the_data_are_never_seen(weight):
    assert shares(weight, misled)[0] == shares(weight, TOWARDS_ONE)[0]


def test_a_gradient_at_the_noisy_action_falls_for_them():
    _, ends = shares(1.0, misled, "noisy")
    assert (ends < -1.3).double().mean().item() == pytest.approx(0.097, abs=0.005)


# --- what any policy may wear ------------------------------------------------------------------


def flow(horizon=1, **options):
    return FlowPolicy(
        3,
        2,
        [16],
        horizon=horizon,
        zero_init=False,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).requires_grad_(False)


def diffusion(clip=None, sampler="ddim"):
    return DiffusionPolicy(
        3,
        2,
        [16],
        schedule=diffusers_schedule(num_levels=20, num_steps=10),
        clip=clip,
        sampler=sampler,
        zero_init=False,
        generator=torch.Generator().manual_seed(0),
    ).requires_grad_(False)


def value(observation, action):
    return -((action - 0.5) ** 2).sum(-1)


@pytest.fixture
def draws():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)


@pytest.mark.parametrize("policy", [flow(), diffusion()], ids=["flow", "diffusion"])
def test_weight_zero_is_the_policy_to_the_bit(policy, draws):
    asked = []
    guided = GuidedPolicy(policy, lambda s, a: asked.append(a), weight=0.0)
    assert torch.equal(guided.sample(*draws), policy.sample(*draws))
    assert not asked


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("policy", [flow(), diffusion(clip=1.0)], ids=["flow", "diffusion"])
def test_every_estimator_raises_the_value(policy, estimator, draws):
    observation, noise = draws
    plain = policy.sample(observation, noise).clamp(-1, 1)
    guided = GuidedPolicy(policy, value, weight=0.2, estimator=estimator).sample(observation, noise)
    assert value(observation, guided).mean() > value(observation, plain).mean() + 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rows_do_not_see_each_other(estimator, draws):
    observation, noise = draws
    guided = GuidedPolicy(flow(), value, weight=0.2, estimator=estimator)
    together = guided.sample(observation, noise)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(guided.sample(observation[order], noise[order]), together[order])
    twice = guided.sample(observation.repeat(2, 1), noise.repeat(2, 1))
    torch.testing.assert_close(twice, together.repeat(2, 1))


def test_a_constant_changes_nothing_and_a_factor_is_a_weight(draws):
    observation, noise = draws
    base = GuidedPolicy(flow(), value, weight=0.2).sample(observation, noise)
    shifted = GuidedPolicy(flow(), lambda s, a: value(s, a) + 7, weight=0.2)
    scaled = GuidedPolicy(flow(), lambda s, a: 4 * value(s, a), weight=0.05)
    torch.testing.assert_close(shifted.sample(observation, noise), base)
    torch.testing.assert_close(scaled.sample(observation, noise), base)


def test_the_last_step_moves_the_clean_estimate_by_its_share(draws):
    observation, noise = draws
    policy, slope = flow(num_steps=1), torch.tensor([0.3, -0.1])
    guided = GuidedPolicy(policy, lambda s, a: (slope * a).sum(-1), weight=2.0)
    expected = (policy.sample(observation, noise) + 2.0 * slope).clamp(-1, 1)
    torch.testing.assert_close(guided.sample(observation, noise), expected)


def test_the_gradient_passes_the_bound_of_the_clean_estimate_unless_with_its_jacobian(draws):
    observation, noise = draws
    policy = flow(num_steps=1)
    noise = noise + 5.0  # the clean estimate lies far above 1 and is clipped
    field, steps = policy.field(observation), policy.sampling_steps()
    ends = {
        estimator: guided_sample(
            field, steps, torch.ones_like, noise, weight=1.0, estimator=estimator
        )
        for estimator in ("denoised", "jacobian")
    }
    plain = policy.sample(observation, noise)
    torch.testing.assert_close(ends["denoised"], plain + 1.0)
    torch.testing.assert_close(ends["jacobian"], plain)


def test_no_gradient_reaches_the_policy(draws):
    observation, noise = draws
    policy = flow().requires_grad_(True)
    for estimator in ESTIMATORS:
        out = GuidedPolicy(policy, value, weight=0.2, estimator=estimator).sample(
            observation, noise
        )
        assert not out.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_diffusion_moves_the_clean_estimate_as_a_flow_would(draws):
    observation, noise = draws
    policy = diffusion()
    slope = torch.tensor([0.3, -0.1])
    step = policy.sampling_steps(1)[0]
    field = policy.field(observation, 1)
    plain = guided_sample(field, [step], torch.zeros_like, noise, weight=1.0)
    moved = guided_sample(field, [step], lambda a: slope.expand_as(a), noise, weight=2.0)
    expected = step.mean_clean * (1 - step.time) * 2.0 * slope
    torch.testing.assert_close(moved - plain, expected.expand_as(plain), rtol=1e-3, atol=1e-4)


def test_chunks_are_guided_as_one_vector():
    generator = torch.Generator().manual_seed(1)
    observation = torch.randn(6, 3, generator=generator)
    noise = torch.randn(6, 4, 2, generator=generator)
    guided = GuidedPolicy(flow(horizon=4), lambda s, a: -(a**2).sum((-2, -1)), weight=0.5)
    out = guided.sample(observation, noise)
    assert out.shape == (6, 4, 2)
    assert out.square().mean() < flow(horizon=4).sample(observation, noise).square().mean()


# --- best of N ---------------------------------------------------------------------------------


def test_best_of_picks_by_row_and_the_first_of_equals():
    candidates = torch.arange(6.0).view(3, 2, 1)
    scores = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 2.0]])
    assert best_of(candidates, scores).flatten().tolist() == [0.0, 3.0]


def test_best_of_one_is_the_policy(draws):
    observation, noise = draws
    chooser = BestOf(flow(), value)
    assert torch.equal(chooser.sample(observation, noise), flow().sample(observation, noise))


def test_more_samples_are_never_worse(draws):
    observation, _ = draws
    noise = torch.randn(16, 6, 2, generator=torch.Generator().manual_seed(3))
    chooser = BestOf(flow(), value)
    found = [value(observation, chooser.sample(observation, noise[:n])) for n in (1, 2, 4, 16)]
    for fewer, more in pairwise(found):
        assert (more >= fewer).all()
    assert (found[-1] > found[0]).any()


def test_the_best_of_uniform_scores_has_the_known_mean():
    scores = torch.rand(32, 20_000, generator=torch.Generator().manual_seed(0))
    assert best_of(scores, scores).mean().item() == pytest.approx(32 / 33, abs=1e-3)


def test_guidance_and_best_of_compose(draws):
    observation, _ = draws
    noise = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(3))
    both = BestOf(GuidedPolicy(flow(), value, weight=0.2), value).sample(observation, noise)
    only = BestOf(flow(), value).sample(observation, noise)
    assert value(observation, both).mean() > value(observation, only).mean()


# --- classifier-free ---------------------------------------------------------------------------


def test_classifier_free_extrapolates_from_the_unconditional():
    field = classifier_free(lambda x, k: x + 3.0, lambda x, k: x + 1.0, 2.0)
    assert field(torch.zeros(1), 0).item() == 5.0


def test_classifier_free_policies_reduce_to_their_parts(draws):
    observation, noise = draws
    policy = flow()

    def without(s):
        return torch.cat((s[..., :2], torch.zeros_like(s[..., 2:])), -1)

    conditional = ClassifierFreePolicy(policy, without, weight=1.0).sample(observation, noise)
    assert torch.equal(conditional, policy.sample(observation, noise))
    unconditional = ClassifierFreePolicy(policy, without, weight=0.0).sample(observation, noise)
    torch.testing.assert_close(unconditional, policy.sample(without(observation), noise))
    wild = ClassifierFreePolicy(policy, without, weight=3.0)
    assert not torch.allclose(wild.sample(observation, noise), conditional)
    guided = GuidedPolicy(wild, value, weight=0.2)
    assert (
        value(observation, guided.sample(observation, noise)).mean()
        > value(observation, wild.sample(observation, noise).clamp(-1, 1)).mean()
    )


# --- the rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["min", "mean"])
def test_the_gradient_of_an_ensemble_follows_its_aggregate(aggregate):
    def both(a):
        members = torch.stack((-a, a)).sum(-1)
        return members.min(0).values if aggregate == "min" else members.mean(0)

    found = gradient_of(both)(torch.tensor([[2.0], [-3.0]])).flatten().tolist()
    assert found == ([-1.0, 1.0] if aggregate == "min" else [0.0, 0.0])


def test_ascent_stays_within_bounds():
    gradient = gradient_of(lambda a: a.sum(-1))
    start = torch.tensor([[0.0, 0.95]])
    found = ascend(start, gradient, step_size=0.1, num_steps=3)
    torch.testing.assert_close(found, torch.tensor([[0.3, 1.0]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, r"guidance\.weight = -1\.0: must be >= 0"),
        ({"best_of": 0}, r"guidance\.best_of = 0: must be >= 1"),
        ({"estimator": "denoise"}, r"guidance\.estimator = 'denoise'.*Did you mean 'denoised'"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GuidanceSettings(**settings)

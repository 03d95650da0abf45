"""Guidance of any policy: what it leaves alone, what it pushes, and the best of several samples."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from genpol.errors import ConfigError
from genpol.objectives.value_learning import aggregate
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
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


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_the_last_step_moves_the_clean_estimate_by_its_share(num_steps, draws):
    """At ``t = (N - 1) / N`` that is the unguided next point, so ``weight / N`` of it is added."""
    observation, noise = draws
    policy, weight = flow(num_steps=num_steps), 0.5
    field, steps = policy.field(observation), policy.sampling_steps()
    gradient = gradient_of(lambda a: value(observation, a))
    before = guided_sample(field, steps[:-1], gradient, noise, weight=weight)
    clean = before + field(before, num_steps - 1) / num_steps
    expected = clean + weight / num_steps * gradient(clean.clamp(-1, 1))
    whole = guided_sample(field, steps, gradient, noise, weight=weight)
    torch.testing.assert_close(whole, expected)
    guided = GuidedPolicy(policy, value, weight=weight).sample(observation, noise)
    torch.testing.assert_close(guided, expected.clamp(-1, 1))


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


@pytest.mark.parametrize(("how", "expected"), [("min", [-1.0, 1.0]), ("mean", [0.0, 0.0])])
def test_the_gradient_of_an_ensemble_follows_its_aggregate(how, expected):
    def both(a):
        return aggregate(torch.stack((-a, a)).sum(-1), how)

    found = gradient_of(both)(torch.tensor([[2.0], [-3.0]]))
    assert found.flatten().tolist() == expected


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

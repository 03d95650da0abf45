"""What the settings of surrogates refuse, before anything is trained, and the units they are in."""

from __future__ import annotations

import pytest
import torch

from genpol.agents.dppo import Settings as DPPOSettings
from genpol.agents.ppo import Settings
from genpol.errors import ConfigError
from genpol.on_policy.settings import RiskSettings
from genpol.on_policy.surrogate_settings import (
    NAMES,
    BAPOSettings,
    BPOSettings,
    CovarianceSettings,
    R2VPOSettings,
)
from genpol.on_policy.surrogates import BPO, PPOEWMA, R2VPO, SURROGATES, Terms
from genpol.policies.gaussian import GaussianPolicy


def test_every_name_has_a_surrogate():
    assert tuple(SURROGATES) == NAMES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BPOSettings(temperature=0, median_temperature=0), "median_temperature = 0: takes"),
        (lambda: BPOSettings(low=0.0), r"agent\.bpo\.low = 0\.0: must be > 0"),
        (lambda: BAPOSettings(low_start=0.95), r"agent\.bapo\.low_end = 0\.9: must be >= 0\.95"),
        (lambda: BAPOSettings(high_step=0.0), r"agent\.bapo\.high_step = 0\.0: must be > 0"),
        (
            lambda: CovarianceSettings(low_quantile=0.999),
            r"agent\.covariance\.high_quantile = 0\.998: must be >= 0\.999",
        ),
        (lambda: Settings(dual_clip=0.5), r"agent\.dual_clip = 0\.5: must be 0 \(off\) or > 1"),
        (lambda: Settings(surrogate="ppo_ewma", clip=1.0), r"agent\.clip = 1\.0: must be < 1"),
        (
            lambda: Settings(surrogate="bpo", risk=RiskSettings(coefficient=0.5)),
            r"agent\.risk\.coefficient = 0\.5: surrogate=bpo",
        ),
        (
            lambda: DPPOSettings(surrogate="bpo", denoising_discount=0.9),
            r"agent\.denoising_discount = 0\.9: .* set agent\.bpo\.weight=stored",
        ),
        (
            lambda: DPPOSettings(clip_base=0.3),
            r"agent\.clip_base = 0\.3: must lie in \[0\.0, 0\.2\]",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_once(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def terms(**given):
    zero = torch.zeros(3)
    values = {
        "log_prob": zero,
        "log_ratio": zero,
        "advantage": zero,
        "target": zero,
        "value": zero,
        "median": None,
        "centred": None,
        "clip": None,
        "divergence": lambda: zero,
        "proximal_log_prob": lambda actor: zero,
    }
    return Terms(**(values | given))


def make(kind, settings):
    generator = torch.Generator().manual_seed(0)
    actor = GaussianPolicy(2, 1, [4], generator=generator)
    return kind(settings, actor, 1, generator), actor


@pytest.mark.parametrize("reward_scale", [0.1, 10.0])
def test_temperatures_of_bpo_are_in_units_of_reward(reward_scale):
    settings = Settings(
        surrogate="bpo",
        reward_scale=reward_scale,
        bpo=BPOSettings(temperature=2.0, median_temperature=3.0),
    )
    assert settings.median_temperature == pytest.approx(3.0 * reward_scale)
    surrogate, _ = make(BPO, settings)
    advantage = reward_scale * torch.tensor([-2.0, 0.0, 2.0])  # minus one to one temperature
    found = surrogate.loss(terms(target=advantage, value=torch.zeros(3), median=torch.zeros(3)))[1]
    expected = 0.2 * torch.tensor([1.0, 0.0, 1.0]) * torch.tanh(torch.tensor(0.5))
    assert float(found["policy/target_distance"]) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_moments_of_a_rollout_without_a_lesson_are_forgotten():
    surrogate, _ = make(R2VPO, Settings(surrogate="r2vpo", r2vpo=R2VPOSettings(rate=1.0)))
    surrogate.begin_rollout(1, 1)
    surrogate.loss(terms())  # ratio one; the actor learned nothing, so the pass has no end
    surrogate.begin_rollout(2, 1)
    surrogate.loss(terms(log_ratio=torch.full((3,), 0.5)))
    surrogate.end_pass()
    moment = torch.expm1(torch.tensor(0.5)) ** 2
    assert float(surrogate.multiplier) == pytest.approx(0.5 + float(moment) - 0.02, rel=1e-5)


def test_the_average_sees_the_statistics_of_the_rollout():
    surrogate, actor = make(PPOEWMA, Settings(surrogate="ppo_ewma"))
    actor.normalizer.update(torch.randn(50, 2))
    surrogate.begin_rollout(1, 1)
    seen = {}
    surrogate.loss(
        terms(proximal_log_prob=lambda average: seen.setdefault(0, average) and torch.zeros(3))
    )
    torch.testing.assert_close(seen[0].normalizer.shift, actor.normalizer.shift)

"""Settings of the surrogate losses: the choice of one, and the own parameters of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from genpol import settings as check
from genpol.errors import ConfigError

NAMES = ("ppo", "bpo", "mdpo", "r2vpo", "mhpo", "bapo", "ppo_ewma", "clip_cov", "kl_cov")
"""What ``agent.surrogate`` may be."""


@dataclass(frozen=True, kw_only=True)
class BPOSettings:
    """Bounded policy optimisation."""

    low: float = 0.2
    """How far below 1 the target ratio lies for actions worse than the median."""
    high: float = 0.2
    """How far above 1 it lies for better ones."""
    temperature: float = 1e-3
    """Advantage, in units of reward, over which the target runs from low to high."""
    centre: str = "median"
    """Critic that divides better from worse: `median` (a head of its own) or `mean`."""
    median_temperature: float = 1.0
    """Width of the median head's loss in units of reward: 1 as released, 0 takes `temperature`."""
    huber: float = 0.0
    """Radius around the target within which the loss is quadratic; 0 is the paper's."""
    weight: str = "online"
    """Weight of a row, its distance from the mean critic: `online` from the critic as it is,
    `stored` from that of the rollout (unlike the paper's, not normalised over the batch)."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.positive("agent.bpo.low", self.low)
        check.within("agent.bpo.low", self.low, 0.0, 1.0)
        check.positive("agent.bpo.high", self.high)
        for name in ("temperature", "median_temperature", "huber"):
            check.at_least(f"agent.bpo.{name}", getattr(self, name), 0.0)
        check.one_of("agent.bpo.centre", self.centre, ("median", "mean"))
        check.one_of("agent.bpo.weight", self.weight, ("online", "stored"))
        if self.centre == "median" and not (self.median_temperature or self.temperature):
            raise ConfigError(
                "agent.bpo.median_temperature = 0: takes agent.bpo.temperature, which is 0 too; "
                "make one of them > 0, or set agent.bpo.centre=mean"
            )


@dataclass(frozen=True, kw_only=True)
class MDPOSettings:
    """On-policy mirror descent."""

    schedule_steps: int = 10_000_000
    """Environment steps over which the mirror step size falls from 1 to its floor."""
    floor: float = 0.02
    """Least mirror step size."""
    schedule: str = "genpol"
    """`genpol` starts at 1; `released` is one iteration late, as the authors' code."""
    per_dimension: bool = False
    """Whether the divergence is divided by the number of action dimensions."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.positive("agent.mdpo.schedule_steps", self.schedule_steps)
        check.within("agent.mdpo.floor", self.floor, 0.0, 1.0)
        check.one_of("agent.mdpo.schedule", self.schedule, ("genpol", "released"))


@dataclass(frozen=True, kw_only=True)
class R2VPOSettings:
    """Ratio-variance regularisation."""

    delta: float = 0.02
    """Second central moment of the ratio that is allowed."""
    multiplier: float = 0.5
    """Lagrange multiplier at the start."""
    rate: float = 1.0
    """Dual step per pass over a rollout; 0 keeps the multiplier."""
    maximum: float = 50.0
    """Greatest multiplier."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.positive("agent.r2vpo.delta", self.delta)
        for name in ("multiplier", "rate", "maximum"):
            check.at_least(f"agent.r2vpo.{name}", getattr(self, name), 0.0)


@dataclass(frozen=True, kw_only=True)
class MHPOSettings:
    """Log-fidelity modulator with hazard penalty."""

    bound: float = 1.5
    """Bound of the modulated log-ratio."""
    up_power: float = 1.5
    """Exponent of the hazard of growing ratios."""
    up_scale: float = 1.0
    """Its scale."""
    down_power: float = 2.0
    """Exponent of the hazard of shrinking ratios."""
    down_scale: float = 0.8
    """Its scale."""
    normalise: bool = True
    """Whether the gradient at ratio 1 is that of the policy gradient; released: 0.265 of it."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("bound", "up_power", "up_scale", "down_power", "down_scale"):
            check.positive(f"agent.mhpo.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class BAPOSettings:
    """Balanced adaptive clipping."""

    low_start: float = 0.8
    """Lower bound of the ratio where the search starts."""
    low_end: float = 0.9
    """Highest that it is raised to."""
    high_start: float = 1.2
    """Upper bound where the search starts."""
    high_end: float = 3.0
    """Highest that it is raised to."""
    low_step: float = 0.02
    """Step of the lower bound."""
    high_step: float = 0.05
    """Step of the upper bound."""
    share: float = 0.5
    """Share of positive advantages to reach."""
    measure: str = "grad"
    """What is counted: rows that carry gradient (`grad`) or clipped values (`value`, released)."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for bound in ("low", "high"):
            start, end = getattr(self, f"{bound}_start"), getattr(self, f"{bound}_end")
            check.positive(f"agent.bapo.{bound}_step", getattr(self, f"{bound}_step"))
            check.at_least(f"agent.bapo.{bound}_end", end, start)
        check.within("agent.bapo.low_end", self.low_end, 0.0, 1.0)
        check.at_least("agent.bapo.high_start", self.high_start, 1.0)
        check.within("agent.bapo.share", self.share, 0.0, 1.0)
        check.one_of("agent.bapo.measure", self.measure, ("grad", "value"))


@dataclass(frozen=True, kw_only=True)
class EWMASettings:
    """Averaged proximal policy."""

    decay: float = 0.889
    """Decay of the average per optimiser step."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.within("agent.ewma.decay", self.decay, 0.0, 0.9999)


@dataclass(frozen=True, kw_only=True)
class CovarianceSettings:
    """Clip-Cov and KL-Cov, by quantiles of the covariance."""

    low_quantile: float = 0.95
    """Clip-Cov drops rows whose covariance lies above this quantile,"""
    high_quantile: float = 0.998
    """and below this one."""
    fraction: float = 0.01
    """Share of rows dropped (Clip-Cov) or penalised (KL-Cov)."""
    coefficient: float = 1.0
    """KL-Cov's weight of the penalty."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("low_quantile", "high_quantile", "fraction"):
            check.within(f"agent.covariance.{name}", getattr(self, name), 0.0, 1.0)
        check.at_least("agent.covariance.high_quantile", self.high_quantile, self.low_quantile)
        check.at_least("agent.covariance.coefficient", self.coefficient, 0.0)


@dataclass(frozen=True, kw_only=True)
class SurrogateSettings:
    """The choice of a surrogate, and the own parameters of each."""

    surrogate: str = "ppo"
    """Policy loss: `ppo`, `bpo`, `mdpo`, `r2vpo`, `mhpo`, `bapo`, `ppo_ewma`, `clip_cov` or
    `kl_cov`."""
    clip: float = 0.2
    """Likelihood ratios are clipped to 1 plus or minus this (ppo, ppo_ewma, clip_cov)."""
    dual_clip: float = 0.0
    """Bound on the loss of negative advantages, in advantages (ppo); 0 for none, usual 3."""
    bpo: BPOSettings = field(default_factory=BPOSettings)
    """Of `bpo`."""
    mdpo: MDPOSettings = field(default_factory=MDPOSettings)
    """Of `mdpo`."""
    r2vpo: R2VPOSettings = field(default_factory=R2VPOSettings)
    """Of `r2vpo`."""
    mhpo: MHPOSettings = field(default_factory=MHPOSettings)
    """Of `mhpo`."""
    bapo: BAPOSettings = field(default_factory=BAPOSettings)
    """Of `bapo`."""
    ewma: EWMASettings = field(default_factory=EWMASettings)
    """Of `ppo_ewma`."""
    covariance: CovarianceSettings = field(default_factory=CovarianceSettings)
    """Of `clip_cov` and `kl_cov`."""
    reward_scale: float = 0.1
    """Rewards are multiplied by this before the critic sees them."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.one_of("agent.surrogate", self.surrogate, NAMES)
        check.positive("agent.clip", self.clip)
        check.positive("agent.reward_scale", self.reward_scale)
        if self.dual_clip != 0.0 and not 1.0 < self.dual_clip < math.inf:
            raise ConfigError(f"agent.dual_clip = {self.dual_clip!r}: must be 0 (off) or > 1, as 3")
        if self.surrogate == "ppo_ewma" and self.clip >= 1.0:
            raise ConfigError(f"agent.clip = {self.clip!r}: must be < 1 with surrogate=ppo_ewma")

    @property
    def median_temperature(self) -> float | None:
        """Width of the median critic's loss in scaled reward; ``None`` if there is none."""
        if self.surrogate != "bpo" or self.bpo.centre == "mean":
            return None
        return self.reward_scale * (self.bpo.median_temperature or self.bpo.temperature)

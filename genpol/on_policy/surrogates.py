"""How surrogate losses plug into the learner: what each reads of a rollout, and what it remembers.

The formulas are pure functions in :mod:`genpol.objectives.surrogates`; here are their settings,
their state between minibatches, and the table from which ``agent.surrogate`` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.objectives import selection
from genpol.objectives import surrogates as losses
from genpol.objectives.bpo import bpo, bpo_target

Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class BPOSettings:
    """Bounded policy optimisation."""

    low: float = 0.2
    """How far below 1 the target ratio lies for actions worse than the median."""
    high: float = 0.2
    """How far above 1 it lies for better ones."""
    temperature: float = 1e-3
    """Advantage, in units of scaled reward, over which the target runs from low to high."""
    centre: str = "median"
    """Critic that divides better from worse: `median` (a head of its own) or `mean`."""
    median_temperature: float = 1.0
    """Width of the median head's loss in scaled reward: 1 as released, 0 takes `temperature`."""
    huber: float = 0.0
    """Radius around the target within which the loss is quadratic; 0 is the paper's."""
    weight: str = "online"
    """Weight of a row: `online` with the critic as it is, `stored` with that of the rollout."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.within("agent.bpo.low", self.low, 0.0, 1.0)
        check.positive("agent.bpo.high", self.high)
        for name in ("temperature", "median_temperature", "huber"):
            check.at_least(f"agent.bpo.{name}", getattr(self, name), 0.0)
        check.one_of("agent.bpo.centre", self.centre, ("median", "mean"))
        check.one_of("agent.bpo.weight", self.weight, ("online", "stored"))


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

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.one_of("agent.surrogate", self.surrogate, tuple(SURROGATES))
        check.positive("agent.clip", self.clip)
        check.at_least("agent.dual_clip", self.dual_clip, 0.0)

    @property
    def median_temperature(self) -> float | None:
        """Width of the median critic's loss in scaled reward; ``None`` if there is none."""
        if self.surrogate != "bpo" or self.bpo.centre == "mean":
            return None
        return self.bpo.median_temperature or self.bpo.temperature


@dataclass(frozen=True)
class Terms:
    """What one minibatch offers a surrogate, rows ``[B]`` each.

    Attributes:
        log_prob: Under the policy that is trained; carries gradient, as does ``log_ratio``.
        log_ratio: Against the policy that collected, clamped.
        advantage: Normalised if the surrogate wants it so.
        target: Return estimates, in scaled reward.
        value: The critic's present values.
        centred: Advantage counted from the median of the row's group; ``None`` without groups.
        clip: Bound on the ratio of each row in place of the settings' own, or ``None``.
        median: The median head's present values; ``None`` without such a head.
        divergence: Computes ``KL(new || old)``; carries gradient.
        proximal_log_prob: Computes the log-density under another actor, without gradient.
    """

    log_prob: Tensor
    log_ratio: Tensor
    advantage: Tensor
    target: Tensor
    value: Tensor
    median: Tensor | None
    centred: Tensor | None
    clip: Tensor | None
    divergence: Callable[[], Tensor]
    proximal_log_prob: Callable[[nn.Module], Tensor]


class Surrogate(ABC):
    """One policy loss, with what it remembers from minibatch to minibatch.

    Attributes:
        normalizes_advantage: Whether the advantage is standardised for it.

    Args:
        settings: Own parameters of all surrogates.
        actor: The network that is trained.
        action_dim: Width of the action.
        generator: Source of random choices.
    """

    normalizes_advantage: ClassVar[bool] = True

    def __init__(
        self,
        settings: SurrogateSettings,
        actor: nn.Module,
        action_dim: int,
        generator: torch.Generator,
    ) -> None:
        self.settings = settings
        self.actor = actor
        self.action_dim = action_dim
        self.generator = generator

    def begin_rollout(self, env_steps: int, batch_steps: int) -> None:
        """Prepare for a rollout of ``batch_steps`` that ends at ``env_steps`` of training."""
        return

    @abstractmethod
    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """Return the loss of each row ``[B]`` and metrics."""

    def end_step(self) -> None:
        """Take note of an optimiser step of the actor."""
        return

    def end_pass(self) -> None:
        """Take note of the end of a pass over the rollout."""
        return

    def state(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        return


class PPO(Surrogate):
    """Clipped ratios."""

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.surrogates.ppo_clip`."""
        settings = self.settings
        clip = settings.clip if terms.clip is None else terms.clip
        rows = losses.ppo_clip(
            terms.log_ratio,
            terms.advantage,
            clip_low=clip,
            clip_high=clip,
            dual_clip=settings.dual_clip,
        )
        return rows, {}


class BPO(Surrogate):
    """Distance to the ratio that is optimal within a box."""

    normalizes_advantage: ClassVar[bool] = False

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.bpo.bpo`."""
        own = self.settings.bpo
        centre = terms.value if terms.median is None else terms.median
        target = bpo_target(
            terms.target - centre if terms.centred is None else terms.centred,
            low=1.0 - own.low,
            high=1.0 + own.high,
            temperature=own.temperature,
        )
        online = own.weight == "online" and terms.centred is None
        weight = terms.target - terms.value if online else terms.advantage
        rows = bpo(terms.log_ratio, weight, target=target, huber=own.huber)
        distance = (terms.log_ratio.detach().exp() - target).abs().mean()
        return rows, {"policy/target_distance": distance}


class MDPO(Surrogate):
    """Unclipped ratio and a divergence whose weight grows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step_size = 1.0

    def begin_rollout(self, env_steps: int, batch_steps: int) -> None:
        """Set the mirror step size of this iteration."""
        mdpo = self.settings.mdpo
        total = max(1, mdpo.schedule_steps // batch_steps)
        iteration = min(total, env_steps // batch_steps) - 1
        self.step_size = losses.mdpo_step_size(
            iteration, total, form=mdpo.schedule, floor=mdpo.floor
        )

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.surrogates.mdpo`."""
        divergence = terms.divergence()
        scaled = divergence / self.action_dim if self.settings.mdpo.per_dimension else divergence
        rows = losses.mdpo(
            terms.log_ratio, terms.advantage, divergence=scaled, step_size=self.step_size
        )
        return rows, {
            "policy/kl": divergence.detach().mean(),
            "policy/step_size": torch.tensor(self.step_size),
        }


class R2VPO(Surrogate):
    """Variance of the ratio, held by a Lagrange multiplier."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.multiplier = torch.tensor(self.settings.r2vpo.multiplier)
        self._moments: list[Tensor] = []

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.surrogates.r2vpo`."""
        rows = losses.r2vpo(
            terms.log_ratio,
            terms.advantage,
            multiplier=self.multiplier,
            delta=self.settings.r2vpo.delta,
        )
        moment = torch.expm1(terms.log_ratio.detach()).square().mean()
        self._moments.append(moment)
        return rows, {
            "policy/ratio_variance": moment,
            "policy/multiplier": self.multiplier,
        }

    def end_pass(self) -> None:
        """Take the dual step, on the moment over the whole pass."""
        r2vpo = self.settings.r2vpo
        self.multiplier = losses.r2vpo_multiplier(
            self.multiplier,
            torch.stack(self._moments).mean(),
            delta=r2vpo.delta,
            rate=r2vpo.rate,
            maximum=r2vpo.maximum,
        )
        self._moments = []

    def state(self) -> dict[str, Any]:
        """Return the multiplier."""
        return {"multiplier": self.multiplier}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.multiplier = state["multiplier"]


class MHPO(Surrogate):
    """Modulated ratio with a hazard penalty."""

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.surrogates.mhpo`."""
        mhpo = self.settings.mhpo
        rows = losses.mhpo(
            terms.log_ratio,
            terms.advantage,
            bound=mhpo.bound,
            up_power=mhpo.up_power,
            up_scale=mhpo.up_scale,
            down_power=mhpo.down_power,
            down_scale=mhpo.down_scale,
            normalise=mhpo.normalise,
        )
        return rows, {}


class BAPO(Surrogate):
    """Clipping whose bounds balance good and bad news."""

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.selection.bapo_bounds`."""
        bapo = self.settings.bapo
        low, high, share = selection.bapo_bounds(
            terms.log_ratio.detach(),
            terms.advantage,
            low_start=bapo.low_start,
            low_end=bapo.low_end,
            high_start=bapo.high_start,
            high_end=bapo.high_end,
            low_step=bapo.low_step,
            high_step=bapo.high_step,
            share=bapo.share,
            measure=bapo.measure,
        )
        rows = losses.ppo_clip(
            terms.log_ratio, terms.advantage, clip_low=1.0 - low, clip_high=high - 1.0
        )
        return rows, {"policy/low": low, "policy/high": high, "policy/positive_share": share}


class PPOEWMA(Surrogate):
    """Clipping around an average of the policies of late."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._average = losses.EWMA(self.actor, self.settings.ewma.decay)

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.surrogates.ppo_ewma`."""
        proximal = terms.proximal_log_prob(self._average.average)
        old_log_prob = (terms.log_prob - terms.log_ratio).detach()
        rows = losses.ppo_ewma(
            terms.log_ratio,
            terms.advantage,
            log_proximal_ratio=losses.clamped_log_ratio(proximal, old_log_prob),
            clip_low=self.settings.clip,
            clip_high=self.settings.clip,
        )
        return rows, {}

    def end_step(self) -> None:
        """Move the average."""
        self._average.update(self.actor)

    def state(self) -> dict[str, Any]:
        """Return the average."""
        return {"average": dict(self._average.state_dict())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._average.load_state_dict(state["average"])


class ClipCov(Surrogate):
    """Clipped ratios, without some of the rows that cost most entropy."""

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.selection.clip_cov_mask`."""
        settings, covariance = self.settings, self.settings.covariance
        bounds = {"clip_low": settings.clip, "clip_high": settings.clip}
        keep = selection.clip_cov_mask(
            terms.log_ratio.detach(),
            terms.advantage,
            log_prob=terms.log_prob.detach(),
            low=covariance.low_quantile,
            high=covariance.high_quantile,
            fraction=covariance.fraction,
            generator=self.generator,
            quantiles=True,
            **bounds,
        )
        rows = losses.ppo_clip(terms.log_ratio, terms.advantage, **bounds)
        return torch.where(keep, rows, 0.0), {}


class KLCov(Surrogate):
    """Unclipped ratios, held where they cost most entropy."""

    def loss(self, terms: Terms) -> tuple[Tensor, Metrics]:
        """See :func:`~genpol.objectives.selection.kl_cov`."""
        covariance = self.settings.covariance
        rows = selection.kl_cov(
            terms.log_ratio,
            terms.advantage,
            log_prob=terms.log_prob.detach(),
            fraction=covariance.fraction,
            coefficient=covariance.coefficient,
        )
        return rows, {}


SURROGATES: dict[str, type[Surrogate]] = {
    "ppo": PPO,
    "bpo": BPO,
    "mdpo": MDPO,
    "r2vpo": R2VPO,
    "mhpo": MHPO,
    "bapo": BAPO,
    "ppo_ewma": PPOEWMA,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
}
"""Surrogates by the names that ``agent.surrogate`` takes."""

"""How surrogate losses plug into the learner: what each reads of a rollout, and what it remembers.

The formulas are pure functions in :mod:`genpol.objectives.surrogates`; here are their state between
minibatches and the table from which ``agent.surrogate`` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genpol import parallel
from genpol.objectives import selection
from genpol.objectives import surrogates as losses
from genpol.objectives.bpo import bpo, bpo_target
from genpol.on_policy.surrogate_settings import SurrogateSettings

Metrics = dict[str, Tensor]


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
            temperature=own.temperature * self.settings.reward_scale,
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

    def begin_rollout(self, env_steps: int, batch_steps: int) -> None:
        """Forget moments of a rollout from which the actor did not learn."""
        self._moments = []

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
            parallel.mean(torch.stack(self._moments).mean()),
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

    def begin_rollout(self, env_steps: int, batch_steps: int) -> None:
        """Take over the observation statistics, which changed after the last step."""
        self._average.copy_buffers(self.actor)

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

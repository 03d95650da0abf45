"""Rows that must not decide an update: those whose own step would go too far (CAPO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genpol import settings as check
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.selection import adam_shift, capo_mask, gaussian_fisher, gaussian_score
from genpol.policies.gaussian import GaussianPolicy

_CALIBRATION_QUANTILE = 0.98


@dataclass(frozen=True, kw_only=True)
class CAPOSettings:
    """Curvature-aware masking of rows."""

    enabled: bool = False
    """Whether rows are masked."""
    max_kl: float = 0.0
    """Divergence that one row's own step may cause; 0 takes the 98th percentile of the first
    rollouts."""
    max_change: float = 0.0
    """Change of the objective that it may cause, either way; 0 for no bound."""
    calibration_rollouts: int = 10
    """Rollouts from which the bound is taken."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("max_kl", "max_change"):
            check.at_least(f"agent.capo.{name}", getattr(self, name), 0.0)
        check.at_least("agent.capo.calibration_rollouts", self.calibration_rollouts, 1)


class CurvatureMask:
    """Leaves out rows whose planned Adam step would move the last layer too far.

    arXiv 2510.00819; the bound by percentile is ours, since published ones are those of language
    models. The head is that of :class:`~genpol.policies.gaussian.GaussianPolicy`: mean, and a raw
    scale behind a softplus, whose derivative takes the step to the log-scale.

    Args:
        settings: Bounds.
        actor: The policy.
    """

    def __init__(self, settings: CAPOSettings, actor: GaussianPolicy) -> None:
        self.settings = settings
        self._actor = actor
        self._bound = settings.max_kl
        self._seen: list[float] = []
        self._rollouts = 0

    @torch.no_grad()
    def keep(
        self, observation: Tensor, action: Tensor, advantage: Tensor, optimizer: GuardedOptimizer
    ) -> Tensor:
        """Return which rows ``[B]`` count.

        Args:
            observation: Normalised observations ``[B, d]``.
            action: What was done, ``[B, A]``, before any squash.
            advantage: Its advantage ``[B]``.
            optimizer: The actor's, of which the moments are read.
        """
        last = self._actor.net.linears[-1]
        moments = optimizer.moments(last.weight)
        if moments is None:  # before the first step there is nothing to plan with
            return torch.ones_like(advantage, dtype=torch.bool)
        hidden = self._actor.net.features(observation)
        raw = last(hidden).chunk(2, dim=-1)[1]
        mean, scale = self._actor.at_normalized(observation)
        score = gaussian_score(mean, scale, action)
        # d log(scale) / d raw; the mean is the head's own output.
        inside = scale < self._actor.max_scale
        slope = torch.cat((torch.ones_like(mean), inside * raw.sigmoid() / scale), -1)
        shift = slope * adam_shift(
            score * slope,
            hidden,
            advantage,
            exp_avg=moments.exp_avg,
            exp_avg_sq=moments.exp_avg_sq,
            step=moments.step,
            learning_rate=optimizer.learning_rate,
            eps=moments.eps,
        )
        fisher = gaussian_fisher(scale, shift)
        if self._bound == 0.0:
            self._seen.append(float((fisher / 2).quantile(_CALIBRATION_QUANTILE)))
            return torch.ones_like(advantage, dtype=torch.bool)
        return capo_mask(
            advantage,
            score,
            shift,
            fisher,
            max_kl=self._bound,
            max_change=self.settings.max_change or math.inf,
        )

    def end_rollout(self) -> None:
        """Take note that a rollout has been learned from."""
        self._rollouts += 1
        calibrated = self._rollouts >= self.settings.calibration_rollouts
        if self._bound == 0.0 and self._seen and calibrated:
            self._bound = sum(self._seen) / len(self._seen)
            self._seen = []

    def state(self) -> dict[str, Any]:
        """Return the bound and what it will be taken from."""
        return {"bound": self._bound, "seen": list(self._seen), "rollouts": self._rollouts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._bound, self._seen = state["bound"], list(state["seen"])
        self._rollouts = state["rollouts"]

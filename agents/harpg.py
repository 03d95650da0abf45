"""Hessian-aided recursive policy gradient (HARPG and N-HARPG), with a Gaussian policy.

Fatkhullin et al. 2023 (arXiv 2302.01734): an iteration takes two rollouts, one at a random point of
the last step for the change of the gradient along it, and one at the parameters for the gradient::

    theta^      = q theta_t + (1 - q) theta_{t-1},   q ~ U[0, 1]
    v_t         = H(theta^) (theta_t - theta_{t-1})
    d_t         = (1 - eta_t) (d_{t-1} + v_t) + eta_t g(theta_t)
    theta_{t+1} = theta_t - gamma_t d_t

with ``eta_t = eta_0 2 / (t + 2)``, ``gamma_t = gamma_0 sqrt(2 / (t + 2))`` and ``d_0 = g_0``.
``agent.normalized=true`` is N-HARPG: ``d_t`` is divided by its norm, and
``gamma_t = gamma_0 2 / (t + 2)``. For each trajectory, with its surrogate Phi and its probability
p, ``H v = grad <grad Phi, v> + grad Phi <grad log p, v>``.

The first iteration has no step behind it and takes one rollout. Evaluation sees theta_t; half of
the rollouts (and with them ``train/return``) and of sampled actions are those of theta^.

Deviations: the authors' code multiplies means over the batch, with the second sign turned, where
we follow the paper; and those of :mod:`genpol.on_policy.policy_gradient`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.objectives import gradient_estimators
from genpol.objectives.gradient_estimators import Trajectories, power_decay
from genpol.on_policy.policy_gradient import PolicyGradientAgent, PolicyGradientSettings


@dataclass(frozen=True, kw_only=True)
class Settings(PolicyGradientSettings):
    """Hyper-parameters of HARPG and N-HARPG."""

    normalized: bool = False
    """Whether steps have a fixed length (N-HARPG) or are as long as the gradient says."""
    step_size: float = 0.1
    """Factor on the gradient in the first step (gamma_0), which decays as sqrt(2 / (t + 2)); or, if
    normalised, the length of that step, which decays as 2 / (t + 2)."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        if self.per_layer and not self.normalized:
            raise ConfigError(
                "agent.per_layer = true: HARPG's steps are not normalised; set "
                "agent.normalized=true for N-HARPG, or agent.per_layer=false"
            )


class HARPG(PolicyGradientAgent):
    """Gaussian HARPG: in turns, a rollout between the last two parameters and one at the latest.

    It is due to explore between them while it has no correction of the momentum in hand.
    """

    estimator: gradient_estimators.HARPG

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        normalize: Literal["none", "global", "layer"] = "none"
        if settings.normalized:
            normalize = "layer" if settings.per_layer else "global"
        self.estimator = gradient_estimators.HARPG(
            self._theta,
            eta=power_decay(settings.gradient_weight, 1.0),
            gamma=power_decay(settings.step_size, 1.0 if settings.normalized else 0.5),
            normalize=normalize,
        )
        self._fraction = 0.0
        # Nothing has been remembered that would need one.
        self._correction: list[Tensor] | None = [torch.zeros_like(x) for x in self._theta]

    def _improve(self, trajectories: Trajectories) -> dict[str, Tensor]:
        if self._correction is None:
            self._correction = self.estimator.hessian_correction(trajectories, self._fraction)
            return {"policy/correction_norm": nn.utils.get_total_norm(self._correction)}
        metrics = self.estimator.step(self._gradient(trajectories), self._correction)
        self._correction = None
        device = self.generator.device
        self._fraction = float(torch.rand((), generator=self.generator, device=device))
        return metrics

    def _where_to_explore(self) -> AbstractContextManager[None]:
        if self._correction is None:
            return self.estimator.between(self._fraction)
        return nullcontext()

    def training_state(self) -> dict[str, Any]:
        """Return what every such agent has, the point between, and the correction in hand."""
        correction = None if self._correction is None else list(self._correction)
        return super().training_state() | {"fraction": self._fraction, "correction": correction}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        self._fraction, self._correction = state["fraction"], None
        if state["correction"] is not None:
            pairs = zip(state["correction"], self._theta, strict=True)
            self._correction = [saved.to(theta) for saved, theta in pairs]
        super().load_training_state(state)


AGENT = HARPG

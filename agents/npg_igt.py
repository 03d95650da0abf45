"""Normalised policy gradient with implicit gradient transport (N-PG-IGT), with a Gaussian policy.

Fatkhullin et al. 2023 (arXiv 2302.01734): every rollout is collected ahead of the parameters, gives
one gradient g, and is thrown away::

    theta~_t    = theta_t + (1 - eta_t) / eta_t (theta_t - theta_{t-1})
    d_t         = (1 - eta_t) d_{t-1} + eta_t g(theta~_t)
    theta_{t+1} = theta_t - gamma_t d_t / |d_t|

with ``eta_t = eta_0 (2 / (t + 2))^(4/5)``, ``gamma_t = gamma_0 2 / (t + 2)`` and ``d_0 = g_0``.
Where the gradient is linear in theta, ``d_t`` is then the gradient at ``theta_t``, although most of
it was measured elsewhere. There is no likelihood ratio, no clip and no minibatch.

Evaluation sees theta_t; only rollouts (and with them ``train/return``) and sampled actions are
those of theta~_t.

Deviations: the look-ahead is capped, because ``1 / eta_t`` grows without bound; the critic is a
network, not linear; and those of :mod:`genpol.on_policy.policy_gradient`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.objectives import gradient_estimators
from genpol.objectives.gradient_estimators import Trajectories, power_decay
from genpol.on_policy.policy_gradient import PolicyGradientAgent, PolicyGradientSettings


@dataclass(frozen=True, kw_only=True)
class Settings(PolicyGradientSettings):
    """Hyper-parameters of N-PG-IGT."""

    max_look_ahead: float = 5.0
    """Rollouts are collected at most so many times the last step ahead."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.at_least("agent.max_look_ahead", self.max_look_ahead, 0.0, infinite=True)


class NPGIGT(PolicyGradientAgent):
    """Gaussian N-PG-IGT: one rollout, one step."""

    estimator: gradient_estimators.NPGIGT

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        self.estimator = gradient_estimators.NPGIGT(
            self._theta,
            eta=power_decay(settings.gradient_weight, 4 / 5),
            gamma=power_decay(settings.step_size, 1.0),
            max_look_ahead=settings.max_look_ahead,
            normalize="layer" if settings.per_layer else "global",
        )

    def _improve(self, trajectories: Trajectories) -> dict[str, Tensor]:
        return self.estimator.step(self._gradient(trajectories))

    def _where_to_explore(self) -> AbstractContextManager[None]:
        return self.estimator.look_ahead()


AGENT = NPGIGT

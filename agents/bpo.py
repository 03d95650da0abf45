"""Bounded policy optimisation (BPO) with a Gaussian policy.

Ao et al. 2026 (arXiv 2604.18578): of all policies whose likelihood ratio stays within
``1 - eps <= r <= 1 + eps`` the best one has ``r = 1 + eps`` for every action better than the median
of Q and ``r = 1 - eps`` for every worse one, softened by a temperature to
``tau = 1 + eps tanh((G - u) / 2 lambda)``. The policy is fitted to it by
``E[|G - V| |r - tau|]``, ``G`` the lambda-return, ``V`` the value and ``u`` the soft median, each
a network. Inside the box that is PPO's loss; outside it pulls the ratio back where PPO goes flat.

For generative policies set ``agent.surrogate=bpo`` on an agent that has one: ``agent=gorl`` (the
latent of a flow or diffusion decoder).

Choices where code and paper leave room: advantages are not normalised, since their scale is the
temperature's; critics have an optimiser of their own, so that the released loss coefficients
(0.5 each) play no part; the median is learned at temperature 1 in units of reward as released,
``agent.bpo.median_temperature=0`` takes the target's own temperature. As in ``agent=ppo``, a KL to
N(0, I) of weight 0.01 is on and the step size adapts, where the authors have neither on MuJoCo:
``agent.prior=none agent.target_kl=0``.
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol.on_policy import GaussianAgent, GaussianSettings


@dataclass(frozen=True, kw_only=True)
class Settings(GaussianSettings):
    """Hyper-parameters of BPO."""

    surrogate: str = "bpo"
    """Policy loss: `bpo`, or any other by name for comparison."""


class BPO(GaussianAgent):
    """Gaussian BPO."""


AGENT = BPO

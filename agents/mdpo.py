"""Mirror descent policy optimisation (MDPO), on-policy, with a Gaussian policy.

Tomar et al. 2020 (arXiv 2005.09814, section 4.1): every iteration takes several full-batch
gradient steps on ``E[r A] - KL(pi || pi_k) / t_k``, with an unclipped ratio, advantages
standardised over the batch, the closed-form divergence of the new policy from the old one, and a
mirror step size ``t_k`` that falls linearly from 1. The off-policy form is
``agent=mdpo_off_policy``.

Deviations: ``t_k`` keeps a floor, since a vanishing step size stops Adam altogether; actor and
critic have optimisers of their own, and the critic makes as many passes as the actor
(``agent.critic_minibatches`` steps each), where the authors make 5 of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol.on_policy import GaussianAgent, GaussianSettings


@dataclass(frozen=True, kw_only=True)
class Settings(GaussianSettings):
    """Hyper-parameters of on-policy MDPO."""

    surrogate: str = "mdpo"
    """Policy loss: `mdpo`, or any other by name for comparison."""
    epochs: int = 10
    """Gradient steps on each rollout, times `minibatches`."""
    minibatches: int = 1
    """Parts of the rollout for the actor; 1 is a full batch, as in the paper."""
    critic_minibatches: int = 16
    """The critic's optimiser steps per pass."""
    learning_rate: float = 3e-4
    """Adam step size of the actor."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic."""
    target_kl: float = 0.0
    """Divergence per update to which the actor's step size adapts; 0 keeps it constant."""
    prior: str = "none"
    """What holds the latent near N(0, I): `kl`, `ridge` or `none`."""


class MDPO(GaussianAgent):
    """Gaussian MDPO."""


AGENT = MDPO

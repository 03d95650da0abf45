"""Soft actor-critic (SAC), as the special case of off-policy MDPO that it is.

Haarnoja et al. 2018 (arXiv 1801.01290 and 1812.05905): maximise ``E sum_t r_t + lambda H(pi(.|s))``
off-policy. Critics regress ``r + gamma (min_i Q'_i(s', a') - lambda log pi(a'|s'))``, the actor
minimises ``E[lambda log pi(a|s) - min_i Q_i(s, a)]`` with a reparameterised action, and ``lambda``
holds the entropy at minus one nat per action dimension. In the loss of
:func:`~genpol.objectives.actor_critic.mdpo_actor_loss` that is the KL coefficient set equal to the
temperature, where the old policy drops out.

Choices: an episode that was cut by its time limit is bootstrapped; actions during the warm-up are
uniform; the actor's log standard deviation runs smoothly between -5 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol.agent import Specs
from genpol.off_policy import OffPolicySettings, Proximity, SoftActorCritic


@dataclass(frozen=True, kw_only=True)
class Settings(OffPolicySettings):
    """Hyper-parameters of SAC: those every soft actor-critic has."""


class SAC(SoftActorCritic):
    """Soft actor-critic.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and noise.
    """

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, Proximity(), specs, device=device, seed=seed)


AGENT = SAC

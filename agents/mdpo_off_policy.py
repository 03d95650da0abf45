"""Off-policy mirror descent policy optimisation (MDPO).

Tomar et al. 2020 (arXiv 2005.09814, section 4.2): SAC with a divergence to a previous policy. The
actor minimises ``E[c log pi(a|s) + (lambda - c) log pi_k(a|s) - Q(s, a)]`` on states of the replay,
``pi_k`` a copy of the actor from up to ``reference_period`` environment steps ago and ``1/c`` the
step size of mirror descent. ``c = lambda`` is SAC (``agent=sac``). With ``tsallis_index`` above 1
entropy and divergence are Tsallis'.

Deviations from the released code: the divergence is taken in closed form, not from one draw
(``divergence=sampled``); actions are sampled, not the mode, while data are collected; the
temperature may be learned, and ``c`` then keeps its ratio to it (1 / 0.2 in the paper), so that
mirror steps fit the scale of the rewards as it does; the 1e-3 penalties on mean and log
standard deviation are left out, as SAC's later codes do; the modern target (``critic=q``) is the
default, the authors' state-value network is ``critic=v``.
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.off_policy import OffPolicySettings, Proximity, SoftActorCritic


@dataclass(frozen=True, kw_only=True)
class Settings(OffPolicySettings):
    """Hyper-parameters of off-policy MDPO."""

    learn_temperature: bool = False
    """Whether the temperature holds the entropy at `entropy_per_dimension`."""
    kl_coefficient: float = 1.0
    """`c`, the inverse of the mirror step size; at least the temperature. If that is learned, `c`
    keeps the ratio of these two."""
    tsallis_index: float = 1.0
    """`q` of entropy and divergence: 1 is Shannon and KL, up to 2."""
    reference_period: int = 1000
    """Environment steps after which the previous policy is copied anew."""
    divergence: str = "exact"
    """exact: the KL divergence in closed form; sampled: from the drawn action, as released, and
    always where `tsallis_index` is above 1."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.within("agent.tsallis_index", self.tsallis_index, 1.0, 2.0)
        check.positive("agent.reference_period", self.reference_period)
        check.one_of("agent.divergence", self.divergence, ("exact", "sampled"))
        if self.kl_coefficient < self.temperature:
            raise ConfigError(
                f"agent.kl_coefficient = {self.kl_coefficient}: must be at least agent.temperature "
                f"= {self.temperature}; below it the old policy repels, equal to it this is SAC"
            )


class OffPolicyMDPO(SoftActorCritic):
    """Soft actor-critic with a proximal term.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and noise.
    """

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        proximity = Proximity(
            settings.kl_coefficient,
            settings.tsallis_index,
            settings.reference_period,
            settings.divergence,
        )
        super().__init__(settings, proximity, specs, device=device, seed=seed)


AGENT = OffPolicyMDPO

"""Hyper-parameters that the on-policy agents share."""

from __future__ import annotations

from dataclasses import dataclass, field

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.on_policy.masks import CAPOSettings
from genpol.on_policy.pipo import PIPOSettings
from genpol.on_policy.surrogate_settings import SurrogateSettings


@dataclass(frozen=True, kw_only=True)
class RiskSettings:
    """Mixed value-at-risk of episode returns (RiskPO)."""

    coefficient: float = 0.0
    """Weight beside the normalised advantage; 0 for none, 0.5 is a start."""
    low_level: float = 0.2
    """Level of the quantile below which returns are the tail."""
    high_level: float = 0.8
    """Level above which returns no longer differ."""
    mixing: float = 1.5
    """Weight of the tail against the middle."""
    rate: float = 0.1
    """Step of the tracked quantiles, in interquartile ranges."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("coefficient", "mixing"):
            check.at_least(f"agent.risk.{name}", getattr(self, name), 0.0)
        check.positive("agent.risk.rate", self.rate)
        if not 0 < self.low_level < self.high_level < 1:
            raise ConfigError(
                f"agent.risk.low_level = {self.low_level}, high_level = {self.high_level}: must "
                "increase within (0, 1), such as 0.2 and 0.8"
            )


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings(SurrogateSettings):
    """Hyper-parameters that the on-policy agents share."""

    rollout_steps: int = 64
    """Actions of every environment between two updates."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 16
    """Optimiser steps per pass."""
    critic_minibatches: int = 0
    """The critic's optimiser steps per pass; 0 takes `minibatches`, and must be a multiple."""
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    advantage: str = "gae"
    """Estimator: textbook `gae`, `brax` (no lambda on the first link), or `group` (returns against
    those of environments that set out from the same state, without a critic)."""
    combine: str = "sum"
    """Reward of several terms: learn from their `sum`, or one value each, combined by `gdpo` or
    `dvao`."""
    reward_weights: list[float] = field(default_factory=list)
    """Weight of each term of the reward; empty for 1 each."""
    risk: RiskSettings = field(default_factory=RiskSettings)
    """Of episode returns, beside the advantage (RiskPO)."""
    pipo: PIPOSettings = field(default_factory=PIPOSettings)
    """Feedback of returns on the update before (PIPO)."""
    learning_rate: float = 1e-3
    """Adam step size of the actor at the start."""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic."""
    target_kl: float = 0.015
    """Divergence per update to which the actor's step size adapts; 0 keeps it constant."""
    max_grad_norm: float = 0.5
    """Gradients of actor and critic are each clipped to this global norm."""
    actor_hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the actor's hidden layers."""
    critic_hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the critic's hidden layers."""
    normalizer: str = "exact"
    """Merge of observation statistics; `released` reproduces the defect of the GoRL release."""
    nonfinite_patience: int = 10
    """Non-finite losses in a row that stop the run."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        for name in (
            *("rollout_steps", "epochs", "minibatches", "learning_rate", "critic_learning_rate"),
            "max_grad_norm",
        ):
            check.positive(f"agent.{name}", getattr(self, name))
        check.at_least("agent.critic_minibatches", self.critic_minibatches, 0)
        if self.critic_minibatches % self.minibatches != 0:
            raise ConfigError(
                f"agent.critic_minibatches = {self.critic_minibatches}: must be a multiple of "
                f"agent.minibatches = {self.minibatches}, or 0 for as many"
            )
        check.at_least("agent.nonfinite_patience", self.nonfinite_patience, 1)
        check.widths("agent.actor_hidden", self.actor_hidden)
        check.widths("agent.critic_hidden", self.critic_hidden)
        check.at_least("agent.target_kl", self.target_kl, 0.0)
        for name in ("gamma", "gae_lambda"):
            check.within(f"agent.{name}", getattr(self, name), 0.0, 1.0)
        check.one_of("agent.advantage", self.advantage, ("gae", "brax", "group"))
        check.one_of("agent.combine", self.combine, ("sum", "gdpo", "dvao"))
        if self.combine != "sum" and (self.surrogate == "bpo" or self.advantage == "group"):
            raise ConfigError(
                f"agent.combine = {self.combine!r}: surrogate=bpo and advantage=group know one "
                "reward only; set agent.combine=sum"
            )
        if self.surrogate == "bpo" and self.risk.coefficient > 0:
            raise ConfigError(
                f"agent.risk.coefficient = {self.risk.coefficient!r}: surrogate=bpo divides better "
                "from worse by its own critic; set it to 0, or use another surrogate"
            )
        check.one_of("agent.normalizer", self.normalizer, ("exact", "released"))

    def check_ranks(self) -> None:
        """Refuse what looks at all rows of a minibatch, or all episodes, which no rank sees.

        Raises:
            ConfigError: With what to leave out.
        """
        alone = {
            f"surrogate={self.surrogate}": self.surrogate in ("bapo", "clip_cov", "kl_cov"),
            f"combine={self.combine}": self.combine != "sum",
            f"risk.coefficient={self.risk.coefficient:g}": self.risk.coefficient > 0,
            "pipo.enabled=true": self.pipo.enabled,
        }
        for name, chosen in alone.items():
            if chosen:
                raise ConfigError(
                    f"agent.{name}: looks at all rows or episodes, of which a rank sees its share; "
                    "leave it or torchrun out"
                )

    def num_values(self, specs: Specs) -> int:
        """Return how many values the critic gives: one, or one for each term of the reward."""
        return 1 if self.combine == "sum" else specs.num_rewards

    def frames_per_batch(self, specs: Specs) -> int:
        """Return the actions in one rollout of all environments.

        Raises:
            ConfigError: If they do not fill the minibatches.
        """
        frames = self.rollout_steps * specs.num_envs
        parts = max(self.minibatches, self.critic_minibatches)
        if frames < parts:
            raise ConfigError(
                f"agent.minibatches = {parts}: a rollout has only {frames} rows "
                "(agent.rollout_steps x num_envs); lower it or raise one of those"
            )
        return frames


@dataclass(frozen=True, kw_only=True)
class GaussianSettings(OnPolicySettings):
    """Hyper-parameters of agents whose trained actor is a Gaussian."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    squashed_entropy: bool = False
    """Whether the entropy is that of the action after tanh (penalises saturation)."""
    prior: str = "kl"
    """What holds the latent near N(0, I): `kl`, `ridge` (the released code; its optimum is a point
    mass) or `none`."""
    prior_coefficient: float = 1e-2
    """Weight of that regulariser."""
    action_gain: float = 1.0
    """Factor from the latent to the action before the squash, as long as no decoder is fitted."""
    noise_correlation: float = 0.0
    """Correlation of the exploration noise from one action to the next; 0 is white noise."""
    encoder_init: str = "gaussian"
    """`gaussian` starts at exactly N(0, I) for every observation, `fresh` at random weights."""
    max_scale: float = 10.0
    """Upper bound of the standard deviation."""
    state_dependent_scale: bool = True
    """Whether the standard deviation depends on the observation, or is one vector of parameters."""
    capo: CAPOSettings = field(default_factory=CAPOSettings)
    """Masking of rows whose own step would go too far (CAPO)."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.positive("agent.action_gain", self.action_gain)
        check.at_least("agent.max_scale", self.max_scale, 1.0)  # N(0, I) must be within reach
        for name in ("entropy_coefficient", "prior_coefficient"):
            check.at_least(f"agent.{name}", getattr(self, name), 0.0)
        check.within("agent.noise_correlation", self.noise_correlation, 0.0, 0.99)
        check.one_of("agent.prior", self.prior, ("ridge", "kl", "none"))
        check.one_of("agent.encoder_init", self.encoder_init, ("gaussian", "fresh"))
        if self.capo.enabled and not self.state_dependent_scale:
            raise ConfigError(
                "agent.capo: is made for a network that gives mean and standard deviation; set "
                "agent.state_dependent_scale=true"
            )

    def check_ranks(self) -> None:
        """See :class:`OnPolicySettings`."""
        super().check_ranks()
        if self.capo.enabled:
            raise ConfigError(
                "agent.capo.enabled=true: plans steps from the gradient of all rows, of which a "
                "rank sees its share; leave it or torchrun out"
            )

"""ReinFlow: on-policy finetuning of a flow through learned noise in its steps.

Zhang et al. 2025 (arXiv 2505.22094). Each Euler step of the flow gets Gaussian noise whose standard
deviation is a network of state and time, bounded by ``sigma_min`` and ``sigma_max``, which makes
sampling a chain with a likelihood. PPO then clips one ratio for the whole chain, whose log is
divided by ``(K + 1) H A`` (``normalize_ratio``) and clamped to +-1, as released; advantages come
from a state value and GAE. What is deployed is the flow alone.

``entropy_coefficient`` rewards the steps' mean log standard deviation, ``wasserstein_coefficient``
holds the flow near the one it began as: ``|F(s, z) - F_0(s, z)|^2`` at the chain's own first noise.

With ``init=`` it begins from a flow of chunks, each of which is one decision. Without, it trains a
new one.

Deviations: sampler and scorer have the same time grid (one variant of the released code does not).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer
from genpol.on_policy import DenoisingAgent, DenoisingPolicy, Rows
from genpol.on_policy.chain_likelihood import ChainLikelihood
from genpol.on_policy.pretrained import (
    PretrainedActions,
    PretrainedPolicyHead,
    PretrainedSettings,
    freeze_statistics,
)
from genpol.policies.chain import Chain, ChainSettings
from genpol.policies.flow import FlowPolicy
from genpol.policies.gaussian import gaussian_kl
from genpol.policies.noisy_flow import NoisyFlow
from genpol.pretrained import PolicyHolder, PretrainedPolicy

_LARGEST_LOG_RATIO = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings(PretrainedSettings):
    """Hyper-parameters of ReinFlow."""

    sigma_min: float = 0.05
    """Least standard deviation of a step."""
    sigma_max: float = 0.12
    """Greatest standard deviation of a step."""
    noise_hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the noise network's hidden layers."""
    noise_clip: float = 3.0
    """Bound on the absolute noise of a step, in standard deviations."""
    normalize_ratio: bool = True
    """Whether a chain's log-ratio is divided by (K + 1) H A and clamped to +-1, as released."""
    clip: float = 0.01
    """Bound of the likelihood ratio's distance from 1."""
    entropy_coefficient: float = 0.0
    """Weight of the steps' entropy, per dimension and step."""
    wasserstein_coefficient: float = 0.0
    """Weight of the squared distance to the flow it began as."""
    learning_rate: float = 3e-4
    """Adam step size of flow and noise."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        if self.denoiser != "flow":
            raise ConfigError(
                f"agent.denoiser = {self.denoiser!r}: ReinFlow is for flows; use dppo"
            )
        check.positive("agent.sigma_min", self.sigma_min)
        check.at_least("agent.sigma_max", self.sigma_max, self.sigma_min)
        check.positive("agent.noise_clip", self.noise_clip)
        check.widths("agent.noise_hidden", self.noise_hidden)
        for name in ("entropy_coefficient", "wasserstein_coefficient"):
            check.at_least(f"agent.{name}", getattr(self, name), 0.0)

    ratio = "path"
    per_dimension = False


class NoisyLikelihood(ChainLikelihood):
    """The likelihood of a noisy flow's chain as a whole, and what holds flow and noise.

    Args:
        actor: The noisy flow.
        chain: Its chain.
        settings: Hyper-parameters.
    """

    actor: NoisyFlow
    settings: Settings

    def __init__(self, actor: NoisyFlow, chain: Chain, settings: Settings) -> None:
        super().__init__(actor, chain, settings)
        self.origin = copy.deepcopy(actor.flow).requires_grad_(False)

    def regulariser(self, rows: Rows, std: Tensor) -> Tensor:
        """See :class:`~genpol.on_policy.chain_likelihood.ChainLikelihood`."""
        settings = self.settings
        total = -settings.entropy_coefficient * std.log().mean()
        if settings.wasserstein_coefficient > 0:
            observation = rows["observation_raw"]
            noise = rows["chain"].select(-1 - len(self.chain.action_shape), 0)
            moved = self.actor.sample(observation, noise)
            with torch.no_grad():
                self.origin.normalizer = self.actor.normalizer
                still = self.origin.sample(observation, noise)
            total = total + settings.wasserstein_coefficient * (moved - still).square().mean()
        return total

    def _density(self, rows: Rows, mean: Tensor, std: Tensor) -> Tensor:
        density = super()._density(rows, mean, std)
        if not self.settings.normalize_ratio:
            return density
        density = density / ((mean.shape[-2] + 1) * mean.shape[-1])
        if "log_prob" not in rows:
            return density
        old = rows["log_prob"]
        return old + (density - old).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)

    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """See :class:`~genpol.on_policy.likelihood.Likelihood`."""
        std = self.actor.std(batch["observation"])
        return super().keep(batch, observation) | {"std": std}

    def divergence(self, rows: Rows, mean: Tensor, std: Tensor) -> Tensor:
        """See :class:`~genpol.on_policy.chain_likelihood.ChainLikelihood`; noise differs, too."""
        return gaussian_kl(mean, std, rows["mean"], rows["std"]).sum(-1)

    def state(self) -> dict[str, Any]:
        """Return the flow that it began as."""
        return super().state() | {"origin": self.origin.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        super().load_state(state)
        self.origin.load_state_dict(state["origin"])


class ReinFlow(PretrainedActions, DenoisingAgent, PolicyHolder):
    """PPO through a flow with learned noise.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment, whose actions are flattened chunks.
        device: Where the networks live.
        seed: Seed of weights, exploration and minibatches.
    """

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        flow = settings.make_actor(specs, generator)
        assert isinstance(flow, FlowPolicy)
        actor = NoisyFlow(
            flow,
            specs.observation_dim,
            settings.noise_hidden,
            sigma_min=settings.sigma_min,
            sigma_max=settings.sigma_max,
            generator=generator,
        )
        chain = Chain(actor, ChainSettings(noise_clip=settings.noise_clip))
        pretrained = settings.actor is not None
        likelihood = NoisyLikelihood(actor.to(device), chain, settings)
        super().__init__(
            settings,
            specs,
            actor=actor,
            likelihood=likelihood,
            generator=generator,
            chain=chain,
            policy_class=PretrainedPolicyHead if pretrained else DenoisingPolicy,
        )
        self._origin = (likelihood.origin,)  # in a tuple: its weights are the likelihood's to keep
        if pretrained:
            freeze_statistics(self.learner.actor_critic, specs.observation_dim)

    @property
    def behaviour(self) -> FlowPolicy:
        """See :class:`~genpol.pretrained.PolicyHolder`: the flow without its noise."""
        actor = self.learner.actor_critic.actor
        assert isinstance(actor, NoisyFlow)
        return actor.flow

    @property
    def observation_normalizer(self) -> RunningNormalizer:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        return self.learner.actor_critic.normalizer

    def load_policy(self, policy: PretrainedPolicy) -> None:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        super().load_policy(policy)
        self._begin_here()

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load all weights, from which another run may go on: its own beginning is restored later.

        See :meth:`NoisyLikelihood.load_state`.
        """
        loaded = super().load_state_dict(state_dict, *args, **kwargs)
        self._begin_here()
        return loaded

    def _begin_here(self) -> None:
        (origin,) = self._origin
        origin.load_state_dict(self.behaviour.state_dict())


AGENT = ReinFlow

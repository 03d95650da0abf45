"""Diffusion policy policy optimisation (DPPO): policy gradients through the denoising chain.

Ren et al. 2024 (arXiv 2409.00588): each denoising step is an action of an inner decision process
with a Gaussian likelihood, and the reward comes with the last one. A step's ratio is
``pi(x_{k+1} | s, x_k) / pi_old(x_{k+1} | s, x_k)``; each step is clipped on its own and they are
averaged (``ratio=step``), with the same advantage for all, discounted towards the noisy ones by
``denoising_discount``. ``ratio=path`` multiplies the ratios of a chain, which is the likelihood
ratio of the whole action (and what the theory of BPO needs). The environment receives the tanh of
the chain's end; the first noise is not in the likelihood.

With ``init=`` it finetunes a model of chunks, each of which is then one decision; its action is the
chain's end, clipped instead of squashed, and its statistics of observations stay as they are.
Published for that: ``gamma=0.999``, ``denoising_discount=0.99``, ``clip_base=0.001 clip=0.01``,
``sigma=0.1``, ``per_dimension=true``.

``denoiser=flow`` is the form that FPO and GoRL compare with: Euler steps of a flow with noise
of standard deviation ``sigma``. ``denoiser=diffusion`` is DDPM on a cosine schedule whose standard
deviations have ``sigma`` as a floor, 0.1 in the paper.

Deviations: log-densities are summed over action dimensions (``per_dimension`` averages them, as
released) and not clamped one by one; a log-ratio is, to +-20. Every step is trained by one network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer
from genpol.on_policy import DenoisingAgent, DenoisingPolicy
from genpol.on_policy.chain_likelihood import ChainLikelihood, clip_schedule
from genpol.on_policy.pretrained import (
    PretrainedActions,
    PretrainedPolicyHead,
    PretrainedSettings,
    freeze_statistics,
)
from genpol.policies.chain import Chain, ChainSettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.pretrained import PolicyHolder


@dataclass(frozen=True, kw_only=True)
class Settings(PretrainedSettings):
    """Hyper-parameters of DPPO."""

    sigma: float = 0.05
    """Standard deviation of each step (flow), or its least one (diffusion; paper: 0.1)."""
    ratio: str = "step"
    """A likelihood ratio for each denoising `step`, or one for the whole `path`."""
    per_dimension: bool = False
    """Whether log-densities are averaged over the action's dimensions, as released."""
    denoising_discount: float = 1.0
    """Factor on the advantage for every step between a denoising step and the last."""
    clip_base: float = 0.0
    """Clip of the noisiest step, from which it grows to `clip`; 0 for the same throughout."""
    noise_clip: float = 3.0
    """Bound on the absolute noise of a step, in standard deviations."""
    learning_rate: float = 3e-4
    """Adam step size of the actor."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.ratio", self.ratio, ("step", "path"))
        check.positive("agent.sigma", self.sigma)
        check.positive("agent.noise_clip", self.noise_clip)
        check.within("agent.denoising_discount", self.denoising_discount, 0.0, 1.0)
        check.within("agent.clip_base", self.clip_base, 0.0, self.clip)
        if self.surrogate == "bpo" and self.bpo.weight == "online" and self.denoising_discount < 1:
            raise ConfigError(
                f"agent.denoising_discount = {self.denoising_discount!r}: weighs advantages, which "
                "surrogate=bpo takes from its critic; set agent.bpo.weight=stored"
            )


class DPPO(PretrainedActions, DenoisingAgent, PolicyHolder):
    """PPO through the denoising chain, of a new model or of one from another run.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment, whose actions are flattened chunks.
        device: Where the networks live.
        seed: Seed of weights, exploration and minibatches.
    """

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        actor = settings.make_actor(specs, generator)
        noise = ChainSettings(
            sigma=settings.sigma,
            schedule="constant",  # the same noise in every step, and no correction for it
            correction="none",
            clip=0.0,
            noise_clip=settings.noise_clip,
        )
        chain = Chain(actor, noise)
        pretrained = settings.actor is not None
        super().__init__(
            settings,
            specs,
            actor=actor,
            likelihood=make_likelihood(actor, chain, settings),
            generator=generator,
            chain=chain,
            policy_class=PretrainedPolicyHead if pretrained else DenoisingPolicy,
        )
        if pretrained:
            freeze_statistics(self.learner.actor_critic, specs.observation_dim)

    @property
    def behaviour(self) -> FlowPolicy | DiffusionPolicy:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        actor = self.learner.actor_critic.actor
        assert isinstance(actor, FlowPolicy | DiffusionPolicy)
        return actor

    @property
    def observation_normalizer(self) -> RunningNormalizer:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        return self.learner.actor_critic.normalizer


def make_likelihood(
    actor: FlowPolicy | DiffusionPolicy, chain: Chain, settings: Settings
) -> ChainLikelihood:
    """Return the likelihood of the actor's chains, weighed and clipped as the settings say."""
    steps = torch.arange(actor.num_steps)
    clip = clip_schedule(actor.num_steps, settings.clip_base, settings.clip)
    return ChainLikelihood(
        actor,
        chain,
        settings,
        step_weight=settings.denoising_discount ** (actor.num_steps - 1 - steps),
        step_clip=clip if settings.clip_base else None,
    )


AGENT = DPPO

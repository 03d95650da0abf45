"""Generative policies that are trained on-policy themselves, not through a latent."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType, exploration_type

from genpol import settings as check
from genpol.agent import Specs
from genpol.on_policy.actors import ActorCritic
from genpol.on_policy.agent import OnPolicyAgent
from genpol.on_policy.likelihood import Likelihood
from genpol.on_policy.settings import OnPolicySettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(OnPolicySettings):
    """Hyper-parameters of agents whose trained actor is a flow or a diffusion model."""

    actor_hidden: list[int] = field(default_factory=lambda: [64, 64, 64])
    """Widths of the denoising network's hidden layers."""
    solver_steps: int = 10
    """Steps of the ODE or of the denoising chain."""
    target_kl: float = 0.0
    """Divergence per update to which the actor's step size adapts; 0 keeps it constant."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.at_least("agent.solver_steps", self.solver_steps, 1)


class DenoisingPolicy(TensorDictModuleBase):
    """The policy that acts: noise in, action ``tanh(x_K)`` out.

    When it does not explore, the noise is zero and the chain takes its means.

    Attributes:
        actor_critic: The generative model and its critics, trained.

    Args:
        actor_critic: See above.
        generator: Source of the noise.
        sigma: Standard deviations of the chain's K steps, which is then written as ``chain``
            ``[..., K + 1, A]``; ``None`` for a deterministic solver.
        noise_clip: Bound on the absolute draws of the chain's steps.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        *,
        generator: torch.Generator,
        sigma: float | None = None,
        noise_clip: float = 3.0,
    ) -> None:
        super().__init__()
        self.in_keys = ["observation"]
        self.out_keys = [*(() if sigma is None else ("chain",)), "decoded", "action"]
        self.actor_critic = actor_critic
        self._generator = generator
        self._sigma = sigma
        self._noise_clip = noise_clip

    @property
    def actor(self) -> FlowPolicy | DiffusionPolicy:
        """The generative model."""
        actor = self.actor_critic.actor
        assert isinstance(actor, FlowPolicy | DiffusionPolicy)
        return actor

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action, the action before the squash and, with ``sigma``, the chain."""
        observation, actor = tensordict["observation"], self.actor
        shape = (*observation.shape[:-1], *actor.action_shape)
        noise = self._draw(shape, observation)
        if self._sigma is None:
            decoded = actor.sample(observation, noise)
        else:
            steps = self._draw((*shape[:-1], actor.num_steps, shape[-1]), observation)
            steps = steps.clamp(-self._noise_clip, self._noise_clip)
            chain = sample_chain(actor, observation, noise, steps, self._sigma)
            tensordict.set("chain", chain)
            decoded = chain[..., -1, :]
        tensordict.set("decoded", decoded)
        tensordict.set("action", torch.tanh(decoded))
        return tensordict

    def _draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if exploration_type() in (ExplorationType.RANDOM, None):
            return torch.empty(shape, device=like.device).normal_(generator=self._generator)
        return torch.zeros(shape, device=like.device)


def sample_chain(
    actor: FlowPolicy | DiffusionPolicy,
    observation: Tensor,
    noise: Tensor,
    step_noise: Tensor,
    sigma: float,
) -> Tensor:
    """Return the chain ``[..., K + 1, A]`` with standard deviation ``sigma`` in every step.

    A flow's steps have exactly that and no correction of the drift; a diffusion model's have their
    own, and ``sigma`` as a floor (DPPO, arXiv 2409.00588).
    """
    if isinstance(actor, FlowPolicy):
        sigmas = [sigma] * actor.num_steps
        return actor.chain(observation, noise, step_noise, sigmas, correction="none")
    return actor.chain(observation, noise, step_noise, sigma)


def chain_transitions(
    actor: FlowPolicy | DiffusionPolicy, observation: Tensor, chain: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """Return means ``[..., K, A]`` and standard deviations ``[K, 1]`` of the chain's steps."""
    if isinstance(actor, FlowPolicy):
        sigmas = [sigma] * actor.num_steps
        return actor.chain_transitions(observation, chain, sigmas, correction="none")
    return actor.chain_transitions(observation, chain, sigma)


class DenoisingAgent(OnPolicyAgent):
    """An agent that trains a flow or a diffusion model by the likelihood of its own making.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        actor: The generative model.
        likelihood: Of what it did.
        generator: Source of weights, exploration and minibatches.
        sigma: See :class:`DenoisingPolicy`.
        noise_clip: See :class:`DenoisingPolicy`.
    """

    def __init__(
        self,
        settings: DenoisingSettings,
        specs: Specs,
        *,
        actor: FlowPolicy | DiffusionPolicy,
        likelihood: Likelihood,
        generator: torch.Generator,
        sigma: float | None = None,
        noise_clip: float = 3.0,
    ) -> None:
        actor_critic = ActorCritic(
            actor,
            specs.observation_dim,
            settings,
            generator=generator,
            num_values=settings.num_values(specs),
        ).to(generator.device)
        super().__init__(
            settings,
            specs,
            actor_critic=actor_critic,
            policy=DenoisingPolicy(
                actor_critic, generator=generator, sigma=sigma, noise_clip=noise_clip
            ),
            likelihood=likelihood,
            generator=generator,
        )

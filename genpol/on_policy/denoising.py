"""Generative policies that are trained on-policy themselves, not through a latent."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import ExplorationType, exploration_type

from genpol import settings as check
from genpol.agent import Specs
from genpol.on_policy.actors import ActorCritic
from genpol.on_policy.agent import OnPolicyAgent
from genpol.on_policy.likelihood import Likelihood
from genpol.on_policy.settings import OnPolicySettings
from genpol.policies.chain import Chain
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
        chain: The noise of the steps; they are then written as ``chain`` ``[..., K + 1, A]``.
            ``None`` for a deterministic solver.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        *,
        generator: torch.Generator,
        chain: Chain | None = None,
    ) -> None:
        super().__init__()
        self.in_keys = ["observation"]
        self.out_keys = [*(() if chain is None else ("chain",)), "decoded", "action"]
        self.actor_critic = actor_critic
        self._generator = generator
        self._chain = chain

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
        leading = observation.shape[:-1]
        explore = exploration_type() in (ExplorationType.RANDOM, None)
        if self._chain is None:
            noise = observation.new_zeros((*leading, *actor.action_shape))
            if explore:
                noise.normal_(generator=self._generator)
            decoded = actor.sample(observation, noise)
        else:
            noise, steps = self._chain.draw(leading, self._generator, explore=explore)
            chain = self._chain.sample(actor, observation, noise, steps)
            tensordict.set("chain", chain)
            decoded = chain[..., -1, :]
        tensordict.set("decoded", decoded)
        tensordict.set("action", torch.tanh(decoded))
        return tensordict


class DenoisingAgent(OnPolicyAgent):
    """An agent that trains a flow or a diffusion model by the likelihood of its own making.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        actor: The generative model.
        likelihood: Of what it did.
        generator: Source of weights, exploration and minibatches.
        chain: See :class:`DenoisingPolicy`.
    """

    def __init__(
        self,
        settings: DenoisingSettings,
        specs: Specs,
        *,
        actor: FlowPolicy | DiffusionPolicy,
        likelihood: Likelihood,
        generator: torch.Generator,
        chain: Chain | None = None,
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
            policy=DenoisingPolicy(actor_critic, generator=generator, chain=chain),
            likelihood=likelihood,
            generator=generator,
        )

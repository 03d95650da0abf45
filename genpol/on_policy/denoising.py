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
from genpol.policies.chain import Chain, Stochastic
from genpol.policies.denoiser import flatten_chunk


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
    """The policy that acts: noise in, action ``tanh(x_K)`` out, of chunks ``[..., H * A]``.

    When it does not explore, the noise is zero and the chain takes its means.

    Attributes:
        actor_critic: The generative model and its critics, trained.

    Args:
        actor_critic: See above.
        generator: Source of the noise.
        chain: The noise of the steps; they are then written as ``chain``
            ``[..., K + 1, *action_shape]``. ``None`` for a deterministic solver.
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
    def actor(self) -> Stochastic:
        """The generative model."""
        actor = self.actor_critic.actor
        assert isinstance(actor, Stochastic)
        return actor

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action, the action before the squash and, with ``sigma``, the chain."""
        states, end = self._actions(tensordict["observation"])
        if states is not None:
            tensordict.set("chain", states)
        decoded = flatten_chunk(end, self.actor.horizon)
        tensordict.set("decoded", decoded)
        tensordict.set("action", self._squash(decoded))
        return tensordict

    def _actions(self, observation: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the chain, if there is one, and its end."""
        actor, leading = self.actor, observation.shape[:-1]
        if self._chain is None:
            noise = observation.new_zeros((*leading, *actor.action_shape))
            if explores():
                noise.normal_(generator=self._generator)
            return None, actor.sample(observation, noise)
        noise, steps = self._chain.draw(leading, self._generator, explore=explores())
        states = self._chain.sample(actor, observation, noise, steps)
        return states, states.select(-1 - len(self._chain.action_shape), -1)

    def _squash(self, decoded: Tensor) -> Tensor:
        return torch.tanh(decoded)


def explores() -> bool:
    """Whether the policy is to explore, as torchrl says."""
    return exploration_type() in (ExplorationType.RANDOM, None)


class DenoisingAgent(OnPolicyAgent):
    """An agent that trains a flow or a diffusion model by the likelihood of its own making.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        actor: The generative model.
        likelihood: Of what it did.
        generator: Source of weights, exploration and minibatches.
        chain: See :class:`DenoisingPolicy`.
        policy_class: What acts.
    """

    def __init__(
        self,
        settings: DenoisingSettings,
        specs: Specs,
        *,
        actor: Stochastic,
        likelihood: Likelihood,
        generator: torch.Generator,
        chain: Chain | None = None,
        policy_class: type[DenoisingPolicy] = DenoisingPolicy,
    ) -> None:
        actor_critic = ActorCritic(
            actor,
            specs.observation_dim,
            settings,
            generator=generator,
            num_values=settings.num_values(specs),
            critic_observation_dim=specs.critic_observation_dim,
        ).to(generator.device)
        super().__init__(
            settings,
            specs,
            actor_critic=actor_critic,
            policy=policy_class(actor_critic, generator=generator, chain=chain),
            likelihood=likelihood,
            generator=generator,
        )

"""Agents around the learner: one update per rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from genpol.agent import Agent, Specs
from genpol.on_policy.actors import ActorCritic, DecodedPolicy, Encoder
from genpol.on_policy.learner import OnPolicyLearner
from genpol.on_policy.likelihood import LatentLikelihood, Likelihood
from genpol.on_policy.settings import GaussianSettings, OnPolicySettings
from genpol.policies.latent import IdentityDecoder


def gaussian_learner(
    encoder: Encoder, settings: GaussianSettings, *, specs: Specs, generator: torch.Generator
) -> OnPolicyLearner:
    """Return the learner of a Gaussian over latents."""
    return OnPolicyLearner(
        encoder,
        settings,
        specs=specs,
        generator=generator,
        likelihood=LatentLikelihood(encoder.actor, settings, generator),
    )


class OnPolicyAgent(Agent):
    """An agent that makes one update on every rollout.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        actor_critic: What is trained, on its device.
        policy: What acts.
        likelihood: Of the actor.
        generator: Source of weights, exploration and minibatches.
    """

    source = "rollout"

    def __init__(
        self,
        settings: OnPolicySettings,
        specs: Specs,
        *,
        actor_critic: ActorCritic,
        policy: TensorDictModuleBase,
        likelihood: Likelihood,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.specs = specs
        self.frames_per_batch = settings.frames_per_batch(specs)
        self.generator = generator
        self.policy = policy
        self.learner = OnPolicyLearner(
            actor_critic, settings, specs=specs, generator=generator, likelihood=likelihood
        )

    def check_ranks(self) -> None:
        """See :class:`~genpol.agent.Agent`."""
        self.settings.check_ranks()

    @property
    def gradient_steps(self) -> int:  # type: ignore[override]
        """Optimiser steps so far."""
        return self.learner.gradient_steps

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Make one update on a rollout ``[num_envs, time]``."""
        return self.learner.update(batch)

    def training_state(self) -> dict[str, Any]:
        """Return optimisers, counters and the generator."""
        return {"learner": self.learner.state(), "generator": self.generator.get_state()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        self.learner.load_state(state["learner"])
        self.generator.set_state(state["generator"])


class DecodedAgent(Agent):
    """An agent that acts by :class:`~genpol.on_policy.actors.DecodedPolicy`, which keeps noise."""

    policy: DecodedPolicy

    def start_acting(self, seed: int) -> None:
        """See :class:`~genpol.agent.Agent`."""
        super().start_acting(seed)
        self.policy.load_noise(None)

    def acting_state(self) -> dict[str, Any]:
        """See :class:`~genpol.agent.Agent`."""
        return super().acting_state() | {"noise": self.policy.noise}

    def load_acting_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~genpol.agent.Agent`."""
        super().load_acting_state(state)
        self.policy.load_noise(state["noise"])


class GaussianAgent(DecodedAgent, OnPolicyAgent):
    """A Gaussian policy behind a tanh, trained by the surrogate that its settings name.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and minibatches.
    """

    policy: DecodedPolicy

    def __init__(self, settings: GaussianSettings, specs: Specs, *, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        encoder = Encoder(
            specs.observation_dim,
            specs.action_dim,
            settings,
            generator=generator,
            init=settings.encoder_init,
            num_values=settings.num_values(specs),
            critic_observation_dim=specs.critic_observation_dim,
        ).to(device)
        super().__init__(
            settings,
            specs,
            actor_critic=encoder,
            policy=DecodedPolicy(
                encoder,
                IdentityDecoder(settings.action_gain),
                generator=generator,
                noise_correlation=settings.noise_correlation,
            ),
            likelihood=LatentLikelihood(encoder.actor, settings, generator),
            generator=generator,
        )

    def training_state(self) -> dict[str, Any]:
        """Return optimisers, counters, the generator and the noise drawn last."""
        return super().training_state() | {"noise": self.policy.noise}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        super().load_training_state(state)
        self.policy.load_noise(state["noise"])

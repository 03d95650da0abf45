"""Proximal policy optimisation with a Gaussian policy: the yardstick.

Schulman et al. 2017 (arXiv 1707.06347): maximise ``E[min(r A, clip(r, 1-c, 1+c) A)]`` over several
passes of each rollout, ``r`` the likelihood ratio and ``A`` the generalised advantage estimate
(Schulman et al. 2016), whose bootstrap uses the true last observation where an episode was cut by
its time limit.

Choices that published baselines often get wrong, and that are right here: observation statistics
merge exactly and are the same in rollout and optimisation; the tanh that bounds the action belongs
to the environment, so the density is that of the Gaussian; the standard deviation depends on the
observation; the step size follows the measured divergence (``target_kl``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from genpol.agent import Agent, Specs
from genpol.on_policy import DecodedPolicy, Encoder, OnPolicySettings, PPOLearner
from genpol.policies.latent import IdentityDecoder


@dataclass(frozen=True, kw_only=True)
class Settings(OnPolicySettings):
    """Hyper-parameters of PPO: those every on-policy agent has."""


class PPO(Agent):
    """Gaussian PPO.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and minibatches.
    """

    source = "rollout"

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.specs = specs
        self.frames_per_batch = settings.frames_per_batch(specs)
        self.generator = torch.Generator(device).manual_seed(seed)
        encoder = Encoder(
            specs.observation_dim,
            specs.action_dim,
            settings,
            generator=self.generator,
            init=settings.encoder_init,
        ).to(device)
        self.policy = DecodedPolicy(
            encoder,
            IdentityDecoder(settings.action_gain),
            generator=self.generator,
            noise_correlation=settings.noise_correlation,
        )
        self.learner = PPOLearner(encoder, settings, generator=self.generator)

    @property
    def gradient_steps(self) -> int:  # type: ignore[override]
        """Optimiser steps so far."""
        return self.learner.gradient_steps

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Make one PPO update on a rollout ``[num_envs, time]``."""
        return self.learner.update(batch)

    def training_state(self) -> dict[str, Any]:
        """Return optimisers, counters and the generator."""
        return {
            "learner": self.learner.state(),
            "generator": self.generator.get_state(),
            "noise": self.policy.noise,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        self.learner.load_state(state["learner"])
        self.generator.set_state(state["generator"])
        self.policy.noise = state["noise"]


AGENT = PPO

"""Agents whose policy plans chunks of actions: what learning from data and finetuning share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from genpol.agent import Agent, Specs
from genpol.data.windows import WindowSpec
from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer
from genpol.offline.policy import PlanningPolicy
from genpol.offline.settings import OfflineSettings
from genpol.seeding import derive

Windows = Mapping[Any, Tensor]
"""A batch of windows by key, that of the next observation being ``("next", "observation")``."""

Draws = Mapping[str, Tensor]
"""Random numbers by name."""


class ChunkAgent(Agent):
    """An agent that learns from windows of transitions and acts by plans.

    A subclass makes its networks and calls :meth:`place` at the end of its constructor.

    Attributes:
        settings: Hyper-parameters.
        normalizer: Of observations; the identity unless the settings say otherwise.
        window: What is learned from.
        plan_steps: Actions H of a plan, and of the chunks that the critics value.
        told_goal: Whether a goal stands behind the observation.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        window: What is learned from.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    window: WindowSpec

    def __init__(
        self,
        settings: OfflineSettings,
        specs: Specs,
        *,
        window: WindowSpec,
        device: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.specs = specs
        self.window = window
        self.batch_size = settings.batch_size
        self.replay_capacity = settings.replay_capacity
        self.frames_per_batch = specs.num_envs
        self.gradient_steps = 0
        self.generator = torch.Generator(device).manual_seed(seed)
        self.normalizer = RunningNormalizer(specs.observation_dim)
        self._env_steps = 0
        self._updates_owed = 0.0
        self._acting = torch.Generator(device).manual_seed(derive(seed, "acting"))

    def place(self, *, plan_steps: int, goal: bool = False) -> None:
        """Move all networks to their device and make the policy that acts.

        Args:
            plan_steps: Actions H of a plan.
            goal: Whether the policy is told the environment's goal.
        """
        self.to(self.generator.device)
        self.plan_steps = plan_steps
        self.told_goal = goal
        self.policy = PlanningPolicy(
            self,
            action_steps=self.settings.action_steps or plan_steps,
            goal=goal,
            generator=self._acting,
        )

    @abstractmethod
    def act(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """Return chunks ``[B, H, A]`` within [-1, 1] for raw observations ``[B, d]``."""

    def encode(self, observation: Tensor) -> Tensor:
        """Standardise raw observations ``[..., d]``; what stands behind them is left as it is."""
        width = self.specs.observation_dim
        if not self.settings.normalize_observations:
            return observation
        state: Tensor = self.normalizer(observation[..., :width])
        return torch.cat((state, observation[..., width:]), dim=-1)

    def value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return what this agent's critics think of chunks.

        Args:
            observation: As the networks see it, ``[B, d]``.
            chunk: ``[..., B, H, A]``.

        Returns:
            Values, or logits that rank alike, ``[..., B]``.

        Raises:
            ConfigError: If it has no critics.
        """
        raise ConfigError(
            "this agent has no critic; take one of iql, fql, qc, dqc, qgf and fisher_decorator"
        )

    def expected_return(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return what the critics expect of chunks, in the units of returns, ``[..., B]``.

        The arguments and errors are those of :meth:`value`.
        """
        return self.value(observation, chunk)

    def windows(self, batch: TensorDict) -> dict[Any, Tensor]:
        """Return a batch on the agent's device, by key."""
        batch = batch.to(self.generator.device)
        return dict(batch.items(include_nested=True, leaves_only=True))

    def observe(self, rollout: TensorDict) -> int:
        """Take note of what was collected; return the updates that it calls for."""
        steps = rollout.numel() * self.specs.action_repeat
        self._env_steps += steps
        if self._env_steps <= self.settings.online_warmup_steps:
            return 0
        self._updates_owed += rollout.numel() * self.settings.updates_per_step
        updates = int(self._updates_owed)
        self._updates_owed -= updates
        return updates

    def training_state(self) -> dict[str, Any]:
        """Return counters, generators, and the plans that are being carried out."""
        return {
            "generator": self.generator.get_state(),
            "gradient_steps": self.gradient_steps,
            "env_steps": self._env_steps,
            "updates_owed": self._updates_owed,
            "acting": self.policy.acting_state(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        self.generator.set_state(state["generator"])
        self.gradient_steps = state["gradient_steps"]
        self._env_steps = state["env_steps"]
        self._updates_owed = state["updates_owed"]
        self.policy.load_acting_state(state["acting"])

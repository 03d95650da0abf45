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

    All its networks know chunks in ``[-1, 1]`` of their own: ``action_shift + action_scale x`` is
    the environment's action. That is the identity but for policies that come from elsewhere.

    Attributes:
        settings: Hyper-parameters.
        normalizer: Of observations; the identity unless the settings say otherwise.
        action_scale: See above, ``[A]``.
        action_shift: See above, ``[A]``.
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
    action_scale: Tensor
    action_shift: Tensor

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
        self.register_buffer("action_scale", torch.ones(specs.action_dim))
        self.register_buffer("action_shift", torch.zeros(specs.action_dim))
        self.register_load_state_dict_pre_hook(_add_identity)
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
            action_steps=self.settings.action_steps or plan_steps - self.settings.past_steps,
            goal=goal,
            generator=self._acting,
        )

    @abstractmethod
    def act(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """Return chunks ``[B, H, A]`` as the networks know them, for observations ``[B, d]``."""

    def plan_actions(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """Return what :meth:`act` makes as actions of the environment, within [-1, 1]."""
        chunk = self.act(observation, generator)
        return (self.action_shift + self.action_scale * chunk).clamp(-1.0, 1.0)

    def own_actions(self, action: Tensor) -> Tensor:
        """Return actions of the environment ``[..., A]`` as the networks know them."""
        scale = torch.where(self.action_scale == 0, 1.0, self.action_scale)  # of what never moves
        return (action - self.action_shift) / scale

    def scale_actions(self, low: Tensor, high: Tensor) -> None:
        """Take -1 and 1 of the networks' actions for these of the environment, ``[A]``."""
        self.action_scale.copy_((high - low) / 2)
        self.action_shift.copy_((high + low) / 2)

    def action_range(self) -> tuple[Tensor, Tensor] | None:
        """Return what :meth:`scale_actions` was given, if that is not -1 and 1."""
        scale, shift = self.action_scale.cpu(), self.action_shift.cpu()
        if torch.all(scale == 1) and torch.all(shift == 0):
            return None
        return shift - scale, shift + scale

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
        """Return a batch on the agent's device, by key, its actions as the networks know them."""
        batch = batch.to(self.generator.device)
        found = dict(batch.items(include_nested=True, leaves_only=True))
        return found | {"action": self.own_actions(found["action"])}

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


def _add_identity(agent: ChunkAgent, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Let weights that were saved before actions could be scaled load as what they are."""
    for name in ("action_scale", "action_shift"):
        weights.setdefault(f"{prefix}{name}", getattr(agent, name).detach().clone())

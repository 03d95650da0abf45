"""The interfaces that the training loop calls and that every agent implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs import EnvBase

from genpol.data.dataset import OfflineDataset
from genpol.data.windows import WindowSpec
from genpol.errors import ConfigError


class TaskSpecs(NamedTuple):
    """What an agent must know of one of several tasks.

    Attributes:
        name: The task's name.
        action_dim: Dimensions of the action that it uses, the first ones.
        max_episode_steps: Environment steps of a full episode.
    """

    name: str
    action_dim: int
    max_episode_steps: int


@dataclass(frozen=True, kw_only=True)
class Specs:
    """What an agent must know of its environment: sizes, and nothing of the simulator.

    Attributes:
        observation_dim: Width of the observation.
        critic_observation_dim: Width of what critics may see in the actor's place, which comes
            under `critic_observation`; 0 where they see the same.
        action_dim: Width of the action.
        num_envs: Environments that are stepped together.
        num_rewards: Terms of the reward.
        goal_dim: Width of the goal that comes with every observation under `goal`, beside the one
            that the state has achieved under `achieved_goal`; 0 for none.
        group_size: Neighbouring environments that set out from one state together; 1 for none.
        group_steps: Actions after which they do so again.
        tells_success: Whether every step says under `success` whether the task is solved.
        action_repeat: Environment steps for which each action is held. Budgets and schedules in
            settings count environment steps; a batch holds one row per action.
        max_episode_steps: Environment steps of a full episode.
        tasks: Several tasks in one environment, whose number an observation tells in its last
            entries, of which one is 1 and the others 0; empty where there is one task.
    """

    observation_dim: int
    action_dim: int
    num_envs: int
    action_repeat: int = 1
    num_rewards: int = 1
    critic_observation_dim: int = 0
    goal_dim: int = 0
    group_size: int = 1
    group_steps: int = 0
    tells_success: bool = False
    max_episode_steps: int = 1000
    tasks: tuple[TaskSpecs, ...] = ()

    @property
    def episode_actions(self) -> int:
        """Actions of a full episode."""
        return self.actions(self.max_episode_steps)

    def actions(self, env_steps: int) -> int:
        """Return how many actions so many environment steps take, at least one."""
        return max(1, env_steps // self.action_repeat)

    @classmethod
    def from_env(cls, env: EnvBase, *, num_envs: int) -> Specs:
        """Read the sizes from one environment of which ``num_envs`` will be stepped."""
        goal = env.observation_spec.get("goal", None)
        privileged = env.observation_spec.get("critic_observation", None)
        return cls(
            observation_dim=env.observation_spec["observation"].shape[-1],
            critic_observation_dim=0 if privileged is None else privileged.shape[-1],
            goal_dim=0 if goal is None else goal.shape[-1],
            action_dim=env.action_spec.shape[-1],
            num_envs=num_envs,
            action_repeat=env.action_repeat,
            num_rewards=env.reward_spec.shape[-1],
            group_size=getattr(env, "group_size", 1),
            group_steps=getattr(env, "group_steps", 0),
            tells_success=env.observation_spec.get("success", None) is not None,
            max_episode_steps=env.max_episode_steps,
            tasks=tuple(TaskSpecs(*task) for task in getattr(env, "tasks", ())),
        )

    def require_groups(self, rollout_steps: int) -> None:
        """Refuse environments whose groups do not set out anew with every rollout.

        Raises:
            ConfigError: With what to set.
        """
        if self.group_size < 2 or self.group_steps != rollout_steps:
            raise ConfigError(
                f"agent.advantage = group: the environments form groups of {self.group_size} for "
                f"{self.group_steps} actions; set env.group_size=8 (say) and "
                f"env.group_steps={rollout_steps}, which is agent.rollout_steps"
            )


class StatefulPolicy(TensorDictModuleBase, ABC):
    """A policy that remembers something from step to step, or draws noise where it is evaluated.

    Evaluations start it anew and give back to training what it was in the midst of.
    """

    @abstractmethod
    def start(self, seed: int) -> None:
        """Forget everything and draw from this seed on."""

    @abstractmethod
    def acting_state(self) -> dict[str, Any]:
        """Return what it remembers."""

    @abstractmethod
    def load_acting_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`acting_state` returned."""


class Agent(nn.Module, ABC):
    """One algorithm: a policy that acts and an update that learns.

    The loop hands every batch it draws from ``source`` to :meth:`update` and logs the metrics that
    come back; it knows nothing else of the algorithm.

    Attributes:
        policy: Maps ``observation`` to ``action`` in ``[-1, 1]``. Collectors, evaluation and export
            run this very object. It samples or takes the mode as torchrl's ``exploration_type``
            says.
        source: Where the next batch comes from.
        frames_per_batch: Actions, over all environments, between two updates.
        generator: The source of every random number the agent draws, on its own device.
        gradient_steps: Optimiser steps taken so far.
        specs: What it was made for.
    """

    policy: TensorDictModuleBase
    source: Literal["rollout", "replay", "dataset"]
    frames_per_batch: int
    generator: torch.Generator
    gradient_steps: int
    specs: Specs

    def check_ready(self) -> None:
        """Refuse to start a run that lacks what only ``init=`` gives; most agents need nothing.

        Raises:
            ConfigError: With what is missing.
        """
        return

    def adopt(self, weights: Mapping[str, Any], tasks: Sequence[str] = ()) -> Mapping[str, Any]:
        """Return weights of another run of this agent, with which ``init=`` lets it begin.

        Those of most agents are as they must be. Others have to be fitted, or call for another
        beginning than that of a run from nothing.

        Args:
            weights: Of the other run.
            tasks: Its tasks, in the order of their numbers; empty where it had but one.
        """
        return weights

    def check_ranks(self) -> None:
        """Refuse to learn on several ranks (:mod:`genpol.parallel`), unless the agent can.

        Raises:
            ConfigError: With what to do instead.
        """
        raise ConfigError(
            "this agent learns in one process: leave torchrun out (collector=ray or distributed "
            "with num_collectors=<n> collects in several); ppo, bpo, mdpo, fpo, dppo, reinflow and "
            "gorl learn on several ranks"
        )

    @abstractmethod
    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Learn from one batch ``[num_envs, time]`` and return scalar metrics by name."""

    @abstractmethod
    def training_state(self) -> dict[str, Any]:
        """Return all that resuming needs beside the module's weights.

        Optimisers, generators, counters, stage machines and buffers, as nested dictionaries of
        tensors, numbers, strings, booleans and ``None``.
        """

    @abstractmethod
    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""

    def start_acting(self, seed: int) -> None:
        """Let the policy forget what it remembers from step to step, and draw from this seed on."""
        if isinstance(self.policy, StatefulPolicy):
            self.policy.start(seed)
        else:
            self.generator.manual_seed(seed)

    def acting_state(self) -> dict[str, Any]:
        """Return what acting changes: where its noise stands, and what the policy remembers."""
        if isinstance(self.policy, StatefulPolicy):
            return self.policy.acting_state()
        return {"generator": self.generator.get_state()}

    def load_acting_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`acting_state` returned."""
        if isinstance(self.policy, StatefulPolicy):
            self.policy.load_acting_state(state)
        else:
            self.generator.set_state(state["generator"].cpu())


class ReplayAgent(Agent):
    """An agent that learns from transitions of the past.

    The loop keeps the replay: it adds every rollout, shows it to :meth:`observe`, and calls
    :meth:`~Agent.update` with ``batch_size`` transitions as often as that asks for.

    Attributes:
        batch_size: Transitions, or windows, per update.
        replay_capacity: Transitions that the replay holds.
        window: What a batch is made of: windows of several transitions on end, or single ones.
        successes: Windows per update, besides, of episodes that ended with success; see
            :class:`~genpol.data.sequences.SequenceReplay`.
    """

    source = "replay"
    batch_size: int
    replay_capacity: int
    window: WindowSpec | None = None
    successes: int = 0

    @abstractmethod
    def observe(self, rollout: TensorDict) -> int:
        """Take note of a rollout ``[num_envs, time]`` and return how many updates are due."""


class DatasetAgent(Agent):
    """An agent that learns from a data set, and then perhaps from what it collects besides.

    The loop draws windows of data and calls :meth:`~Agent.update` with each batch. If environment
    steps follow, it shows every rollout to :meth:`observe` and draws windows from both together.
    One that does without data learns from the first step on from what it collects.

    Attributes:
        needs_data: Whether it cannot do without.
        window: What a batch is made of.
        batch_size: Windows per update.
        replay_capacity: Collected transitions that are held beside the data.
        offline_share: Share of each batch that is drawn from the data once anything is collected;
            ``None`` for as much as there is of them.
    """

    source = "dataset"
    needs_data: bool = True
    window: WindowSpec
    batch_size: int
    replay_capacity: int
    offline_share: float | None = None

    @abstractmethod
    def prepare(self, dataset: OfflineDataset) -> None:
        """Take what is needed from the data as a whole, once before the first update."""

    @abstractmethod
    def observe(self, rollout: TensorDict) -> int:
        """Take note of a rollout ``[num_envs, time]`` and return how many updates are due."""

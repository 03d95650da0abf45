"""Groups of environments: what several collectors share out, in this process or in others.

With ``num_collectors=k`` the training environments form k groups. Each has seeds of its own, a copy
of the agent that acts, and torchrl's ``Collector``; before every rollout the copy is brought up to
the agent's state. A batch is the groups' rollouts, one below the other. Where a group is played
makes no difference, to the bit, as long as torch has equally many threads there.

From other processes, what a rollout leaves behind (simulation, noise, plans under way) comes with
it, so that a checkpoint of all groups is at hand even when a collector has died.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from genpol.agent import Agent
from genpol.errors import EnvironmentFault
from genpol.seeding import derive
from genpol.training.collection import make_collector

State = dict[str, Any]


class CollectorDied(EnvironmentFault):
    """A collector's process is gone."""


@dataclass(frozen=True)
class GroupSpec:
    """How to begin one group, here or in another process; it can be pickled where its makers can.

    Attributes:
        make_env: Takes ``num_envs``, ``seed`` and ``training``.
        make_agent: Makes an agent that is fit to take over the state of the one that learns.
        num_envs: Environments of the group.
        frames: Actions in one rollout of the group.
        seed: That of the run.
        index: The group's number.
        state: What a rollout before left behind; ``None`` for a beginning.
    """

    make_env: Callable[..., EnvBase]
    make_agent: Callable[[], Agent]
    num_envs: int
    frames: int
    seed: int
    index: int
    state: State | None = None

    def env(self) -> EnvBase:
        """Make the group's environments, where the rollout before left them."""
        seed = derive(self.seed, f"training/{self.index}")
        env = self.make_env(num_envs=self.num_envs, seed=seed, training=True)
        if self.state is not None and self.state["simulation"] is not None:
            env.load_simulation(self.state["simulation"])
        return env

    def policy(self) -> ActingCopy:
        """Make what acts in them."""
        seed = derive(self.seed, f"collector/{self.index}")
        return ActingCopy(self.make_agent(), seed, self.state)


class ActingCopy(TensorDictModuleBase):
    """A copy of the agent that learns, which acts for a group with noise of its own.

    Args:
        agent: The copy.
        seed: Where its noise begins.
        state: What a rollout before left behind, from where it goes on; ``None`` for none.
    """

    def __init__(self, agent: Agent, seed: int, state: State | None) -> None:
        super().__init__()
        self._beginning = (seed, None if state is None else state["acting"])
        self.in_keys = agent.policy.in_keys
        self.out_keys = agent.policy.out_keys
        # In a tuple, so that no collector takes its weights for the policy's and sends them about.
        self._agent = (agent,)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Act as the agent would."""
        acted: TensorDictBase = self._agent[0].policy(tensordict)
        return acted

    def follow(self, learned: Mapping[str, Any]) -> None:
        """Become what the agent that learns is, but for the noise; see :func:`learned_state`."""
        agent = self._agent[0]
        own = agent.acting_state()
        agent.load_state_dict(learned["weights"])
        agent.load_training_state(learned["training"])
        agent.load_acting_state(own)

    def begin(self) -> None:
        """Put the noise where it begins, once a collector has been made, which tries it out."""
        seed, state = self._beginning
        if state is None:
            self._agent[0].start_acting(seed)
        else:
            self._agent[0].load_acting_state(state)

    def acting_state(self) -> State:
        """Return where the noise stands, and plans under way."""
        return self._agent[0].acting_state()


def learned_state(agent: Agent) -> State:
    """Return all that decides how an agent acts: what resuming would need, which is enough."""
    return {"weights": dict(agent.state_dict()), "training": agent.training_state()}


class Group:
    """One group, played in this process.

    Args:
        spec: How to begin it.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self._env = spec.env()
        self._copy = spec.policy()
        self._collector = make_collector(self._env, self._copy, spec.frames)
        self._copy.begin()
        self._batches = iter(self._collector)

    def collect(self, learned: Mapping[str, Any]) -> TensorDict:
        """Return a rollout ``[num_envs, time]`` of the agent as it is now."""
        self._copy.follow(learned)
        batch: TensorDict = next(self._batches)
        return batch

    def state(self) -> State:
        """Return what the last rollout left behind."""
        return {
            "simulation": self._env.state_dict_of_simulation(),
            "acting": self._copy.acting_state(),
        }

    def close(self) -> None:
        """Close the environments."""
        self._collector.shutdown(close_env=False)
        if not self._env.is_closed:
            self._env.close()


class Collection(Protocol):
    """Groups that collect together."""

    def collect(self, learned: Mapping[str, Any]) -> TensorDict:
        """Return a rollout of all groups ``[num_envs, time]``, in their order.

        Raises:
            CollectorDied: If one of their processes is gone.
        """
        ...

    def states(self) -> list[State]:
        """Return what the last whole rollout left behind in every group."""
        ...

    def close(self) -> None:
        """Close everything."""
        ...


class DirectCollection:
    """Groups played one after the other in this process.

    Args:
        specs: How to begin them.
    """

    def __init__(self, specs: Sequence[GroupSpec]) -> None:
        with torch.random.fork_rng():  # torch's own generator is the learner's
            self._groups = [Group(spec) for spec in specs]

    def collect(self, learned: Mapping[str, Any]) -> TensorDict:
        """See :class:`Collection`."""
        rollouts: TensorDict = torch.cat([group.collect(learned) for group in self._groups])
        return rollouts

    def states(self) -> list[State]:
        """See :class:`Collection`."""
        return [group.state() for group in self._groups]

    def close(self) -> None:
        """See :class:`Collection`."""
        for group in self._groups:
            group.close()

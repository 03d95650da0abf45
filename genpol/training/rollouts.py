"""Rollouts of groups: what the loop asks for, whoever plays the groups and wherever.

One rank plays all groups, by ``collector=`` and ``num_collectors=``. Of several ranks
(:mod:`genpol.parallel`) each plays the group of its number, so that k ranks see what one process
sees with ``num_collectors=k``, and can go on from its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torchrl.envs import EnvBase

from genpol import parallel
from genpol.agent import Agent
from genpol.errors import CheckpointError, ConfigError
from genpol.training.groups import (
    Collection,
    DirectCollection,
    GroupSpec,
    State,
    learned_state,
)
from genpol.training.settings import TrainSettings

_KEY = "collectors"


class GroupRollouts:
    """Rollouts of the groups that are played by this process or for it.

    Attributes:
        reward_terms: Names of the reward's terms, if it has several.
        num_envs: Environments in a rollout.

    Args:
        agent: What learns.
        make_env: Makes environments.
        make_agent: Makes copies of the agent, whose state does not matter.
        settings: Of the run.

    Raises:
        ConfigError: If the environments cannot be shared out.
    """

    def __init__(
        self,
        agent: Agent,
        make_env: Callable[..., EnvBase],
        make_agent: Callable[[], Agent],
        settings: TrainSettings,
    ) -> None:
        self._agent = agent
        self._settings = settings
        self._count = number_of_groups(settings)
        if agent.frames_per_batch % self._count != 0:
            raise ConfigError(
                f"num_collectors = {self._count}: does not divide the {agent.frames_per_batch} "
                "actions between two updates, which collectors share equally; change num_envs"
            )
        smallest = getattr(settings.env, "group_size", 1)
        probe = make_env(num_envs=smallest, seed=settings.seed, training=True)
        self.reward_terms: tuple[str, ...] = getattr(probe, "reward_terms", ())
        probe.close()
        own = range(self._count)
        if parallel.size() > 1:
            own = range(parallel.rank(), parallel.rank() + 1)
        self._specs = [
            GroupSpec(
                make_env=make_env,
                make_agent=make_agent,
                num_envs=settings.num_envs // self._count,
                frames=agent.frames_per_batch // self._count,
                seed=settings.seed,
                index=index,
            )
            for index in own
        ]
        self.num_envs = sum(spec.num_envs for spec in self._specs)
        self._collection: Collection | None = None

    def batches(self) -> Iterator[TensorDict]:
        """Yield rollouts ``[num_envs, time]`` of the agent as it is when each is asked for.

        Raises:
            CollectorDied: If a collector is gone; :meth:`state` is then that of the batch before.
        """
        self._collection = _open_collection(
            self._settings.collector, self._specs, num_threads=self._settings.num_threads
        )
        while True:
            yield self._collection.collect(learned_state(self._agent))

    def state(self) -> dict[str, list[State]]:
        """Return what the last rollout left behind in every group, on whatever rank."""
        if self._collection is None:
            states = [spec.state for spec in self._specs if spec.state is not None]
        else:
            states = self._collection.states()
        return {_KEY: [state for some in parallel.gather(states) for state in some]}

    def load(self, state: Mapping[str, Any], path: Path) -> bool:
        """Let the groups go on from what :meth:`state` returned.

        Returns:
            Whether the simulations go on, too; else they begin new episodes.

        Raises:
            CheckpointError: If there are other numbers of groups in checkpoint ``path``.
        """
        saved = saved_groups(state)
        if saved != self._count:
            raise CheckpointError(_of_others(path, saved, self._count))
        states = state[_KEY]
        self._specs = [replace(spec, state=states[spec.index]) for spec in self._specs]
        return all(x["simulation"] is not None for x in states)

    def close(self) -> None:
        """Close environments and processes."""
        if self._collection is not None:
            self._collection.close()


def number_of_groups(settings: TrainSettings) -> int:
    """Return how many groups the training environments form, over all ranks.

    Raises:
        ConfigError: If they cannot.
    """
    ranks = parallel.size()
    if ranks == 1:
        return settings.num_collectors
    if settings.num_collectors > 1:
        raise ConfigError(
            f"num_collectors = {settings.num_collectors}: every rank of torchrun is a collector; "
            "leave it out"
        )
    if settings.num_envs % ranks != 0:
        raise ConfigError(
            f"num_envs = {settings.num_envs}: {ranks} ranks cannot share them equally; take a "
            f"multiple of {ranks}"
        )
    return ranks


def saved_groups(simulation: Mapping[str, Any] | None) -> int:
    """Return the number of groups of which a checkpoint holds the simulation."""
    return len(simulation[_KEY]) if simulation is not None and _KEY in simulation else 1


def refuse_groups(simulation: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on in one group with what several left behind.

    Raises:
        CheckpointError: If checkpoint ``path`` holds several groups.
    """
    if (saved := saved_groups(simulation)) > 1:
        raise CheckpointError(_of_others(path, saved, 1))


def _of_others(path: Path, saved: int, here: int) -> str:
    mend = "num_collectors=1, without torchrun"
    if saved > 1:
        mend = f"num_collectors={saved}, or on {saved} ranks of torchrun"
    return f"{path}: was saved by {saved} collectors or ranks, not {here}; go on with {mend}"


def _open_collection(backend: str, specs: Sequence[GroupSpec], *, num_threads: int) -> Collection:
    """Begin groups where ``backend`` says: ``direct``, ``ray`` or ``distributed``.

    Args:
        backend: See above.
        specs: How to begin each.
        num_threads: Threads of torch in each other process; 0 shares the cores out.

    Raises:
        MissingExtraError: If the backend's package is not installed.
        CollectorDied: If a collector does not come up.
    """
    if backend == "direct":
        return DirectCollection(specs)
    if backend == "ray":
        from genpol.training.ray_collection import RayCollection

        return RayCollection(specs, num_threads=num_threads)
    from genpol.training.distributed_collection import DistributedCollection

    return DistributedCollection(specs, num_threads=num_threads)

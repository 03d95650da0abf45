"""Groups played by torchrl's ``RayCollector``: in other processes, here or anywhere in a cluster.

``RayCollector`` itself keeps the actors and gathers their rollouts. Two things go past its own
ways (torchrl 0.14.1):

* Its weight synchronisation sends parameters and buffers. How an agent acts also depends on what is
  neither, such as a warm-up that is over or a decoder that was put in, so the whole learned state
  goes to each collector's policy by ``map_fn``.
* With ``total_frames=-1``, which it documents as endless, it ends before the first batch
  (``while collected_frames < total_frames``): it is given the largest number there is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, ExplorationType

from genpol.errors import GenpolError, require
from genpol.provenance import usable_cores
from genpol.training import ray_cluster
from genpol.training.groups import CollectorDied, GroupSpec, State

T = TypeVar("T")


class RayCollection:
    """Groups that Ray's actors play; see :class:`~genpol.training.groups.Collection`.

    Args:
        specs: How to begin them.
        num_threads: Threads of torch in each actor; 0 shares the cores out.

    Raises:
        MissingExtraError: If Ray is not installed.
        CollectorDied: If an actor does not come up.
    """

    def __init__(self, specs: Sequence[GroupSpec], *, num_threads: int = 0) -> None:
        self._ray = require("ray", "distributed")
        self._count = len(specs)
        self._states = [spec.state for spec in specs]
        threads = num_threads or max(1, usable_cores() // len(specs))
        self._ours = ray_cluster.join(self._ray, max(usable_cores(), len(specs)))
        self._collector = self._telling(lambda: _make_collector(specs, threads))
        self._batches = iter(self._collector)

    def collect(self, learned: Mapping[str, Any]) -> TensorDict:
        """See :class:`~genpol.training.groups.Collection`."""
        return self._telling(lambda: self._collect(learned))

    def states(self) -> list[State]:
        """See :class:`~genpol.training.groups.Collection`."""
        return [state for state in self._states if state is not None]

    def close(self) -> None:
        """See :class:`~genpol.training.groups.Collection`."""
        self._collector.shutdown(shutdown_ray=self._ours)
        if self._ours:
            self._ray.shutdown()

    def _collect(self, learned: Mapping[str, Any]) -> TensorDict:
        shared = self._ray.put(dict(learned))
        self._map("policy.follow", [(shared,)] * self._count)
        with _knowing():
            rollouts: TensorDict = next(self._batches).flatten(0, 1)
        simulations = self._map("env.state_dict_of_simulation")
        acting = self._map("policy.acting_state")
        self._states = [
            {"simulation": x, "acting": y} for x, y in zip(simulations, acting, strict=True)
        ]
        return rollouts

    def _map(self, method: str, arguments: list[tuple[Any, ...]] | None = None) -> list[Any]:
        found: list[Any] = self._collector.map_fn(method, arguments)
        return found

    def _telling(self, work: Callable[[], T]) -> T:
        """Do something with the actors, and say in one line which one is gone, or refuses."""
        errors = self._ray.exceptions
        try:
            return work()
        except errors.RayActorError as error:
            raise CollectorDied(self._obituary(error)) from None
        except errors.RayTaskError as error:
            if not isinstance(error.cause, GenpolError):
                raise
            raise CollectorDied(f"a collector of {self._count} (Ray) died: {error.cause}") from None

    def _obituary(self, error: Exception) -> str:
        dead = getattr(error, "actor_id", None)
        handles = getattr(getattr(self, "_collector", None), "remote_collectors", [])
        numbers = [i for i, x in enumerate(handles) if x._actor_id.hex() == dead]
        which = f"collector {numbers[0]}" if numbers else "a collector"
        *_, reason = str(error).strip().splitlines()  # behind a traceback or a list of facts
        reason = reason.removeprefix("genpol.errors.").partition(". Worker exit type")[0]
        return f"{which} of {self._count} (Ray) died: {reason}"


class _Actor(Collector):
    """torchrl's collector, of which Ray can tell what went wrong in it.

    Ray asks what failed for its truth, hence its length, which endless and unfinished collectors
    answer by errors of their own; the process then dies over that, and nobody learns the cause.
    """

    def __bool__(self) -> bool:
        """Be true, as any object is."""
        return True


def _make_collector(specs: Sequence[GroupSpec], threads: int) -> Any:
    from torchrl.collectors.distributed import RayCollector

    with _knowing():
        collector = RayCollector(
            [partial(_make_env, spec, threads) for spec in specs],
            policy_factory=[spec.policy for spec in specs],
            collector_class=_Actor,
            frames_per_batch=sum(spec.frames for spec in specs),
            total_frames=sys.maxsize,
            exploration_type=ExplorationType.RANDOM,
            trust_policy=True,
            sync=True,
            collector_kwargs=[
                {"track_traj_ids": False, "auto_register_policy_transforms": False} for _ in specs
            ],
            remote_configs={"num_cpus": 1, "num_gpus": 0, "max_restarts": 0},
            weight_sync_schemes={},
        )
    collector.map_fn("policy.begin")
    return collector


@contextmanager
def _knowing() -> Iterator[None]:
    """Leave out torchrl's warnings that it sends no weights, which are sent past it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The policy is not an nn.Module")
        warnings.filterwarnings("ignore", "RayCollector iteration started before weight")
        yield


def _make_env(spec: GroupSpec, threads: int) -> EnvBase:
    torch.set_num_threads(threads)
    return spec.env()

"""Groups played by other processes of this machine, which talk to this one by torch.distributed.

Each process plays one group with torchrl's ``Collector``; learned states go out and rollouts come
back as tensors over gloo, on the loopback device alone and beside any default process group.

torchrl's own ``DistributedCollector`` and ``DistributedSyncCollector`` (0.14.1) cannot do it:

* With ``total_frames=-1``, documented as endless, the one ended after no batch and the other raised
  ("Cannot dispatch -1 frames across 2").
* ``state_dict`` raises NotImplementedError, and workers know four instructions (continue, update
  weights, seed, shut down): neither simulations nor noise can be saved, and of the agent only
  parameters and buffers arrive, not that a warm-up is over or which decoder acts.
* After a worker was killed, the one failed 15 s later with "wait timeout after 10000ms, keys:
  /NODE_2_out", which names no process; workers of the other collect ahead of the learner, with
  weights that arrive at any time, so that no run can be repeated.
* Both take the process's default group, which belongs to the ranks of :mod:`genpol.parallel`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from genpol.provenance import usable_cores
from genpol.training.groups import CollectorDied, Group, GroupSpec, State

_HOST = "127.0.0.1"
_COMES_UP = timedelta(seconds=180)  # importing torch and a simulator on a busy machine
_COLLECTS = timedelta(hours=6)
_TAKES_LEAVE_S = 5.0
_LEARNER = 0  # rank of this process in the group; collector i is rank i + 1


class DistributedCollection:
    """Groups that processes of this machine play; see :class:`~genpol.training.groups.Collection`.

    Args:
        specs: How to begin them.
        num_threads: Threads of torch in each process; 0 shares the cores out.

    Raises:
        CollectorDied: If a process does not come up.
    """

    def __init__(self, specs: Sequence[GroupSpec], *, num_threads: int = 0) -> None:
        threads = num_threads or max(1, usable_cores() // len(specs))
        self._states = [spec.state for spec in specs]
        self._line: _Line | None = None
        self._broken = False  # whether one is gone, the others then being in the midst of a rollout
        size = len(specs) + 1
        store = dist.TCPStore(_HOST, 0, size, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        for number, spec in enumerate(specs, start=1):
            process = context.Process(
                target=_play,
                args=(cloudpickle.dumps(spec), store.port, number, size, threads),
                daemon=True,
            )
            process.start()
            self._processes.append(process)
        self._await(store)
        self._line = _Line(store, _LEARNER, size)

    def collect(self, learned: Mapping[str, Any]) -> TensorDict:
        """See :class:`~genpol.training.groups.Collection`."""
        parcel = _wrap(dict(learned))
        ranks = range(1, len(self._processes) + 1)
        for rank in ranks:
            self._talk(rank, "send", parcel)
        rollouts, states = zip(*(self._talk(rank, "receive") for rank in ranks), strict=True)
        self._states = list(states)
        batch: TensorDict = torch.cat(rollouts)
        return batch

    def states(self) -> list[State]:
        """See :class:`~genpol.training.groups.Collection`."""
        return [state for state in self._states if state is not None]

    def close(self) -> None:
        """See :class:`~genpol.training.groups.Collection`."""
        if self._line is not None and not self._broken:
            self._line.take_leave(range(1, len(self._processes) + 1))
            for process in self._processes:
                process.join(timeout=_TAKES_LEAVE_S)
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
        self._line = None

    def _await(self, store: dist.TCPStore) -> None:
        """Wait until all processes have their environments, or one has died over it."""
        for number, process in enumerate(self._processes):
            waited = timedelta()
            while not store.check([_ready(number + 1)]):
                process.join(timeout=0.05)
                waited += timedelta(seconds=0.05)
                if not process.is_alive() or waited > _COMES_UP:
                    self.close()
                    raise CollectorDied(self._obituary(number))

    def _talk(self, rank: int, method: str, *parcel: Tensor) -> Any:
        assert self._line is not None
        try:
            return getattr(self._line, method)(rank, *parcel)
        except RuntimeError:  # gloo: connection closed by peer
            self._broken = True
            raise CollectorDied(self._obituary(rank - 1)) from None

    def _obituary(self, number: int) -> str:
        process = self._processes[number]
        process.join(timeout=5)
        code = process.exitcode
        how = "does not answer" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        return f"collector {number} of {len(self._processes)} (process {process.pid}) died: {how}"


class _Line:
    """Sends and receives parcels between the learner and the collectors.

    Args:
        store: Where the processes find each other.
        rank: Of this process.
        size: Number of processes.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        gloo: Any = dist.ProcessGroupGloo  # of which torch's stubs know little
        options = gloo._Options()
        # Of this machine alone: gloo would else listen where the host's name leads.
        options._devices = [gloo.create_device(hostname=_HOST)]
        options._timeout = _COLLECTS
        self._gloo = gloo(dist.PrefixStore("gloo", store), rank, size, options)

    def send(self, rank: int, parcel: Tensor) -> None:
        """Send bytes."""
        self._gloo.send([torch.tensor([len(parcel)])], rank, 0).wait()
        self._gloo.send([parcel], rank, 1).wait()

    def take_leave(self, ranks: Iterable[int]) -> None:
        """Let the others end, without waiting: one that is gone would never answer."""
        nothing = torch.zeros(1, dtype=torch.int64)
        self._last = [self._gloo.send([nothing], rank, 0) for rank in ranks]

    def receive(self, rank: int) -> Any:
        """Return what a parcel holds, ``None`` where the other one took leave."""
        length = torch.zeros(1, dtype=torch.int64)
        self._gloo.recv([length], rank, 0).wait()
        parcel = torch.empty(int(length), dtype=torch.uint8)
        if len(parcel) == 0:
            return None
        self._gloo.recv([parcel], rank, 1).wait()
        return cloudpickle.loads(parcel.numpy())


def _wrap(thing: Any) -> Tensor:
    return torch.frombuffer(bytearray(cloudpickle.dumps(thing)), dtype=torch.uint8)


def _ready(rank: int) -> str:
    return f"ready/{rank}"


def _play(spec: bytes, port: int, rank: int, size: int, threads: int) -> None:
    """Play one group until the learner is gone: what the other processes run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's to heed
    torch.set_num_threads(threads)
    group = Group(cloudpickle.loads(spec))
    store = dist.TCPStore(_HOST, port, size, is_master=False, timeout=_COMES_UP)
    store.set(_ready(rank), "")
    line = _Line(store, rank, size)
    while True:
        try:
            learned = line.receive(_LEARNER)
        except RuntimeError:  # the learner was killed
            break
        if learned is None:
            break
        batch = group.collect(learned)
        line.send(_LEARNER, _wrap((batch, group.state())))
    group.close()
    os._exit(0)  # with torch loaded the interpreter takes seconds to end, and nothing is left to do

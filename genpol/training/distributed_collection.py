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
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from genpol.errors import GenpolError
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
        self._store = _open_store(size)
        context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        for number, spec in enumerate(specs, start=1):
            process = context.Process(
                target=_play,
                args=(cloudpickle.dumps(spec), self._store.port, number, size, threads),
                daemon=True,
            )
            with _deaf_to_interrupts():
                process.start()
            self._processes.append(process)
        self._await()
        self._line = _Line(self._store, _LEARNER, size)

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
            deadline = time.monotonic() + _TAKES_LEAVE_S
            for process in self._processes:
                process.join(timeout=max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
        self._line = None

    def _await(self) -> None:
        """Wait until all processes have their environments, or one has died over it."""
        for number, process in enumerate(self._processes):
            waited = timedelta()
            while not self._store.check([_ready(number + 1)]):
                process.join(timeout=0.05)
                waited += timedelta(seconds=0.05)
                if not process.is_alive() or waited > _COMES_UP:
                    obituary = self._obituary(number)  # of how it is before the others are closed
                    self.close()
                    raise CollectorDied(obituary)

    def _talk(self, rank: int, method: str, *parcel: Tensor) -> Any:
        assert self._line is not None
        try:
            return getattr(self._line, method)(rank, *parcel)
        except _LineCut:
            self._broken = True
            raise CollectorDied(self._obituary(rank - 1)) from None

    def _obituary(self, number: int) -> str:
        process = self._processes[number]
        process.join(timeout=5)
        code = process.exitcode
        how = "does not answer" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        if self._store.check([_reason(number + 1)]):
            how = self._store.get(_reason(number + 1)).decode()
        return f"collector {number} of {len(self._processes)} (process {process.pid}) died: {how}"


class _LineCut(Exception):  # noqa: N818 - of the other's making
    """The process at the other end is gone."""


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
        """Send bytes.

        Raises:
            _LineCut: If nobody is there.
        """
        self._pass("send", torch.tensor([len(parcel)]), rank, 0)
        self._pass("send", parcel, rank, 1)

    def take_leave(self, ranks: Iterable[int]) -> None:
        """Let the others end, without waiting: one that is gone would never answer."""
        nothing = torch.zeros(1, dtype=torch.int64)
        self._last = []
        for rank in ranks:
            with suppress(RuntimeError):  # it is gone already
                self._last.append(self._gloo.send([nothing], rank, 0))

    def receive(self, rank: int) -> Any:
        """Return what a parcel holds, ``None`` where the other one took leave.

        Raises:
            _LineCut: If nobody is there.
        """
        length = torch.zeros(1, dtype=torch.int64)
        self._pass("recv", length, rank, 0)
        parcel = torch.empty(int(length), dtype=torch.uint8)
        if len(parcel) == 0:
            return None
        self._pass("recv", parcel, rank, 1)
        return cloudpickle.loads(parcel.numpy())

    def _pass(self, method: str, x: Tensor, rank: int, tag: int) -> None:
        try:
            getattr(self._gloo, method)([x], rank, tag).wait()
        except RuntimeError:  # gloo: connection closed by peer
            raise _LineCut from None


def _wrap(thing: Any) -> Tensor:
    return torch.frombuffer(bytearray(cloudpickle.dumps(thing)), dtype=torch.uint8)


def _open_store(size: int) -> dist.TCPStore:
    """Open the place where so many processes find each other, to this machine alone."""
    listener = socket.create_server((_HOST, 0))  # a store that listens by itself does so everywhere
    port = listener.getsockname()[1]
    return dist.TCPStore(
        _HOST,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let processes that are started here never hear Ctrl-C, which is the learner's to heed."""
    resource_tracker.ensure_running()  # or the first start would begin it, and unblock all signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ready(rank: int) -> str:
    return f"ready/{rank}"


def _reason(rank: int) -> str:
    return f"reason/{rank}"


def _play(spec: bytes, port: int, rank: int, size: int, threads: int) -> None:
    """Play one group until the learner is gone: what the other processes run."""
    torch.set_num_threads(threads)
    store = dist.TCPStore(_HOST, port, size, is_master=False, timeout=_COMES_UP)
    try:
        group = Group(cloudpickle.loads(spec))
        store.set(_ready(rank), "")
        _answer(_Line(store, rank, size), group)
    except GenpolError as error:
        store.set(_reason(rank), str(error))
        os._exit(error.exit_code)
    group.close()
    os._exit(0)  # with torch loaded the interpreter takes seconds to end, and nothing is left to do


def _answer(line: _Line, group: Group) -> None:
    """Answer learned states with rollouts until the learner takes leave, or was killed."""
    try:
        while (learned := line.receive(_LEARNER)) is not None:
            batch = group.collect(learned)
            line.send(_LEARNER, _wrap((batch, group.state())))
    except _LineCut:
        return

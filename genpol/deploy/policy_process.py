"""The policy in a process of its own: what takes long, or dies, does not stop the control loop.

It loads a bundle, makes noise, remembers its last chunk, and answers one question at a time. It
needs no torch unless the bundle's format does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from genpol.deploy.bundle import Array, open_bundle
from genpol.deploy.chunks import Answer, kept_weights
from genpol.deploy.contract import Contract
from genpol.deploy.start import POLICY_PRIORITY, take_priority
from genpol.errors import GenpolError

_QUESTION = struct.Struct("<qi?")
_ANSWER = struct.Struct("<qd")
_START_S = 120.0
_END_S = 2.0
_EXIT_S = 0.02
_WARM_UP = 20
_RECENT = 20


class PolicyError(GenpolError):
    """The policy cannot be started."""


class PolicyProcess:
    """A bundle's policy in another process.

    Args:
        folder: The bundle.
        contract: Its contract.
        form: Its format that is run.
        seed: Of the noise.
        num_threads: Of the policy's arithmetic.
    """

    def __init__(
        self,
        folder: Path,
        contract: Contract,
        *,
        form: str = "onnx",
        seed: int = 0,
        num_threads: int = 1,
    ) -> None:
        self._arguments = (folder, form, seed, num_threads)
        self._shape = (contract.horizon, len(contract.action))
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._asked_s: float | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._failure = "it was not started"

    @property
    def pending(self) -> bool:
        """Whether a question has not been answered yet."""
        return self._asked_s is not None

    @property
    def waited_s(self) -> float:
        """Seconds since the question that has not been answered; 0 if there is none."""
        return 0.0 if self._asked_s is None else time.monotonic() - self._asked_s

    @property
    def slowest_s(self) -> float:
        """Seconds that the slowest of the last answers took."""
        return max(self._recent, default=0.0)

    @property
    def failure(self) -> str:
        """Why it answers no more; empty if it does."""
        return self._failure

    def start(self) -> None:
        """Load the policy and let it act a few times.

        Raises:
            PolicyError: If that fails.
        """
        self.close()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, *self._arguments), name="genpol policy", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(_START_S) and self._connection.recv_bytes()
        except (EOFError, OSError):
            ready = b"its process ended"
        if ready != b"":
            self.close()
            raise PolicyError(f"policy: {(ready or b'does not answer').decode()}")
        self._failure = ""

    def ask(self, tick: int, observation: Sequence[float], *, delay: int, anew: bool) -> None:
        """Ask for a chunk without waiting.

        Args:
            tick: The tick of the observation.
            observation: What the policy sees.
            delay: Ticks that will have passed when the answer comes.
            anew: Whether an episode begins, so that nothing is left of the chunk before.
        """
        assert self._connection is not None
        head = _QUESTION.pack(tick, delay, anew)
        self._asked_s = time.monotonic()
        try:
            self._connection.send_bytes(head + np.asarray(observation, np.float32).tobytes())
        except OSError:
            self._fail()

    def answer(self, timeout_s: float) -> Answer | None:
        """Return the chunk that was asked for; ``None`` if it does not come in time."""
        if self._connection is None or self._asked_s is None:
            return None
        try:
            if not self._connection.poll(max(0.0, timeout_s)):
                return None
            data = self._connection.recv_bytes()
        except (EOFError, OSError):
            self._fail()
            return None
        self._recent.append(time.monotonic() - self._asked_s)
        self._asked_s = None
        tick, seconds = _ANSWER.unpack_from(data)
        chunk = np.frombuffer(data, np.float32, offset=_ANSWER.size).reshape(self._shape)
        return Answer(tick, chunk.tolist(), seconds)

    def check(self) -> None:
        """Take note if the process has ended."""
        if not self._failure and self._process is not None and not self._process.is_alive():
            self._fail()

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.join(_END_S)
            if self._process.is_alive():
                self._process.kill()
                self._process.join(_END_S)
            self._process = None
        self._asked_s = None
        self._failure = "it was ended"

    def _fail(self) -> None:
        assert self._process is not None
        self._process.join(_EXIT_S)  # its pipe ends a moment before it does
        code = self._process.exitcode
        how = "" if code is None else f" ({_name_of(code)})"
        self._failure = f"the policy's process ended{how}"
        self._asked_s = None


def _name_of(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


class _Memory:
    """What is left of the last chunk when the next one is asked for."""

    def __init__(self, contract: Contract) -> None:
        self._names = [name for name in ("previous", "kept") if name in contract.inputs]
        self._horizon = contract.horizon
        self._zeros = np.zeros((contract.horizon, len(contract.action)), np.float32)
        self._chunk, self._tick = self._zeros, -contract.horizon

    def inputs(self, tick: int, delay: int, *, anew: bool) -> dict[str, Array]:
        if not self._names:
            return {}
        passed = self._horizon if anew else min(tick - self._tick, self._horizon)
        left = self._horizon - passed
        previous = np.concatenate((self._chunk[passed:], self._zeros[: self._horizon - left]))
        kept = kept_weights(self._horizon, delay=min(delay, left), left=left)
        found = {"previous": previous, "kept": np.asarray(kept, np.float32)}
        return {name: found[name][None] for name in self._names}

    def keep(self, tick: int, chunk: Array) -> None:
        self._chunk, self._tick = chunk, tick


def _work(connection: Connection, folder: Path, form: str, seed: int, num_threads: int) -> None:
    """Answer questions until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the controller to answer
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    take_priority(POLICY_PRIORITY)  # where it is refused, the control loop says so
    try:
        bundle = open_bundle(folder)
        plan = bundle.load(form, num_threads=num_threads)
        contract = bundle.contract
        noise = np.random.default_rng(seed)
        for _ in range(_WARM_UP):
            plan(_zeros(contract.inputs))
    except Exception as error:
        connection.send_bytes(" ".join(str(error).split()).encode() or b"cannot be loaded")
        return
    memory = _Memory(contract)
    connection.send_bytes(b"")
    with suppress(EOFError, OSError):
        while True:
            data = connection.recv_bytes()
            begin = time.perf_counter()
            tick, delay, anew = _QUESTION.unpack_from(data)
            inputs = {
                "observation": np.frombuffer(data, np.float32, offset=_QUESTION.size)[None],
                "noise": noise.standard_normal((1, *contract.inputs["noise"]), np.float32),
                **memory.inputs(tick, delay, anew=anew),
            }
            chunk = plan(inputs)[0]
            memory.keep(tick, chunk)
            head = _ANSWER.pack(tick, time.perf_counter() - begin)
            connection.send_bytes(head + chunk.tobytes())


def _zeros(inputs: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {name: np.zeros((1, *shape), np.float32) for name, shape in inputs.items()}

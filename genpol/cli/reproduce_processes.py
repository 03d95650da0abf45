"""Processes that `genpol` starts: their commands, and signals that reach all of them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

_POLL_S = 1.0


def train_command(overrides: Sequence[str], output: Path) -> list[str]:
    """Return the command of a new run, whose folder is made somewhere under ``output``."""
    return [*_genpol(), "train", *overrides, f"output={_quoted(output)}"]


def resume_command(run_folder: Path) -> list[str]:
    """Return the command that continues the run in ``run_folder``."""
    return [*_genpol(), "train", f"resume={run_folder}"]


def generate_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that makes a data set."""
    return [*_genpol(), "data", "generate", *arguments]


def record_command(acting: Sequence[Path], arguments: Sequence[str]) -> list[str]:
    """Return the command that records a data set of what runs or checkpoints do."""
    return [*_genpol(), "data", "record", *map(str, acting), *arguments]


def eval_command(run_folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command that evaluates the run in ``run_folder``."""
    return [*_genpol(), "eval", str(run_folder), "json=true", *arguments]


def _genpol() -> list[str]:
    return [sys.executable, "-m", "genpol.cli.main"]


def _quoted(path: Path) -> str:
    """Return a path as the override grammar reads it back, signs such as ``=`` included."""
    return '"' + str(path).replace('"', '\\"') + '"'


class Processes:
    """Processes under way, and whether more may start.

    Attributes:
        stop: Set once no more are to start.
        signalled: Set once a signal has been passed on.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.signalled = threading.Event()
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def send(self, number: int) -> None:
        """Start no more processes and pass a signal on to those under way."""
        self.stop.set()
        self.signalled.set()
        with self._lock:
            children = list(self._children)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    def call(
        self,
        command: list[str],
        *,
        output: IO[bytes] | None = None,
        errors: IO[bytes] | None = None,
        folder: Path | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> int:
        """Run a command to its end and return its exit code.

        Args:
            command: The command.
            output: Where its output goes; ``None`` for the terminal.
            errors: Where its complaints go; ``None`` for the same place.
            folder: Where it runs; ``None`` for here.
            poll: Called now and then, and once more at the end.
        """
        # In a session of its own, so that the terminal's Ctrl-C comes once, through us.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if errors is None and output is not None else errors,
            cwd=folder,
            start_new_session=True,
        )
        with self._lock:
            self._children.append(child)
        if self.signalled.is_set():  # while the process was being made
            child.send_signal(signal.SIGINT)
        while child.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_S)
            poll()
        with self._lock:
            self._children.remove(child)
        return child.returncode

    @contextlib.contextmanager
    def forwarding_signals(self, *, interrupt: int = signal.SIGINT) -> Iterator[None]:
        """Pass Ctrl-C and polite kills on to the processes for as long as the block lasts.

        Args:
            interrupt: What Ctrl-C is to them.
        """

        def forward(number: int, frame: FrameType | None) -> None:
            # A closed terminal cannot come back for a second try; to a run it is a SIGTERM.
            self.send(interrupt if number == signal.SIGINT else signal.SIGTERM)

        numbers = [
            signal.SIGINT,
            signal.SIGTERM,
            *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
        ]
        previous = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

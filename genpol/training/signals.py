"""Signals: a polite stop and a checkpoint on demand, taken at the next safe point of the loop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class SignalWatch:
    """Note signals while the ``with`` block runs, for the loop to ask after between two updates.

    SIGTERM and the first Ctrl-C ask for a stop; a second Ctrl-C raises ``KeyboardInterrupt`` at
    once; SIGUSR1 asks for a checkpoint. The handlers that were there before return at the end.
    Python delivers signals to the main thread only: in any other thread, nothing is ever asked.
    """

    def __init__(self) -> None:
        self._interrupts = 0
        self._stop_signal: str | None = None
        self._checkpoint = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """Whether a SIGTERM or a Ctrl-C has come."""
        return self._stop_signal is not None

    @property
    def stop_signal(self) -> str | None:
        """Name of the signal that asked for the stop, such as ``"SIGTERM"``."""
        return self._stop_signal

    def checkpoint_requested(self) -> bool:
        """Return whether a SIGUSR1 has come since the last call, and forget it."""
        requested, self._checkpoint = self._checkpoint, False
        return requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._install(signal.SIGTERM, self._on_terminate)
            self._install(signal.SIGINT, self._on_interrupt)
            if hasattr(signal, "SIGUSR1"):  # absent on Windows
                self._install(signal.SIGUSR1, self._on_user)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python and cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _install(self, number: signal.Signals, handler: Any) -> None:
        self._previous[number] = signal.signal(number, handler)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = self._stop_signal or "SIGTERM"

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        self._stop_signal = self._stop_signal or "SIGINT"
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _on_user(self, number: int, frame: FrameType | None) -> None:
        self._checkpoint = True

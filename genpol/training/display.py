"""The live console: a bar and a line of figures in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_RECENT_S = 15.0  # the speed is that of the last so many seconds
_REFRESH_S = 0.25  # redrawn in the caller's thread, so that no other one takes time from physics


class TerminalReport:
    """Show how a training goes while the ``with`` block runs.

    Args:
        total_steps: Environment steps at which the training ends.
        start_steps: Environment steps at which it starts; more than zero when it resumes.
        unit: What is counted.
        interval_s: Seconds between two lines when the output is no terminal.
        console: Where to write; standard output if not given.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_steps: int = 0,
        unit: str = "steps",
        interval_s: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._steps = start_steps
        self._unit = unit
        self._clock = clock
        self._console = console or Console()
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._interval_s = _REFRESH_S if self._live else interval_s
        self._shown_at: float | None = None
        self._fields: dict[str, str] = {}
        self._recent: deque[tuple[float, int]] = deque([(clock(), start_steps)])
        self._progress = Progress(
            BarColumn(bar_width=12),
            TextColumn("{task.fields[line]}", markup=False),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_steps, line="")

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._show()
        if self._live:
            self._progress.stop()

    def update(self, env_steps: int, **fields: float | str | None) -> None:
        """Tell how far the training is.

        Args:
            env_steps: Environment steps so far.
            **fields: What to show beside: by habit ``train_return``, ``eval_return`` and ``stage``.
                Underscores show as spaces, a field stays until it is given again, and ``None``
                removes it.
        """
        now = self._clock()
        self._steps = env_steps
        self._recent.append((now, env_steps))
        while len(self._recent) > 2 and now - self._recent[1][0] > _RECENT_S:
            self._recent.popleft()
        for name, value in fields.items():
            if value is None:
                self._fields.pop(name, None)
            else:
                self._fields[name] = value if isinstance(value, str) else f"{value:.4g}"
        if self._shown_at is None or now - self._shown_at >= self._interval_s:
            self._shown_at = now
            self._show()

    def message(self, text: str) -> None:
        """Write a line that stays, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @property
    def steps_per_s(self) -> float:
        """Environment steps per second over the last seconds; 0 before two updates."""
        (first_s, first_steps), (last_s, last_steps) = self._recent[0], self._recent[-1]
        elapsed_s = last_s - first_s
        return (last_steps - first_steps) / elapsed_s if elapsed_s > 0 else 0.0

    def line(self) -> str:
        """Return the line that is shown: steps, speed, fields, time left."""
        speed = self.steps_per_s
        parts = [f"{_count(self._steps)}/{_count(self._total)} {self._unit}"]
        parts += [f"{_count(speed)} {self._unit}/s"]
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in self._fields.items()]
        if speed > 0:
            parts.append(f"{_duration(max(0, self._total - self._steps) / speed)} left")
        return " | ".join(parts)

    def _show(self) -> None:
        if self._live:
            self._progress.update(self._task, completed=self._steps, line=self.line())
            self._progress.refresh()
        else:
            self.message(self.line())


def _count(number: float) -> str:
    """Return three digits and a unit: 0.35, 950, 12.3k, 1.5M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _duration(seconds: float) -> str:
    """Return minutes and seconds, or hours and minutes: 2m05s, 1h20m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"

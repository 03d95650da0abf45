"""Benchmarks of single calls: what is measured how often, the table, and the rows that are kept."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from genpol.provenance import code_version, machine

if TYPE_CHECKING:
    import numpy as np

    from genpol.report.benchmark import Contender
    from genpol.training.settings import TrainSettings

_QUANTILES = {"p50_ms": 50, "p99_ms": 99}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark whose calls are timed one by one."""

    name: str
    """Name of its results."""
    keys: Sequence[str]
    contenders: Callable[[TrainSettings], list[Contender]]
    title: Callable[[TrainSettings], str]
    defaults: Mapping[str, str]
    """Overrides where none are given."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What of it is measured, and where it is recorded."""

    arguments: Sequence[str]
    seconds: float
    rounds: int
    only: Sequence[str] = ()
    save: Path | None = None
    progress: Callable[[str], None] = field(default=lambda line: None)


def run(suite: Suite, settings: TrainSettings, request: Request) -> None:
    """Measure, print, and record if asked."""
    from genpol.report import benchmark

    chosen = [x for x in suite.contenders(settings) if not request.only or x.key in request.only]
    times, skipped = benchmark.measure_calls(
        chosen, seconds=request.seconds, rounds=request.rounds, progress=request.progress
    )
    request.progress("")
    sys.stdout.write(f"{suite.title(settings)}; milliseconds\n")
    _print(chosen, times, skipped)
    if request.save is not None:
        _save(suite.name, times, request, settings)


def _print(
    chosen: Sequence[Contender],
    times: Mapping[str, Sequence[np.ndarray]],
    skipped: Mapping[str, str],
) -> None:
    import numpy as np
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("contender", style="bold", no_wrap=True)
    for name in ("median", "p99", "greatest", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what")
    for contender in chosen:
        if contender.key in skipped:
            table.add_row(contender.key, "skipped", "", "", "", escape(skipped[contender.key]))
            continue
        ms = 1e3 * np.concatenate(times[contender.key])
        numbers = (*np.percentile(ms, list(_QUANTILES.values())), ms.max())
        table.add_row(contender.key, *(f"{x:.2f}" for x in numbers), str(len(ms)), contender.what)
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)


def _save(
    name: str,
    times: Mapping[str, Sequence[np.ndarray]],
    request: Request,
    settings: TrainSettings,
) -> None:
    """Record a row per contender, quantile and round, whose number is the seed."""
    import numpy as np

    from genpol.report import results

    assert request.save is not None
    command = shlex.join(["genpol", "bench", *request.arguments])
    commit, where = code_version(), machine()
    rows = [
        results.ResultRow(
            experiment=name,
            agent=key,
            env=settings.choices.env,
            seed=index,
            env_steps=len(seconds),
            agent_steps=len(seconds),
            gradient_steps=0,
            metric=f"{metric}/{key}",
            value=float(f"{1e3 * np.percentile(seconds, quantile):.6g}"),
            episodes=0,
            wall_clock_s=round(float(seconds.sum()), 3),
            commit=commit,
            machine=where,
            command=command,
        )
        for metric, quantile in _QUANTILES.items()
        for key, rounds in times.items()
        for index, seconds in enumerate(rounds)
    ]
    path = request.save / f"{name}.csv"
    same = (command, where)
    results.replace(path, rows, obsolete=lambda row: (row.command, row.machine) == same)
    sys.stdout.write(f"{len(rows)} rows in {path}; `genpol report {name}` draws them\n")

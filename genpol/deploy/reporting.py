"""The report of a run, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from genpol.deploy.controller import Report

_BAR = 40
_BINS_MS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def summary(report: Report) -> dict[str, Any]:
    """Return what happened, as JSON can say it; times in milliseconds."""
    return {
        "rate_hz": 1.0 / report.period_s,
        "seconds": (report.ticks + report.skipped) * report.period_s,
        "ticks": report.ticks,
        "deadlines_missed": report.late + report.skipped,
        "ticks_skipped": report.skipped,
        "ticks_without_action": report.unanswered,
        "stop_reason": report.stop_reason,
        "interventions": dict(report.interventions),
        "events": [
            {"tick": x.tick, "what": x.what, "joint": x.joint}
            | ({"asked": x.asked, "sent": x.sent} if x.asked == x.asked else {})
            for x in report.events
        ],
        "link": dict(report.link),
        "work_ms": _distribution(report.work_s),
        "jitter_ms": _distribution(report.jitter_s),
        "policy_ms": _distribution(report.answer_s),
        "observation_age_ms": _distribution(report.age_s),
        "work_histogram": _histogram(report.work_s),
    }


def of_episodes(
    returns: Sequence[float],
    lengths: Sequence[int],
    successes: Sequence[bool],
    periods: int,
    missed: int,
) -> dict[str, Any]:
    """Return what a simulation saw."""
    found: dict[str, Any] = {"episodes": len(returns), "returns": list(returns)}
    if returns:
        found |= {
            "return_mean": float(np.mean(returns)),
            "return_std": float(np.std(returns)),
            "length_mean": float(np.mean(lengths)),
        }
    if successes:
        found["success_mean"] = float(np.mean(successes))
    return found | {"periods": periods, "periods_without_command": missed}


def show(found: dict[str, Any]) -> None:
    """Print a summary."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{found['seconds']:.1f} s at {found['rate_hz']:g} Hz")
    for column in ("ms", "median", "p99", "greatest"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    for key, name in (
        ("work_ms", "from the tick to the command"),
        ("policy_ms", "of that the policy"),
        ("jitter_ms", "beginning of the tick too late by"),
        ("observation_age_ms", "age of observations"),
    ):
        values = found[key]
        if values:
            table.add_row(name, *(f"{values[x]:.2f}" for x in ("p50", "p99", "max")))
    console.print(table)
    most = max(found["work_histogram"].values(), default=0)
    for label, count in found["work_histogram"].items():
        if count:
            bar = "█" * max(1, round(_BAR * count / most))
            console.print(f"{label:>14}  {bar} {count}", highlight=False)
    console.print(
        f"{found['ticks']} ticks, {found['deadlines_missed']} deadlines missed "
        f"({found['ticks_skipped']} skipped), {found['ticks_without_action']} ticks without action"
    )
    for title, counts in (("interventions", found["interventions"]), ("link", found["link"])):
        told = ", ".join(f"{what} {count}" for what, count in counts.items() if count)
        console.print(f"{title}: {told or 'none'}", highlight=False)
    if found["stop_reason"]:
        console.print(f"STOPPED: {found['stop_reason']}", style="bold red", highlight=False)
    if "ticks_not_recorded" in found:
        console.print(f"{found['ticks_not_recorded']} ticks could not be recorded in time")
    if "simulation" in found:
        _show_episodes(console, found["simulation"])


def _show_episodes(console: Any, found: dict[str, Any]) -> None:
    if not found["episodes"]:
        console.print("simulation: no episode was completed")
        return
    success = f", success {found['success_mean']:.2f}" if "success_mean" in found else ""
    console.print(
        f"simulation: {found['episodes']} episodes, return {found['return_mean']:.1f} "
        f"(std {found['return_std']:.1f}){success}; {found['periods_without_command']} of "
        f"{found['periods']} periods without a command"
    )


def _distribution(seconds: Sequence[float]) -> dict[str, float]:
    if not len(seconds):
        return {}
    ms = 1e3 * np.asarray(seconds)
    p50, p99 = np.percentile(ms, [50, 99])
    return {"p50": float(p50), "p99": float(p99), "max": float(ms.max()), "mean": float(ms.mean())}


def _histogram(seconds: Sequence[float]) -> dict[str, int]:
    edges = [0.0, *_BINS_MS, np.inf]
    counts, _ = np.histogram(1e3 * np.asarray(seconds), edges)
    names = [f"< {_BINS_MS[0]:g} ms", *(f"{x:g} ms" for x in _BINS_MS)]
    labels = [names[0], *(f"from {name}" for name in names[1:])]
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}

"""`genpol report`: what the recorded results say, as a table and a figure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.cli.arguments import ArgumentParser
from genpol.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import pandas as pd

    from genpol.report.plan import Evaluation, Run

SUMMARY = "summarise recorded results and draw them"
USAGE = """
usage: genpol report NAME [--metric return] [--at STEPS|last] [--figure PATH]

Prints, for each agent and environment of assets/results/NAME.csv, the interquartile mean over seeds
of the last evaluation with its 95 % bootstrap interval, and draws the learning curves.

  NAME             an experiment whose results are recorded, or the path of a CSV file
  --metric M       return (default), success, return/TASK where there are several tasks, or a value
                   at risk of the experiment's further evaluations: var_5, cvar_5, var_25, cvar_25
  --at STEPS       the last evaluation at or under so many environment steps: 20e6, 20_000_000
  --budget MIN     the last evaluation at or under so many minutes of training
  --versus AGENT   also print how likely a run of each agent beats one of this agent
  --figure PATH    where the picture goes (beside the CSV; NAME.png)
  --results DIR    where the CSV is (assets/results)

examples:
  genpol report gorl-hopperstand --budget 20
  genpol report gorl-controls --at 20e6 --versus ppo
  genpol report bench-HopperStand
"""

_FEW_SEEDS = 5
_RATES = {
    "env_steps_per_s/": "environment steps per second",
    "samples_per_s/": "samples learned from per second",
    "updates_per_s/": "updates per second",
    "plans_per_s/": "plans per second",
    "p99_ms/": "milliseconds per action, the 99th of 100",
    "p50_ms/": "milliseconds per action, median",
}
_FIGURES = (".png", ".pdf", ".svg")


def run(arguments: list[str]) -> int:
    """Print the table and write the figure.

    Raises:
        ConfigError: If there are no such results, or no such metric or agent in them.
        DatasetError: If the file of results is damaged, or has no evaluation within the limits.
    """
    options = _parser().parse_args(arguments)
    from genpol.report import results

    path = Path(options.name)
    if path.suffix != ".csv":
        path = results.find(options.name, options.results)
    figure = options.figure or path.with_suffix(".png")
    if figure.suffix.lower() not in _FIGURES:
        raise ConfigError(f"--figure {figure}: must end in one of {', '.join(_FIGURES)}")
    frame = _of_plan(results.read(path), path.stem)
    try:
        if frame["metric"].str.startswith(tuple(_RATES)).any():
            _report_bench(frame, path, figure)
        else:
            _report_experiment(frame, path, figure, options)
    except OSError as error:
        raise DatasetError(f"--figure {figure}: cannot be written ({error.strerror})") from None
    sys.stdout.write(f"figure: {figure}\n")
    return 0


def _of_plan(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Keep the runs that the experiment ``name`` consists of today; say what is left out."""
    from genpol.report import experiment
    from genpol.report.results import UNFINISHED

    if name not in experiment.names():
        return frame
    chosen = experiment.load(name)
    plan: list[Run | Evaluation] = [*chosen.plan(), *chosen.plan_evaluations()]
    planned = {(item.label, item.env, item.seed, item.command) for item in plan}
    commands = frame["command"].str.removesuffix(UNFINISHED)
    keys = zip(frame["agent"], frame["env"], frame["seed"], commands, strict=True)
    kept = frame[[key in planned for key in keys]]
    if kept.empty:
        raise DatasetError(
            f"results of {name!r} hold no run of the experiment as it is now; "
            f"`genpol reproduce {name}` makes them"
        )
    if len(kept) < len(frame):
        outside = frame.drop(kept.index)[["agent", "env", "seed"]].drop_duplicates()
        _note(f"{len(outside)} runs left out that are not those of the experiment as it is now")
    commits = list(dict.fromkeys(kept["commit"]))
    if len(commits) > 1:
        _note(f"runs of {len(commits)} commits: {', '.join(commits)}")
    return kept


def _report_experiment(
    frame: pd.DataFrame, path: Path, figure: Path, options: argparse.Namespace
) -> None:
    from genpol.report import figures, results, statistics

    budget_s = None if options.budget is None else 60.0 * options.budget
    limits: dict[str, Any] = {"metric": options.metric, "at": options.at, "budget_s": budget_s}
    table = statistics.summarise(frame, **limits)
    offline = statistics.on_data(frame[frame["metric"] == options.metric])
    clock = "updates" if offline else "env steps"
    _print(f"{path.stem}: {options.metric}", *_cells(table, clock))
    _print_tasks(frame, path.stem, limits)
    if (table["seeds"] < _FEW_SEEDS).any():
        _note("intervals over fewer than 5 seeds are too narrow to be taken at their word")
    picked = statistics.scores(frame, **limits)
    unfinished = picked["command"].str.endswith(results.UNFINISHED).sum()
    if unfinished:
        _note(f"{unfinished} of {len(picked)} runs had not finished")
    if options.versus is not None:
        for agent in table["agent"].unique():
            if agent != options.versus:
                chance = statistics.probability_of_improvement(
                    frame, str(agent), options.versus, **limits
                )
                _note(f"P({agent} > {options.versus}) = {_interval(*chance, '.2f')}")
    figures.experiment_curves(frame, figure, metric=options.metric)


def _print_tasks(frame: pd.DataFrame, name: str, limits: dict[str, Any]) -> None:
    """Print the interquartile means of each task, where runs have several."""
    from genpol.report import statistics

    prefix = f"{limits['metric']}/"
    measured = frame["metric"]
    tasks = [str(x) for x in measured[measured.str.startswith(prefix)].unique()]
    if not tasks:
        return
    lines: dict[str, dict[str, str]] = {}
    for task in tasks:
        for row in statistics.summarise(frame, **{**limits, "metric": task}).to_dict("records"):
            lines.setdefault(row["agent"], {})[task] = f"{row['iqm']:.4g}"
    header = ["agent", *(task.removeprefix(prefix) for task in tasks)]
    rows = [[agent, *(found.get(task, "") for task in tasks)] for agent, found in lines.items()]
    _print(f"{name}: {limits['metric']} in each task, interquartile means", header, rows)


def _report_bench(frame: pd.DataFrame, path: Path, figure: Path) -> None:
    from genpol.report import figures

    # A table of several measurements would compare unlike settings or machines; the last counts.
    last = frame.iloc[-1]
    frame = frame[(frame["command"] == last["command"]) & (frame["machine"] == last["machine"])]
    measured = frame["metric"]
    for prefix, unit in _RATES.items():
        rates = frame[measured.str.startswith(prefix)].groupby("metric", sort=False)["value"]
        rows = [
            [
                str(metric).removeprefix(prefix),
                *(_rate(x) for x in (values.median(), values.min(), values.max())),
            ]
            for metric, values in rates
        ]
        if rows:
            _print(f"{path.stem}: {unit}", ["contender", "median", "min", "max"], rows)
    for _, row in frame[~measured.str.startswith(tuple(_RATES))].iterrows():
        _note(f"{row['metric']}: {row['value']:.3g}")
    drawn = next((prefix for prefix in _RATES if measured.str.startswith(prefix).any()), "")
    figures.bench_bars(frame, figure, prefix=drawn, unit=_RATES.get(drawn, ""))


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cells(table: pd.DataFrame, clock: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of the printed table, with what its steps are."""
    header = ["agent", "env", "seeds", clock, "IQM", "95 % interval", "mean ± std", "minutes"]
    apart = bool((table["agent_steps"] != table["env_steps"]).any())
    if apart:
        header.insert(header.index(clock) + 1, "agent steps")
    rows = [
        [
            row["agent"],
            row["env"],
            f"{row['seeds']}",
            f"{row['env_steps']:,}",
            *([f"{row['agent_steps']:,}"] if apart else []),
            f"{row['iqm']:.4g}",
            _bounds(row["low"], row["high"], ".4g"),
            f"{row['mean']:.4g}" + (f" ± {row['std']:.3g}" if row["seeds"] > 1 else ""),
            f"{row['wall_clock_s'] / 60:.1f}",
        ]
        for row in table.to_dict("records")
    ]
    return header, rows


def _bounds(low: float, high: float, style: str) -> str:
    return f"[{low:{style}}, {high:{style}}]" if low == low else "n/a"  # NaN differs from itself


def _interval(value: float, low: float, high: float, style: str) -> str:
    return f"{value:{style}} {_bounds(low, high, style)}"


def _print(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    numeric = {"seeds", "env steps", "agent steps", "updates"}
    numeric |= {"IQM", "minutes", "median", "min", "max"}
    for name in header:
        table.add_column(name, justify="right" if name in numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    _note(title)
    # In a pipe rich assumes 80 columns and would cut the table.
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def _note(line: str) -> None:
    sys.stdout.write(line + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="genpol report", add_help=False)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--metric", default="return")
    parser.add_argument("--at", type=_steps)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--versus", metavar="AGENT")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--results", type=Path)
    return parser


def _steps(text: str) -> int | None:
    if text == "last":
        return None
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps, nor 'last'") from None

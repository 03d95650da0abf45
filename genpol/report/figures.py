"""Figures of runs, experiments and benchmarks, drawn without a display and without global state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from genpol.errors import DatasetError
from genpol.report import statistics

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with any colour vision; yellow, too faint on white, is left
# out. Line styles repeat with another period, so that more agents than colours stay apart too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.titlesize": 10.0,
    "legend.frameon": False,
}
_DPI = 150


def learning_curve(evals: pd.DataFrame, path: Path) -> None:
    """Draw one run: return against steps, with the wall clock along the top.

    Steps are those of the environment; of a run on a data set alone, updates.

    The dark band is one standard deviation over the evaluation's episodes, the light one their
    range.

    Args:
        evals: The run's ``evals.csv``.
        path: The picture to write.

    Raises:
        DatasetError: If the run has not been evaluated.
    """
    if evals.empty:
        raise DatasetError("no evaluations to draw: the run has not been evaluated yet")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        offline = statistics.on_data(evals)
        steps = evals["gradient_steps" if offline else "env_steps"]
        mean, std = evals["return_mean"], evals["return_std"]
        colour = PALETTE[0]
        # A deviation reaches beyond the best episode where returns are skewed; the range does not.
        low = np.maximum(mean - std, evals["return_min"])
        high = np.minimum(mean + std, evals["return_max"])
        axes.fill_between(
            steps,
            evals["return_min"],
            evals["return_max"],
            color=colour,
            alpha=0.13,
            linewidth=0,
            label="min to max",
        )
        axes.fill_between(
            steps, low, high, color=colour, alpha=0.3, linewidth=0, label="± 1 standard deviation"
        )
        marker = "o" if len(evals) < 40 else None
        episodes = int(evals["episodes"].iloc[-1])
        axes.plot(
            steps,
            mean,
            color=colour,
            marker=marker,
            markersize=3,
            linewidth=1.8,
            label=f"mean of {episodes} episodes",
        )
        axes.set_ylabel("return per episode")
        _steps_axis(axes, "updates" if offline else "environment steps")
        _clock_axis(axes, steps.to_numpy(float), evals["wall_clock_s"].to_numpy(float))
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="best")
        _save(figure, path)


def experiment_curves(
    results: pd.DataFrame,
    path: Path,
    *,
    metric: str = "return",
    repetitions: int = statistics.REPETITIONS,
) -> None:
    """Draw an experiment: a panel for each environment, a line for each agent.

    Lines are interquartile means over seeds and bands their 95 % bootstrap intervals; an agent
    with one seed has no band. An agent has the same colour in every panel.

    Args:
        results: Rows of results.
        path: The picture to write.
        metric: Which rows to draw.
        repetitions: Bootstrap samples behind the bands.

    Raises:
        ConfigError: If there is no such metric.
    """
    curves = statistics.curves(results, metric=metric, repetitions=repetitions)
    agents = list(curves["agent"].unique())
    envs = list(curves["env"].unique())
    offline = statistics.on_data(results[results["metric"] == metric])
    clock = "updates" if offline else "environment steps"
    columns = 2 if len(envs) == 4 else min(3, len(envs))
    lines = -(-len(envs) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.2 + 3.9 * columns, 0.7 + 3.0 * lines), layout="constrained")
        for index, env in enumerate(envs):
            axes = figure.add_subplot(lines, columns, index + 1)
            _panel(axes, curves[curves["env"] == env], agents)
            _steps_axis(axes, clock)
            axes.set_title(env)
            axes.set_ylabel(_metric_label(metric))
        handles = _handles(figure, agents)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(len(handles), columns + 1),
        )
        _save(figure, path)


def bench_bars(
    results: pd.DataFrame,
    path: Path,
    *,
    prefix: str = "env_steps_per_s/",
    unit: str = "environment steps per second",
) -> None:
    """Draw a benchmark: the median rate of each contender, with its least and greatest round.

    Args:
        results: Rows of results whose metric is the prefix and a contender, one for each round.
        path: The picture to write.
        prefix: Which metric.
        unit: What it measures, in words.

    Raises:
        DatasetError: If there are no such rows.
    """
    rows = results[results["metric"].str.startswith(prefix)]
    if rows.empty:
        raise DatasetError(f"no rows with a metric {prefix}... to draw")
    rates = rows.assign(contender=rows["metric"].str.removeprefix(prefix))
    groups = rates.groupby("contender")["value"].agg(["median", "min", "max"])
    groups = groups.sort_values("median")
    places = np.arange(len(groups))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 1.0 + 0.34 * len(groups)), layout="constrained")
        axes = figure.add_subplot()
        median = groups["median"]
        whiskers = np.stack([median - groups["min"], groups["max"] - median])
        own = [str(name).startswith("genpol") for name in groups.index]
        axes.barh(
            places,
            median,
            xerr=whiskers,
            height=0.7,
            color=[PALETTE[0] if mine else "#9AA5AD" for mine in own],
            error_kw={"ecolor": "#333333", "elinewidth": 1.0, "capsize": 2.0},
        )
        for place, value, end in zip(places, median, groups["max"], strict=True):
            axes.annotate(
                f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
                (end, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(places, list(groups.index))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        if groups["max"].max() >= 1000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(0, groups["max"].max() * 1.15)
        axes.set_xlabel(f"{unit} (median of the rounds, least to greatest)")
        axes.set_title(", ".join(rows["env"].unique()))
        _save(figure, path)


def _panel(axes: Axes, curves: pd.DataFrame, agents: list[str]) -> None:
    for agent, rows in curves.groupby("agent", sort=False):
        index = agents.index(str(agent))
        colour = PALETTE[index % len(PALETTE)]
        seeds = int(rows["seeds"].iloc[0])
        axes.fill_between(
            rows["env_steps"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(
            rows["env_steps"],
            rows["iqm"],
            color=colour,
            linestyle=LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)],
            linewidth=1.8,
            # A run evaluated once is a point, which a line would not show.
            marker="o" if len(rows) == 1 else None,
            markersize=4,
            label=f"{agent} ({seeds} seed{'s' if seeds != 1 else ''})",
        )


def _handles(figure: Figure, agents: Iterable[str]) -> dict[str, Artist]:
    """Return one legend entry for each distinct label of all panels, in the agents' order."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = {agent: index for index, agent in enumerate(agents)}
    return dict(sorted(entries.items(), key=lambda entry: order[entry[0].rsplit(" (", 1)[0]]))


def _metric_label(metric: str) -> str:
    names = {"return": "return per episode", "success": "success rate"}
    return f"{names.get(metric, metric)} (IQM)"


def _steps_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)


def _clock_axis(axes: Axes, steps: np.ndarray, seconds: np.ndarray) -> None:
    """Mark the wall clock along the top, at the steps that training had reached by then."""
    if len(steps) < 2 or not (np.diff(seconds) > 0).all() or not (np.diff(steps) > 0).all():
        return
    unit, name = next(
        (unit, name)
        for unit, name in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if seconds[-1] >= 2 * unit or unit == 1.0
    )
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(
        seconds[0] / unit, seconds[-1] / unit
    )
    ticks = ticks[(ticks >= seconds[0] / unit) & (ticks <= seconds[-1] / unit)]
    top = axes.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks * unit, seconds, steps), [f"{tick:g}" for tick in ticks])
    top.set_xlabel(f"wall clock ({name})")
    top.spines["top"].set_visible(True)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(str(path), dpi=_DPI)

"""`genpol bench`: the speed of stepping, or of learning, beside that of other libraries."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.cli import (
    bench_calls,
    bench_fql,
    bench_guidance,
    bench_isaaclab,
    bench_latency,
    bench_ppo,
    bench_search,
    bench_stepping,
)
from genpol.envs import label
from genpol.errors import ConfigError, nearest
from genpol.provenance import code_version, machine, usable_cores

if TYPE_CHECKING:
    from genpol.report.benchmark import Contender, Measurements
    from genpol.report.results import ResultRow
    from genpol.training.settings import TrainSettings

SUMMARY = "measure the speed of stepping and learning beside other libraries"
USAGE = """
usage: genpol bench env=NAME [num_envs=1024] [key=value ...] [options]
       genpol bench agent=ppo|fql|qgf|bc|mbdpo [env=NAME] [key=value ...] [--learning] [options]

Measures the environment alone, with the policy, under torchrl's Collector and with learning, beside
a bare C loop over mj_step, EnvPool, gymnasium's AsyncVectorEnv and torchrl's ParallelEnv.

Isaac Lab's tasks (env=isaaclab env.task=cartpole) are measured beside Isaac Lab's own environment,
rsl_rl's PPO and Isaac Lab's torchrl trainer, all on one simulation.

With --learning, which these agents without env= imply, measures
  agent=ppo   PPO beside stable-baselines3 and one-file PPO in cleanrl's style: updates alone in
              samples/s, and collection and updates together in environment steps/s; network,
              rollout, passes, minibatches and cores are the same for all
  agent=fql   updates of FQL beside a plain torch loop and a jitted JAX update
  agent=qgf   what guidance costs in acting, beside best of N
  agent=bc    milliseconds from an observation to an action: exported (ONNX, AOTInductor,
              TorchScript), as trained, and in a loop over diffusers' scheduler; --save writes
              bench-latency.csv
  agent=mbdpo or agent=tdmpc2
              milliseconds of a search for one action: reverse diffusion and MPPI of several sizes,
              as they are and compiled, and the score network by itself; --save writes
              bench-search.csv

All take turns in every round, so that the ratios hold on a machine whose speed drifts.

  key=value       settings as for `genpol train`: agent=ppo, env.num_threads=1, ...
  --learning      measure learning instead of stepping
  --seconds S     least time per contender and round (0.5)
  --rounds N      rounds (12)
  --only KEYS     only these contenders, with commas between
  --save          write the rows to assets/results/bench-ENV.csv, bench-ppo-ENV.csv, ...
  --results DIR   where --save writes

seconds=S and rounds=N are understood too.

examples:
  genpol bench env=HopperStand num_envs=1024 --save
  genpol bench env=CheetahRun agent=ppo --only genpol-env,mj_step,envpool rounds=3
  genpol bench agent=ppo --save
  genpol bench agent=qgf num_envs=50
  genpol bench env=isaaclab env.task=cartpole agent=ppo num_envs=1024
  genpol bench env=Walker2d-v5 --learning num_envs=64 agent.epochs=10
"""


@dataclass(frozen=True, kw_only=True)
class _Suite:
    """A benchmark."""

    prefix: str
    """Of the results' name."""
    keys: Sequence[str]
    contenders: Callable[[TrainSettings], list[Contender]]
    ratios: Sequence[tuple[str, str, str, str]]
    """Which to print: (first, second, name, wanted)."""
    metric: Callable[[str], str]
    """What is measured of a contender."""
    baseline: Callable[[str], str]
    """Whom the table compares a contender with."""
    baseline_name: str
    title: Callable[[TrainSettings], str] = lambda settings: "environment steps/s"
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Overrides where none are given."""
    place: Callable[[TrainSettings], str] = lambda settings: str(settings.choices.env)
    """The environment in the results."""
    counts: str = "env_steps"
    """Column of the results that says how much work a round was."""


_STEPPING = _Suite(
    prefix="bench",
    keys=bench_stepping.KEYS,
    contenders=bench_stepping.contenders,
    ratios=bench_stepping.RATIOS,
    metric=lambda key: f"env_steps_per_s/{key}",
    baseline=lambda key: "mj_step",
    baseline_name="mj_step",
)
_ISAACLAB = _Suite(
    prefix="bench",
    keys=bench_isaaclab.KEYS,
    contenders=bench_isaaclab.contenders,
    ratios=bench_isaaclab.RATIOS,
    metric=lambda key: f"env_steps_per_s/{key}",
    baseline=lambda key: "isaaclab-env",
    baseline_name="isaaclab-env",
    place=lambda settings: label(settings.env),
)
# By the agent that is measured.
_LEARNING = {
    "ppo": _Suite(
        prefix="bench-ppo",
        keys=bench_ppo.KEYS,
        contenders=bench_ppo.contenders,
        ratios=bench_ppo.RATIOS,
        metric=bench_ppo.metric,
        baseline=bench_ppo.baseline,
        baseline_name="SB3",
        title=bench_ppo.title,
        defaults=bench_ppo.DEFAULTS,
    ),
    "fql": _Suite(
        prefix="bench-fql",
        keys=bench_fql.KEYS,
        contenders=bench_fql.contenders,
        ratios=bench_fql.RATIOS,
        metric=lambda key: f"updates_per_s/{key}",
        baseline=bench_fql.baseline,
        baseline_name="torch",
        title=bench_fql.title,
        defaults=bench_fql.DEFAULTS,
        counts="gradient_steps",
    ),
    "qgf": _Suite(
        prefix="bench-guidance",
        keys=bench_guidance.KEYS,
        contenders=bench_guidance.contenders,
        ratios=bench_guidance.RATIOS,
        metric=lambda key: f"plans_per_s/{key}",
        baseline=lambda key: bench_guidance.BASELINE,
        baseline_name=bench_guidance.BASELINE,
        title=bench_guidance.title,
        defaults=bench_guidance.DEFAULTS,
    ),
}


# Of single calls, by the agent.
_CALLS = {
    "bc": bench_latency.SUITE,
    "mbdpo": bench_search.SUITE,
    "tdmpc2": bench_search.SUITE,
}
_DEFAULTS = {name: suite.defaults for name, suite in _LEARNING.items()} | {
    name: suite.defaults for name, suite in _CALLS.items()
}


def run(arguments: list[str]) -> int:
    """Measure, print the table, and with ``--save`` record it.

    Raises:
        ConfigError: If an argument is wrong.
    """
    options = _parse(arguments)
    if options.learning in _CALLS:
        return _run_calls(_CALLS[options.learning], options)
    stepping = _ISAACLAB if "env=isaaclab" in options.overrides else _STEPPING
    suite = _LEARNING[options.learning] if options.learning else stepping
    _check_names(options.only, suite.keys)
    import torch

    from genpol.cli.configuration import compose, to_settings
    from genpol.report import benchmark

    config = compose(options.overrides)
    given = [override.partition("=")[0] for override in options.overrides]
    if "action_repeat" in config.env and "env.action_repeat" not in given:
        config.env.action_repeat = 1  # others pay for observation and reward at every control step
    settings = to_settings(config)
    torch.set_num_threads(settings.num_threads or usable_cores())
    chosen = [x for x in suite.contenders(settings) if not options.only or x.key in options.only]
    found = benchmark.measure(
        chosen, seconds=options.seconds, rounds=options.rounds, progress=_progress
    )
    _progress("")
    _print(suite, chosen, found, settings)
    if options.save:
        _save(suite, found, options, settings)
    return 0


def _run_calls(suite: bench_calls.Suite, options: _Options) -> int:
    _check_names(options.only, suite.keys)
    import torch

    from genpol.cli.configuration import compose, to_settings
    from genpol.report import results

    settings = to_settings(compose(options.overrides))
    torch.set_num_threads(settings.num_threads or usable_cores())
    request = bench_calls.Request(
        arguments=options.arguments,
        seconds=options.seconds,
        rounds=options.rounds,
        only=options.only,
        save=(options.results or results.results_folder()) if options.save else None,
        progress=_progress,
    )
    bench_calls.run(suite, settings, request)
    return 0


def _print(
    suite: _Suite, chosen: Sequence[Contender], found: Measurements, settings: TrainSettings
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    title = (
        f"{suite.place(settings)}, {settings.num_envs} environments, {usable_cores()} cores: "
        f"{suite.title(settings)}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("contender", style="bold", no_wrap=True)
    for name in ("per second", "min", "max", f"/ {suite.baseline_name}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what")
    for contender in chosen:
        if contender.key in found.skipped:
            reason = escape(found.skipped[contender.key])  # which may name an [extra]
            table.add_row(contender.key, "skipped", "", "", "", reason)
            continue
        rates = found.rates(contender.key)
        numbers = (_median(rates), rates.min(), rates.max())
        ratio = found.ratio(contender.key, suite.baseline(contender.key))
        relative = "" if ratio is None else f"{ratio:.2f}"
        cells = [f"{number:,.0f}" if number >= 100 else f"{number:.3g}" for number in numbers]
        table.add_row(contender.key, *cells, relative, contender.what)
    sys.stdout.write(title + "\n")
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    for first, second, name, wanted in suite.ratios:
        ratio = found.ratio(first, second)
        if ratio is not None:
            sys.stdout.write(f"{name}: {ratio:.2f}{f' (wanted {wanted})' if wanted else ''}\n")
    overhead = _overhead_percent(found)
    if overhead is not None:
        sys.stdout.write(
            f"Collector over the hand-written loop: {overhead:+.1f} % (wanted <= 10)\n"
        )


def _median(rates: Any) -> float:
    import numpy as np

    return float(np.median(rates))


def _overhead_percent(found: Measurements) -> float | None:
    """Return how much more time a step takes under the Collector than by hand."""
    ratio = found.ratio(
        *bench_stepping.COLLECTOR
    )  # of rates, so of the seconds the other way round
    return None if ratio is None else 100 * (ratio - 1)


def _save(suite: _Suite, found: Measurements, options: _Options, settings: TrainSettings) -> None:
    """Record the measurement; an earlier one by the same command on this machine is replaced."""
    from genpol.report import results

    rows = _rows(suite, found, options, settings)
    folder = results.results_folder() if options.results is None else options.results
    path = folder / f"{rows[0].experiment}.csv"
    same = (rows[0].command, rows[0].machine)
    results.replace(path, rows, obsolete=lambda row: (row.command, row.machine) == same)
    sys.stdout.write(f"{len(rows)} rows in {path}; `genpol report {path.stem}` draws them\n")


def _rows(
    suite: _Suite, found: Measurements, options: _Options, settings: TrainSettings
) -> list[ResultRow]:
    """Return a row per contender and round (its number as the seed), then one per ratio."""
    from genpol.report import results

    commit, where = code_version(), machine()
    command = shlex.join(["genpol", "bench", *options.arguments])

    def row(contender: str, metric: str, value: float, **measured: Any) -> ResultRow:
        values: dict[str, Any] = {"seed": 0, "env_steps": 0, "gradient_steps": 0}
        values |= {"wall_clock_s": 0.0, **measured}
        values["agent_steps"] = values["env_steps"] // getattr(settings.env, "action_repeat", 1)
        return results.ResultRow(
            experiment=f"{suite.prefix}-{suite.place(settings)}",
            agent=contender,
            env=suite.place(settings),
            metric=metric,
            value=float(f"{value:.6g}"),
            episodes=0,
            commit=commit,
            machine=where,
            command=command,
            **values,
        )

    rows = [
        row(
            key,
            suite.metric(key),
            sample.rate,
            seed=index,
            **{suite.counts: sample.work},
            wall_clock_s=round(sample.seconds, 3),
        )
        for key, samples in found.samples.items()
        for index, sample in enumerate(samples)
    ]
    for first, second, *_ in suite.ratios:
        ratio = found.ratio(first, second)
        if ratio is not None:
            rows.append(row(first, f"ratio/{first}:{second}", ratio))
    overhead = _overhead_percent(found)
    if overhead is not None:
        rows.append(row(bench_stepping.COLLECTOR[1], "overhead_percent/collector", overhead))
    return rows


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{line}")
        sys.stderr.flush()


@dataclass(kw_only=True)
class _Options:
    """The command line, taken apart."""

    arguments: list[str]
    overrides: list[str] = field(default_factory=list)
    seconds: float = 0.5
    rounds: int = 12
    only: list[str] = field(default_factory=list)
    learning: str = ""
    """The agent whose learning is measured, if it is not stepping."""
    save: bool = False
    results: Path | None = None


def _parse(arguments: list[str]) -> _Options:
    """Separate the options, written ``--name value`` or ``name=value``, from the overrides."""
    options = _Options(arguments=[x for x in arguments if x != "--save"])
    known = {"--seconds", "--rounds", "--only", "--results"}
    flags = {"--save", "--learning"}
    rest, learning = list(arguments), False
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        option = f"--{name}" if name in ("seconds", "rounds") else name
        if option == "--save" and not equals:
            options.save = True
        elif option == "--learning" and not equals:
            learning = True
        elif option in known:
            if not equals and not rest:
                raise ConfigError(f"{option} needs a value; see `genpol bench --help`")
            _set(options, option, value if equals else rest.pop(0))
        elif option.startswith("--"):
            raise ConfigError(f"unknown option {option!r}.{nearest(option, flags | known)}")
        else:
            options.overrides.append(name + equals + value)
    agent = next((x[6:] for x in options.overrides if x.startswith("agent=")), "")
    alone = agent in _DEFAULTS and not any(x.startswith("env=") for x in options.overrides)
    if learning or alone:
        options.learning = agent or "ppo"
        options.overrides = complete(options.overrides, options.learning)
    return options


def complete(overrides: Sequence[str], agent: str) -> list[str]:
    """Return the overrides, with those that are missing to measure the learning of an agent.

    Raises:
        ConfigError: If it is an agent whose learning is compared with nothing.
    """
    if agent not in _DEFAULTS:
        raise ConfigError(
            f"agent={agent}: --learning measures {', '.join(_DEFAULTS)}; set one of them, or leave "
            "--learning out to measure stepping"
        )
    given = {text.partition("=")[0] for text in overrides}
    defaults = {"agent": agent, **_DEFAULTS[agent]}
    missing = [f"{key}={value}" for key, value in defaults.items() if key not in given]
    return [*overrides, *missing]


def _set(options: _Options, option: str, text: str) -> None:
    try:
        if option == "--seconds":
            options.seconds = float(text)
        elif option == "--rounds":
            options.rounds = int(text)
        elif option == "--only":
            options.only = text.split(",")
        else:
            options.results = Path(text)
    except ValueError:
        raise ConfigError(f"{option} {text}: must be a number") from None
    if not options.seconds > 0 or options.rounds < 1:
        raise ConfigError(f"{option} {text}: must be > 0")


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"unknown contender {name!r}.{nearest(name, known)} There are {', '.join(known)}"
            )

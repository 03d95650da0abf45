"""`genpol bench`: environment steps per second, beside other ways of stepping the same task."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from genpol.errors import ConfigError, nearest
from genpol.provenance import code_version, machine, usable_cores

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

    from genpol.agent import Agent
    from genpol.report.benchmark import Chunk, Contender, Measurements
    from genpol.report.results import ResultRow
    from genpol.training.settings import TrainSettings

SUMMARY = "measure environment steps per second beside other libraries"
USAGE = """
usage: genpol bench env=NAME [num_envs=1024] [key=value ...] [options]

Measures the environment alone, with the policy, under torchrl's Collector and with learning, beside
a bare C loop over mj_step, EnvPool, gymnasium's AsyncVectorEnv and torchrl's ParallelEnv. All take
turns in every round, so that the ratios hold on a machine whose speed drifts.

  key=value       settings as for `genpol train`: agent=ppo, env.num_threads=1, ...
  --seconds S     least time per contender and round (0.5)
  --rounds N      rounds (12)
  --only KEYS     only these contenders, with commas between
  --save          write the rows to assets/results/bench-ENV.csv
  --results DIR   where --save writes

seconds=S and rounds=N are understood too.

examples:
  genpol bench env=HopperStand num_envs=1024 --save
  genpol bench env=CheetahRun agent=ppo --only genpol-env,mj_step,envpool rounds=3
"""

_ROLLOUT_STEPS = 32
_BARE_ENVS = 64
_METRIC = "env_steps_per_s"
# What is asked of the library: (first, second, name, wanted).
_RATIOS = (
    ("genpol-env", "mj_step", "environment / bare mj_step loop", ">= 0.9"),
    ("genpol-env", "envpool", "environment / EnvPool", ">= 1.1"),
)
_COLLECTOR = ("genpol-policy", "genpol-collector")


def run(arguments: list[str]) -> int:
    """Measure, print the table, and with ``--save`` record it.

    Raises:
        ConfigError: If an argument is wrong.
    """
    options = _parse(arguments)
    _check_names(options.only)
    import torch

    from genpol.cli.configuration import compose, to_settings
    from genpol.report import benchmark

    config = compose(options.overrides)
    given = [override.partition("=")[0] for override in options.overrides]
    if "action_repeat" in config.env and "env.action_repeat" not in given:
        config.env.action_repeat = 1  # others pay for observation and reward at every control step
    settings = to_settings(config)
    torch.set_num_threads(settings.num_threads or usable_cores())
    chosen = [x for x in contenders(settings) if not options.only or x.key in options.only]
    found = benchmark.measure(
        chosen, seconds=options.seconds, rounds=options.rounds, progress=_progress
    )
    _progress("")
    _print(chosen, found, settings)
    if options.save:
        _save(found, options, settings)
    return 0


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders for one configuration."""
    from genpol.report import benchmark

    num_threads = getattr(settings.env, "num_threads", 0) or usable_cores()
    physics, environment, *rest = _own(settings)
    bare_loop = benchmark.Contender(
        key="mj_step",
        what=f"bare C loop over mj_step, {num_threads} threads",
        build=partial(_bare_loop, settings, num_threads),
    )
    envpool, *pools = benchmark.yardsticks(_reference(settings), settings.num_envs, num_threads)
    # Those that are compared stand side by side: a machine drifts within one round, too.
    return [physics, environment, bare_loop, envpool, *rest, *pools]


def _own(settings: TrainSettings) -> list[Contender]:
    from genpol.report.benchmark import Contender

    agent = settings.choices.agent
    table: list[tuple[str, str, Callable[[TrainSettings, ExitStack], Chunk]]] = [
        ("genpol-physics", "physics alone: no observation, reward or reset", _physics),
        ("genpol-env", "environment with resets, random actions", _environment),
        ("genpol-policy", f"with {agent}'s policy, hand-written loop", _hand_loop),
        ("genpol-collector", f"with {agent}'s policy, torchrl Collector", _collector),
        ("genpol-learning", f"with {agent}'s updates", _learning),
    ]
    return [
        Contender(key=key, what=what, build=partial(build, settings)) for key, what, build in table
    ]


def _make_env(settings: TrainSettings, cleanup: ExitStack, num_envs: int | None = None) -> EnvBase:
    env: EnvBase = importlib.import_module("genpol.envs").make(
        settings.env,
        num_envs=settings.num_envs if num_envs is None else num_envs,
        device="cpu",
        seed=settings.seed,
    )
    cleanup.callback(env.close, raise_if_closed=False)
    return env


def _make_agent(settings: TrainSettings, env: EnvBase) -> Agent:
    from genpol.agent import Specs

    agent: Agent = importlib.import_module("genpol.agents").make(
        settings.choices.agent,
        settings.agent,
        Specs.from_env(env, num_envs=settings.num_envs),
        device=settings.device,
        seed=settings.seed,
    )
    make_decoder = getattr(agent, "make_decoder", None)
    if make_decoder is not None:  # as in all stages of GoRL but the first
        agent.policy.decoder = make_decoder().requires_grad_(False)
    return agent


def _environment(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    from genpol.report import benchmark

    env = _make_env(settings, cleanup)
    return benchmark.stepping(env, _action_repeat(env))


def _native(settings: TrainSettings, cleanup: ExitStack, num_envs: int | None = None) -> Any:
    """Return a native environment in mid-motion."""
    from genpol.report import benchmark

    env = _make_env(settings, cleanup, num_envs)
    if not hasattr(env, "sim"):
        raise benchmark.SkippedError("only for the native MuJoCo tasks")
    benchmark.stepping(env)
    return env


def _physics(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    env = _native(settings, cleanup)
    actions = [env.full_action_spec.rand()["action"].double() for _ in range(16)]
    index = 0

    def chunk() -> int:
        nonlocal index
        env.task.before_step(env.sim, actions[index % len(actions)])
        env.sim.step(env.task.num_substeps, env.task.stage)
        index += 1
        return settings.num_envs

    return chunk


def _bare_loop(settings: TrainSettings, num_threads: int, cleanup: ExitStack) -> Chunk:
    from genpol.report import benchmark

    env = _native(settings, cleanup, _BARE_ENVS)
    states = tuple(x.numpy().copy() for x in (env.sim.qpos, env.sim.qvel, env.sim.act))
    assert len(states) == 3
    return benchmark.bare_loop(env.task.model, states, env.task.num_substeps, num_threads, cleanup)


def _hand_loop(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    """Return rollouts as one would write them by hand, into storage made once."""
    import torch
    from torchrl.envs import ExplorationType, set_exploration_type

    env = _make_env(settings, cleanup)
    policy = _make_agent(settings, env).policy
    data = env.reset()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        first, _ = env.step_and_maybe_reset(policy(data.clone()))
    storage = first.unsqueeze(1).expand(settings.num_envs, _ROLLOUT_STEPS).clone()
    columns = storage.unbind(1)

    def chunk() -> int:
        nonlocal data
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            for column in columns:
                step, data = env.step_and_maybe_reset(policy(data))
                column.update_(step)
        return storage.numel() * _action_repeat(env)

    return _burnt_in(chunk)


def _collector(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    env = _make_env(settings, cleanup)
    frames = _ROLLOUT_STEPS * settings.num_envs
    batches = _batches(env, _make_agent(settings, env), frames, cleanup)
    return _burnt_in(lambda: int(next(batches).numel()) * _action_repeat(env))


def _learning(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    env = _make_env(settings, cleanup)
    agent = _make_agent(settings, env)
    batches = _batches(env, agent, agent.frames_per_batch, cleanup)

    def chunk() -> int:
        batch = next(batches)
        agent.update(batch)
        return int(batch.numel()) * _action_repeat(env)

    chunk()
    return chunk


def _action_repeat(env: EnvBase) -> int:
    """Return the control steps that one step of the environment makes."""
    return int(cast(Any, env).action_repeat)


def _batches(env: EnvBase, agent: Agent, frames: int, cleanup: ExitStack) -> Any:
    """Collect as the training loop does."""
    from genpol.training.collection import make_collector

    collector = make_collector(env, agent.policy, frames)
    cleanup.callback(collector.shutdown, close_env=False)
    return iter(collector)


def _burnt_in(chunk: Chunk) -> Chunk:
    from genpol.report.benchmark import BURN_IN

    for _ in range(-(-BURN_IN // _ROLLOUT_STEPS)):
        chunk()
    return chunk


def _reference(settings: TrainSettings) -> Any:
    """Return the task's original: of native tasks by name, of others as configured."""
    from genpol.report import benchmark

    env = settings.env
    if hasattr(env, "id"):
        return benchmark.Reference(id=env.id)
    if hasattr(env, "domain"):
        return benchmark.Reference(domain=env.domain, task=env.task)
    return benchmark.reference(env.name)


def _print(chosen: Sequence[Contender], found: Measurements, settings: TrainSettings) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{settings.choices.env}, {settings.num_envs} environments, {usable_cores()} cores"
    table = Table(box=None, pad_edge=False)
    table.add_column("contender", style="bold", no_wrap=True)
    for name in ("steps/s", "min", "max", "/ mj_step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what")
    for contender in chosen:
        if contender.key in found.skipped:
            table.add_row(contender.key, "skipped", "", "", "", found.skipped[contender.key])
            continue
        rates = found.rates(contender.key)
        numbers = (_median(rates), rates.min(), rates.max())
        ratio = found.ratio(contender.key, "mj_step")
        relative = "" if ratio is None else f"{ratio:.2f}"
        cells = [f"{number:,.0f}" for number in numbers]
        table.add_row(contender.key, *cells, relative, contender.what)
    sys.stdout.write(title + "\n")
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)
    for first, second, name, wanted in _RATIOS:
        ratio = found.ratio(first, second)
        if ratio is not None:
            sys.stdout.write(f"{name}: {ratio:.2f} (wanted {wanted})\n")
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
    ratio = found.ratio(*_COLLECTOR)  # of rates, so of the seconds the other way round
    return None if ratio is None else 100 * (ratio - 1)


def _save(found: Measurements, options: _Options, settings: TrainSettings) -> None:
    """Record the measurement; an earlier one by the same command on this machine is replaced."""
    from genpol.report import results

    rows = _rows(found, options, settings)
    folder = results.results_folder() if options.results is None else options.results
    path = folder / f"{rows[0].experiment}.csv"
    same = (rows[0].command, rows[0].machine)
    results.replace(path, rows, obsolete=lambda row: (row.command, row.machine) == same)
    sys.stdout.write(f"{len(rows)} rows in {path}; `genpol report {path.stem}` draws them\n")


def _rows(found: Measurements, options: _Options, settings: TrainSettings) -> list[ResultRow]:
    """Return a row per contender and round (its number as the seed), then one per ratio."""
    from genpol.report import results

    commit, where = code_version(), machine()
    command = shlex.join(["genpol", "bench", *options.arguments])

    def row(contender: str, metric: str, value: float, **measured: Any) -> ResultRow:
        values: dict[str, Any] = {"seed": 0, "env_steps": 0, "wall_clock_s": 0.0} | measured
        return results.ResultRow(
            experiment=f"bench-{settings.choices.env}",
            agent=contender,
            env=settings.choices.env,
            gradient_steps=0,
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
            f"{_METRIC}/{key}",
            sample.rate,
            seed=index,
            env_steps=sample.env_steps,
            wall_clock_s=round(sample.seconds, 3),
        )
        for key, samples in found.samples.items()
        for index, sample in enumerate(samples)
    ]
    for first, second, *_ in _RATIOS:
        ratio = found.ratio(first, second)
        if ratio is not None:
            rows.append(row(first, f"ratio/{first}:{second}", ratio))
    overhead = _overhead_percent(found)
    if overhead is not None:
        rows.append(row(_COLLECTOR[1], "overhead_percent/collector", overhead))
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
    save: bool = False
    results: Path | None = None


def _parse(arguments: list[str]) -> _Options:
    """Separate the options, written ``--name value`` or ``name=value``, from the overrides."""
    options = _Options(arguments=[x for x in arguments if x != "--save"])
    known = {"--seconds", "--rounds", "--only", "--results"}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        option = f"--{name}" if name in ("seconds", "rounds") else name
        if option == "--save" and not equals:
            options.save = True
        elif option in known:
            if not equals and not rest:
                raise ConfigError(f"{option} needs a value; see `genpol bench --help`")
            _set(options, option, value if equals else rest.pop(0))
        elif option.startswith("--"):
            raise ConfigError(f"unknown option {option!r}.{nearest(option, {*known, '--save'})}")
        else:
            options.overrides.append(name + equals + value)
    return options


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


def _check_names(names: Sequence[str]) -> None:
    known = (
        *("genpol-physics", "genpol-env", "genpol-policy", "genpol-collector", "genpol-learning"),
        *("mj_step", "envpool", "gymnasium-async-8", "torchrl-parallel-2", "torchrl-parallel-8"),
    )
    for name in names:
        if name not in known:
            raise ConfigError(
                f"unknown contender {name!r}.{nearest(name, known)} There are {', '.join(known)}"
            )

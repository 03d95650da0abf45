"""`genpol data record`: let trained policies act, and keep what they did as a data set."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol import __version__
from genpol.cli.data import interrupted, whole_number
from genpol.errors import ConfigError, GenpolError, nearest
from genpol.settings import at_least

if TYPE_CHECKING:
    import numpy as np

    from genpol.cli.runs import TrainedRun
    from genpol.data.staging import Staging
    from genpol.data.store import DatasetWriter

USAGE = """
usage: genpol data record RUN [RUN ...] output=<data set> [episodes=100] [format=minari]
                          [stochastic=true] [seed=30000] [env=<name>] [key=value ...]

Lets the policy of each RUN (its last checkpoint, or the one named) act for so many episodes in the
run's own environment, and writes all of them as one data set: a run that has learnt makes an expert
set, an early checkpoint a medium one, several checkpoints of one run a replay, and different runs a
mix.

  episodes     of each RUN
  format       minari (default; output must be named NAME-v0), genpol or ogbench
  stochastic   explore, as in training, or take the policy's mode
  seed         of start states and actions; other than those of training and evaluation
  env          need not be given: it is the run's, and another one is refused
  key=value    other settings of the run, such as env.action_repeat=1 or num_envs=8

A run keeps its last three checkpoints. To have early ones, train with, say,
checkpoint.interval_steps=500000 checkpoint.keep=1000, which keeps up to a thousand; there is no
value for all of them. Take as medium one whose return in evals.csv is about half the last.

Ctrl-C keeps the finished episodes, and the same command goes on where it stopped. No episode is
recorded twice, and on the CPU the result is what it had been without the stop.

examples:
  genpol data record runs/HopperStand/gorl/20261122-101500-s0 output=data/hopper-expert-v0
  genpol data record RUN/checkpoints/step-000002000000 output=data/hopper-medium-v0
  genpol data record RUN/checkpoints/step-000002000000 RUN output=data/hopper-mix-v0
"""

_OPTIONS = ("output", "episodes", "format", "stochastic", "seed", "env")
_OF_RUNS = ("num_envs", "device", "num_threads")
_STORE = "episodes"
# Episodes that run, and are held in memory, at once.
_ROUND = 64


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is to be recorded.

    Attributes:
        paths: Runs or checkpoints.
        output: The data set to make.
        format: Its format.
        episodes: Episodes of each run.
        seed: Seed of all of them.
        stochastic: Whether the policies explore.
        env: The environment they are said to act in.
        overrides: Settings of the runs to change.
    """

    paths: tuple[Path, ...]
    output: Path
    format: str
    episodes: int
    seed: int
    stochastic: bool
    env: str | None
    overrides: tuple[str, ...]

    @property
    def total(self) -> int:
        """Episodes of all runs."""
        return self.episodes * len(self.paths)


def run(arguments: list[str]) -> int:
    """Record a data set; return 0, or 130 or 143 if a signal stopped it.

    Raises:
        ConfigError: If an argument is wrong, or an interrupted recording was another one.
        CheckpointError: If a run has no sound checkpoint.
        DatasetError: If the data set exists, is being made, or cannot be written.
        EnvironmentFault: If an environment or a worker fails.
        MissingExtraError: If the format's package is not installed.
    """
    request = _parse(arguments)
    from genpol.data import formats
    from genpol.data.staging import Staging

    formats.check_target(request.output, request.format)
    from genpol.cli.runs import load_run

    runs = [load_run(path, request.overrides) for path in request.paths]
    _check_environments(request, runs)
    staging = Staging(request.output)
    try:
        staging.claim(_recipe(request, runs))
        return _run(_Recording(request, runs, staging))
    finally:
        staging.release()


def _run(recording: _Recording) -> int:
    from genpol.training.signals import SignalWatch

    with SignalWatch() as signals:

        def heed_signals() -> None:
            if signals.stop_requested:
                raise _Stopped

        with suppress(_Stopped, KeyboardInterrupt):  # a second Ctrl-C, which does not wait
            recording.run(on_step=heed_signals)
            transitions = recording.finish()
            request = recording.request
            sys.stdout.write(
                f"{request.output}: {request.total} episodes, {transitions:,} transitions\n"
            )
            return 0
    return interrupted(
        signals.stop_signal, recording.kept, recording.request.total, recording.staging.folder
    )


class _Stopped(Exception):  # noqa: N818 - a stop, not an error
    """A signal asks the recording to stop."""


class _Recording:
    """A recording under way, or taken up again.

    Its episodes are numbered: those of the first run come first. A round of them, one from each
    environment, depends on nothing but the seed, the run's place and its own number. So where a
    recording stopped within a round, that round runs again, and what is kept of it is left out.

    Attributes:
        request: What is to be recorded.
        staging: Where the episodes are kept until the end.
        kept: How many there are.
    """

    def __init__(self, request: _Request, runs: Sequence[TrainedRun], staging: Staging) -> None:
        self.request = request
        self.staging = staging
        self.kept = 0
        self._runs = runs
        self._store = staging.folder / _STORE

    def run(self, on_step: Callable[[], None]) -> None:
        """Record what is missing.

        Args:
            on_step: Called after every step; an exception that it raises ends the recording.
        """
        from genpol.data.store import DatasetWriter

        if self._store.exists():  # only the last move was interrupted
            self.kept = self.request.total
            return
        writer = DatasetWriter.resume(self._store, metadata=_metadata(self.request, self._runs))
        try:
            self.kept = writer.num_trajectories
            self._append(writer, on_step)
            writer.finish()
        except GenpolError as error:
            if self.kept == 0:
                raise
            raise type(error)(
                f"{error}; {self.kept} of {self.request.total} episodes are kept, and the same "
                "command goes on"
            ) from error
        finally:
            writer.close()
            if self.kept == 0:  # nothing to go on with, nor to keep other commands from
                self.staging.discard()

    def _append(self, writer: DatasetWriter, on_step: Callable[[], None]) -> None:
        from genpol.training.display import TerminalReport

        total = self.request.total
        if self.kept > 0:
            sys.stdout.write(f"going on after {self.kept} of {total} episodes\n")
        episodes = _episodes(self.request, self._runs, self.kept, on_step)
        with (
            closing(episodes),
            TerminalReport(total, start_steps=self.kept, unit="episodes") as report,
        ):
            for trajectory in episodes:
                writer.append_trajectory(trajectory)
                self.kept = writer.num_trajectories
                report.update(self.kept)

    def finish(self) -> int:
        """Put the data set in its place and return its number of transitions."""
        from genpol.data import formats
        from genpol.data.store import open_store

        transitions = open_store(self._store).num_transitions
        formats.place(self._store, self.staging, self.request.format)
        return transitions


def _episodes(
    request: _Request, runs: Sequence[TrainedRun], first: int, on_step: Callable[[], None]
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yield the episodes of all runs from number ``first`` on."""
    for place, trained in enumerate(runs):
        begin = max(0, first - place * request.episodes)
        if begin < request.episodes:
            yield from _episodes_of_run(request, place, trained, begin, on_step)


def _episodes_of_run(
    request: _Request, place: int, trained: TrainedRun, first: int, on_step: Callable[[], None]
) -> Generator[dict[str, np.ndarray], None, None]:
    from genpol.seeding import derive
    from genpol.training.evaluation import trajectories

    num_envs = _round(request, trained)
    env = trained.make_env(num_envs=num_envs, seed=request.seed)
    try:
        for begin in range(first // num_envs * num_envs, request.episodes, num_envs):
            seed = derive(request.seed, f"recording/{place}/{begin // num_envs}")
            trained.agent.generator.manual_seed(derive(seed, "policy"))
            found = trajectories(
                trained.agent.policy,
                env,
                episodes=min(num_envs, request.episodes - begin),
                seed=seed,
                deterministic=not request.stochastic,
                on_step=on_step,
            )
            yield from islice(found, max(0, first - begin), None)
    finally:
        env.close()


def _round(request: _Request, trained: TrainedRun) -> int:
    return min(request.episodes, trained.settings.num_envs, _ROUND)


def _recipe(request: _Request, runs: Sequence[TrainedRun]) -> dict[str, Any]:
    """Return all that the episodes depend on."""
    from genpol.training.checkpoint import MANIFEST

    manifests = [(trained.checkpoint / MANIFEST).read_bytes() for trained in runs]
    return {
        "checkpoints": [str(trained.checkpoint.resolve()) for trained in runs],
        "contents": [hashlib.sha256(manifest).hexdigest()[:12] for manifest in manifests],
        "episodes": request.episodes,
        "seed": request.seed,
        "stochastic": request.stochastic,
        "overrides": sorted(request.overrides),
        "num_envs": [_round(request, trained) for trained in runs],
        "genpol": __version__,
        **{package: version(package) for package in ("torch", "mujoco")},
    }


def _metadata(request: _Request, runs: Sequence[TrainedRun]) -> dict[str, Any]:
    from genpol.envs import label

    return {
        "env": label(runs[0].settings.env),
        "action_repeat": runs[0].agent.specs.action_repeat,
        "source": "genpol data record",
        "checkpoints": [str(trained.checkpoint) for trained in runs],
        "episodes": request.episodes,
        "seed": request.seed,
        "stochastic": request.stochastic,
    }


def _check_environments(request: _Request, runs: Sequence[TrainedRun]) -> None:
    """Refuse runs that do not act in one environment, or not in the one that was named."""
    from genpol.envs import label

    first = runs[0]
    name = label(first.settings.env)
    if request.env not in (None, name, first.settings.choices.env):
        raise ConfigError(
            f"env = {request.env!r}: {request.paths[0]} was trained in {name}, where it is "
            "recorded; leave env= out"
        )
    for path, trained in zip(request.paths, runs, strict=True):
        here = (label(trained.settings.env), trained.agent.specs.action_repeat)
        if here != (name, first.agent.specs.action_repeat):
            raise ConfigError(
                f"{path}: acts in {here[0]} with action_repeat={here[1]}, {request.paths[0]} in "
                f"{name} with action_repeat={first.agent.specs.action_repeat}; record them apart"
            )


def _parse(arguments: Sequence[str]) -> _Request:
    """Divide the arguments into runs, options and settings of the runs."""
    paths: list[Path] = []
    given: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            paths.append(Path(argument).expanduser())
        elif key in given:
            raise ConfigError(f"{key} is given twice; keep one")
        elif key in _OPTIONS:
            given[key] = value
        elif "." in key or key in _OF_RUNS:
            overrides.append(argument)
        else:
            raise ConfigError(
                f"unknown option {key!r} of `genpol data record`.{nearest(key, _OPTIONS)} "
                f"There are {', '.join(_OPTIONS)}"
            )
    if not paths:
        raise ConfigError("no run given; write: genpol data record RUN output=<data set>")
    if not given.get("output"):
        raise ConfigError("no output given: add output=<data set>, such as output=data/medium-v0")
    if given.setdefault("stochastic", "true") not in ("true", "false"):
        raise ConfigError(f"stochastic = {given['stochastic']!r}: must be true or false")
    request = _Request(
        paths=tuple(paths),
        output=Path(given["output"]).expanduser(),
        format=given.get("format", "minari"),
        episodes=whole_number(given, "episodes", 100),
        seed=whole_number(given, "seed", 30_000),
        stochastic=given["stochastic"] == "true",
        env=given.get("env"),
        overrides=tuple(overrides),
    )
    at_least("episodes", request.episodes, 1)
    at_least("seed", request.seed, 0)
    return request

"""`genpol train --multirun`: several runs of one command line, by Hydra's grammar of sweeps.

``seed=0,1 agent=ppo,bpo`` are four runs; ``hydra/launcher=`` says where they take place, under the
names of Hydra's launchers and with ``hydra.launcher.<option>=``, which go to submitit's
``AutoExecutor`` and to ``ray.remote`` as they are. The launchers themselves cannot do it: they want
to compose the configuration by Hydra alone, which knows neither ``2e6`` as an integer nor the
errors of :mod:`genpol.cli.configuration`, and hydra-ray-launcher 1.2.2 wants cloudpickle < 3 beside
the 3.1 of torchrl. So submitit and Ray are asked directly, and a run is what it always is: a
process of `genpol train`, which a signal stops with a checkpoint.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from genpol.cli.reproduce_processes import Processes
from genpol.errors import ConfigError, nearest, require

_LAUNCHER = "hydra/launcher="
_OPTION = "hydra.launcher."

_INTERRUPTED = (130, 143)  # exit codes of `genpol train`, which a signal stopped

Job = tuple[list[str], Path, Path]
"""Overrides of one run, the file that takes what it prints, and the folder to run it in."""
Ending = int | str
"""Exit code of a run, or why there is none."""


def run(arguments: Sequence[str]) -> int:
    """Launch the runs that ``arguments`` ask for.

    Returns:
        0 if all ended well, 130 if one was stopped by a signal, else 1.

    Raises:
        ConfigError: If the command line, or one run's configuration, is wrong; none is begun then.
        MissingExtraError: If the launcher's package is not installed.
    """
    from genpol import parallel

    if parallel.started_by_torchrun():
        raise ConfigError("--multirun: every rank of torchrun would begin all runs; leave it out")
    launcher, options, overrides = _read(arguments)
    sweeps, differing = _expand(overrides)
    for sweep in sweeps:
        _check(sweep)
    output = next((x.partition("=")[2] for x in overrides if x.startswith("output=")), "runs")
    here = Path.cwd()
    folder = here / output / "multirun" / f"{datetime.now().astimezone():%Y%m%d-%H%M%S-%f}"
    launch = _LAUNCHERS[launcher](options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(sweep, folder / f"{number}.log", here) for number, sweep in enumerate(sweeps)]
    sys.stdout.write(f"{len(jobs)} runs by {launcher}; what they print: {folder}\n")
    sys.stdout.flush()
    with _interrupted_by_sigterm():
        endings = launch(jobs)
    for own, (sweep, log, _), ending in zip(differing, jobs, endings, strict=True):
        sys.stdout.write(f"{' '.join(own or sweep)}: {_told(ending, log)}\n")
    if any(ending in _INTERRUPTED for ending in endings):
        return _INTERRUPTED[0]
    return int(any(ending != 0 for ending in endings))


def train(overrides: Sequence[str], log: Path, folder: Path) -> int:
    """Run `genpol train` in a process of its own, which gets our signals; return its exit code."""
    processes = Processes()
    # As SIGTERM, of which a second one changes nothing: submitit sends more than one, the terminal
    # another, and Ray's processes have blocked SIGINT, which is inherited.
    forwarding = processes.forwarding_signals(interrupt=signal.SIGTERM)
    with log.open("wb") as file, forwarding:
        return processes.call(_command(overrides), output=file, folder=folder)


def _command(overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "genpol.cli.main", "train", *overrides]


def _told(ending: Ending, log: Path) -> str:
    if ending == 0:
        return "finished"
    if isinstance(ending, str):
        return ending
    return f"{'interrupted' if ending in _INTERRUPTED else f'exit code {ending}'}, see {log}"


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM be what Ctrl-C is, for runs under way are to be stopped then."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(arguments: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """Return the launcher, its options, and the other overrides."""
    import yaml

    launcher, options, overrides = "basic", {}, []
    for text in arguments:
        if text.startswith(_LAUNCHER):
            launcher = text.removeprefix(_LAUNCHER)
        elif text.startswith(_OPTION):
            key, _, value = text.removeprefix(_OPTION).partition("=")
            try:
                options[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigError(f"{text!r}: {' '.join(str(error).split())}") from None
        else:
            overrides.append(text)
    if launcher not in _LAUNCHERS:
        raise ConfigError(
            f"{_LAUNCHER}{launcher}: must be one of {', '.join(sorted(_LAUNCHERS))}."
            f"{nearest(launcher, _LAUNCHERS)}"
        )
    return launcher, options, overrides


def _expand(overrides: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Return the overrides of each run, and of these the ones that differ between runs."""
    choices = [_choices(text) for text in overrides]
    sweeps = [list(chosen) for chosen in itertools.product(*choices)]
    swept = [number for number, values in enumerate(choices) if len(values) > 1]
    return sweeps, [[sweep[number] for number in swept] for sweep in sweeps]


def _choices(text: str) -> list[str]:
    """Return an override once for each value that it gives."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [text]  # whose error is told where all are checked
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise ConfigError(f"{text!r}: give the values, as in 1,2,3 or range(1,4)")
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]


def _check(overrides: Sequence[str]) -> None:
    """Compose one run's configuration, for the sake of its errors."""
    if any(text.startswith(("init=", "resume=")) for text in overrides):
        return  # what is right depends on another run
    from genpol.cli import configuration

    configuration.to_settings(configuration.compose(overrides))


Launch = Callable[[Sequence[Job]], list[Ending]]


def _basic(options: Mapping[str, Any], folder: Path) -> Launch:
    """One after the other, in this machine, until one is interrupted."""
    for name in options:
        raise ConfigError(f"{_OPTION}{name}: hydra/launcher=basic has no options; leave it out")

    def launch(jobs: Sequence[Job]) -> list[Ending]:
        endings: list[Ending] = []
        for job in jobs:
            endings.append(train(*job))
            if endings[-1] in _INTERRUPTED:
                break
        return endings + ["not begun"] * (len(jobs) - len(endings))

    return launch


def _ray(options: Mapping[str, Any], folder: Path) -> Launch:
    """Tasks of Ray, in the cluster of ``RAY_ADDRESS`` or here, with options of ``ray.remote``."""
    ray = require("ray", "distributed")
    from genpol.training import ray_cluster

    with _refusing():
        task = ray.remote(**{"num_cpus": 1, "max_retries": 0, **options})(train)

    def launch(jobs: Sequence[Job]) -> list[Ending]:
        ours = ray_cluster.join(ray)
        begun = [task.remote(*job) for job in jobs]
        try:
            return [_ending(partial(ray.get, x), ray.exceptions.RayError) for x in begun]
        except BaseException:
            for x in begun:
                ray.cancel(x)
            ray.wait(begun, num_returns=len(begun))  # for their checkpoints
            raise
        finally:
            if ours:
                ray.shutdown()

    return launch


def _submitit(cluster: str) -> Callable[[Mapping[str, Any], Path], Launch]:
    """Jobs of submitit, with options of its ``AutoExecutor.update_parameters``.

    Slurm's jobs outlive an interruption of this process.
    """

    def choose(options: Mapping[str, Any], folder: Path) -> Launch:
        submitit = require("submitit", "distributed")
        with _refusing():
            executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster)
            executor.update_parameters(**{"timeout_min": 60 * 24, **options})

        def launch(jobs: Sequence[Job]) -> list[Ending]:
            with executor.batch():
                begun = [executor.submit(train, *job) for job in jobs]
            try:
                lost = submitit.core.utils.UncompletedJobError
                return [_ending(job.result, lost) for job in begun]
            except BaseException:
                for job in begun if cluster == "local" else ():
                    job.cancel()
                raise

        return launch

    return choose


@contextmanager
def _refusing() -> Iterator[None]:
    """Say in one line which option of a launcher is wrong, or that it is not to be had."""
    try:
        yield
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"hydra/launcher: {' '.join(str(error).split())}") from None


def _ending(result: Callable[[], int], lost: type[Exception]) -> Ending:
    """Wait for a run's exit code; where its process or machine was lost, say so."""
    try:
        return result()
    except lost as error:
        *_, reason = str(error).strip().splitlines()
        return f"lost: {reason.strip()}"


_LAUNCHERS: dict[str, Callable[[Mapping[str, Any], Path], Launch]] = {
    "basic": _basic,
    "ray": _ray,
    "submitit_local": _submitit("local"),
    "submitit_slurm": _submitit("slurm"),
}

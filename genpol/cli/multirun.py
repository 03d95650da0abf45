"""`genpol train --multirun`: several runs of one command line, by Hydra's grammar of sweeps.

``seed=0,1 agent=ppo,bpo`` are four runs; ``hydra/launcher=`` says where they take place, under the
names of Hydra's launchers and with their ``hydra.launcher.<option>=``. The launchers themselves
cannot do it: they want to compose the configuration by Hydra alone, which knows neither ``2e6`` as
an integer nor the errors of :mod:`genpol.cli.configuration`, and hydra-ray-launcher 1.2.2 wants
cloudpickle < 3 beside the 3.1 of torchrl. So submitit and Ray are asked directly, and a run is what
it always is: a process of `genpol train`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from genpol.errors import ConfigError, nearest, require

_LAUNCHER = "hydra/launcher="
_OPTION = "hydra.launcher."

Job = tuple[list[str], Path]
"""Overrides of one run, and the file that takes what it prints."""


def run(arguments: Sequence[str]) -> int:
    """Launch the runs that ``arguments`` ask for; return 0 if all ended well, else 1.

    Raises:
        ConfigError: If the command line, or one run's configuration, is wrong; none is begun then.
        MissingExtraError: If the launcher's package is not installed.
    """
    launcher, options, overrides = _read(arguments)
    sweeps, differing = _expand(overrides)
    for sweep in sweeps:
        _check(sweep)
    output = next((x.partition("=")[2] for x in overrides if x.startswith("output=")), "runs")
    folder = Path(output) / "multirun" / f"{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    launch = _LAUNCHERS[launcher](options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(sweep, folder / f"{number}.log") for number, sweep in enumerate(sweeps)]
    sys.stdout.write(f"{len(jobs)} runs by {launcher}; what they print: {folder}\n")
    sys.stdout.flush()
    codes = launch(jobs)
    for own, (sweep, log), code in zip(differing, jobs, codes, strict=True):
        ended = "finished" if code == 0 else f"exit code {code}, see {log}"
        sys.stdout.write(f"{' '.join(own or sweep)}: {ended}\n")
    return int(any(codes))


def train(overrides: Sequence[str], log: Path) -> int:
    """Run `genpol train` in a process of its own and return its exit code."""
    command = [sys.executable, "-m", "genpol.cli.main", "train", *overrides]
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode


def _read(arguments: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    """Return the launcher, its options, and the other overrides."""
    import yaml

    launcher, options, overrides = "basic", {}, []
    for text in arguments:
        if text.startswith(_LAUNCHER):
            launcher = text.removeprefix(_LAUNCHER)
        elif text.startswith(_OPTION):
            key, _, value = text.removeprefix(_OPTION).partition("=")
            options[key] = yaml.safe_load(value)
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


Launch = Callable[[Sequence[Job]], list[int]]


def _basic(options: Mapping[str, Any], folder: Path) -> Launch:
    """One after the other, in this machine."""
    _refuse(options)
    return lambda jobs: [train(*job) for job in jobs]


def _ray(options: Mapping[str, Any], folder: Path) -> Launch:
    """Tasks of Ray, in the cluster of ``RAY_ADDRESS`` or here, with options of ``ray.remote``."""
    ray = require("ray", "distributed")

    def launch(jobs: Sequence[Job]) -> list[int]:
        local = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="error", **local)
        try:
            task = ray.remote(**{"num_cpus": 1, "max_retries": 0, **options})(train)
            codes: list[int] = ray.get([task.remote(*job) for job in jobs])
        finally:
            ray.shutdown()
        return codes

    return launch


def _submitit(cluster: str) -> Callable[[Mapping[str, Any], Path], Launch]:
    """Jobs of submitit, with options of its ``AutoExecutor.update_parameters``."""

    def choose(options: Mapping[str, Any], folder: Path) -> Launch:
        submitit = require("submitit", "distributed")

        def launch(jobs: Sequence[Job]) -> list[int]:
            executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster)
            executor.update_parameters(**{"timeout_min": 60 * 24, **options})
            with executor.batch():
                submitted = [executor.submit(train, *job) for job in jobs]
            return [job.result() for job in submitted]

        return launch

    return choose


def _refuse(options: Mapping[str, Any]) -> None:
    for name in options:
        raise ConfigError(f"{_OPTION}{name}: hydra/launcher=basic has no options; leave it out")


_LAUNCHERS: dict[str, Callable[[Mapping[str, Any], Path], Launch]] = {
    "basic": _basic,
    "ray": _ray,
    "submitit_local": _submitit("local"),
    "submitit_slurm": _submitit("slurm"),
}

"""Experiments: which runs a result is made of, read from ``configs/experiment/NAME.yaml``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from genpol.errors import ConfigError, nearest

# Labels and environments name folders, so they hold nothing that a file system could mistake.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of an experiment."""

    experiment: str
    """Name of the experiment."""
    label: str
    """The agent's name in the results."""
    env: str
    """Name of the environment."""
    seed: int
    """Seed of the run."""
    overrides: tuple[str, ...]
    """What follows ``genpol train`` on the command line."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.label}-{self.env}-s{self.seed}"

    @property
    def command(self) -> str:
        """The command that repeats the run by itself, as the results record it."""
        return shlex.join(["genpol", "train", *self.overrides])


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Agents to compare on environments, over seeds.

    Raises:
        ConfigError: If a field is empty or a name cannot name a folder.
    """

    name: str
    """The file's name without its ending."""
    description: str
    """What the experiment shows and by which protocol."""
    compute: str
    """What it costs: machine and hours."""
    seeds: list[int]
    """Seeds of every run."""
    envs: list[str]
    """Environments of every run."""
    runs: dict[str, list[str]]
    """Overrides of each agent by the label it bears in the results."""
    common: list[str] = field(default_factory=list)
    """Overrides of all runs; those of a run come before them."""
    data: dict[str, list[str]] = field(default_factory=dict)
    """By environment, the arguments of `genpol data generate` for the data set that its runs learn
    from, ``output=FILE`` among them; it is made where it does not exist."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for entry in ("seeds", "envs", "runs"):
            if not getattr(self, entry):
                raise ConfigError(f"experiment {self.name!r}: {entry} is empty; name at least one")
        for name in (*self.envs, *self.runs):
            if not _NAME.fullmatch(name):
                raise ConfigError(
                    f"experiment {self.name!r}: {name!r} must be letters, digits, '.', '_' or '-'"
                )
        lists = (self.common, *self.runs.values(), *self.data.values())
        for override in (x for overrides in lists for x in overrides):
            if "=" not in override:
                raise ConfigError(
                    f"experiment {self.name!r}: override {override!r} must read key=value"
                )

        for env, arguments in self.data.items():
            if env not in self.envs or _output(arguments) is None:
                raise ConfigError(
                    f"experiment {self.name!r}: data of {env!r} must be of one of envs, and have "
                    "output=FILE"
                )

    def data_sets(self, plan: Iterable[Run]) -> dict[Path, list[str]]:
        """Return the files that the runs of a plan learn from, and what makes each.

        That is what follows ``genpol data generate`` on the command line.
        """
        envs = dict.fromkeys(run.env for run in plan)
        commands = {env: [f"env={env}", *self.data[env]] for env in envs if env in self.data}
        return {Path(str(_output(command))): command for command in commands.values()}

    def plan(self, seeds: Iterable[int] | None = None, only: Sequence[str] = ()) -> list[Run]:
        """Return the runs, seed by seed so that a comparison is complete as early as can be.

        Args:
            seeds: Seeds to run instead of the experiment's own.
            only: Labels and environments to keep; labels and environments left unnamed all stay.

        Raises:
            ConfigError: If ``only`` names what the experiment has not.
        """
        for name in only:
            if name not in self.runs and name not in self.envs:
                known = [*self.runs, *self.envs]
                raise ConfigError(
                    f"experiment {self.name!r} has no run or environment {name!r}."
                    f"{nearest(name, known)} It has {', '.join(known)}"
                )
        labels = [label for label in self.runs if label in only] or list(self.runs)
        envs = [env for env in self.envs if env in only] or self.envs
        return [
            Run(
                experiment=self.name,
                label=label,
                env=env,
                seed=seed,
                overrides=self._overrides(label, env, seed),
            )
            for seed in (self.seeds if seeds is None else seeds)
            for env in envs
            for label in labels
        ]

    def _overrides(self, label: str, env: str, seed: int) -> tuple[str, ...]:
        # The command line refuses a key given twice, so the more specific one is kept here.
        data = [f"data={_output(self.data[env])}"] if env in self.data else []
        given = [f"env={env}", *data, *self.common, *self.runs[label], f"seed={seed}"]
        by_key = {override.partition("=")[0]: override for override in given}
        return tuple(by_key.values())


def _output(arguments: Iterable[str]) -> str | None:
    """Return the file that `genpol data generate` would write."""
    return next((x.removeprefix("output=") for x in arguments if x.startswith("output=")), None)


def names() -> dict[str, Path]:
    """Return the files of all experiments by name."""
    folder = Path(str(files("genpol.configs"))) / "experiment"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(name: str) -> Experiment:
    """Read the experiment ``name``, or the one in the YAML file that ``name`` is the path of.

    Raises:
        ConfigError: If there is none, or a field is unknown, missing or of the wrong type.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else names().get(name)
    if path is None:
        raise ConfigError(
            f"unknown experiment {name!r}.{nearest(name, names())} `genpol list experiments` "
            "shows all"
        )
    return _read(path)


def _read(path: Path) -> Experiment:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        written = OmegaConf.load(path)
        schema = OmegaConf.structured(Experiment)
        OmegaConf.set_readonly(schema, False)
        known = [entry.name for entry in fields(Experiment) if entry.name != "name"]
        for key in written:
            if key not in known:
                raise ConfigError(f"{path}: unknown field {key!r}.{nearest(str(key), known)}")
        merged = OmegaConf.merge(schema, {"name": path.stem}, written)
        experiment: Any = OmegaConf.to_object(merged)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        reason = str(error.msg or error).partition("\n")[0]
        raise ConfigError(f"{path}: {error.full_key or 'the file'}: {reason}") from None
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"{path}: is not an experiment; it needs {', '.join(known)}")
    return experiment

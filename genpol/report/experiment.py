"""Experiments: which runs a result is made of, read from ``configs/experiment/NAME.yaml``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from genpol.errors import ConfigError, nearest
from genpol.report.plan import NAME, PLACE, DataSet, Evaluation, Run, Training, folder_name


@dataclass(kw_only=True)  # OmegaConf merges nothing into what is frozen inside another
class RecordingFields:
    """How the data set of an environment is recorded."""

    train: list[str]
    """Overrides of the run that acts; it is trained in this environment first."""
    record: list[str]
    """Arguments of `genpol data record` after the run, ``output=FILE`` among them."""


@dataclass(kw_only=True)
class EvaluationFields:
    """How finished runs are evaluated once more."""

    run: str
    """Label of the runs."""
    arguments: list[str] = field(default_factory=list)
    """Arguments of `genpol eval` after the run. ``{other}`` stands for the folder of the run
    ``other`` of the same environment and seed; YAML wants quotes around it inside [brackets]."""


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
    """Overrides of all runs; those of an environment and of a run come before them."""
    env_overrides: dict[str, list[str]] = field(default_factory=dict)
    """By environment, overrides of its runs; those of a run come before them."""
    data: dict[str, list[str]] = field(default_factory=dict)
    """By environment, the arguments of `genpol data generate` for the data set that its runs learn
    from, ``output=FILE`` among them; it is made where it does not exist."""
    recorded: dict[str, RecordingFields] = field(default_factory=dict)
    """By environment, how the data set that its runs learn from is recorded from a run that is
    trained for it; it is made where it does not exist."""
    evaluations: dict[str, EvaluationFields] = field(default_factory=dict)
    """By the label that they bear in the results, further evaluations of finished runs. Unlike
    those that training makes, they have values at risk: ``var_5``, ``cvar_5``, ``var_25`` and
    ``cvar_25`` beside ``return`` and ``success``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for entry in ("seeds", "envs", "runs"):
            if not getattr(self, entry):
                raise ConfigError(f"experiment {self.name!r}: {entry} is empty; name at least one")
        for name in (*self.envs, *self.runs, *self.evaluations):
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"experiment {self.name!r}: {name!r} must be letters, digits, '.', '_' or '-'"
                )
        lists = (
            *(self.common, *self.env_overrides.values(), *self.runs.values(), *self.data.values()),
            *(x for entry in self.recorded.values() for x in (entry.train, entry.record)),
            *(entry.arguments for entry in self.evaluations.values()),
        )
        for override in (x for overrides in lists for x in overrides):
            if "=" not in override:
                raise ConfigError(
                    f"experiment {self.name!r}: override {override!r} must read key=value"
                )
        for env in self.env_overrides:
            if env not in self.envs:
                raise ConfigError(
                    f"experiment {self.name!r}: env_overrides of {env!r} must be of one of envs."
                    f"{nearest(env, self.envs)}"
                )
        self._check_data()
        for label, evaluation in self.evaluations.items():
            self._check_evaluation(label, evaluation)

    def _check_data(self) -> None:
        made = {"data": self.data} | {
            "recorded": {env: entry.record for env, entry in self.recorded.items()}
        }
        for title, arguments in made.items():
            for env in arguments:
                if env not in self.envs or _output(arguments[env]) is None:
                    raise ConfigError(
                        f"experiment {self.name!r}: {title} of {env!r} must be of one of envs, and "
                        "have output=FILE"
                    )
        for env in self.data:
            if env in self.recorded:
                raise ConfigError(
                    f"experiment {self.name!r}: {env!r} is in data and in recorded; keep one"
                )

    def _check_evaluation(self, label: str, entry: EvaluationFields) -> None:
        place = f"experiment {self.name!r}: evaluation {label!r}"
        if label in self.runs:
            raise ConfigError(f"{place} is also the label of runs; name it otherwise")
        named = [found for text in entry.arguments for found in PLACE.findall(text)]
        for name in (entry.run, *named):
            if name not in self.runs:
                raise ConfigError(
                    f"{place} needs runs {name!r}, which there are not.{nearest(name, self.runs)} "
                    f"There are {', '.join(self.runs)}"
                )
        if any(text.startswith("json=") for text in entry.arguments):
            raise ConfigError(f"{place}: json=true is given anyway; leave it out")

    def data_sets(self, plan: Iterable[Run]) -> list[DataSet]:
        """Return the data sets that the runs of a plan learn from."""
        found = (self._data_set(env) for env in dict.fromkeys(run.env for run in plan))
        return list({data.file: data for data in found if data is not None}.values())

    def _data_set(self, env: str) -> DataSet | None:
        file = self._data_file(env)
        if file is None:
            return None
        if env in self.data:
            return DataSet(file=Path(file), arguments=(f"env={env}", *self.data[env]))
        entry = self.recorded[env]
        overrides = _last_of_each_key([f"env={env}", *entry.train])
        training = Training(name=f"data-{env}", overrides=overrides)
        return DataSet(file=Path(file), arguments=tuple(entry.record), training=training)

    def _data_file(self, env: str) -> str | None:
        if env in self.recorded:
            return _output(self.recorded[env].record)
        return _output(self.data.get(env, []))

    def plan(self, seeds: Iterable[int] | None = None, only: Sequence[str] = ()) -> list[Run]:
        """Return the runs, seed by seed so that a comparison is complete as early as can be.

        Args:
            seeds: Seeds to run instead of the experiment's own.
            only: Labels and environments to keep; labels and environments left unnamed all stay.
                The label of an evaluation keeps the runs that it needs.

        Raises:
            ConfigError: If ``only`` names what the experiment has not.
        """
        known = [*self.runs, *self.evaluations, *self.envs]
        for name in only:
            if name not in known:
                raise ConfigError(
                    f"experiment {self.name!r} has no run or environment {name!r}."
                    f"{nearest(name, known)} It has {', '.join(known)}"
                )
        asked = {*only, *(x for e in self.evaluations if e in only for x in self._needs(e))}
        labels = [label for label in self.runs if label in asked] or list(self.runs)
        envs = [env for env in self.envs if env in only] or self.envs
        return [
            Run(
                name=folder_name(label, env, seed),
                overrides=self._overrides(label, env, seed),
                experiment=self.name,
                label=label,
                env=env,
                seed=seed,
            )
            for seed in (self.seeds if seeds is None else seeds)
            for env in envs
            for label in labels
        ]

    def plan_evaluations(
        self, seeds: Iterable[int] | None = None, only: Sequence[str] = ()
    ) -> list[Evaluation]:
        """Return the further evaluations, whose runs are all in :meth:`plan`.

        The arguments and errors are those of :meth:`plan`. Where ``only`` names labels, evaluations
        that it does not name are left out.
        """
        runs = {(run.label, run.env, run.seed): run for run in self.plan(seeds, only)}
        some = any(name in self.runs or name in self.evaluations for name in only)
        labels = [label for label in self.evaluations if label in only or not some]
        return [
            Evaluation(
                label=label,
                run=needed[0],
                others=tuple(needed[1:]),
                arguments=tuple(self.evaluations[label].arguments),
            )
            for env, seed in dict.fromkeys((env, seed) for _, env, seed in runs)
            for label in labels
            for needed in [[runs[name, env, seed] for name in self._needs(label)]]
        ]

    def evaluations_of(self, label: str) -> set[str]:
        """Return the labels of the evaluations that need the runs ``label``."""
        return {evaluation for evaluation in self.evaluations if label in self._needs(evaluation)}

    def _needs(self, evaluation: str) -> list[str]:
        """Return the labels of the runs that an evaluation needs, the one it is of first."""
        entry = self.evaluations[evaluation]
        named = (found for text in entry.arguments for found in PLACE.findall(text))
        return list(dict.fromkeys([entry.run, *named]))

    def _overrides(self, label: str, env: str, seed: int) -> tuple[str, ...]:
        file = self._data_file(env)
        data = [] if file is None else [f"data={file}"]
        of_env = self.env_overrides.get(env, [])
        own = self.runs[label]
        return _last_of_each_key([f"env={env}", *data, *self.common, *of_env, *own, f"seed={seed}"])


def _last_of_each_key(overrides: Iterable[str]) -> tuple[str, ...]:
    """Return overrides with each key once, since the command line refuses a key given twice."""
    by_key = {override.partition("=")[0]: override for override in overrides}
    return tuple(by_key.values())


def _output(arguments: Iterable[str]) -> str | None:
    """Return the file that a command of `genpol data` would write."""
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

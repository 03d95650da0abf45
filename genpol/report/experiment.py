"""Experiments: which runs a result is made of, read from ``configs/experiment/NAME.yaml``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from genpol.errors import ConfigError, nearest
from genpol.report.plan import (
    NAME,
    DataSet,
    Evaluation,
    Run,
    Training,
    folder_name,
    in_order,
    named,
)


@dataclass(kw_only=True)  # OmegaConf merges nothing into what is frozen inside another
class RecordingFields:
    """How a data set is recorded."""

    train: list[str]
    """Overrides of the run that acts; it is trained first, in this environment unless they say
    ``env=OTHER``."""
    record: list[str]
    """Arguments of `genpol data record` after the run, ``output=FILE`` among them."""
    every_checkpoint: bool = False
    """Whether all checkpoints that the run keeps act, as a replay of what it learned from, and not
    its last alone. Training keeps as many as ``checkpoint.keep`` says."""


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
    """Overrides of each agent by the label it bears in the results. ``{other}`` stands for the
    folder of the run ``other`` of the same environment and seed, which is trained before:
    ``"init={other}"``; YAML wants quotes around it inside [brackets]."""
    common: list[str] = field(default_factory=list)
    """Overrides of all runs; those of an environment and of a run come before them."""
    env_overrides: dict[str, list[str]] = field(default_factory=dict)
    """By environment, overrides of its runs; those of a run come before them."""
    run_overrides: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """By label and environment, overrides of these runs alone, which come before all others."""
    data: dict[str, list[str]] = field(default_factory=dict)
    """By environment, the arguments of `genpol data generate` for the data set that its runs learn
    from, ``output=FILE`` among them; it is made where it does not exist."""
    recorded: dict[str, list[RecordingFields]] = field(default_factory=dict)
    """By environment, how what its runs learn from is recorded from runs that are trained for it:
    a data set, or several in one folder, which the runs then learn from. Each is made where it does
    not exist."""
    evaluations: dict[str, EvaluationFields] = field(default_factory=dict)
    """By the label that they bear in the results, further evaluations of finished runs. Unlike
    those that training makes, they have values at risk: ``var_5``, ``cvar_5``, ``var_25`` and
    ``cvar_25`` beside ``return`` and ``success``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for entry in ("seeds", "envs", "runs"):
            if not getattr(self, entry):
                raise ConfigError(f"experiment {self.name!r}: {entry} is empty; name at least one")
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"experiment {self.name!r}: seeds = {self.seeds}: must differ and be at least 0"
            )
        if len(set(self.envs)) < len(self.envs):
            raise ConfigError(f"experiment {self.name!r}: envs = {self.envs}: must differ")
        for name in (*self.envs, *self.runs, *self.evaluations):
            if not NAME.fullmatch(name):
                raise ConfigError(
                    f"experiment {self.name!r}: {name!r} must be letters, digits, '.', '_' or '-'"
                )
        without_places = (
            *(self.common, *self.env_overrides.values(), *self.data.values()),
            *(x for of_label in self.run_overrides.values() for x in of_label.values()),
            *(x for _, entry in self._recordings() for x in (entry.train, entry.record)),
        )
        with_places = (
            *self.runs.values(),
            *(entry.arguments for entry in self.evaluations.values()),
        )
        for override in (x for words in (*without_places, *with_places) for x in words):
            if "=" not in override:
                raise ConfigError(
                    f"experiment {self.name!r}: override {override!r} must read key=value"
                )
        in_envs = {"env_overrides of": self.env_overrides} | {
            f"run_overrides of {label!r} in": own for label, own in self.run_overrides.items()
        }
        for title, by_env in in_envs.items():
            for env in by_env:
                if env not in self.envs:
                    raise ConfigError(
                        f"experiment {self.name!r}: {title} {env!r} must be of one of envs."
                        f"{nearest(env, self.envs)}"
                    )
        self._check_labels("run_overrides", self.run_overrides)
        for words in without_places:
            for label in named(words):
                raise ConfigError(
                    f"experiment {self.name!r}: {{{label}}} stands for the folder of a run only in "
                    "runs and in arguments of evaluations"
                )
        self._check_data()
        for label, overrides in self.runs.items():
            self._check_labels(f"run {label!r}", named(overrides))
        for label in self.runs:
            self._check_order(label, ())
        for label, evaluation in self.evaluations.items():
            self._check_evaluation(label, evaluation)

    def _recordings(self) -> list[tuple[str, RecordingFields]]:
        """Return all recordings with the environment of the runs that learn from them."""
        return [(env, entry) for env, entries in self.recorded.items() for entry in entries]

    def _check_data(self) -> None:
        recorded = [("recorded", env, entry.record) for env, entry in self._recordings()]
        generated = [("data", env, arguments) for env, arguments in self.data.items()]
        for title, env, arguments in (*generated, *recorded):
            if env not in self.envs or _output(arguments) is None:
                raise ConfigError(
                    f"experiment {self.name!r}: {title} of {env!r} must be of one of envs, and "
                    "have output=FILE"
                )
        for env, entries in self.recorded.items():
            place = f"experiment {self.name!r}: recorded of {env!r}"
            if env in self.data:
                raise ConfigError(
                    f"experiment {self.name!r}: {env!r} is in data and in recorded; keep one"
                )
            files = [Path(_output(entry.record) or "") for entry in entries]
            if not files:
                raise ConfigError(f"{place} is empty; name at least one")
            if len(set(files)) < len(files) or len({file.parent for file in files}) > 1:
                raise ConfigError(f"{place} must be different data sets in one folder")

    def _check_labels(self, who: str, labels: Iterable[str]) -> None:
        for label in labels:
            if label not in self.runs:
                raise ConfigError(
                    f"experiment {self.name!r}: {who} needs runs {label!r}, which there are not."
                    f"{nearest(label, self.runs)} There are {', '.join(self.runs)}"
                )

    def _check_order(self, label: str, behind: tuple[str, ...]) -> None:
        """Refuse runs that would have to wait for themselves."""
        chain = (*behind, label)
        if label in behind:
            circle = " for ".join(chain[behind.index(label) :])
            raise ConfigError(f"experiment {self.name!r}: runs wait for each other: {circle}")
        for needed in named(self.runs[label]):
            self._check_order(needed, chain)

    def _check_evaluation(self, label: str, entry: EvaluationFields) -> None:
        place = f"experiment {self.name!r}: evaluation {label!r}"
        if label in self.runs:
            raise ConfigError(f"{place} is also the label of runs; name it otherwise")
        self._check_labels(f"evaluation {label!r}", [entry.run, *named(entry.arguments)])
        if any(text.startswith("json=") for text in entry.arguments):
            raise ConfigError(f"{place}: json=true is given anyway; leave it out")

    def data_sets(self, plan: Iterable[Run]) -> list[DataSet]:
        """Return the data sets that the runs of a plan learn from."""
        found = [x for env in dict.fromkeys(run.env for run in plan) for x in self._data_of(env)]
        return list({data.file: data for data in found}.values())

    def _data_of(self, env: str) -> list[DataSet]:
        made = []
        if env in self.data:
            arguments = self.data[env]
            file = Path(_output(arguments) or "")
            made.append(DataSet(file=file, arguments=(f"env={env}", *arguments)))
        entries = self.recorded.get(env, [])
        for number, entry in enumerate(entries, start=1):
            training = Training(
                name=f"data-{env}" + (f"-{number}" if len(entries) > 1 else ""),
                overrides=_last_of_each_key([f"env={env}", *entry.train]),
            )
            made.append(
                DataSet(
                    file=Path(_output(entry.record) or ""),
                    arguments=tuple(entry.record),
                    training=training,
                    every_checkpoint=entry.every_checkpoint,
                )
            )
        return made

    def _learned_from(self, env: str) -> Path | None:
        """Return the data set that runs of an environment are given, or the folder of several."""
        made = [data.file for data in self._data_of(env)]
        if not made:
            return None
        return made[0] if len(made) == 1 else made[0].parent

    def plan(self, seeds: Iterable[int] | None = None, only: Sequence[str] = ()) -> list[Run]:
        """Return the runs, seed by seed so that a comparison is complete as early as can be.

        A run comes behind those that it needs.

        Args:
            seeds: Seeds to run instead of the experiment's own.
            only: Labels and environments to keep; labels and environments left unnamed all stay.
                A label, of a run or an evaluation, keeps the runs that it needs.

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
            run
            for seed in (self.seeds if seeds is None else seeds)
            for env in envs
            for run in in_order(self._run(label, env, seed) for label in labels)
        ]

    def _run(self, label: str, env: str, seed: int) -> Run:
        return Run(
            name=folder_name(label, env, seed),
            overrides=self._overrides(label, env, seed),
            experiment=self.name,
            label=label,
            env=env,
            seed=seed,
            needs=tuple(self._run(needed, env, seed) for needed in named(self.runs[label])),
        )

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

    def made_of(self, label: str) -> set[str]:
        """Return the labels of the runs and evaluations that need the runs ``label``.

        Also those that need them by way of other runs.
        """
        runs = {run for run in self.runs if label in named(self.runs[run])}
        evaluations = {x for x in self.evaluations if label in self._needs(x)}
        return runs.union(evaluations, *(self.made_of(run) for run in runs))

    def _needs(self, evaluation: str) -> list[str]:
        """Return the labels of the runs that an evaluation names, the one it is of first."""
        entry = self.evaluations[evaluation]
        return list(dict.fromkeys([entry.run, *named(entry.arguments)]))

    def _overrides(self, label: str, env: str, seed: int) -> tuple[str, ...]:
        learned_from = self._learned_from(env)
        data = [] if learned_from is None else [f"data={learned_from}"]
        of_env = self.env_overrides.get(env, [])
        own = [*self.runs[label], *self.run_overrides.get(label, {}).get(env, [])]
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


def _check_recordings(path: Path, written: Any) -> None:
    """Give the recordings in a file their type, which OmegaConf leaves out inside a list.

    Raises:
        ConfigError: If an environment has no list of them, or a field is unknown or missing.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    recorded = written.get("recorded")
    for env, entries in recorded.items() if isinstance(recorded, DictConfig) else ():
        place = f"{path}: recorded.{env!s}"
        if not isinstance(entries, ListConfig):
            raise ConfigError(f"{place}: must be a list of {{train: [...], record: [...]}}")
        schema = OmegaConf.structured(RecordingFields)
        for index, entry in enumerate(entries):
            if not isinstance(entry, DictConfig):
                raise ConfigError(f"{place}[{index}]: must be {{train: [...], record: [...]}}")
            try:
                entries[index] = OmegaConf.merge(schema, entry)
                OmegaConf.to_object(entries[index])
            except OmegaConfBaseException as error:
                reason = str(error.msg or error).partition("\n")[0]
                raise ConfigError(f"{place}[{index}]: {reason}") from None


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
        _check_recordings(path, written)
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

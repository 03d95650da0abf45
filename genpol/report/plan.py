"""What an experiment consists of: runs, further evaluations, data sets, and their commands.

A command is what the results record and what a dry run prints: a line that a shell can repeat. It
names no folder of a run by its time, which is unknown beforehand, but by a pattern.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Labels and environments name folders, so they hold nothing that a file system could mistake.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Where an evaluation's arguments take the folder of a run; Hydra's own {key: value} has a colon.
PLACE = re.compile(rf"\{{({NAME.pattern})\}}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run, in a folder of its own."""

    name: str
    """Name of the folder."""
    overrides: tuple[str, ...]
    """What follows ``genpol train`` on the command line."""

    @property
    def command(self) -> str:
        """The command that repeats the run by itself, as the results record it."""
        return shlex.join(["genpol", "train", *self.overrides])

    def command_in(self, root: Path) -> str:
        """Return the shell's line that trains it in a folder ``root / name``."""
        return f"{self.command} {shlex.quote(f'output={root / self.name}')}"


@dataclass(frozen=True, kw_only=True)
class Run(Training):
    """One training run whose evaluations are results."""

    experiment: str
    """Name of the experiment."""
    label: str
    """The agent's name in the results."""
    env: str
    """Name of the environment."""
    seed: int
    """Seed of the run."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a finished run."""

    label: str
    """The agent's name in the results."""
    run: Run
    """The run that is evaluated."""
    others: tuple[Run, ...]
    """Other runs of the same environment and seed, which the arguments name."""
    arguments: tuple[str, ...]
    """What follows ``genpol eval RUN`` on the command line; ``{label}`` is a run's folder."""

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return self.run.experiment

    @property
    def env(self) -> str:
        """Name of the environment."""
        return self.run.env

    @property
    def seed(self) -> int:
        """Seed of the runs."""
        return self.run.seed

    @property
    def name(self) -> str:
        """Name of the folder of what it says."""
        return folder_name(self.label, self.env, self.seed)

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs that it needs."""
        return (self.run, *self.others)

    @property
    def command(self) -> str:
        """The shell's line that trains the runs and repeats the evaluation.

        It names no folder that was made before: it is the same on every machine.
        """
        root = Path("repeat")
        trained = [run.command_in(root) for run in self.runs]
        return " && ".join([*trained, self.command_in(root)])

    def command_in(self, root: Path) -> str:
        """Return the shell's line that evaluates the run, all runs being in ``root / run.name``."""
        shown = {run.label: _run_in(root, run) for run in self.runs}
        words = [_in_shell(argument, shown) for argument in self.arguments]
        return " ".join(["genpol eval", shown[self.run.label], "json=true", *words])

    def filled(self, folders: Mapping[str, Path]) -> list[str]:
        """Return the arguments with the folder of each run, by label, in its place."""
        return [PLACE.sub(lambda found: str(folders[found[1]]), x) for x in self.arguments]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that runs of an experiment learn from."""

    file: Path
    """File or folder; it is made where it does not exist."""
    arguments: tuple[str, ...]
    """What follows ``genpol data generate``, or ``genpol data record RUN``."""
    training: Training | None = None
    """The run that is recorded; ``None`` if the data are generated."""

    def commands_in(self, root: Path) -> list[str]:
        """Return the shell's lines that make it, the run being in ``root / training.name``."""
        if self.training is None:
            return [shlex.join(["genpol", "data", "generate", *self.arguments])]
        recorded = _run_in(root, self.training)
        words = shlex.join(self.arguments)
        return [self.training.command_in(root), f"genpol data record {recorded} {words}"]


def folder_name(label: str, env: str, seed: int) -> str:
    """Return the name of a folder that no other label, environment and seed share."""
    return f"{label}-{env}-s{seed}"


def _run_in(root: Path, training: Training) -> str:
    """Return, as a shell reads it, the folder of the only run of a training.

    Training puts it into a folder of the environment, one of the agent and one of the time.
    """
    return f'"$(echo {shlex.quote(str(root / training.name))}/*/*/*)"'


def _in_shell(argument: str, shown: Mapping[str, str]) -> str:
    """Return an argument as a shell reads it, with what is shown in the place of labels."""
    # Split at a pattern with a group, every other piece is a label.
    pieces = PLACE.split(argument)
    quoted = [shown[x] if i % 2 else shlex.quote(x) for i, x in enumerate(pieces) if x]
    return "".join(quoted)

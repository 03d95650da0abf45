"""What an experiment consists of: runs, further evaluations, data sets, and their commands.

A command is what the results record and what a dry run prints: a line that a shell can repeat. It
names no folder of a run by its time, which is unknown beforehand, but by a pattern.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Labels and environments name folders, so they hold nothing that a file system could mistake.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Where overrides and arguments take the folder of a run; Hydra's own {key: value} has a colon.
PLACE = re.compile(rf"\{{({NAME.pattern})\}}")
# Where recorded commands put runs: no folder that was made before, so the same on every machine.
_REPEAT = Path("repeat")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training run, in a folder of its own."""

    name: str
    """Name of the folder."""
    overrides: tuple[str, ...]
    """What follows ``genpol train`` on the command line; ``{label}`` is a run's folder."""

    @property
    def command(self) -> str:
        """The command that repeats the run by itself, as the results record it."""
        return shlex.join(["genpol", "train", *self.overrides])

    def command_in(self, root: Path) -> str:
        """Return the shell's line that trains it in a folder ``root / name``."""
        return f"{self.command} {shlex.quote(f'output={root / self.name}')}"


@dataclass(frozen=True, kw_only=True)
class Run(Training):
    """One training run whose evaluations are results.

    It may begin from others, whose folders its overrides name.
    """

    experiment: str
    """Name of the experiment."""
    label: str
    """The agent's name in the results."""
    env: str
    """Name of the environment."""
    seed: int
    """Seed of the run."""
    needs: tuple[Run, ...] = ()
    """Runs of the same environment and seed whose folders the overrides name."""

    @property
    def command(self) -> str:
        """The shell's line that repeats the run, after those that it needs."""
        if not self.needs:
            return super().command
        return " && ".join(run.command_in(_REPEAT) for run in in_order([self]))

    def command_in(self, root: Path) -> str:
        """Return the shell's line that trains it, those that it needs being in ``root`` too."""
        if not self.needs:
            return super().command_in(root)
        words = [*self.overrides, f"output={root / self.name}"]
        return " ".join(["genpol train", *_in_shell(words, self.needs, root)])


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
        """The shell's line that trains the runs and repeats the evaluation."""
        trained = [run.command_in(_REPEAT) for run in in_order(self.runs)]
        return " && ".join([*trained, self.command_in(_REPEAT)])

    def command_in(self, root: Path) -> str:
        """Return the shell's line that evaluates the run, all runs being in ``root / run.name``."""
        words = _in_shell(self.arguments, self.runs, root)
        return " ".join(["genpol eval", _run_in(root, self.run), "json=true", *words])


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set that runs of an experiment learn from."""

    file: Path
    """File or folder; it is made where it does not exist."""
    arguments: tuple[str, ...]
    """What follows ``genpol data generate``, or ``genpol data record RUN``."""
    training: Training | None = None
    """The run that is recorded; ``None`` if the data are generated."""
    every_checkpoint: bool = False
    """Whether all checkpoints that the run keeps are recorded, and not its last alone."""

    def commands_in(self, root: Path) -> list[str]:
        """Return the shell's lines that make it, the run being in ``root / training.name``."""
        if self.training is None:
            return [shlex.join(["genpol", "data", "generate", *self.arguments])]
        recorded = _run_in(root, self.training)
        if self.every_checkpoint:
            recorded = f"{recorded}/checkpoints/step-*"
        words = shlex.join(self.arguments)
        return [self.training.command_in(root), f"genpol data record {recorded} {words}"]


def named(words: Iterable[str]) -> list[str]:
    """Return the labels of the runs whose folders overrides or arguments take, each once."""
    return list(dict.fromkeys(found for word in words for found in PLACE.findall(word)))


def filled(words: Iterable[str], folders: Mapping[str, Path]) -> list[str]:
    """Return overrides or arguments with the folder of each run, by label, in its place."""
    return [PLACE.sub(lambda found: str(folders[found[1]]), word) for word in words]


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Return the runs and all that they need, each once and behind those that it needs."""
    ordered = [x for run in runs for x in (*in_order(run.needs), run)]
    return list(dict.fromkeys(ordered))


def folder_name(label: str, env: str, seed: int) -> str:
    """Return the name of a folder that no other label, environment and seed share."""
    return f"{label}-{env}-s{seed}"


def _run_in(root: Path, training: Training) -> str:
    """Return, as a shell reads it, the folder of the only run of a training.

    Training puts it into a folder of the environment, one of the agent and one of the time.
    """
    return f'"$(echo {shlex.quote(str(root / training.name))}/*/*/*)"'


def _in_shell(words: Iterable[str], runs: Iterable[Run], root: Path) -> list[str]:
    """Return words as a shell reads them, with the folders of runs in the place of labels."""
    shown = {run.label: _run_in(root, run) for run in runs}
    # Split at a pattern with a group, every other piece is a label.
    return [
        "".join(
            shown[piece] if index % 2 else shlex.quote(piece)
            for index, piece in enumerate(PLACE.split(word))
            if piece
        )
        for word in words
    ]

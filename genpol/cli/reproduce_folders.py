"""What the folders of `genpol reproduce` say: of runs, whether they ended well and how they did."""

from __future__ import annotations

import contextlib
import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from genpol.data.staging import lock
from genpol.errors import DatasetError
from genpol.report.plan import Evaluation, Run, Training
from genpol.report.results import UNFINISHED, ResultRow
from genpol.training.run import AGENT_STEPS, OF_TASK, agent_steps, read_config

# Which column of evals.csv is which metric of the results, beside those of single tasks.
_METRICS = {"return": "return_mean", "success": "success_mean"}
# Which key of what `genpol eval` says is which, beside these.
_RISKS = {
    "var_5": "value_at_risk_5%",
    "cvar_5": "conditional_value_at_risk_5%",
    "var_25": "value_at_risk_25%",
    "cvar_25": "conditional_value_at_risk_25%",
}

_MADE_BY = "command.txt"  # the command of the training that last began in a folder


@dataclass(frozen=True)
class Provenance:
    """Where results come from.

    Attributes:
        commit: Commit of the code.
        machine: Processor, cores and memory.
    """

    commit: str = ""
    machine: str = ""


class Attempt:
    """A training under way in its folder, begun anew or resumed.

    Attributes:
        root: The training's folder, in which run folders lie.
        resumed: The run folder that is continued; ``None`` if a new one is to come.
    """

    def __init__(self, root: Path, item: Training) -> None:
        self.root = root
        self.resumed = _resumable(root, item)
        self._before = _run_folders(root) - {self.resumed}
        root.mkdir(parents=True, exist_ok=True)
        (root / _MADE_BY).write_text(item.command + "\n", encoding="utf-8")

    @property
    def log(self) -> Path:
        """Where the training's output goes."""
        return self.root / "train.log"

    @property
    def folder(self) -> Path | None:
        """The run folder, once training has made it."""
        return _newest(_run_folders(self.root) - self._before)

    @property
    def ended_well(self) -> bool:
        """Whether the run is finished."""
        return self.folder is not None and _ended_well(self.folder)


@contextlib.contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Keep other processes from training under ``root`` for as long as the block lasts.

    Raises:
        DatasetError: If another one does.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a") as file:
        lock(file.fileno(), root, wait=False)
        yield


def retire(root: Path) -> None:
    """Let what lies under ``root`` be neither finished nor resumable; nothing of it is removed."""
    (root / _MADE_BY).unlink(missing_ok=True)


def finished(root: Path, item: Training) -> Path | None:
    """Return the run folder of a training under ``root`` if its last run ended well, evaluated."""
    folder = _newest(_run_folders(root))
    if folder is None or not _made_by(root, item) or not _ended_well(folder):
        return None
    return folder if any(_evaluations(folder / "evals.csv")) else None


def rows(
    folder: Path | None, item: Run, provenance: Provenance, *, finished: bool
) -> list[ResultRow]:
    """Return the evaluations that a run has made so far, marked if it is not finished."""
    if folder is None:
        return []
    evaluations = list(_evaluations(folder / "evals.csv"))
    provenance = replace(provenance, commit=_commit_of(folder) or provenance.commit)
    command = item.command if finished else item.command + UNFINISHED
    columns = dict.fromkeys(column for at in evaluations for column in at)
    return [
        _row(item, metric, float(at[column]), int(at["episodes"]), at, provenance, command)
        for metric, column in _metrics(columns).items()
        for at in evaluations
        if at.get(column)
    ]


def rows_of_evaluation(
    folder: Path, item: Evaluation, said: Mapping[str, Any], provenance: Provenance
) -> list[ResultRow]:
    """Return what an evaluation of the run in ``folder`` said, as of the end of that run.

    Returns and values at risk that JSON says to be nothing are NaN: of a policy with which the
    physics diverge in every episode, say. A success that it does not mention has no row.
    """
    values = {metric: said.get(key) for metric, key in {**_metrics(said), **_RISKS}.items()}
    if values["success"] is None:
        del values["success"]
    *_, last = _evaluations(folder / "evals.csv")
    return [
        _row(
            item,
            metric,
            math.nan if value is None else float(value),
            int(said["episodes"]),
            last,
            provenance,
            item.command,
        )
        for metric, value in values.items()
    ]


def _metrics(columns: Iterable[str]) -> dict[str, str]:
    """Return the columns that are results by their metrics, which ``return/TASK`` are among."""
    tasks = [column for column in columns if column.startswith(OF_TASK)]
    return {f"return/{x.removeprefix(OF_TASK)}": x for x in tasks} | _METRICS


def _row(
    item: Run | Evaluation,
    metric: str,
    value: float,
    episodes: int,
    at: Mapping[str, str],
    provenance: Provenance,
    command: str,
) -> ResultRow:
    """Return one result, as of the row ``at`` of the run's ``evals.csv``."""
    return ResultRow(
        experiment=item.experiment,
        agent=item.label,
        env=item.env,
        seed=item.seed,
        env_steps=int(at["env_steps"]),
        agent_steps=int(at[AGENT_STEPS]),
        gradient_steps=int(at["gradient_steps"]),
        metric=metric,
        value=value,
        episodes=episodes,
        wall_clock_s=round(float(at["wall_clock_s"]), 1),
        commit=provenance.commit,
        machine=provenance.machine,
        command=command,
    )


def said_in(file: Path) -> dict[str, Any] | None:
    """Return what `genpol eval` said into a file: the last line in it, if that is its JSON."""
    try:
        said = json.loads(last_line(file))
    except ValueError:
        return None
    return said if isinstance(said, dict) and {"episodes", "return_mean"} <= said.keys() else None


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _commit_of(folder: Path) -> str:
    """Return the commit that a run noted when it last began; the checkout may have moved on."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        latest = [record, *record.get("resumed", [])][-1]
        git = latest.get("git") or {}
    except (OSError, ValueError):
        return ""
    changes = "+changes" if git.get("dirty") else ""
    return f"{git['commit'][:12]}{changes}" if git.get("commit") else ""


def _run_folders(root: Path) -> set[Path]:
    """Return the folders under ``root`` that training has made: those with a configuration."""
    return {path.parent for path in root.rglob("config.yaml")}


def _newest(folders: set[Path]) -> Path | None:
    """Return the folder made last; names begin with the time."""
    return max(folders, key=lambda folder: folder.name, default=None)


def _resumable(root: Path, item: Training) -> Path | None:
    """Return the run folder to continue: the newest, if this command made it and it was saved."""
    folder = _newest(_run_folders(root))
    if folder is None or not _made_by(root, item):
        return None
    return folder if any((folder / "checkpoints").glob("step-*/manifest.json")) else None


def _made_by(root: Path, item: Training) -> bool:
    """Return whether the training that last began under ``root`` was this one."""
    note = root / _MADE_BY
    return note.is_file() and note.read_text(encoding="utf-8").strip() == item.command


def _ended_well(folder: Path) -> bool:
    """Return whether the run says so itself: one that a signal stopped may exit with 0."""
    try:
        status = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return False
    return bool(status == "finished")


def _evaluations(path: Path) -> Iterator[dict[str, str]]:
    """Read the complete lines of a run's ``evals.csv``, which may be growing.

    Agent steps that an older version did not write follow from the run's configuration.
    """
    if not path.exists():
        return
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    reader = csv.DictReader(complete.splitlines())
    needed = {"env_steps", "gradient_steps", "wall_clock_s", "episodes", "return_mean"}
    missing = sorted(needed - set(reader.fieldnames or needed))
    if missing:
        raise DatasetError(
            f"{path} has no column {', '.join(missing)}: not written by genpol train"
        )
    config = None
    for row in reader:
        if not row.get(AGENT_STEPS):
            config = read_config(path.parent) if config is None else config
            row[AGENT_STEPS] = str(agent_steps(config, int(row["env_steps"])))
        yield row

"""The run folder: what one training was asked, where it ran, and what came of it.

::

    runs/<env>/<agent>/<YYYYmmdd-HHMMSS>-s<seed>/
        config.yaml   the resolved configuration
        run.json      status, command, versions, commit, machine, times
        metrics.csv   one row per logged update       tensorboard/  the same, for TensorBoard
        evals.csv     one row per evaluation
        checkpoints/  see genpol.training.checkpoint  videos/
        replay/       see genpol.training.replay_store, of agents that have one
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import io
import json
import platform
import re
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from omegaconf import OmegaConf

import genpol
from genpol import provenance
from genpol.errors import GenpolError, require

Status = Literal["running", "finished", "interrupted", "failed"]

PROGRESS_COLUMNS = ("env_steps", "gradient_steps", "wall_clock_s")
OF_TASK = "return_mean/"  # and a task's name: a column of evals.csv, where there are several tasks
AGENT_STEPS = "agent_steps"  # a column of evals.csv, which older versions did not write
EVALUATION_COLUMNS = (
    *("episodes", "return_mean", "return_std", "return_min", "return_max"),
    *("length_mean", "diverged"),
)


class Run:
    """A run folder, open for logging.

    Make a new one with :meth:`create` and come back to one with :meth:`open`.

    Attributes:
        path: The folder.
        checkpoints: Where its checkpoints belong.
        videos: Where its videos belong.
        config: The resolved configuration.
        record: The contents of ``run.json``.
    """

    def __init__(self, path: Path, *, tensorboard: bool, wandb_project: str | None) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.videos = path / "videos"
        self.config: dict[str, Any] = _read_config(path / "config.yaml")
        self.record: dict[str, Any] = _read_record(path / "run.json")
        self._metrics = _Table(path / "metrics.csv", PROGRESS_COLUMNS)
        first, *others = PROGRESS_COLUMNS
        self._evaluations = _Table(
            path / "evals.csv",
            (first, AGENT_STEPS, *others, *EVALUATION_COLUMNS),
            complete=self._with_agent_steps,
        )
        self._started = time.monotonic() - self.record["elapsed_s"]
        self._sinks: list[_Sink] = []
        if tensorboard:
            self._sinks.append(_TensorBoard(path / "tensorboard"))
        if wandb_project is not None:
            self._sinks.append(_WandB(self, wandb_project))

    @classmethod
    def create(
        cls,
        root: Path,
        env_name: str,
        agent_name: str,
        seed: int,
        config: Mapping[str, Any],
        command: list[str],
        *,
        tensorboard: bool = True,
        wandb_project: str | None = None,
    ) -> Run:
        """Make ``root/env/agent/<time>-s<seed>``; a number is appended if that is taken.

        Args:
            root: The folder of all runs; made if absent.
            env_name: Name of the environment.
            agent_name: Name of the algorithm.
            seed: Seed of the run.
            config: The resolved configuration.
            command: The command line, as in ``sys.argv``.
            tensorboard: Whether to log for TensorBoard too.
            wandb_project: Log to this Weights & Biases project too.

        Raises:
            MissingExtraError: If ``wandb_project`` is given and wandb is not installed.
            GenpolError: If the folder cannot be made.
        """
        if wandb_project is not None:
            require("wandb", "wandb")  # before the folder exists, so that none is left empty
        now = datetime.now().astimezone()
        record = {
            "status": "running",
            "env": env_name,
            "agent": agent_name,
            "seed": seed,
            "command": shlex.join(command),
            "resumed": [],
            "started": now.isoformat(timespec="seconds"),
            "elapsed_s": 0.0,
            "versions": _versions(),
            "git": _git(),
            "machine": _machine(),
        }
        parent = root / _folder_name(env_name) / _folder_name(agent_name)
        with _writing(parent):
            path = _make_new(parent, f"{now:%Y%m%d-%H%M%S}-s{seed}")
            OmegaConf.save(OmegaConf.create(dict(config)), path / "config.yaml")
            _replace(path / "run.json", json.dumps(record, indent=1))
        return cls(path, tensorboard=tensorboard, wandb_project=wandb_project)

    @classmethod
    def open(cls, path: Path, *, tensorboard: bool = True, wandb_project: str | None = None) -> Run:
        """Open an existing run folder, to read it or to go on; by itself this changes nothing.

        Raises:
            GenpolError: If ``path`` is no run folder.
        """
        return cls(path, tensorboard=tensorboard, wandb_project=wandb_project)

    def log_metrics(
        self,
        env_steps: int,
        gradient_steps: int,
        wall_clock_s: float,
        metrics: Mapping[str, Any],
        *,
        step: int | None = None,
    ) -> None:
        """Append one row of scalar metrics to metrics.csv; new names become new columns.

        Args:
            env_steps: Environment steps so far, over all environments.
            gradient_steps: Optimiser steps so far.
            wall_clock_s: Seconds of training so far, over all resumptions.
            metrics: Numbers, or tensors of one element, by name.
            step: Where TensorBoard and W&B draw them; by default at the environment steps.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        self._metrics.append(numbers | _progress(env_steps, gradient_steps, wall_clock_s))
        for sink in self._sinks:
            sink.log(env_steps if step is None else step, numbers)

    def log_evaluation(
        self,
        env_steps: int,
        gradient_steps: int,
        wall_clock_s: float,
        evaluation: Mapping[str, float],
        *,
        step: int | None = None,
    ) -> None:
        """Append one row to evals.csv, with the agent steps that the environment steps stand for.

        Args:
            env_steps: See :meth:`log_metrics`.
            gradient_steps: See :meth:`log_metrics`.
            wall_clock_s: See :meth:`log_metrics`.
            evaluation: A number for each of :data:`EVALUATION_COLUMNS`; more become new columns.
            step: See :meth:`log_metrics`.
        """
        missing = [name for name in EVALUATION_COLUMNS if name not in evaluation]
        if missing:
            raise ValueError(f"evaluation lacks {', '.join(missing)}")
        progress = _progress(env_steps, gradient_steps, wall_clock_s)
        self._evaluations.append(self._with_agent_steps(dict(evaluation) | progress))
        for sink in self._sinks:
            named = {f"evaluation/{name}": float(value) for name, value in evaluation.items()}
            sink.log(env_steps if step is None else step, named)

    def resume(self, command: list[str], config: Mapping[str, Any] | None = None) -> None:
        """Mark the run as running again; note when, by which command and under which settings.

        Args:
            command: The command line.
            config: The resolved configuration, if it may differ from the one before.
        """
        if config is not None:
            self.config = dict(config)
            _replace(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.config)))
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.record["resumed"].append(
            {
                "at": now,
                "command": shlex.join(command),
                "versions": _versions(),
                "git": _git(),
                "machine": _machine(),
            }
        )
        self._set_status("running")

    def check_tables(self) -> None:
        """Refuse tables that are not a run's, before anything is changed.

        Raises:
            GenpolError: If a column is missing.
        """
        self._metrics.check()
        self._evaluations.check()

    def truncate_to(
        self,
        env_steps: int,
        gradient_steps: int | None = None,
        *,
        evaluated: tuple[int, int] | None = None,
        step: int | None = None,
    ) -> None:
        """Drop the rows of both tables that lie beyond a checkpoint, before resuming from it.

        A row is beyond if it has more environment steps, or, where ``gradient_steps`` is given,
        more of those: learning from a data set takes no environment steps. A last line that a
        killed process left half written is dropped too.

        Args:
            env_steps: Those of the checkpoint.
            gradient_steps: Those of the checkpoint, if they are to count.
            evaluated: Environment and gradient steps of its last evaluation, if not its own: an
                evaluation after that will be made again.
            step: See :meth:`log_metrics`.
        """
        self._metrics.truncate(env_steps, gradient_steps)
        self._evaluations.truncate(*(evaluated or (env_steps, gradient_steps)))
        for sink in self._sinks:
            sink.forget_after(env_steps if step is None else step)

    def finish(self, status: Literal["finished", "interrupted", "failed"]) -> None:
        """Record how the run ended and how long it took, and close what is open."""
        for sink in self._sinks:
            sink.close()
        self._set_status(status)

    def _with_agent_steps(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row of evals.csv with its agent steps, which an older version left out."""
        if row.get(AGENT_STEPS):
            return dict(row)
        return {**row, AGENT_STEPS: agent_steps(self.config, int(row["env_steps"]))}

    def _set_status(self, status: Status) -> None:
        self.record["status"] = status
        self.record["elapsed_s"] = round(time.monotonic() - self._started, 3)
        with _writing(self.path):
            _replace(self.path / "run.json", json.dumps(self.record, indent=1))


def agent_steps(config: Mapping[str, Any], env_steps: int) -> int:
    """Return the policy's decisions in so many environment steps of a run with this configuration.

    An action is held for ``env.action_repeat`` of them. Each action of a chunk counts.
    """
    repeat: int = (config.get("env") or {}).get("action_repeat") or 1
    return env_steps // repeat


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration of the run in ``folder``.

    Raises:
        GenpolError: If it cannot be read.
    """
    return _read_config(folder / "config.yaml")


# --- tables ------------------------------------------------------------------------------------


class _Table:
    """A CSV file that grows by rows, and now and then by columns.

    Args:
        path: The file.
        columns: Those that it has at least, the first ones.
        complete: Fills in what rows of older versions lack.
    """

    def __init__(
        self,
        path: Path,
        columns: Iterable[str],
        complete: Callable[[Mapping[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self._path = path
        self._columns = list(columns)
        self._complete = complete
        self._ready = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and hand it to the operating system; columns it lacks stay empty."""
        if not self._ready:
            self._rewrite(self._read())
            self._ready = True
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self._read()
            self._columns += new
            self._rewrite(rows)
        with _writing(self._path), self._path.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def check(self) -> None:
        """Raise ``GenpolError`` if the file is not such a table."""
        self._read()

    def truncate(self, env_steps: int, gradient_steps: int | None) -> None:
        """Keep the rows up to the given counts."""
        if not self._path.exists():
            return
        kept = [
            row
            for row in self._read()
            if int(row["env_steps"]) <= env_steps
            and (gradient_steps is None or int(row["gradient_steps"]) <= gradient_steps)
        ]
        self._rewrite(kept)

    def _read(self) -> list[dict[str, Any]]:
        """Return all whole rows, and take over the columns of the file.

        A killed process can leave half a line, a power cut a stretch of zeros.
        """
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole))
        names = reader.fieldnames or PROGRESS_COLUMNS
        missing = [name for name in PROGRESS_COLUMNS if name not in names]
        if missing:
            raise GenpolError(
                f"{self._path}: has no column {missing[0]!r}, so it is not a run's; move it away"
            )
        self._columns += [name for name in names if name not in self._columns]
        rows = [row for row in reader if None not in row.values()]
        return [self._complete(row) for row in rows if row["env_steps"].isdigit()]

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with _writing(self._path):
            _replace(self._path, text.getvalue())


def _progress(env_steps: int, gradient_steps: int, wall_clock_s: float) -> dict[str, Any]:
    values = (int(env_steps), int(gradient_steps), round(float(wall_clock_s), 3))
    return dict(zip(PROGRESS_COLUMNS, values, strict=True))


# --- other places to log to --------------------------------------------------------------------


class _Sink(Protocol):
    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None: ...
    def forget_after(self, env_steps: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    """TensorBoard's event files; neither imported nor made before the first number comes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._purge_step: int | None = None

    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=self._purge_step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, env_steps)

    def forget_after(self, env_steps: int) -> None:
        self._purge_step = env_steps + 1  # TensorBoard hides this step and all later ones

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB:
    """Weights & Biases; one run there per run folder, over all resumptions."""

    def __init__(self, run: Run, project: str) -> None:
        wandb = require("wandb", "wandb")
        name = "-".join(run.path.parts[-3:])
        self._run = wandb.init(
            project=project, name=name, id=name, resume="allow", dir=run.path, config=run.config
        )
        # An axis of our own: wandb's own step only grows, and a resumed run goes back.
        self._run.define_metric("*", step_metric="env_steps")

    def log(self, env_steps: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "env_steps": env_steps})

    def forget_after(self, env_steps: int) -> None:
        """Leave what is online: rows logged again at the same step show on top of it."""

    def close(self) -> None:
        self._run.finish()


# --- files and facts ---------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise GenpolError(_not_a_run(path, error.strerror)) from error
    if not isinstance(content, dict):
        raise GenpolError(_not_a_run(path, "not a mapping"))
    return {str(key): value for key, value in content.items()}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GenpolError(_not_a_run(path, error.strerror)) from error
    except ValueError as error:
        raise GenpolError(_not_a_run(path, "not valid JSON")) from error
    if not isinstance(record, dict) or not {"resumed", "elapsed_s"} <= record.keys():
        raise GenpolError(_not_a_run(path, "not the record of a run"))
    return record


def _not_a_run(path: Path, reason: str | None) -> str:
    return f"{path}: cannot be read ({reason}); give a run folder, such as runs/ENV/AGENT/TIME-s0"


def _folder_name(name: str) -> str:
    """Return ``name`` without what a file system or a shell would take amiss."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip(".-") or "unnamed"


def _make_new(parent: Path, name: str) -> Path:
    """Make a folder that was not there, with -2, -3, ... appended to its name if need be."""
    parent.mkdir(parents=True, exist_ok=True)
    attempt = 1
    while True:
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            attempt += 1
        else:
            return path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in one line what could not be written and how to mend it."""
    try:
        yield
    except OSError as error:
        raise GenpolError(
            f"{path}: cannot be written ({error.strerror}); free some disk space, make the folder "
            "writable, or run in another one"
        ) from error


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part."""
    staged = path.with_name(f".tmp-{path.name}")
    staged.write_text(text, encoding="utf-8", newline="")
    staged.replace(path)


def _versions() -> dict[str, str | None]:
    """Return the versions of what decides a result.

    ``None`` stands for what is not installed though it must be; other simulators are told if they
    are there.
    """
    versions: dict[str, str | None] = {"genpol": genpol.__version__}
    for package in ("torch", "torchrl", "tensordict", "mujoco"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    for simulator in ("dm-control", "gymnasium", "ogbench", "metaworld", "isaaclab", "mjlab"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[simulator] = importlib.metadata.version(simulator)
    return versions


def _git() -> dict[str, Any] | None:
    state = provenance.git_state()
    return None if state is None else asdict(state)


def _machine() -> dict[str, Any]:
    return {
        "cpu": provenance.processor(),
        "cores": provenance.usable_cores(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }

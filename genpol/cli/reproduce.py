"""`genpol reproduce`: run an experiment over its seeds and record every evaluation.

Each run is a process of its own, `genpol train ...`, whose folder is kept under
``runs/reproduce/NAME/``. Its evaluations go into ``NAME.csv`` as they come, marked as unfinished
until the run has ended well; then the same rows are written without the mark. Starting the command
again therefore skips what is finished, resumes what has a checkpoint, and never has a run twice.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Literal

from genpol.cli.arguments import ArgumentParser
from genpol.errors import DatasetError
from genpol.provenance import code_version, machine
from genpol.report import experiment, results
from genpol.report.experiment import Experiment, Run
from genpol.report.results import ResultRow

SUMMARY = "run an experiment over its seeds and record the results"
USAGE = """
usage: genpol reproduce NAME [--seeds 0,1] [--only KEY] [--jobs N]
                             [--dry-run] [--continue] [--fresh]

Trains every agent of the experiment on each of its environments and seeds, and records each
evaluation in assets/results/NAME.csv. Data sets that it needs are made first, where they do not
exist. Ctrl-C stops the run at its next checkpoint; the same command starts again where it stopped:
finished runs are skipped, an interrupted one is resumed.

  NAME           an experiment of `genpol list experiments`, or the path of a YAML file
  --seeds 0,1    seeds to run instead of the experiment's own
  --only KEY     only this agent label or environment; several with commas
  --jobs N       runs at a time (1); wall-clock times are comparable with 1 only
  --dry-run      print the commands and run nothing
  --continue     go on with the other runs after one has failed
  --fresh        run anew what is finished or was interrupted, and replace its rows; needed after
                 a recipe or a default has changed, which the commands do not show
  --output DIR   where the run folders go (runs/reproduce)
  --results DIR  where the CSV goes (assets/results)

examples:
  genpol reproduce gorl-hopperstand
  genpol reproduce gorl-controls --only gorl-identity,ppo --seeds 0
  genpol reproduce gorl-dmc --dry-run
"""

Outcome = Literal["finished", "failed", "interrupted", "skipped"]

# Which column of evals.csv is which metric of the results.
_METRICS = {"return": "return_mean", "success": "success_mean"}
_POLL_S = 1.0
_INTERRUPTED = 130


def run(arguments: list[str]) -> int:
    """Run the experiment that the arguments name.

    Returns:
        0 if every run is finished, 1 if one failed, 130 if it was interrupted.

    Raises:
        ConfigError: If an argument or the experiment is wrong.
    """
    options = _parser().parse_args(arguments)
    chosen = experiment.load(options.name)
    plan = chosen.plan(options.seeds, options.only)
    folder = results.results_folder() if options.results is None else options.results
    session = _Session(
        root=options.output / chosen.name,
        results_file=folder / f"{chosen.name}.csv",
        keep_going=options.keep_going,
        fresh=options.fresh,
    )
    data_sets = chosen.data_sets(plan)
    if options.dry_run:
        for file, command in data_sets.items():
            done = "   # exists" if file.exists() else ""
            _say(f"{shlex.join(['genpol', 'data', 'generate', *command])}{done}")
        for item in plan:
            done = "   # finished" if session.is_finished(item) else ""
            _say(f"{item.command}{done}")
        return 0
    _announce(chosen, plan, session)
    with _forwarding_signals(session):
        for file, command in data_sets.items():
            if not file.exists() and (code := session.make_data(file, command)) != 0:
                return code
        outcomes = session.run_all(plan, options.jobs)
    return _conclude(outcomes, session)


def train_command(overrides: Sequence[str], output: Path) -> list[str]:
    """Return the command of a new run, whose folder is made somewhere under ``output``."""
    return [*_train(), *overrides, f"output={_quoted(output)}"]


def resume_command(run_folder: Path) -> list[str]:
    """Return the command that continues the run in ``run_folder``."""
    return [*_train(), f"resume={run_folder}"]


def generate_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that makes a data set."""
    return [*_genpol(), "data", "generate", *arguments]


def _train() -> list[str]:
    return [*_genpol(), "train"]


def _genpol() -> list[str]:
    return [sys.executable, "-m", "genpol.cli.main"]


def _quoted(path: Path) -> str:
    """Return a path as the override grammar reads it back, signs such as ``=`` included."""
    return '"' + str(path).replace('"', '\\"') + '"'


@dataclass
class _Session:
    """The runs of one invocation: where they live, which are under way, whether to stop."""

    root: Path
    results_file: Path
    keep_going: bool = False
    fresh: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    signalled: threading.Event = field(default_factory=threading.Event)
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _provenance: tuple[str, str] = ("", "")

    def run_all(self, plan: Sequence[Run], jobs: int) -> list[Outcome]:
        """Run what is not finished, ``jobs`` at a time, and return what became of each."""
        self._provenance = code_version(), machine()
        with ThreadPoolExecutor(jobs) as pool:
            pending = [pool.submit(self.run_one, item) for item in plan]
            for future in pending:
                _wait(future)
        return [future.result() for future in pending]

    def make_data(self, file: Path, arguments: Sequence[str]) -> int:
        """Make a data set, or go on making it; return 0, or the code to end with."""
        _say(f"{file}: is made first")
        code = self._call(generate_command(arguments), None, lambda: None)
        if self.signalled.is_set():
            return _INTERRUPTED
        if code != 0 or not file.exists():
            _complain(f"{file} was not made (exit code {code}); see above")
            return 1
        return 0

    def run_one(self, item: Run) -> Outcome:
        """Train one run to its end, unless that has been done."""
        if not self.fresh and self.is_finished(item):
            _say(f"{item.name}: already finished")
            return "skipped"
        if self.stop.is_set():
            return "interrupted"
        root = self.root / item.name
        before = _run_folders(root)
        resumed = None if self.fresh else _resumable(root, item)
        if resumed is None:
            command = train_command(item.overrides, root)
        else:
            command = resume_command(resumed)
            before.discard(resumed)
        root.mkdir(parents=True, exist_ok=True)
        (root / "command.txt").write_text(item.command + "\n", encoding="utf-8")
        _say(f"{item.name}: {'resumes' if resumed else 'starts'}, log in {root / 'train.log'}")
        try:
            code = self._train(item, command, root, before)
            return self._finish(item, code, root, before)
        except BaseException:  # the results cannot be written, say: the others' cannot either
            self.send(signal.SIGTERM)
            raise

    def is_finished(self, item: Run) -> bool:
        """Return whether the results hold this run, made by this very command, to its end."""
        rows = results.rows_of(self.results_file)
        return any(_same_run(row, item) and row.command == item.command for row in rows)

    def send(self, number: int) -> None:
        """Start no more runs and pass a signal on to those under way."""
        self.stop.set()
        self.signalled.set()
        with self._lock:
            children = list(self._children)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    def _train(self, item: Run, command: list[str], root: Path, before: set[Path]) -> int:
        """Run ``command`` to its end, recording evaluations as they come; return its exit code."""
        recorded = 0

        def record() -> None:
            nonlocal recorded
            recorded = self._record(item, root, before, recorded)

        with (root / "train.log").open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            return self._call(command, log, record)

    def _call(self, command: list[str], log: IO[bytes] | None, poll: Callable[[], None]) -> int:
        """Run a command to its end, polling now and then; return its exit code."""
        # In a session of its own, so that the terminal's Ctrl-C comes once, through us.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            start_new_session=True,
        )
        with self._lock:
            self._children.append(child)
        if self.signalled.is_set():  # while the process was being made
            child.send_signal(signal.SIGINT)
        while child.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_S)
            poll()
        with self._lock:
            self._children.remove(child)
        return child.returncode

    def _record(self, item: Run, root: Path, before: set[Path], recorded: int) -> int:
        """Write new evaluations into the results, as of an unfinished run; return their number."""
        rows = self._rows(item, root, before, finished=False)
        if len(rows) > recorded:
            self._replace(item, rows)
            last = rows[-1]
            _say(
                f"{item.name}: {last.env_steps:,} steps, {last.metric} {last.value:.4g},"
                f" {last.wall_clock_s / 60:.1f} min"
            )
        return max(recorded, len(rows))

    def _finish(self, item: Run, code: int, root: Path, before: set[Path]) -> Outcome:
        rows = self._rows(item, root, before, finished=True)
        folder = _newest(_run_folders(root) - before)
        if code == 0 and rows and folder is not None and _ended_well(folder):
            self._replace(item, rows)
            _say(f"{item.name}: finished")
            return "finished"
        if self.signalled.is_set():
            _say(f"{item.name}: interrupted; the same command resumes it")
            return "interrupted"
        if not self.keep_going:
            self.stop.set()
        reason = f"exit code {code}" if code else "it ended before its last evaluation"
        _complain(f"{item.name} failed ({reason}): {_last_line(root / 'train.log')}")
        return "failed"

    def _replace(self, item: Run, rows: list[ResultRow]) -> None:
        results.replace(self.results_file, rows, obsolete=lambda row: _same_run(row, item))

    def _rows(self, item: Run, root: Path, before: set[Path], *, finished: bool) -> list[ResultRow]:
        folder = _newest(_run_folders(root) - before)
        if folder is None:
            return []
        commit, machine = self._provenance
        commit = _commit_of(folder) or commit
        command = item.command if finished else item.command + results.UNFINISHED
        evaluations = list(_evaluations(folder / "evals.csv"))
        return [
            ResultRow(
                experiment=item.experiment,
                agent=item.label,
                env=item.env,
                seed=item.seed,
                env_steps=int(evaluation["env_steps"]),
                gradient_steps=int(evaluation["gradient_steps"]),
                metric=metric,
                value=float(evaluation[column]),
                episodes=int(evaluation["episodes"]),
                wall_clock_s=round(float(evaluation["wall_clock_s"]), 1),
                commit=commit,
                machine=machine,
                command=command,
            )
            for metric, column in _METRICS.items()
            for evaluation in evaluations
            if evaluation.get(column)
        ]


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


def _same_run(row: ResultRow, item: Run) -> bool:
    return (row.agent, row.env, row.seed) == (item.label, item.env, item.seed)


def _run_folders(root: Path) -> set[Path]:
    """Return the folders under ``root`` that training has made: those with a configuration."""
    return {path.parent for path in root.rglob("config.yaml")}


def _newest(folders: set[Path]) -> Path | None:
    """Return the folder made last; names begin with the time."""
    return max(folders, key=lambda folder: folder.name, default=None)


def _resumable(root: Path, item: Run) -> Path | None:
    """Return the run folder to continue: the newest, if this command made it and it was saved."""
    made_by = root / "command.txt"
    if not made_by.is_file() or made_by.read_text(encoding="utf-8").strip() != item.command:
        return None
    folder = _newest(_run_folders(root))
    if folder is None or not any((folder / "checkpoints").glob("step-*/manifest.json")):
        return None
    return folder


def _ended_well(folder: Path) -> bool:
    """Return whether the run says so itself: one that a signal stopped may exit with 0."""
    try:
        status = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError):
        return False
    return bool(status == "finished")


def _evaluations(path: Path) -> Iterator[dict[str, str]]:
    """Read the complete lines of a run's ``evals.csv``, which may be growing."""
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
    yield from reader


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


@contextlib.contextmanager
def _forwarding_signals(session: _Session) -> Iterator[None]:
    """Pass Ctrl-C and polite kills on to the runs for as long as the block lasts."""

    def forward(number: int, frame: FrameType | None) -> None:
        # A closed terminal cannot come back for a second try; to a run it is a SIGTERM.
        session.send(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    numbers = [
        signal.SIGINT,
        signal.SIGTERM,
        *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
    ]
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(future: Future[Outcome]) -> None:
    """Wait in short spells: Python runs signal handlers between them, and never inside one."""
    while not future.done():
        time.sleep(0.05)


def _announce(chosen: Experiment, plan: Sequence[Run], session: _Session) -> None:
    finished = sum(session.is_finished(item) for item in plan)
    _say(f"{chosen.name}: {' '.join(chosen.description.split())}")
    _say(f"compute: {' '.join(chosen.compute.split())}")
    _say(f"{len(plan)} runs, {finished} of them finished; results in {session.results_file}")


def _conclude(outcomes: list[Outcome], session: _Session) -> int:
    done = sum(outcome in ("finished", "skipped") for outcome in outcomes)
    _say(f"{done} of {len(outcomes)} runs finished; `genpol report {session.results_file.stem}`")
    if "failed" in outcomes:
        return 1
    return 0 if done == len(outcomes) else _INTERRUPTED


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _complain(line: str) -> None:
    sys.stderr.write(f"genpol: error: {line}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="genpol reproduce", add_help=False)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--seeds", type=_seeds)
    parser.add_argument("--only", type=lambda text: text.split(","), default=())
    parser.add_argument("--jobs", type=_jobs, default=1)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--continue", action="store_true", dest="keep_going")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--results", type=Path)
    return parser


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0,1,2") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r}: seeds are distinct and at least 0")
    return seeds


def _jobs(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")
    return int(text)

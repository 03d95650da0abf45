"""One invocation of `genpol reproduce`: it makes data, trains, evaluates and records."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from genpol.cli import reproduce_folders as folders
from genpol.cli import reproduce_processes as commands
from genpol.cli.reproduce_folders import Attempt, Provenance
from genpol.cli.reproduce_processes import Processes
from genpol.errors import DatasetError
from genpol.provenance import code_version, machine
from genpol.report import results
from genpol.report.experiment import Experiment
from genpol.report.plan import DataSet, Evaluation, Run, Training, filled, folder_name
from genpol.report.results import UNFINISHED, ResultRow

Outcome = Literal["finished", "failed", "interrupted", "skipped", "not begun"]

INTERRUPTED = 130


class Session:
    """The runs of one invocation: where they live, what is finished, what is to follow.

    Attributes:
        processes: Those under way.
        results_file: Where results are recorded.
    """

    def __init__(
        self,
        chosen: Experiment,
        *,
        root: Path,
        results_file: Path,
        keep_going: bool = False,
    ) -> None:
        """Begin a session.

        Args:
            chosen: The experiment.
            root: Where the folders of runs and evaluations go.
            results_file: Where results are recorded.
            keep_going: Whether to go on with the others after one has failed.
        """
        self.processes = Processes()
        self.results_file = results_file
        self._chosen = chosen
        self._root = root
        self._keep_going = keep_going
        self._provenance = Provenance()
        self._todo: list[Run] = []
        self._waiting: list[Evaluation] = []
        self._ended: set[Run] = set()
        self._changed = threading.Condition()

    def run_all(
        self, plan: Sequence[Run], evaluations: Sequence[Evaluation], jobs: int
    ) -> list[Outcome]:
        """Do what is not finished, ``jobs`` at a time, and return what became of each.

        Args:
            plan: The runs, in the order to begin them; all that they need is among them.
            evaluations: Those to make of them.
            jobs: How many at a time.
        """
        self._provenance = Provenance(code_version(), machine())
        self._todo, self._waiting = list(plan), list(evaluations)
        with ThreadPoolExecutor(jobs) as pool:
            workers = [pool.submit(self._work) for _ in range(jobs)]
            for worker in workers:
                _wait(worker)
        return [outcome for worker in workers for outcome in worker.result()]

    def is_finished(self, item: Run | Evaluation) -> bool:
        """Return whether the results hold this item, made by this very command, to its end."""
        rows = results.rows_of(self.results_file)
        return any(_is_of(row, item) and row.command == item.command for row in rows)

    def retire(self, items: Sequence[Run | Evaluation]) -> None:
        """Let finished or interrupted items count as not begun: the next attempt makes them anew.

        Their rows stay, marked as unfinished, until there are others.
        """

        def retired(row: ResultRow) -> bool:
            return any(_is_of(row, item) for item in items)

        rows = [row for row in results.rows_of(self.results_file) if retired(row)]
        if rows:
            marked = [
                replace(row, command=row.command.removesuffix(UNFINISHED) + UNFINISHED)
                for row in rows
            ]
            results.replace(self.results_file, marked, obsolete=retired)
        for item in items:
            folders.retire(self._root / item.name)

    def make_data(self, data: DataSet) -> int:
        """Make a data set, or go on making it; return 0, or the code to end with."""
        say(f"{data.file}: is made first")
        if data.training is None:
            command = commands.generate_command(data.arguments)
        else:
            folder = self._train_for_data(data.training)
            if folder is None:
                return INTERRUPTED if self.processes.signalled.is_set() else 1
            kept = sorted(folder.glob("checkpoints/step-*"))
            acting = kept if data.every_checkpoint else [folder]
            command = commands.record_command(acting, data.arguments)
        code = self.processes.call(command)
        if self.processes.signalled.is_set():
            return INTERRUPTED
        if code != 0 or not data.file.exists():
            complain(f"{data.file} was not made (exit code {code}); see above")
            return 1
        return 0

    def _train_for_data(self, item: Training) -> Path | None:
        """Return the run folder of a finished training, or ``None`` if it cannot be had now."""
        folder = folders.finished(self._root / item.name, item)
        if folder is None:
            with folders.claimed(self._root / item.name):
                attempt, code = self._train(item)
            well = code == 0 and attempt.ended_well
            if self._outcome(item, code, attempt.log, well=well) == "finished":
                folder = attempt.folder
        return folder

    def _work(self) -> list[Outcome]:
        """Train runs, and make the evaluations that waited for no other, until all are begun."""
        outcomes: list[Outcome] = []
        while (item := self._next()) is not None:
            try:
                outcomes.append(self._run(item))
            except BaseException:  # the results cannot be written, say: the others' cannot either
                self.processes.send(signal.SIGTERM)
                raise
            finally:
                ready = self._end(item)
            outcomes += [self._evaluate(x) for x in ready]
        return outcomes

    def _next(self) -> Run | None:
        """Return the first run that waits for no other, once there is one; ``None`` at the end."""
        with self._changed:
            while self._todo:
                ready = [x for x in self._todo if self._ended.issuperset(x.needs)]
                if ready:
                    self._todo.remove(ready[0])
                    return ready[0]
                self._changed.wait()
        return None

    def _end(self, item: Run) -> list[Evaluation]:
        """Let others wait no longer for a run; return the evaluations that waited for it last."""
        with self._changed:
            self._ended.add(item)
            self._changed.notify_all()
            ready = [x for x in self._waiting if self._ended.issuperset(x.runs)]
            self._waiting = [x for x in self._waiting if x not in ready]
        return ready

    def _run(self, item: Run) -> Outcome:
        """Train one run to its end, unless that has been done."""
        if self.is_finished(item):
            say(f"{item.name}: already finished")
            return "skipped"
        lacking = [run.name for run in item.needs if not self.is_finished(run)]
        if lacking and not self.processes.signalled.is_set():
            complain(f"{item.name} is not begun: {' and '.join(lacking)} did not finish")
            return "not begun"
        if self.processes.stop.is_set():
            return "interrupted"
        found = self._folders_of(item, item.needs)
        if found is None:
            return "failed"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folders.claimed(self._root / item.name))
            except DatasetError as error:
                return self._fail(f"{item.name}: {error}")
            return self._train_and_record(item, found)

    def _folders_of(self, item: Run | Evaluation, runs: Sequence[Run]) -> dict[str, Path] | None:
        """Return the folders of finished runs by label; complain if one is gone."""
        found: dict[str, Path] = {}
        for run in runs:
            folder = folders.finished(self._root / run.name, run)
            if folder is None:
                self._fail(
                    f"{item.name} cannot be made: {run.name} is recorded as finished, but its "
                    f"folder {self._root / run.name} holds no such run; `--fresh --only "
                    f"{run.label}` trains it anew"
                )
                return None
            found[run.label] = folder
        return found

    def _train_and_record(self, item: Run, found: Mapping[str, Path]) -> Outcome:
        recorded = 0

        def record(attempt: Attempt) -> None:
            nonlocal recorded
            recorded = self._record(item, attempt, recorded)

        attempt, code = self._train(item, found, poll=record)
        rows = folders.rows(attempt.folder, item, self._provenance, finished=True)
        well = code == 0 and bool(rows) and attempt.ended_well
        if well:
            self._replace(item, rows)
        return self._outcome(item, code, attempt.log, well=well)

    def _train(
        self,
        item: Training,
        found: Mapping[str, Path] = MappingProxyType({}),
        *,
        poll: Callable[[Attempt], None] = lambda _: None,
    ) -> tuple[Attempt, int]:
        """Run or resume a training to its end; return its exit code too.

        Args:
            item: The training.
            found: Folders of the runs that it begins from, by label.
            poll: Called now and then.
        """
        attempt = Attempt(self._root / item.name, item)
        if attempt.resumed is None:
            command = commands.train_command(filled(item.overrides, found), attempt.root)
            if isinstance(item, Run):
                self._retire_what_is_made_of(item)
        else:
            command = commands.resume_command(attempt.resumed)
        say(f"{item.name}: {'resumes' if attempt.resumed else 'starts'}, log in {attempt.log}")
        with attempt.log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            code = self.processes.call(command, output=log, poll=lambda: poll(attempt))
        return attempt, code

    def _record(self, item: Run, attempt: Attempt, recorded: int) -> int:
        """Write new evaluations into the results, as of an unfinished run; return their number."""
        rows = folders.rows(attempt.folder, item, self._provenance, finished=False)
        if len(rows) > recorded:
            self._replace(item, rows)
            last = rows[-1]
            say(
                f"{item.name}: {last.env_steps:,} steps, {last.metric} {last.value:.4g},"
                f" {last.wall_clock_s / 60:.1f} min"
            )
        return max(recorded, len(rows))

    def _evaluate(self, item: Evaluation) -> Outcome:
        """Make one evaluation of a finished run, unless that has been done."""
        if self.is_finished(item):
            say(f"{item.name}: already finished")
            return "skipped"
        if self.processes.stop.is_set() or not all(self.is_finished(run) for run in item.runs):
            return "interrupted"
        found = self._folders_of(item, item.runs)
        if found is None:
            return "failed"
        folder = found[item.run.label]
        command = commands.eval_command(folder, filled(item.arguments, found))
        said, code, log = self._ask(item, command)
        if said is not None:
            self._replace(item, folders.rows_of_evaluation(folder, item, said, self._provenance))
        return self._outcome(item, code, log, well=said is not None)

    def _ask(self, item: Evaluation, command: list[str]) -> tuple[dict[str, Any] | None, int, Path]:
        """Run `genpol eval`; return what it says, if it ends well, its exit code and its log."""
        root = self._root / item.name
        root.mkdir(parents=True, exist_ok=True)
        answer, log = root / "evaluation.json", root / "evaluation.log"
        say(f"{item.name}: starts, log in {log}")
        with answer.open("wb") as output, log.open("ab") as errors:
            errors.write(f"$ {shlex.join(command)}\n".encode())
            errors.flush()
            code = self.processes.call(command, output=output, errors=errors)
        said = folders.said_in(answer) if code == 0 else None
        return said, code, log

    def _outcome(self, item: Training | Evaluation, code: int, log: Path, *, well: bool) -> Outcome:
        """Say what became of an item, and stop the others if it failed."""
        if well:
            say(f"{item.name}: finished")
            return "finished"
        if self.processes.signalled.is_set():
            say(f"{item.name}: interrupted; the same command, without --fresh, resumes it")
            return "interrupted"
        lacking = (
            "without an answer" if isinstance(item, Evaluation) else "before its last evaluation"
        )
        reason = f"exit code {code}" if code else f"it ended {lacking}"
        return self._fail(f"{item.name} failed ({reason}): {folders.last_line(log)}")

    def _fail(self, line: str) -> Outcome:
        if not self._keep_going:
            self.processes.stop.set()
        complain(line)
        return "failed"

    def _retire_what_is_made_of(self, item: Run) -> None:
        """Let runs that began from what this one was before begin anew, too."""
        for label in self._chosen.made_of(item.label):
            folders.retire(self._root / folder_name(label, item.env, item.seed))

    def _replace(self, item: Run | Evaluation, rows: list[ResultRow]) -> None:
        """Put rows in the place of the item's, and of all that was made of it as it was before."""
        stale = self._chosen.made_of(item.label) if isinstance(item, Run) else set()
        results.replace(
            self.results_file,
            rows,
            obsolete=lambda row: (
                (row.env, row.seed) == (item.env, item.seed) and row.agent in {item.label, *stale}
            ),
        )


def _is_of(row: ResultRow, item: Run | Evaluation) -> bool:
    return (row.agent, row.env, row.seed) == (item.label, item.env, item.seed)


def _wait(future: Future[list[Outcome]]) -> None:
    """Wait in short spells: Python runs signal handlers between them, and never inside one."""
    while not future.done():
        time.sleep(0.05)


def say(line: str) -> None:
    """Tell the user what is going on."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def complain(line: str) -> None:
    """Tell the user what went wrong."""
    sys.stderr.write(f"genpol: error: {line}\n")
    sys.stderr.flush()

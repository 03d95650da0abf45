"""`genpol reproduce`: run an experiment over its seeds and record every evaluation.

Each run is a process of its own, `genpol train ...`, whose folder is kept under
``runs/reproduce/NAME/``. Its evaluations go into ``NAME.csv`` as they come, marked as unfinished
until the run has ended well; then the same rows are written without the mark. Starting the command
again therefore skips what is finished, resumes what has a checkpoint, and never has a run twice.
What an experiment consists of is told by :class:`genpol.report.experiment.Experiment`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from genpol.cli.arguments import ArgumentParser
from genpol.cli.reproduce_session import INTERRUPTED, Outcome, Session, say
from genpol.report import experiment, results
from genpol.report.experiment import Experiment
from genpol.report.plan import DataSet, Evaluation, Run

SUMMARY = "run an experiment over its seeds and record the results"
USAGE = """
usage: genpol reproduce NAME [--seeds 0,1] [--only KEY] [--jobs N]
                             [--dry-run] [--continue] [--fresh]

Trains every agent of the experiment on each of its environments and seeds, and records each
evaluation in assets/results/NAME.csv. Data sets that it needs are made first, where they do not
exist: generated, or recorded from a run that is trained for it. Further evaluations of the
experiment, such as those of a corrected policy, are made as soon as the runs that they need are
finished, and so are runs that begin from others. Ctrl-C stops the run at its next checkpoint; the
same command starts again where it stopped: what is finished is skipped, an interrupted run is
resumed.

  NAME           an experiment of `genpol list experiments`, or the path of a YAML file
  --seeds 0,1    seeds to run instead of the experiment's own
  --only KEY     only this label, of a run or of an evaluation (and the runs that it needs), or this
                 environment; several with commas
  --jobs N       runs at a time (1); wall-clock times are comparable with 1 only
  --dry-run      print the commands and run nothing
  --continue     go on with the other runs after one has failed
  --fresh        run anew what is finished or was interrupted, and replace its rows; needed after
                 a recipe or a default has changed, which the commands do not show. With --only
                 LABEL this label alone, not the finished runs that it needs
  --output DIR   where the run folders go (runs/reproduce)
  --results DIR  where the CSV goes (assets/results)

examples:
  genpol reproduce gorl-hopperstand
  genpol reproduce gorl-controls --only gorl-identity,ppo --seeds 0
  genpol reproduce gorl-dmc --dry-run
"""


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
    evaluations = chosen.plan_evaluations(options.seeds, options.only)
    data_sets = chosen.data_sets(plan)
    folder = results.results_folder() if options.results is None else options.results
    root = options.output / chosen.name
    session = Session(
        chosen,
        root=root,
        results_file=folder / f"{chosen.name}.csv",
        keep_going=options.keep_going,
    )
    if options.dry_run:
        _print_commands(data_sets, [*plan, *evaluations], session, root)
        return 0
    if options.fresh:
        labels = _labels(chosen, options.only)
        items: list[Run | Evaluation] = [*plan, *evaluations]
        session.retire([item for item in items if item.label in labels])
    _announce(chosen, plan, evaluations, session)
    with session.processes.forwarding_signals():
        for data in data_sets:
            if not data.file.exists():
                code = session.make_data(data)
                if code != 0:
                    return code
        outcomes = session.run_all(plan, evaluations, options.jobs)
    return _conclude(outcomes, session)


def _labels(chosen: Experiment, only: Sequence[str]) -> list[str]:
    """Return the labels that are asked for by name, or else all."""
    known = [*chosen.runs, *chosen.evaluations]
    return [label for label in known if label in only] or known


def _print_commands(
    data_sets: Sequence[DataSet],
    plan: Sequence[Run | Evaluation],
    session: Session,
    root: Path,
) -> None:
    """Print what would be run, in the order of a shell that does one after the other."""
    for data in data_sets:
        done = "   # exists" if data.file.exists() else ""
        for command in data.commands_in(root):
            say(f"{command}{done}")
    for item in plan:
        done = "   # finished" if session.is_finished(item) else ""
        say(f"{item.command_in(root)}{done}")


def _announce(
    chosen: Experiment, plan: Sequence[Run], evaluations: Sequence[Evaluation], session: Session
) -> None:
    items: list[Run | Evaluation] = [*plan, *evaluations]
    finished = sum(session.is_finished(item) for item in items)
    what = f"{len(plan)} runs" + (f" and {len(evaluations)} evaluations" if evaluations else "")
    say(f"{chosen.name}: {' '.join(chosen.description.split())}")
    say(f"compute: {' '.join(chosen.compute.split())}")
    say(f"{what}, {finished} of them finished; results in {session.results_file}")


def _conclude(outcomes: Sequence[Outcome], session: Session) -> int:
    done = sum(outcome in ("finished", "skipped") for outcome in outcomes)
    say(f"{done} of {len(outcomes)} finished; `genpol report {session.results_file.stem}`")
    if "failed" in outcomes:
        return 1
    return 0 if done == len(outcomes) else INTERRUPTED


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

"""Further evaluations of experiments, with a few lines in place of `genpol eval`."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpol.cli import report, reproduce_processes
from genpol.report import experiment, results

if TYPE_CHECKING:
    from tests.cli.conftest import Scene

# Says how good the run is in which it finds itself, and of which others it was told.
EVALUATOR = """
import json, os, signal, sys, time
arguments = dict(item.split("=", 1) for item in sys.argv[2:])
mode = os.environ["FAKE"]
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
open(os.environ["BEGUN"], "w").close()
print("evaluating", sys.argv[1:], file=sys.stderr)
while mode == "wait for it" and not stopped:
    time.sleep(0.01)
if mode == "silent":
    sys.exit(0)
if mode == "broken evaluation" or stopped:
    sys.exit("genpol: error: the wind was wrong")
names = [part + "_%d%%" % level for level in (5, 25)
         for part in ("value_at_risk", "conditional_value_at_risk")]
said = {name: 10.0 + index for index, name in enumerate(names)}
said |= {"episodes": int(arguments["episodes"]), "return_mean": 7.5, "success_mean": 0.25}
if mode == "diverged":
    said = {"episodes": 0, "return_mean": None}
print("a warning on the way")
print(json.dumps(said))
"""


@pytest.fixture
def evaluated(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Let the experiment evaluate its runs once more."""
    arguments = '[episodes=4, "corrector=cdsa:{ppo}"]'
    scene.add(f"evaluations:\n  corrected: {{run: gorl, arguments: {arguments}}}\n")
    evaluator = scene.folder / "evaluator.py"
    evaluator.write_text(EVALUATOR)
    monkeypatch.setenv("BEGUN", str(scene.folder / "begun"))

    def evaluate(run_folder: Path, arguments: Sequence[str]) -> list[str]:
        scene.calls.append(("eval", str(run_folder), *arguments))
        return [sys.executable, "-S", str(evaluator), str(run_folder), *arguments]

    monkeypatch.setattr(reproduce_processes, "eval_command", evaluate)
    return scene


BOTH = ("--seeds", "0")


def kinds(scene: Scene) -> list[str]:
    return [call[0] for call in scene.calls]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_evaluation_is_recorded_once_its_runs_are_finished(evaluated: Scene, jobs: str) -> None:
    assert evaluated.run(*BOTH, "--jobs", jobs) == 0
    assert kinds(evaluated) == ["train", "train", "eval"]
    _, run_folder, *arguments = evaluated.calls[-1]
    runs = evaluated.folder / "runs/demo"
    assert Path(run_folder).is_relative_to(runs / "gorl-HopperStand-s0")
    assert arguments[0] == "episodes=4"
    other = arguments[1].removeprefix("corrector=cdsa:")
    assert Path(other).is_relative_to(runs / "ppo-HopperStand-s0")
    rows = [row for row in results.rows_of(evaluated.results) if row.agent == "corrected"]
    assert {row.metric: row.value for row in rows} == {
        **{"return": 7.5, "success": 0.25, "var_5": 10.0, "cvar_5": 11.0},
        **{"var_25": 12.0, "cvar_25": 13.0},
    }
    (item,) = experiment.load(str(evaluated.yaml)).plan_evaluations(seeds=[0])
    for row in rows:
        assert (row.experiment, row.env, row.seed) == ("demo", "HopperStand", 0)
        assert (row.env_steps, row.gradient_steps, row.episodes) == (200, 2, 4)
        assert (row.wall_clock_s, row.command) == (2.0, item.command)
        assert row.commit
        assert "cores" in row.machine
    log = runs / "corrected-HopperStand-s0/evaluation.log"
    assert "evaluating" in log.read_text()


def test_evaluations_follow_their_runs_seed_by_seed(evaluated: Scene) -> None:
    assert evaluated.run() == 0
    assert kinds(evaluated) == ["train", "train", "eval", "train", "train", "eval"]
    assert [len(evaluated.recorded("corrected", seed)) for seed in (0, 1)] == [6, 6]


def test_finished_evaluations_are_skipped(evaluated: Scene) -> None:
    evaluated.run(*BOTH)
    before = evaluated.results.read_text()
    assert evaluated.run(*BOTH) == 0
    assert evaluated.calls == []
    assert evaluated.results.read_text() == before


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("broken evaluation", "corrected-HopperStand-s0 failed (exit code 1): genpol: error: the"),
        ("silent", "corrected-HopperStand-s0 failed (it ended without an answer)"),
    ],
)
def test_a_failed_evaluation_is_made_again_without_training(
    evaluated: Scene, capsys: pytest.CaptureFixture[str], trainer: str, message: str
) -> None:
    assert evaluated.run(trainer=trainer) == 1
    assert kinds(evaluated) == ["train", "train", "eval"]  # the other seed was not begun
    assert message in capsys.readouterr().err
    assert evaluated.recorded("corrected") == []
    assert evaluated.run(*BOTH) == 0
    assert kinds(evaluated) == ["eval"]


def test_an_interrupt_reaches_an_evaluation(evaluated: Scene) -> None:
    begun = evaluated.folder / "begun"
    with evaluated.interrupted_when(begun.exists):
        assert evaluated.run(trainer="wait for it") == 130
    assert kinds(evaluated) == ["train", "train", "eval"]
    assert evaluated.recorded("corrected") == []


def test_no_evaluation_without_all_its_runs(
    evaluated: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated.run(*BOTH, "--only", "gorl") == 0
    assert kinds(evaluated) == ["train"]
    assert evaluated.run(*BOTH, "--continue", trainer="crash") == 1
    assert kinds(evaluated) == ["train"]
    assert "cannot be made" not in capsys.readouterr().err  # what failed has been told


def test_an_evaluation_can_be_asked_for_by_name(evaluated: Scene) -> None:
    evaluated.add("  plain: {run: gorl, arguments: [episodes=5]}\n")
    assert evaluated.run(*BOTH, "--only", "plain") == 0
    assert kinds(evaluated) == ["train", "eval"]
    assert evaluated.run(*BOTH, "--only", "plain", "--fresh") == 0
    assert kinds(evaluated) == ["eval"]  # its run is not trained anew
    assert evaluated.run(*BOTH) == 0
    assert kinds(evaluated) == ["train", "eval"]


@pytest.mark.parametrize("label", ["gorl", "ppo"])
def test_what_a_run_was_before_is_no_longer_evaluated(evaluated: Scene, label: str) -> None:
    evaluated.run()
    assert evaluated.run(*BOTH, "--only", label, "--fresh") == 0
    assert evaluated.recorded("corrected", 0) == []
    assert len(evaluated.recorded("corrected", 1)) == 6
    assert evaluated.run() == 0
    assert kinds(evaluated) == ["eval"]
    assert len(evaluated.recorded("corrected", 0)) == 6


def test_other_arguments_are_another_evaluation(evaluated: Scene) -> None:
    evaluated.run(*BOTH)
    evaluated.change("episodes=4", "episodes=6")
    assert evaluated.run(*BOTH) == 0
    assert kinds(evaluated) == ["eval"]
    rows = [row for row in results.rows_of(evaluated.results) if row.agent == "corrected"]
    assert [row.episodes for row in rows] == [6] * 6


def test_a_run_whose_folder_is_gone_cannot_be_evaluated(
    evaluated: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated.run(*BOTH, trainer="broken evaluation")
    shutil.rmtree(evaluated.folder / "runs/demo/ppo-HopperStand-s0")
    assert evaluated.run(*BOTH) == 1
    assert evaluated.calls == []
    assert "`--fresh --only ppo` trains it anew" in capsys.readouterr().err
    assert evaluated.run(*BOTH, "--only", "ppo", "--fresh") == 0
    assert evaluated.run(*BOTH) == 0
    assert kinds(evaluated) == ["eval"]


def test_a_policy_that_always_diverges_has_no_number(evaluated: Scene) -> None:
    assert evaluated.run(*BOTH, trainer="diverged") == 0
    rows = [row for row in results.rows_of(evaluated.results) if row.agent == "corrected"]
    assert {row.metric for row in rows} == {"return", "var_5", "cvar_5", "var_25", "cvar_25"}
    assert all(math.isnan(row.value) for row in rows)


def test_a_dry_run_tells_the_evaluations(
    evaluated: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = evaluated.folder / "runs/demo"
    line = (
        f'genpol eval "$(echo {runs}/gorl-HopperStand-s0/*/*/*)" json=true episodes=4 '
        f'corrector=cdsa:"$(echo {runs}/ppo-HopperStand-s0/*/*/*)"'
    )
    assert evaluated.run("--dry-run", *BOTH) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [line]
    evaluated.run(*BOTH)
    capsys.readouterr()
    assert evaluated.run("--dry-run", *BOTH) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [f"{line}   # finished"]


def test_values_at_risk_are_reported_with_intervals_over_seeds(
    evaluated: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only what the experiment consists of is reported: its evaluations do.
    monkeypatch.setattr(experiment, "names", lambda: {"demo": evaluated.yaml})
    evaluated.run()
    capsys.readouterr()
    arguments = ["demo", "--results", str(evaluated.results.parent), "--metric", "cvar_5"]
    assert report.run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("corrected"))
    assert line.split()[:7] == ["corrected", "HopperStand", "2", "200", "11", "[11,", "11]"]
    assert not any(line.startswith("ppo") for line in lines)

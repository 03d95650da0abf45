"""Restartability, with a trainer of thirty lines in place of the real one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpol.cli import reproduce, reproduce_folders, reproduce_processes
from genpol.errors import ConfigError
from genpol.report import experiment, results
from genpol.report.plan import named
from genpol.report.results import UNFINISHED

if TYPE_CHECKING:
    from tests.cli.conftest import Scene

ONE = ("--only", "gorl", "--seeds", "0")
COMMAND = "genpol train env=HopperStand total_steps=3 agent=gorl seed=0"


def test_every_run_and_evaluation_is_recorded(scene: Scene) -> None:
    assert scene.run() == 0
    rows = results.rows_of(scene.results)
    assert len(rows) == 2 * 2 * 3
    assert len(scene.calls) == 4
    first = rows[0]
    assert (first.experiment, first.agent, first.env, first.seed) == (
        "demo",
        "gorl",
        "HopperStand",
        0,
    )
    assert [row.value for row in rows[:3]] == [0.5, 1.5, 2.5]
    assert (rows[2].env_steps, rows[2].gradient_steps, rows[2].episodes) == (200, 2, 5)
    assert rows[2].metric == "return"
    assert rows[2].wall_clock_s == 2.0
    assert first.command == COMMAND
    assert first.commit
    assert "cores" in first.machine
    assert "training with" in (scene.folder / "runs/demo/gorl-HopperStand-s0/train.log").read_text()


def test_agent_steps_that_a_run_did_not_tell_follow_from_its_configuration(scene: Scene) -> None:
    scene.run(*ONE, trainer="crash")
    assert [row.agent_steps for row in results.rows_of(scene.results)] == [0, 100]
    (config,) = scene.folder.rglob("config.yaml")
    config.write_text("env: {action_repeat: 4}\n")
    scene.run(*ONE)
    assert [row.agent_steps for row in results.rows_of(scene.results)] == [0, 25, 50]


def test_returns_of_single_tasks_are_recorded_too(scene: Scene) -> None:
    scene.run(*ONE, trainer="crash")
    (table,) = scene.folder.rglob("evals.csv")
    head, *lines = table.read_text().splitlines()
    more = [
        f"{head},return_mean/Walk,return_mean/Run",
        *(f"{x},7.0,{i}" for i, x in enumerate(lines)),
    ]
    table.write_text("\n".join(more) + "\n")
    scene.run(*ONE)
    recorded = [(row.metric, row.value) for row in results.rows_of(scene.results)]
    assert [value for metric, value in recorded if metric == "return/Walk"] == [7.0, 7.0]
    assert [value for metric, value in recorded if metric == "return/Run"] == [0.0, 1.0]
    assert [value for metric, value in recorded if metric == "return"] == [0.5, 1.5, 2.5]


def test_finished_runs_are_skipped(scene: Scene) -> None:
    scene.run(*ONE)
    before = scene.results.read_text()
    assert scene.run(*ONE) == 0
    assert scene.calls == []
    assert scene.results.read_text() == before


def test_a_crashed_run_is_marked_then_resumed_and_never_doubled(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run(*ONE, trainer="crash") == 1
    assert "the lights went out" in capsys.readouterr().err
    assert [(steps, command) for steps, _, command in scene.recorded()] == [
        (0, COMMAND + UNFINISHED),
        (100, COMMAND + UNFINISHED),
    ]
    assert scene.run(*ONE) == 0
    assert [call[0] for call in scene.calls] == ["resume"]
    assert scene.recorded() == [(0, 0.5, COMMAND), (100, 1.5, COMMAND), (200, 2.5, COMMAND)]


@pytest.mark.parametrize("earlier", ["", "crash"])
def test_fresh_runs_anew_and_replaces_the_rows(scene: Scene, earlier: str) -> None:
    scene.run(*ONE, trainer=earlier)
    assert scene.run(*ONE, "--fresh") == 0
    assert [call[0] for call in scene.calls] == ["train"]
    assert scene.recorded() == [(0, 0.5, COMMAND), (100, 1.5, COMMAND), (200, 2.5, COMMAND)]


def test_a_fresh_start_that_was_interrupted_is_resumed_without_fresh(scene: Scene) -> None:
    scene.run("--seeds", "0")
    with scene.interrupted_when(lambda: len(scene.recorded()) == 2):
        assert scene.run("--seeds", "0", "--fresh", trainer="wait") == 130
    assert [call[0] for call in scene.calls] == ["train"]
    unfinished = {row.agent: row.command for row in results.rows_of(scene.results)}
    assert all(command.endswith(UNFINISHED) for command in unfinished.values())
    assert scene.run("--seeds", "0") == 0
    assert [call[0] for call in scene.calls] == ["resume", "train"]
    assert not any(row.command.endswith(UNFINISHED) for row in results.rows_of(scene.results))


def test_a_run_that_another_process_trains_is_left_to_it(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with reproduce_folders.claimed(scene.folder / "runs/demo/gorl-HopperStand-s0"):
        assert scene.run("--seeds", "0", "--continue") == 1
    assert "another process is writing it; wait for it to end" in capsys.readouterr().err
    assert [call[2:] for call in scene.calls] == [("total_steps=2", "agent=ppo", "seed=0")]
    assert scene.run(*ONE) == 0


def test_without_a_checkpoint_a_run_starts_afresh(scene: Scene) -> None:
    scene.run(*ONE, trainer="no checkpoint")
    assert scene.run(*ONE) == 0
    assert [call[0] for call in scene.calls] == ["train"]
    assert [steps for steps, *_ in scene.recorded()] == [0, 100, 200]


def test_a_changed_experiment_runs_again_and_replaces_its_rows(scene: Scene) -> None:
    scene.run(*ONE, trainer="crash")
    scene.change("total_steps=3", "total_steps=4")
    assert scene.run(*ONE) == 0
    assert [call[0] for call in scene.calls] == ["train"]  # the saved run is another's
    assert {command for *_, command in scene.recorded()} == {COMMAND.replace("=3", "=4")}
    assert len(scene.recorded()) == 3


def test_a_failure_stops_the_others_unless_told_to_continue(scene: Scene) -> None:
    assert scene.run(trainer="crash") == 1
    assert len(scene.calls) == 1
    assert scene.run("--continue", trainer="no checkpoint") == 1
    assert len(scene.calls) == 4


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interrupt_reaches_the_trainer_and_the_run_is_resumed(scene: Scene, jobs: str) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with scene.interrupted_when(lambda: len(scene.recorded()) == 2):
        assert scene.run("--seeds", "0", "--jobs", jobs, trainer="wait") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(scene.calls) == int(jobs)  # nothing was started after the interrupt
    assert {command for *_, command in scene.recorded()} == {COMMAND + UNFINISHED}
    assert scene.run(*ONE) == 0
    assert [call[0] for call in scene.calls] == ["resume"]
    assert len(scene.recorded()) == 3


def test_a_dry_run_prints_the_commands_and_runs_nothing(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--dry-run", "--seeds", "3") == 0
    runs = scene.folder / "runs/demo"
    assert capsys.readouterr().out.splitlines() == [
        f"genpol train env=HopperStand total_steps={steps} agent={agent} seed=3 "
        f"output={runs}/{agent}-HopperStand-s3"
        for steps, agent in ((3, "gorl"), (2, "ppo"))
    ]
    assert scene.calls == []
    assert not scene.results.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gorl-hoperstand"], "Did you mean 'gorl-hopperstand'"),
        ([], "NAME"),
        (["gorl-hopperstand", "--only", "gorll"], "Did you mean 'gorl'"),
        (["gorl-hopperstand", "--seeds", "0,0"], "distinct"),
        (["gorl-hopperstand", "--jobs", "0"], "jobs"),
        (["gorl-hopperstand", "--dryrun"], "dryrun"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        reproduce.run(arguments)
    assert "\n" not in str(error.value)


def test_the_real_commands_name_their_folders() -> None:
    train = reproduce_processes.train_command(["env=HopperStand"], Path("runs/a=b"))
    assert train[1:] == ["-m", "genpol.cli.main", "train", "env=HopperStand", 'output="runs/a=b"']
    assert reproduce_processes.resume_command(Path("runs/x"))[-1] == "resume=runs/x"
    record = reproduce_processes.record_command([Path("runs/x")], ["output=y"])
    assert record[1:] == ["-m", "genpol.cli.main", "data", "record", "runs/x", "output=y"]
    evaluate = reproduce_processes.eval_command(Path("runs/x"), ["episodes=2"])
    assert evaluate[1:] == ["-m", "genpol.cli.main", "eval", "runs/x", "json=true", "episodes=2"]


@pytest.mark.parametrize("name", list(experiment.names()))
def test_every_experiment_composes_and_builds(name: str) -> None:
    from genpol.cli.configuration import compose, to_settings

    for run in experiment.load(name).plan(seeds=[3]):
        # The run that one begins from is there only once it is trained.
        given = [override for override in run.overrides if not named([override])]
        settings = to_settings(compose([*given, 'output="runs/a=b"']))
        assert settings.choices.env == run.env
        assert settings.seed == 3

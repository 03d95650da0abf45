"""Restartability, with a trainer of thirty lines in place of the real one."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genpol.cli import reproduce
from genpol.errors import ConfigError
from genpol.report import experiment, results
from genpol.report.results import UNFINISHED

# Makes a run folder, evaluates `total` times, and does what FAKE says at its second evaluation.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
arguments = dict(item.split("=", 1) for item in sys.argv[1:])
mode = os.environ.get("FAKE", "")
folder = Path(arguments.get("resume") or Path(arguments["output"]) / "env/agent" / str(time.time()))
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").touch()
table = folder / "evals.csv"
if not table.exists():
    table.write_text("env_steps,gradient_steps,wall_clock_s,episodes,return_mean\\n")
done = len(table.read_text().splitlines()) - 1
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
print("training with", arguments)
for index in range(done, 3):
    with table.open("a") as file:
        file.write(f"{index * 100},{index},{index}.04,5,{index}.5\\n")
    checkpoint = folder / "checkpoints" / f"step-{index * 100:012d}"
    if mode != "no checkpoint":
        checkpoint.mkdir()
        (checkpoint / "manifest.json").touch()
    if index == 1 and mode in ("crash", "no checkpoint"):
        sys.exit("genpol: error: the lights went out")
    while index == 1 and mode == "wait" and not stopped:
        time.sleep(0.01)
    if stopped:
        (folder / "run.json").write_text('{"status": "interrupted"}')
        sys.exit(0)
(folder / "run.json").write_text('{"status": "finished"}')
"""

YAML = """
description: A test.
compute: none
seeds: [0, 1]
envs: [HopperStand]
common: [total_steps=3]
runs:
  gorl: [agent=gorl]
  ppo: [agent=ppo, total_steps=2]
"""


class Scene:
    """An experiment in a folder of its own, with a trainer whose calls are noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.yaml = folder / "demo.yaml"
        self.yaml.write_text(YAML)
        self.results = folder / "results" / "demo.csv"
        self.calls: list[tuple[str, ...]] = []
        self._monkeypatch = monkeypatch
        trainer = folder / "trainer.py"
        trainer.write_text(TRAINER)

        def train(overrides: tuple[str, ...], output: Path) -> list[str]:
            self.calls.append(("train", *overrides))
            return [sys.executable, "-S", str(trainer), *overrides, f"output={output}"]

        def resume(run_folder: Path) -> list[str]:
            self.calls.append(("resume", str(run_folder)))
            return [sys.executable, "-S", str(trainer), f"resume={run_folder}"]

        monkeypatch.setattr(reproduce, "train_command", train)
        monkeypatch.setattr(reproduce, "resume_command", resume)
        monkeypatch.setattr(reproduce, "_POLL_S", 0.02)

    def run(self, *options: str, trainer: str = "") -> int:
        self.calls.clear()
        self._monkeypatch.setenv("FAKE", trainer)
        output = ("--output", str(self.folder / "runs"), "--results", str(self.results.parent))
        return reproduce.run([str(self.yaml), *output, *options])

    def recorded(self, label: str = "gorl", seed: int = 0) -> list[tuple[int, float, str]]:
        return [
            (row.env_steps, row.value, row.command)
            for row in results.rows_of(self.results)
            if (row.agent, row.seed) == (label, seed)
        ]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


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


def test_without_a_checkpoint_a_run_starts_afresh(scene: Scene) -> None:
    scene.run(*ONE, trainer="no checkpoint")
    assert scene.run(*ONE) == 0
    assert [call[0] for call in scene.calls] == ["train"]
    assert [steps for steps, *_ in scene.recorded()] == [0, 100, 200]


def test_a_changed_experiment_runs_again_and_replaces_its_rows(scene: Scene) -> None:
    scene.run(*ONE, trainer="crash")
    scene.yaml.write_text(YAML.replace("total_steps=3", "total_steps=4"))
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
    interrupter = threading.Thread(target=interrupt_when, args=[lambda: len(scene.recorded()) == 2])
    interrupter.start()
    assert scene.run("--seeds", "0", "--jobs", jobs, trainer="wait") == 130
    interrupter.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(scene.calls) == int(jobs)  # nothing was started after the interrupt
    assert {command for *_, command in scene.recorded()} == {COMMAND + UNFINISHED}
    assert scene.run(*ONE) == 0
    assert [call[0] for call in scene.calls] == ["resume"]
    assert len(scene.recorded()) == 3


def interrupt_when(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


# Writes the file unless FAKE says that it cannot, or waits for an interrupt.
GENERATOR = """
import os, signal, sys, time
arguments = dict(item.split("=", 1) for item in sys.argv[1:])
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
open(arguments["output"] + ".begun", "w").close()
while os.environ["FAKE"] == "wait" and not stopped:
    time.sleep(0.01)
if os.environ["FAKE"] == "broken" or stopped:
    sys.exit(130 if stopped else 2)
open(arguments["output"], "w").close()
"""


@pytest.fixture
def data_set(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the experiment learn from data, and return the file."""
    file = scene.folder / "hopper.npz"
    scene.yaml.write_text(YAML + f"data:\n  HopperStand: [output={file}]\n")
    generator = scene.folder / "generator.py"
    generator.write_text(GENERATOR)

    def generate(arguments: list[str]) -> list[str]:
        scene.calls.append(("generate", *arguments))
        return [sys.executable, "-S", str(generator), *arguments]

    monkeypatch.setattr(reproduce, "generate_command", generate)
    return file


def test_data_are_made_once_and_before_the_runs(scene: Scene, data_set: Path) -> None:
    assert scene.run("--seeds", "0") == 0
    assert scene.calls[0] == ("generate", "env=HopperStand", f"output={data_set}")
    assert [call[0] for call in scene.calls[1:]] == ["train", "train"]
    assert f"data={data_set}" in scene.calls[1]
    assert scene.run("--seeds", "1") == 0
    assert [call[0] for call in scene.calls] == ["train", "train"]


def test_without_its_data_an_experiment_does_not_run(
    scene: Scene, data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--seeds", "0", trainer="broken") == 1
    assert [call[0] for call in scene.calls] == ["generate"]
    assert f"{data_set} was not made (exit code 2)" in capsys.readouterr().err


def test_an_interrupt_reaches_what_makes_the_data(scene: Scene, data_set: Path) -> None:
    begun = Path(f"{data_set}.begun")
    interrupter = threading.Thread(target=interrupt_when, args=[begun.exists])
    interrupter.start()
    assert scene.run("--seeds", "0", trainer="wait") == 130
    interrupter.join()
    assert [call[0] for call in scene.calls] == ["generate"]


def test_a_dry_run_tells_how_the_data_are_made(
    scene: Scene, data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--dry-run", "--seeds", "0") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"genpol data generate env=HopperStand output={data_set}"


def test_a_dry_run_prints_the_commands_and_runs_nothing(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--dry-run", "--seeds", "3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "genpol train env=HopperStand total_steps=3 agent=gorl seed=3",
        "genpol train env=HopperStand total_steps=2 agent=ppo seed=3",
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
    train = reproduce.train_command(["env=HopperStand"], Path("runs/a=b"))
    assert train[1:] == ["-m", "genpol.cli.main", "train", "env=HopperStand", 'output="runs/a=b"']
    assert reproduce.resume_command(Path("runs/x"))[-1] == "resume=runs/x"


@pytest.mark.parametrize("name", list(experiment.names()))
def test_every_experiment_composes_and_builds(name: str) -> None:
    from genpol.cli.configuration import compose, to_settings

    for run in experiment.load(name).plan(seeds=[3]):
        settings = to_settings(compose([*run.overrides, 'output="runs/a=b"']))
        assert settings.choices.env == run.env
        assert settings.seed == 3

"""Data sets of experiments, with a few lines in place of the commands that make them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpol.cli import reproduce_processes
from genpol.report import results

if TYPE_CHECKING:
    from tests.cli.conftest import Scene

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
    scene.add(f"data:\n  HopperStand: [output={file}]\n")
    generator = scene.folder / "generator.py"
    generator.write_text(GENERATOR)

    def generate(arguments: list[str]) -> list[str]:
        scene.calls.append(("generate", *arguments))
        return [sys.executable, "-S", str(generator), *arguments]

    monkeypatch.setattr(reproduce_processes, "generate_command", generate)
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
    with scene.interrupted_when(begun.exists):
        assert scene.run("--seeds", "0", trainer="wait") == 130
    assert [call[0] for call in scene.calls] == ["generate"]


def test_a_dry_run_tells_how_the_data_are_made(
    scene: Scene, data_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--dry-run", "--seeds", "0") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"genpol data generate env=HopperStand output={data_set}"


# Writes a data set that says which run it is of.
RECORDER = """
import os, sys
arguments = dict(item.split("=", 1) for item in sys.argv[2:])
if os.environ["FAKE"] == "broken":
    sys.exit(2)
with open(arguments["output"], "w") as file:
    file.write(sys.argv[1])
"""


@pytest.fixture
def recorded_set(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the experiment learn from data that a run of its own records, and return the file."""
    file = scene.folder / "hopper-v0"
    entry = f"{{train: [agent=sac, steps=9], record: [episodes=3, output={file}]}}"
    scene.add(f"recorded:\n  HopperStand: [{entry}]\n")
    recorder = scene.folder / "recorder.py"
    recorder.write_text(RECORDER)

    def record(acting: Sequence[Path], arguments: Sequence[str]) -> list[str]:
        scene.calls.append(("record", *(x.name for x in acting[1:]), *arguments))
        return [sys.executable, "-S", str(recorder), str(acting[0]), *arguments]

    monkeypatch.setattr(reproduce_processes, "record_command", record)
    return file


TRAINED = ("train", "env=HopperStand", "agent=sac", "steps=9")


def test_a_run_is_trained_and_recorded_once_and_before_the_runs(
    scene: Scene, recorded_set: Path
) -> None:
    assert scene.run("--seeds", "0") == 0
    assert scene.calls[:2] == [TRAINED, ("record", "episodes=3", f"output={recorded_set}")]
    assert [call[0] for call in scene.calls[2:]] == ["train", "train"]
    assert f"data={recorded_set}" in scene.calls[2]
    run_folder = Path(recorded_set.read_text())
    assert run_folder.is_relative_to(scene.folder / "runs/demo/data-HopperStand")
    assert (run_folder / "run.json").exists()
    assert {row.agent for row in results.rows_of(scene.results)} == {"gorl", "ppo"}
    assert scene.run("--seeds", "1", "--fresh") == 0
    assert [call[0] for call in scene.calls] == ["train", "train"]


def test_all_checkpoints_of_a_run_are_recorded_as_a_replay(
    scene: Scene, recorded_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.change("{train:", "{every_checkpoint: true, train:")
    assert scene.run("--seeds", "0", "--dry-run") == 0
    run_folder = f'"$(echo {scene.folder}/runs/demo/data-HopperStand/*/*/*)"'
    line = f"genpol data record {run_folder}/checkpoints/step-* episodes=3 output={recorded_set}"
    assert capsys.readouterr().out.splitlines()[1] == line
    assert scene.run("--seeds", "0") == 0
    assert Path(recorded_set.read_text()).name == "step-000000000000"
    assert scene.calls[1][:3] == ("record", "step-000000000100", "step-000000000200")


def test_training_for_data_is_resumed_after_a_crash(
    scene: Scene, recorded_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--seeds", "0", trainer="crash") == 1
    assert scene.calls == [TRAINED]
    assert "data-HopperStand failed (exit code 1): genpol: error" in capsys.readouterr().err
    assert scene.run("--seeds", "0") == 0
    assert [call[0] for call in scene.calls] == ["resume", "record", "train", "train"]


def test_a_recording_that_failed_does_not_train_again(
    scene: Scene, recorded_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--seeds", "0", trainer="broken") == 1
    assert [call[0] for call in scene.calls] == ["train", "record"]
    assert f"{recorded_set} was not made (exit code 2)" in capsys.readouterr().err
    assert scene.run("--seeds", "0") == 0
    assert [call[0] for call in scene.calls] == ["record", "train", "train"]


def test_other_training_for_data_begins_anew(scene: Scene, recorded_set: Path) -> None:
    scene.run("--seeds", "0", trainer="broken")
    scene.change("steps=9", "steps=8")
    assert scene.run("--seeds", "0") == 0
    assert scene.calls[0] == (*TRAINED[:-1], "steps=8")


def test_an_interrupt_reaches_the_training_for_data(scene: Scene, recorded_set: Path) -> None:
    root = scene.folder / "runs/demo/data-HopperStand"
    with scene.interrupted_when(lambda: len(list(root.rglob("step-*"))) == 2):
        assert scene.run("--seeds", "0", trainer="wait") == 130
    assert scene.calls == [TRAINED]


def test_a_dry_run_tells_how_the_data_are_recorded(
    scene: Scene, recorded_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.run("--dry-run", "--seeds", "0") == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "genpol train env=HopperStand agent=sac steps=9 "
        f"output={scene.folder}/runs/demo/data-HopperStand",
        f'genpol data record "$(echo {scene.folder}/runs/demo/data-HopperStand/*/*/*)" episodes=3 '
        f"output={recorded_set}",
    ]


def test_of_several_recordings_those_that_are_there_are_not_made_anew(
    scene: Scene, recorded_set: Path
) -> None:
    other = scene.folder / "walker-v0"
    scene.change("}]\n", f"}}, {{train: [env=WalkerWalk], record: [output={other}]}}]\n")
    assert scene.run("--seeds", "0") == 0
    assert [call[0] for call in scene.calls] == ["train", "record", "train", "record"] + [
        "train"
    ] * 2
    assert scene.calls[2] == ("train", "env=WalkerWalk")
    assert f"data={scene.folder}" in scene.calls[4]
    made_of = [Path(file.read_text()).parents[2].name for file in (recorded_set, other)]
    assert made_of == ["data-HopperStand-1", "data-HopperStand-2"]
    other.unlink()
    assert scene.run("--seeds", "1") == 0
    assert [call[0] for call in scene.calls] == ["record", "train", "train"]

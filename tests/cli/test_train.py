"""`genpol train` and `genpol eval` as a user runs them, on two hundred steps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genpol.cli.main import main
from genpol.errors import GenpolError
from genpol.training import checkpoint, evaluation

TINY = [
    "env=Reacher-v5",  # short episodes
    "num_envs=4",
    "num_threads=1",
    "env.num_threads=1",
    "evaluation.episodes=2",
    "tensorboard=false",
    "video=false",
]
PPO = [*TINY, "agent=ppo", "agent.rollout_steps=25", "agent.minibatches=2", "total_steps=200"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two hundred steps and return the run folder."""
    output = tmp_path_factory.mktemp("runs")
    assert main(["train", *PPO, f"output={output}"]) == 0
    return next(output.glob("Reacher-v5/ppo/*"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run folder that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_default_agent_trains_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genpol.cli.main", "train", *TINY, "total_steps=200"]
    command += ["agent.rollout_steps=25", "agent.minibatches=2", "agent.stage_steps=[50]"]
    command += ["agent.refinement_steps=50", "agent.fit_steps=5", f"output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate with: genpol eval" in done.stdout
    assert len(list(tmp_path.glob("Reacher-v5/gorl/*/checkpoints/step-*"))) == 1


def test_run_folder_holds_what_the_readme_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "run.json", "metrics.csv", "evals.csv", "checkpoints"} <= names
    assert (finished / "learning_curve.png").stat().st_size > 1000
    assert json.loads((finished / "run.json").read_text())["status"] == "finished"
    assert len((finished / "evals.csv").read_text().splitlines()) == 3  # before and after


def test_evaluation_is_reproducible(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = []
    for seed in (5, 5, 6):
        assert main(["eval", str(finished), "episodes=3", f"seed={seed}", "json=true"]) == 0
        outcomes.append(json.loads(capsys.readouterr().out))
    assert outcomes[0] == outcomes[1] != outcomes[2]
    assert outcomes[0]["episodes"] == 3
    assert outcomes[0]["conditional_value_at_risk_25%"] <= outcomes[0]["return_mean"]


@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_checkpoint_away_from_its_run_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.latest(finished / "checkpoints"), copy)
    assert main([command, f"resume={copy}" if command == "train" else str(copy)]) == 1
    error = capsys.readouterr().err
    assert f"{copy}: lies in no run folder" in error
    assert error.count("\n") == 1


def test_a_checkpoint_is_found_from_its_own_folder(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkpoint.latest(finished / "checkpoints"))
    assert main(["eval", ".", "episodes=1", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1


def test_a_video_that_cannot_be_written_is_an_error_after_the_numbers(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    frames = [np.zeros((8, 8, 3), np.uint8)]
    monkeypatch.setattr(evaluation, "record", lambda *args, **options: frames)
    path = tmp_path / "folder.mp4"
    path.mkdir()
    assert main(["eval", str(finished), "episodes=1", "json=true", f"video={path}"]) == 1
    out, error = capfd.readouterr()
    assert json.loads(out)["episodes"] == 1
    assert f"{path}: the video cannot be written (Is a directory); choose" in error
    assert error.count("\n") == 1


def test_a_training_without_a_video_ends_well(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def undrawable(*args: object, **options: object) -> None:
        raise GenpolError("nothing can be drawn here")

    monkeypatch.setattr(evaluation, "record", undrawable)
    assert main(["train", f"resume={copied}", "video=true"]) == 0  # only the end is left to do
    out, error = capsys.readouterr()
    assert "no video: nothing can be drawn here\n" in error
    assert "evaluate with: genpol eval" in out


def test_resume_extends_the_run_and_remembers_it(copied: Path) -> None:
    assert main(["train", f"resume={copied}", "total_steps=300"]) == 0
    assert checkpoint.latest(copied / "checkpoints").name == checkpoint.step_name(300)
    assert "total_steps: 300" in (copied / "config.yaml").read_text()


def test_init_starts_from_trained_weights(finished: Path, tmp_path: Path) -> None:
    assert main(["train", *PPO, "seed=1", f"init={finished}", f"output={tmp_path}"]) == 0
    made = next(tmp_path.glob("Reacher-v5/ppo/*"))
    old, new = (
        checkpoint.load(checkpoint.latest(folder / "checkpoints"))["weights"]
        for folder in (finished, made)
    )
    distance = max((old[name] - new[name]).abs().max().item() for name in old if "net" in name)
    assert 0 < distance < 0.2  # two updates away; another seed's weights are far


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval"], "no run given"),
        (["eval", "nowhere"], "no such folder"),
        (["eval", "nowhere", "episodes=0"], "episodes = '0': must be a whole number"),
        (["eval", "nowhere", "video=a.gif"], "video = 'a.gif': must be a file name that ends in"),
        (["eval", __file__], "test_train.py: is a file; give a run folder"),
        (["train", "resume=nowhere"], "no such folder"),
        (["train", "env=HopperStand", "device=cuda:99"], "device = 'cuda:99'"),
        (["train", "env=HopperStand", "agent.actor_hidden=[-1]"], "agent.actor_hidden = [-1]"),
        (["train", "env=HopperStand", "env.action_repeat=7"], "env.action_repeat = 7: must divide"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_checkpoint_leaves_the_run_as_it_was(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = checkpoint.latest(copied / "checkpoints") / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    assert main(["train", f"resume={copied}", "total_steps=300"]) == 1
    assert "tensors.safetensors" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}

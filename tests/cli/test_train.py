"""`genpol train` and `genpol eval` as a user runs them, on two hundred steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from genpol.cli.main import main
from genpol.training import checkpoint

TINY = [
    "env=CartpoleSwingup",
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
    return next(output.glob("CartpoleSwingup/ppo/*"))


def test_default_agent_trains_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genpol.cli.main", "train", *TINY, "total_steps=200"]
    command += ["agent.rollout_steps=25", "agent.minibatches=2", "agent.stage_steps=[50]"]
    command += ["agent.refinement_steps=50", "agent.fit_steps=5", f"output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate with: genpol eval" in done.stdout
    assert len(list(tmp_path.glob("CartpoleSwingup/gorl/*/checkpoints/step-*"))) == 1


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


def test_resume_extends_the_run_and_remembers_it(finished: Path) -> None:
    assert main(["train", f"resume={finished}", "total_steps=300"]) == 0
    assert checkpoint.latest(finished / "checkpoints").name == checkpoint.step_name(300)
    assert "total_steps: 300" in (finished / "config.yaml").read_text()


def test_init_starts_from_trained_weights(finished: Path, tmp_path: Path) -> None:
    assert main(["train", *PPO, "seed=1", f"init={finished}", f"output={tmp_path}"]) == 0
    made = next(tmp_path.glob("CartpoleSwingup/ppo/*"))
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *PPO, f"output={tmp_path}"]) == 0
    run = next(tmp_path.glob("CartpoleSwingup/ppo/*"))
    tensors = checkpoint.latest(run / "checkpoints") / "tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["train", f"resume={run}", "total_steps=300"]) == 1
    assert "tensors.safetensors" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

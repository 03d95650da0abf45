"""A world model from the data of several tasks, evaluated on each and finetuned on another."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from genpol.cli.main import main
from genpol.data.store import DatasetWriter
from genpol.training import checkpoint

# Short episodes: observations of 10 and 23, actions of 2 and 7, and a task to come.
WIDTHS = {"Reacher-v5": (10, 2), "Pusher-v5": (23, 7)}
NEW = "InvertedPendulum-v5"
TINY = [
    "agent=tdmpc2",
    "env=multitask",
    "env.action_repeat=1",
    "env.num_threads=1",
    "num_threads=1",
    "agent.encoder_dim=8",
    "agent.mlp_dim=8",
    "agent.latent_dim=8",
    "agent.task_dim=4",
    "agent.num_plans=8",
    "agent.num_elites=4",
    "agent.iterations=1",
    "agent.batch_size=8",
    "evaluation.episodes=2",
    "evaluation.num_envs=2",
    "tensorboard=false",
    "video=false",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for name, (width, dims) in WIDTHS.items():
        with DatasetWriter(folder / f"{name}-random-v0", metadata={"action_repeat": 1}) as writer:
            for _ in range(3):
                writer.append_trajectory(
                    {
                        "observation": draw.normal(size=(11, width)).astype(np.float32),
                        "action": draw.uniform(-1, 1, size=(10, dims)).astype(np.float32),
                        "reward": draw.normal(size=10).astype(np.float32),
                        "terminated": np.zeros(10, bool),
                    }
                )
    return folder


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that has learned from the data."""
    output = tmp_path_factory.mktemp("runs")
    tasks = f"env.tasks=[{','.join(WIDTHS)}]"
    arguments = [*TINY, tasks, f"data={data}", "total_steps=3", f"output={output}"]
    assert main(["train", *arguments]) == 0
    return next(output.glob("multitask/tdmpc2/*"))


def test_all_tasks_are_learned_from_data(pretrained: Path) -> None:
    saved = checkpoint.load(checkpoint.latest(pretrained / "checkpoints"))
    assert saved["offline_updates"] == 3
    assert saved["env_steps"] == 0
    assert saved["weights"]["model.tasks"].shape == (2, 4)


def test_a_task_is_evaluated_alone(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(pretrained), "env.only=Reacher-v5", "episodes=2", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["episodes"] == 2
    assert told["length_mean"] == 50  # Pusher's episodes have 100 steps


def test_a_new_task_is_learned_online_from_there(pretrained: Path, tmp_path: Path) -> None:
    tasks = f"env.tasks=[{','.join([*WIDTHS, NEW])}]"
    arguments = [*TINY, tasks, f"env.only={NEW}", f"init={pretrained}", "total_steps=6"]
    arguments += ["num_envs=1", f"output={tmp_path}"]
    assert main(["train", *arguments, "agent.like_task=Reacher-v5"]) == 0
    run = next(tmp_path.glob(f"multitask-{NEW}/tdmpc2/*"))
    saved = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    assert saved["env_steps"] == 6
    assert saved["training"]["gradient_steps"] == 6  # from the first action on
    before = checkpoint.load(checkpoint.latest(pretrained / "checkpoints"))["weights"]
    # Windows of the new task alone: what the others are told has not moved.
    assert saved["weights"]["model.tasks"][:2].equal(before["model.tasks"])
    assert not saved["weights"]["model.tasks"][2].equal(before["model.tasks"][0])


def test_online_steps_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "env.only=FingerSpin", "online_steps=10"]) == 2
    assert "online_steps = 10: these follow updates on data" in capsys.readouterr().err

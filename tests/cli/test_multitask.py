"""A world model from the data of several tasks, evaluated on each and finetuned on another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from genpol.cli.main import main
from genpol.data.store import DatasetWriter
from genpol.training import checkpoint

# Short episodes: observations of 10 and 23, actions of 2 and 7, and a task to come.
WIDTHS = {"Reacher-v5": (10, 2), "Pusher-v5": (23, 7)}
NEW = "InvertedPendulum-v5"
STEPS = 20  # in which a pendulum falls that nobody holds
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


def test_returns_are_told_of_each_task(pretrained: Path) -> None:
    last = pd.read_csv(pretrained / "evals.csv").iloc[-1]
    of_tasks = [last[f"return_mean/{name}"] for name in WIDTHS]
    assert last["return_mean"] == pytest.approx(sum(of_tasks) / 2)
    assert of_tasks[0] != of_tasks[1]


def test_a_task_is_evaluated_alone(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(pretrained), "env.only=Reacher-v5", "episodes=2", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["episodes"] == 2
    assert told["length_mean"] == 50  # Pusher's episodes have 100 steps


def test_a_new_task_is_learned_online_from_there(pretrained: Path, tmp_path: Path) -> None:
    tasks = f"env.tasks=[{','.join([*WIDTHS, NEW])}]"
    arguments = [*TINY, tasks, f"env.only={NEW}", f"init={pretrained}", f"total_steps={STEPS}"]
    arguments += ["num_envs=1", f"output={tmp_path}"]
    assert main(["train", *arguments, "agent.like_task=Reacher-v5"]) == 0
    run = next(tmp_path.glob(f"multitask-{NEW}/tdmpc2/*"))
    saved = checkpoint.load(checkpoint.latest(run / "checkpoints"))
    assert saved["env_steps"] == STEPS
    learned = pd.read_csv(run / "metrics.csv")["loss/value"].notna()
    first = int(learned.idxmax())
    assert 0 < first < STEPS - 1
    assert learned[first:].all()
    assert saved["training"]["gradient_steps"] == STEPS - first  # nothing is made up for
    before = weights_of(pretrained)
    # Windows of the new task alone: what the others are told has not moved.
    assert saved["weights"]["model.tasks"][:2].equal(before["model.tasks"])
    assert not saved["weights"]["model.tasks"][2].equal(before["model.tasks"][0])


def weights_of(run: Path) -> dict[str, Any]:
    weights: dict[str, Any] = checkpoint.load(checkpoint.latest(run / "checkpoints"))["weights"]
    return weights


def begin_again(pretrained: Path, output: Path, tasks: list[str], *extra: str) -> int:
    """Begin a run of so many tasks from the pretrained one, of one step."""
    widths = ["env.observation_width=23", "env.action_width=7"]
    arguments = [*TINY, *widths, f"env.tasks=[{','.join(tasks)}]", "env.only=Reacher-v5"]
    arguments += [f"init={pretrained}", "total_steps=1", "num_envs=1", f"output={output}"]
    return main(["train", *arguments, *extra])


def test_tasks_are_known_by_name_in_another_order(pretrained: Path, tmp_path: Path) -> None:
    tasks = ["Pusher-v5", "Reacher-v5"]
    assert begin_again(pretrained, tmp_path, tasks) == 0
    told = weights_of(next(tmp_path.glob("multitask-Reacher-v5/tdmpc2/*")))["model.tasks"]
    assert told.equal(weights_of(pretrained)["model.tasks"][[1, 0]])


def test_another_second_task_is_a_new_one(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["Reacher-v5", NEW]
    assert begin_again(pretrained, tmp_path, tasks) == 2
    told = f"does not know {NEW}; give the one of its tasks, Reacher-v5, Pusher-v5, that"
    assert told in capsys.readouterr().err
    assert begin_again(pretrained, tmp_path, tasks, "agent.like_task=Pusher-v5") == 0
    told = weights_of(next(tmp_path.glob("multitask-Reacher-v5/tdmpc2/*")))["model.tasks"]
    assert told.equal(weights_of(pretrained)["model.tasks"])


def test_a_run_that_does_not_tell_its_tasks_is_refused(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(pretrained, copied)
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("  - Pusher-v5\n", ""))
    assert begin_again(copied, tmp_path / "runs", ["Reacher-v5"]) == 2
    assert "learned 2 tasks, and its config.yaml names 1 in env.tasks" in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint.latest(pretrained / "checkpoints"), moved)
    assert begin_again(moved, tmp_path / "runs", ["Reacher-v5"]) == 2
    assert "learned 2 tasks" in capsys.readouterr().err


def test_three_tasks_are_evaluated_as_often_each(tmp_path: Path) -> None:
    tasks = f"env.tasks=[Reacher-v5,{NEW},InvertedDoublePendulum-v5]"
    arguments = [*TINY, tasks, "num_envs=3", "total_steps=3", f"output={tmp_path}"]
    assert main(["train", *arguments]) == 0
    run = next(tmp_path.glob("multitask/tdmpc2/*"))
    assert pd.read_csv(run / "evals.csv")["episodes"].tolist() == [3, 3]


def test_an_evaluation_of_all_tasks_has_as_many_episodes_each(
    pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(pretrained), "episodes=1", "json=true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["episodes"], told["length_mean"]) == (2, 75)  # 50 steps and 100


def test_online_steps_need_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "env.only=FingerSpin", "online_steps=10"]) == 2
    assert "online_steps = 10: these follow updates on data" in capsys.readouterr().err

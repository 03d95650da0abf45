"""mjlab from the command line: what a newcomer without it is told, and training with it."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest

from genpol.cli.main import main

HERE = importlib.util.find_spec("mjlab") is not None
TRAIN = [
    "train",
    "env=mjlab",
    "env.task=Mjlab-Cartpole-Balance",
    "agent=ppo",
    "num_envs=16",
    "agent.rollout_steps=8",
    "evaluation.episodes=2",
    "evaluation.interval_steps=10000",
    "tensorboard=false",
    "video=false",
    "num_threads=1",
]


@pytest.mark.skipif(HERE, reason="mjlab is installed here")
def test_missing_mjlab_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, f"output={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "mjlab is not installed" in error
    assert "make mjlab" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.mjlab
@pytest.mark.skipif(not HERE, reason="needs mjlab: make test-mjlab")
def test_two_hundred_steps_and_on_from_there(tmp_path: Path) -> None:
    steps = 16 * 200
    assert main([*TRAIN, f"total_steps={steps}", f"output={tmp_path}"]) == 0
    run = next(tmp_path.glob("*/ppo/*"))
    assert main(["train", f"resume={run}", f"total_steps={2 * steps}"]) == 0
    with (run / "evals.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [rows[0]["env_steps"], rows[-1]["env_steps"]] == ["0", str(2 * steps)]
    assert main(["eval", str(run), "episodes=3"]) == 0

"""Isaac Lab from the command line: what a newcomer without it is told, and training with it."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from genpol.cli import bench_isaaclab
from genpol.cli.configuration import compose, to_settings
from genpol.cli.main import main
from genpol.errors import ConfigError

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "env=isaaclab", "env.task=cartpole", "agent=ppo", "num_envs=16"]
QUICK = [
    "evaluation.episodes=2",
    "evaluation.interval_steps=1000",
    "tensorboard=false",
    "num_threads=1",
]
with_isaaclab = [
    pytest.mark.isaaclab,
    pytest.mark.skipif(
        importlib.util.find_spec("isaaclab") is None,
        reason="needs Isaac Lab: make test-isaaclab",
    ),
]


def train(*arguments: str, output: Path) -> Path:
    assert main([*TRAIN, *QUICK, *arguments, f"output={output}"]) == 0
    return next(output.glob("isaaclab-cartpole/ppo/*"))


def evaluations(run: Path) -> list[dict[str, str]]:
    with (run / "evals.csv").open() as file:
        return list(csv.DictReader(file))


# --- without Isaac Lab -----------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("isaaclab") is not None, reason="Isaac Lab is installed here"
)
def test_missing_isaaclab_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, f"output={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "Isaac Lab is not installed in this Python" in error
    assert "make isaaclab" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.task=", "env.task is empty: give a name"),
        ("env.action_bound=0", "env.action_bound = 0.0: must be > 0"),
        ("env.taks=cartpole", "env.taks.*Did you mean 'env.task'"),
    ],
)
def test_wrong_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        to_settings(compose(["env=isaaclab", override]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("python", ["no-such-python", "false"])
def test_make_says_which_python_is_missing(python: str, tmp_path: Path) -> None:
    made = subprocess.run(
        ["make", "isaaclab", f"ISAACLAB_PYTHON={python}", f"ISAACLAB_VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode != 0
    assert f"Isaac Lab needs Python 3.12, and '{python}' is not one" in made.stderr
    assert "ISAACLAB_PYTHON=/path/to/python3.12" in made.stderr
    assert not list(tmp_path.iterdir())


# --- with it ---------------------------------------------------------------------------------


class TestTraining:
    """Training, resuming and evaluating."""

    pytestmark = with_isaaclab

    def test_two_hundred_steps_and_on_from_there(self, tmp_path: Path) -> None:
        steps = 16 * 200
        run = train(f"total_steps={steps}", "agent.rollout_steps=8", "video=false", output=tmp_path)
        rows = evaluations(run)
        assert [row["env_steps"] for row in (rows[0], rows[-1])] == ["0", str(steps)]
        assert main(["train", f"resume={run}", f"total_steps={2 * steps}"]) == 0
        assert evaluations(run)[-1]["env_steps"] == str(2 * steps)
        assert main(["eval", str(run), "episodes=3"]) == 0

    def test_a_video_that_cannot_be_made_does_not_fail_the_run(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train("total_steps=128", "agent.rollout_steps=8", output=tmp_path)
        assert "cannot be drawn" in capsys.readouterr().err

    def test_critics_with_more_to_see_learn(self, tmp_path: Path) -> None:
        run = tmp_path / "runs"
        small = ["num_envs=4", "total_steps=64", "agent.rollout_steps=8", "video=false"]
        chosen = ["train", "env=isaaclab", "env.task=quadruped", "agent=ppo"]
        assert main([*chosen, *QUICK, *small, f"output={run}"]) == 0

    def test_ppo_keeps_the_pole_up(self, tmp_path: Path) -> None:
        """To the end of every episode, in less than five minutes on two cores."""
        run = train(
            *("num_envs=256", "total_steps=300000", "agent.rollout_steps=32"),
            *("agent.minibatches=8", "agent.epochs=5", "evaluation.episodes=64"),
            *("video=false", "seed=1"),
            output=tmp_path,
        )
        last = evaluations(run)[-1]
        assert float(last["length_mean"]) == 300.0
        assert float(last["return_mean"]) > 285.0
        assert float(last["wall_clock_s"]) < 300.0


class TestBenchmark:
    """The benchmark beside Isaac Lab's trainers."""

    pytestmark = with_isaaclab
    BENCH: ClassVar = [
        *("bench", "env=isaaclab", "env.task=cartpole", "num_envs=8", "num_threads=1"),
        *("agent.rollout_steps=4", "agent.epochs=2", "agent.minibatches=2"),
        *("--rounds", "1", "--seconds", "0.01"),
    ]

    def test_all_take_part_on_one_simulation(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*self.BENCH, "agent=ppo", "--save", "--results", str(tmp_path)]) == 0
        with (tmp_path / "bench-isaaclab-cartpole.csv").open() as file:
            rows = list(csv.DictReader(file))
        rates = {row["metric"]: float(row["value"]) for row in rows if row["seed"] == "0"}
        for key in bench_isaaclab.KEYS:
            assert rates[f"env_steps_per_s/{key}"] > 0
        assert "skipped" not in capsys.readouterr().out

    def test_other_agents_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*self.BENCH, "agent=gorl"]) == 2
        assert "set agent=ppo" in capsys.readouterr().err

"""`genpol train --multirun`: the runs it makes, what it refuses, each launcher on two runs."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from genpol.cli import multirun
from genpol.cli.main import main

TINY = [
    *("env=Reacher-v5", "num_envs=4", "num_threads=1", "env.num_threads=1", "agent=ppo"),
    *("agent.rollout_steps=5", "agent.minibatches=1", "total_steps=2e1", "evaluation.episodes=1"),
    *("tensorboard=false", "video=false"),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Take note of the runs that would be made; that with seed 2 fails."""
    monkeypatch.chdir(tmp_path)
    runs: list[list[str]] = []

    def train(overrides: list[str], log: Path, folder: Path) -> int:
        runs.append(overrides)
        return int("seed=2" in overrides)

    monkeypatch.setattr(multirun, "train", train)
    return runs


def test_every_combination_is_a_run_and_other_settings_stay_as_written(launched: Any) -> None:
    agents = ["agent.rollout_steps=5,6", "seed=range(0,2)"]
    rest = [text for text in TINY if not text.startswith("agent.rollout")]
    assert main(["train", "--multirun", *rest, *agents]) == 0
    assert [run[-2:] for run in launched] == [
        [f"agent.rollout_steps={steps}", f"seed={seed}"] for steps in (5, 6) for seed in (0, 1)
    ]
    assert all(run[:-2] == rest for run in launched)


def test_a_run_that_fails_is_named_and_the_others_take_place(launched: Any, capsys: Any) -> None:
    assert main(["train", "-m", *TINY, "seed=1,2,3"]) == 1
    assert len(launched) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "seed=1: finished"
    assert lines[2].startswith(f"seed=2: exit code 1, see {Path.cwd() / 'runs'}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_politely_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: signal.Signals
) -> None:
    """The run takes longer to end than Python's ``subprocess.run`` lets children live then."""
    script = f"""
import os, signal, sys, time
def stop(*_):
    time.sleep(1)
    print("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getppid(), {number})
time.sleep(60)
"""
    monkeypatch.setattr(multirun, "_command", lambda overrides: [sys.executable, "-c", script])
    assert main(["train", "-m", *TINY, "seed=1,2", f"output={tmp_path}"]) == 130
    lines = capsys.readouterr().out.splitlines()
    (log,) = tmp_path.rglob("0.log")
    assert lines[1:] == [f"seed=1: interrupted, see {log}", "seed=2: not begun"]
    assert log.read_text() == "saved\n"


def test_a_run_whose_machine_is_lost_is_named() -> None:
    def lost() -> int:
        raise ConnectionError("Job 7 has not produced any output\n  node failure\n")

    assert multirun._ending(lost, ConnectionError) == "lost: node failure"
    assert multirun._ending(lambda: 3, ConnectionError) == 3


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["seed=0,-1"], "seed = -1: must lie in"),
        (["agent.rollout_step=1,2"], "Did you mean 'agent.rollout_steps'?"),
        (["seed=interval(0,1)"], "give the values"),
        (["hydra/launcher=joblib"], "must be one of basic, ray, submitit_local, submitit_slurm"),
        (["hydra.launcher.timeout_min=5"], "basic has no options"),
        (["hydra.launcher.timeout_min=["], "'hydra.launcher.timeout_min=[': while parsing"),
    ],
)
def test_what_is_wrong_is_told_before_any_run(
    launched: Any, capsys: Any, extra: list[str], message: str
) -> None:
    assert main(["train", "--multirun", *TINY, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert launched == []


def test_ranks_do_not_each_begin_all_runs(
    launched: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--multirun", *TINY, "seed=1,2"]) == 2
    assert "every rank of torchrun would begin all runs" in capsys.readouterr().err
    assert launched == []


@pytest.mark.parametrize(("launcher", "package"), [("ray", "ray"), ("submitit_local", "submitit")])
def test_a_missing_package_is_told_in_one_line(
    launched: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, launcher: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["train", "--multirun", *TINY, f"hydra/launcher={launcher}"]) == 2
    assert "pip install 'genpol[distributed]'" in capsys.readouterr().err


def installed(package: str) -> Any:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (extra `distributed`)")


LAUNCHERS = [
    pytest.param("ray", marks=installed("ray")),
    pytest.param("submitit_local", marks=installed("submitit")),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_option_that_a_launcher_does_not_know_is_told_in_one_line(
    launched: Any, capsys: Any, launcher: str
) -> None:
    arguments = [f"hydra/launcher={launcher}", "hydra.launcher.memry=5"]
    assert main(["train", "--multirun", *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert "memry" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_runs_take_place(tmp_path: Path, capsys: Any, launcher: str) -> None:
    arguments = ["train", "--multirun", *TINY, f"hydra/launcher={launcher}", "seed=3,4"]
    assert main([*arguments, f"output={tmp_path}"]) == 0
    assert "seed=3: finished\nseed=4: finished" in capsys.readouterr().out
    assert len(list(tmp_path.glob("Reacher-v5/ppo/*-s[34]/checkpoints/step-*"))) == 2

"""`genpol data generate` reads its settings, tells how far it is and leaves what can be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from genpol.cli import data_generate
from genpol.errors import ConfigError
from genpol.provenance import usable_cores

ENV = "env=cube-single-play"


class FakeGeneration:
    """Finishes all episodes at once, or is asked to stop after the first."""

    made: list[FakeGeneration]
    interrupted = False

    def __init__(self, plan: Any, output: Path) -> None:
        self.plan = plan
        self.output = output
        self.validation_output = output.with_name(f"{output.stem}-val.npz")
        self.folder = output.with_name(f".tmp-{output.name}")
        self.calls: list[str] = []
        self.made.append(self)

    def missing(self) -> list[Any]:
        return list(self.plan.files())[2:]

    def run(self, num_workers: int, *, on_episode: Any, stop: Any) -> bool:
        self.num_workers = num_workers
        for _ in self.missing():
            on_episode()
            if self.interrupted:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop():
                return False
        return True

    def finish(self) -> dict[Path, int]:
        self.calls.append("finish")
        return {self.output: 2_000_000, self.validation_output: 123}

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeGeneration]:
    pytest.importorskip("gymnasium")
    monkeypatch.setattr(FakeGeneration, "made", [], raising=False)
    monkeypatch.setattr("genpol.envs.generation.Generation", FakeGeneration)
    return FakeGeneration


def test_all_has_a_default_but_the_environment(
    fake: type[FakeGeneration], capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_generate.run([ENV]) == 0
    (generation,) = fake.made
    assert generation.output == Path("datasets/cube-single-play-v0.npz")
    assert generation.plan.episodes == {"train": 1000, "val": 100}
    assert generation.plan.recipe.seed == 0
    assert generation.num_workers == usable_cores()
    assert generation.calls == ["finish", "close"]
    out = capsys.readouterr().out
    assert "going on after 2 of 1100 episodes" in out
    assert "1.1k/1.1k episodes" in out
    assert "datasets/cube-single-play-v0.npz: 2,000,000 transitions" in out
    assert "datasets/cube-single-play-v0-val.npz: 123 transitions" in out


def test_settings_are_read(fake: type[FakeGeneration]) -> None:
    arguments = ["num_transitions=2e4", "output=x/y.npz", "seed=7", "num_workers=3", "kind=noisy"]
    assert data_generate.run(["env=puzzle-4x5-play", *arguments]) == 0
    (generation,) = fake.made
    assert generation.output == Path("x/y.npz")
    assert generation.plan.episodes == {"train": 20, "val": 2}
    assert generation.plan.recipe.name == "puzzle-4x5"
    assert generation.plan.recipe.kind == "noisy"
    assert generation.plan.recipe.seed == 7
    assert generation.num_workers == 3


def test_kind_is_in_the_name(fake: type[FakeGeneration]) -> None:
    data_generate.run([ENV, "kind=noisy"])
    assert fake.made[0].output == Path("datasets/cube-single-noisy-v0.npz")


def test_a_stop_is_told_in_one_line(
    fake: type[FakeGeneration],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fake, "interrupted", True)
    assert data_generate.run([ENV, "num_transitions=9000"]) == 143
    assert fake.made[0].calls == ["close"]
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stopped by SIGTERM after 3 of 10 episodes, which datasets/.tmp-cube-single-play-v0.npz "
        "keeps; the same command goes on"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no environment given: add env="),
        (["env=cube-single"], "unknown environment.*Did you mean 'cube-single-play'"),
        (["env=HopperStand"], "has no recipe for data"),
        ([ENV, "num_transition=5"], "Did you mean 'num_transitions'"),
        ([ENV, "num_transitions=0"], "num_transitions = 0: must be >= 1"),
        ([ENV, "num_transitions=many"], "num_transitions = 'many': must be an integer"),
        ([ENV, "num_transitions=inf"], "must be an integer"),
        ([ENV, "seed=0.5"], "seed = '0.5': must be an integer"),
        ([ENV, "num_workers=-1"], "num_workers = -1: must be >= 0"),
        ([ENV, "kind=nosy"], "kind = 'nosy'.*Did you mean 'noisy'"),
        ([ENV, "output=folder"], "output = 'folder': must end in .npz"),
        ([ENV, "seed=1", "seed=2"], "seed is given twice"),
        ([ENV, "--fast"], "cannot read '--fast'"),
    ],
)
def test_wrong_settings_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        data_generate.run(arguments)
    assert "\n" not in str(caught.value)


def test_reading_settings_imports_no_simulator() -> None:
    code = (
        "import sys, genpol.cli.data_generate;"
        "print([m for m in ('torch', 'mujoco', 'gymnasium') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own_leaves_what_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")
    code = "import sys; from genpol.cli.data_generate import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, ENV, "num_transitions=2000", "num_workers=1"]
    command.append(f"output={tmp_path / 'x.npz'}")
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    staging = tmp_path / ".tmp-x.npz"
    deadline = time.monotonic() + 300
    while not list(staging.glob("train-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    finished = len(list(staging.glob("train-*.npz")))
    assert out.splitlines()[-1].startswith(f"stopped by SIGINT after {finished} of 3 episodes")

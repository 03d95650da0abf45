"""`genpol bench agent=mbdpo`: searches of several sizes take turns, and each call is timed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from genpol.cli import bench_search
from genpol.cli.configuration import compose, to_settings
from genpol.cli.main import main
from genpol.report import benchmark

SMALL = [
    *("env=CartpoleSwingup", "num_envs=1", "num_threads=1", "env.num_threads=1"),
    *("agent.encoder_dim=8", "agent.mlp_dim=8", "agent.latent_dim=8"),
]
QUICK = "diffusion-64x5,score,mppi-64x6"  # compiling takes a minute


@pytest.mark.parametrize("agent", ["mbdpo", "tdmpc2"])
def test_sizes_of_both_searches_are_measured(
    agent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"agent={agent}", *SMALL, "--learning", "rounds=2", "seconds=0.02", "--only", QUICK]
    assert main(["bench", *asked, "--save", "--results", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "latent state 8, hidden layers 8, horizon 3, cpu, 1 threads; milliseconds" in shown
    assert "skipped" not in shown
    with (tmp_path / "bench-search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {
        f"{quantile}/{key}" for quantile in ("p50_ms", "p99_ms") for key in QUICK.split(",")
    }
    assert all(int(row["agent_steps"]) > 0 for row in rows)
    assert main(["report", str(tmp_path / "bench-search.csv")]) == 0
    assert "milliseconds per action" in capsys.readouterr().out


def contender(key: str, *, num_envs: int = 1) -> benchmark.Contender:
    arguments = ["agent=mbdpo", *SMALL[:1], f"num_envs={num_envs}", *SMALL[2:]]
    found = bench_search.contenders(to_settings(compose(arguments)))
    assert [x.key for x in found] == list(bench_search.KEYS)
    return next(x for x in found if x.key == key)


def test_a_size_is_that_of_the_search_and_plans_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, starts = [], []
    original = bench_search._agent

    def made(*args: Any, **options: Any) -> Any:
        agent = original(*args, **options)
        sample, search = agent.planner._round, agent.search
        agent.planner._round = lambda *x: rounds.append(x[2].shape) or sample(*x)
        agent.search = lambda o, s, g: starts.append(s.clone()) or search(o, s, g)
        return agent

    monkeypatch.setattr(bench_search, "_agent", made)
    _, skipped = benchmark.measure_calls(
        [contender("diffusion-128x10", num_envs=3)], seconds=1e-9, rounds=1
    )
    assert skipped == {}
    assert set(rounds) == {(3, 128 - 6, 3, 1)}
    assert len(rounds) == 9 * len(starts)
    assert not starts[0].any()
    assert starts[-1].any()


@pytest.mark.parametrize(("error", "reason"), [(0.1, "finds another action"), (0.0, None)])
def test_who_finds_another_action_when_compiled_takes_no_part(
    monkeypatch: pytest.MonkeyPatch, error: float, reason: str | None
) -> None:
    def compiled(function: Any, *, name: str, graphs: bool = False) -> Any:
        def run(*args: Any) -> Any:
            found = function(*args)
            return found + error if isinstance(found, torch.Tensor) else found

        return run

    for module in ("agent", "planning", "amortised"):
        monkeypatch.setattr(f"genpol.world_model.{module}.compiled", compiled)
    found, skipped = benchmark.measure_calls([contender("score-compiled")], seconds=1e-9, rounds=1)
    assert (skipped.get("score-compiled") or "").startswith(reason or "")
    assert ("score-compiled" in found) == (reason is None)


def test_what_cannot_be_compiled_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    key = "mppi-64x6-compiled"
    _, skipped = benchmark.measure_calls([contender(key)], seconds=1e-9, rounds=1)
    assert "cannot compile here" in skipped[key]
    assert "no C++ compiler" in skipped[key]

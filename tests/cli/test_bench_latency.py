"""`genpol bench agent=bc`: all contenders are the same policy, and each call is timed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genpol.cli import bench_latency
from genpol.cli.main import main
from genpol.report import benchmark
from genpol.report.benchmark import Contender, SkippedError

pytest.importorskip("onnxruntime", reason="needs the extra genpol[deploy]")

SMALL = ["agent=bc", "env=Reacher-v5", "agent.actor.hidden=[8]", "agent.solver_steps=3"]
QUICK = "onnx,torchscript,eager,diffusers"  # AOTInductor compiles for ten seconds


def bench(*arguments: str) -> int:
    return main(["bench", *SMALL, "--learning", "rounds=2", "seconds=0.02", *arguments])


def test_all_make_the_same_chunk_and_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--only", QUICK, "--save", "--results", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "skipped" not in shown
    with (tmp_path / "bench-latency.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {
        f"{quantile}/{key}" for quantile in ("p50_ms", "p99_ms") for key in QUICK.split(",")
    }
    assert [row["seed"] for row in rows[:2]] == ["0", "1"]
    values = {(row["metric"], row["seed"]): float(row["value"]) for row in rows}
    assert all(values["p50_ms/eager", x] <= values["p99_ms/eager", x] for x in ("0", "1"))
    assert main(["report", str(tmp_path / "bench-latency.csv")]) == 0
    assert "milliseconds per action" in capsys.readouterr().out
    assert (tmp_path / "bench-latency.png").is_file()


def test_who_makes_another_chunk_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    from genpol.cli.configuration import compose, to_settings

    settings = to_settings(compose([*SMALL, "num_threads=1"]))
    built = {x.key: x for x in bench_latency.contenders(settings)}
    original = bench_latency._checked

    def off(plan: Any, question: bench_latency.Question) -> Any:
        return original(lambda: plan() + 1e-3, question)

    monkeypatch.setattr(bench_latency, "_checked", off)
    found, skipped = benchmark.measure_calls([built["eager"]], seconds=0.01, rounds=1)
    assert found == {}
    assert "another chunk" in skipped["eager"]


def test_every_call_is_timed() -> None:
    calls: list[int] = []

    def build(_: object) -> Any:
        def chunk() -> int:
            calls.append(1)
            return 1

        return chunk

    def refuse(_: object) -> Any:
        raise SkippedError("not here")

    contenders = [
        Contender(key="one", what="", build=build),
        Contender(key="two", what="", build=refuse),
    ]
    found, skipped = benchmark.measure_calls(contenders, seconds=0.01, rounds=3)
    assert len(found["one"]) == 3
    assert sum(len(times) for times in found["one"]) == len(calls)
    assert all(times.sum() >= 0.01 for times in found["one"])
    assert np.all(np.concatenate(found["one"]) > 0)
    assert skipped == {"two": "not here"}


def test_unknown_contenders_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--only", "onxx") == 2
    assert "Did you mean 'onnx'" in capsys.readouterr().err

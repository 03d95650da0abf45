from __future__ import annotations

from pathlib import Path

import pytest

from genpol.cli import bench, bench_stepping
from genpol.errors import ConfigError
from genpol.report import results


def test_a_benchmark_prints_and_records_its_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_stepping, "_BARE_ENVS", 2)
    arguments = [
        *("env=HopperStand", "num_envs=4", "agent=ppo", "seconds=0.01", "rounds=2", "--save"),
        *("--only", "genpol-physics,genpol-env,genpol-policy,genpol-collector,mj_step"),
        *("--results", str(tmp_path)),
    ]
    assert bench.run(arguments) == 0
    out = capsys.readouterr().out
    assert "environment / bare mj_step loop" in out
    assert "Collector over the hand-written loop" in out
    frame = results.read(tmp_path / "bench-HopperStand.csv")
    rates = frame[frame["metric"].str.startswith("env_steps_per_s/")]
    assert len(rates) == 5 * 2
    assert (rates["value"] > 0).all()
    ratios = set(frame["metric"]) - set(rates["metric"])
    assert ratios == {"ratio/genpol-env:mj_step", "overhead_percent/collector"}


def test_the_same_measurement_replaces_its_older_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_stepping, "_BARE_ENVS", 2)
    arguments = ["env=HopperStand", "seconds=0.01", "--only", "mj_step", "--save"]
    for rounds in ("rounds=1", "rounds=2", "rounds=2"):
        bench.run([*arguments, rounds, "--results", str(tmp_path)])
    assert len(results.rows_of(tmp_path / "bench-HopperStand.csv")) == 1 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["env=HopperStand", "--sav"], "Did you mean '--save'"),
        (["env=HopperStand", "--only", "envpol"], "Did you mean 'envpool'"),
        (["env=HopperStand", "rounds=0"], "rounds 0"),
        (["env=HopperStand", "seconds=soon"], "must be a number"),
        (["env=HopperStand", "--seconds"], "needs a value"),
        (["env=HoperStand"], "Did you mean 'HopperStand'"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        bench.run(arguments)
    assert "\n" not in str(error.value)

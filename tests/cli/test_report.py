from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from genpol.cli import main, report
from genpol.errors import ConfigError
from genpol.report import results
from genpol.report.results import UNFINISHED, ResultRow


def record(
    folder: Path, name: str = "demo", *, metric: str = "return", unit: str = "", repeat: int = 1
) -> None:
    rows = [
        ResultRow(
            experiment=name,
            agent=agent,
            env="HopperStand",
            seed=seed,
            env_steps=step,
            agent_steps=step // repeat,
            gradient_steps=1,
            metric=metric + (f"/{agent}" if unit else ""),
            value=base + step / 1000 + seed,
            episodes=100,
            wall_clock_s=step / 100,
            commit="abc",
            machine="2 cores",
            command="genpol train" + (UNFINISHED if agent == "ppo" and seed == 1 else ""),
        )
        for agent, base in (("gorl", 500.0), ("ppo", 200.0))
        for seed in (range(2) if not unit else range(1))
        for step in (0, 30_000, 60_000)
    ]
    results.append(folder / f"{name}.csv", rows)


def test_the_table_has_iqm_interval_and_wall_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    assert report.run(["demo", "--results", str(tmp_path), "--versus", "ppo"]) == 0
    out = capsys.readouterr().out
    (gorl,) = (line for line in out.splitlines() if line.startswith("gorl"))
    assert gorl.split() == [
        *("gorl", "HopperStand", "2", "60,000", "560.5", "[560,", "561]"),
        *("560.5", "±", "0.707", "10.0"),
    ]
    assert "fewer than 5 seeds" in out
    assert "1 of 4 runs had not finished" in out
    assert "P(gorl > ppo) = 1.00" in out
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_the_clock_of_what_learns_from_data_is_updates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    path = tmp_path / "demo.csv"
    rows = [
        replace(row, env_steps=0, agent_steps=0, gradient_steps=row.env_steps)
        for row in results.rows_of(path)
    ]
    results.replace(path, rows, obsolete=lambda row: True)
    assert report.run(["demo", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "updates" in out
    assert "env steps" not in out
    assert "60,000" in out


def test_agent_steps_are_told_where_they_are_fewer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    record(tmp_path, "held", repeat=8)
    for name, expected in (("demo", []), ("held", ["7,500"])):
        assert report.run([name, "--results", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert ("agent steps" in out) == bool(expected)
        (gorl,) = (line for line in out.splitlines() if line.startswith("gorl"))
        assert gorl.split()[3:5] == ["60,000", *(expected or ["560.5"])]


def test_several_tasks_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    record(tmp_path, metric="return/Walk")
    rows = results.rows_of(tmp_path / "demo.csv")
    alone = [replace(row, metric="return/Run", value=7.0) for row in rows if row.agent == "ppo"]
    results.append(tmp_path / "demo.csv", alone)
    assert report.run(["demo", "--results", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    at = lines.index(["agent", "Walk", "Run"])
    assert lines[at + 1 : at + 3] == [["gorl", "560.5"], ["ppo", "260.5", "7"]]
    assert report.run(["demo", "--results", str(tmp_path), "--metric", "return/Run"]) == 0


def test_the_budget_and_the_figure_can_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    figure = tmp_path / "elsewhere" / "x.png"
    arguments = ["--results", str(tmp_path), "--figure", str(figure)]
    report.run(["demo", "--budget", "5", *arguments])
    assert "530.5" in capsys.readouterr().out
    report.run(["demo", "--at", "1e4", *arguments])
    assert "500.5" in capsys.readouterr().out
    assert figure.stat().st_size > 10_000
    assert not (tmp_path / "demo.png").exists()


def test_a_benchmark_is_shown_as_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, "bench-HopperStand", metric="env_steps_per_s", unit="/")
    assert report.run(["bench-HopperStand", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "environment steps per second" in out
    (gorl,) = (line for line in out.splitlines() if line.startswith("gorl"))
    assert gorl.split() == ["gorl", "530", "500", "560"]
    assert (tmp_path / "bench-HopperStand.png").stat().st_size > 5_000


def test_an_unknown_name_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path)
    assert main.main(["report", "demi", "--results", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "Did you mean 'demo'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--metric", "retrun"], "Did you mean 'return'"),
        (["demo", "--versus", "pp"], "Did you mean 'ppo'"),
        (["demo", "--at", "soon"], "'soon' is not a number of steps"),
        ([], "NAME"),
    ],
)
def test_wrong_arguments_are_told(tmp_path: Path, arguments: list[str], message: str) -> None:
    record(tmp_path)
    with pytest.raises(ConfigError, match=message):
        report.run([*arguments, "--results", str(tmp_path)])

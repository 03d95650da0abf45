from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import pytest

from genpol.errors import ConfigError, DatasetError
from genpol.report import results
from genpol.report.results import ResultRow

HEADER = (
    "experiment,agent,env,seed,env_steps,agent_steps,gradient_steps,metric,value,episodes,"
    "wall_clock_s,commit,machine,command"
)


def row(**changes: object) -> ResultRow:
    values = ResultRow(
        experiment="demo",
        agent="gorl",
        env="HopperStand",
        seed=0,
        env_steps=1_000_000,
        agent_steps=500_000,
        gradient_steps=10,
        metric="return",
        value=512.25,
        episodes=100,
        wall_clock_s=60.5,
        commit="abc",
        machine='a "quick" CPU, 2 cores',
        command="genpol train env=HopperStand 'x=[1,2]'",
    )
    return replace(values, **changes)


def test_what_is_appended_is_read_back_with_its_types(tmp_path: Path) -> None:
    path = tmp_path / "new" / "demo.csv"
    results.append(path, [row(), row(seed=1, value=math.nan)])
    results.append(path, [row(seed=2, agent="None")])
    frame = results.read(path)
    assert results.rows_of(path)[0] == row()
    assert list(frame["seed"]) == [0, 1, 2]
    assert frame["agent"].tolist() == ["gorl", "gorl", "None"]  # a name, not a missing value
    assert math.isnan(frame["value"][1])
    assert frame.dtypes["env_steps"] == "int64"
    assert frame.dtypes["value"] == "float64"
    assert frame["machine"][0] == row().machine


def test_the_columns_are_those_that_were_promised(tmp_path: Path) -> None:
    results.append(tmp_path / "demo.csv", [row()])
    assert (tmp_path / "demo.csv").read_text().splitlines()[0] == HEADER
    assert ",".join(field.name for field in fields(ResultRow)) == HEADER


def test_results_from_before_agent_steps_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    path.write_text(HEADER.replace("agent_steps,", "") + "\n")
    with pytest.raises(DatasetError, match="before results had agent_steps; move it away") as error:
        results.read(path)
    assert "\n" not in str(error.value)


def test_no_row_is_lost_among_concurrent_writers(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: results.append(path, [row(seed=seed)]), range(40)))
    assert sorted(r.seed for r in results.rows_of(path)) == list(range(40))
    assert [p.name for p in tmp_path.iterdir()] == ["demo.csv"]


def test_obsolete_rows_are_replaced_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    results.append(path, [row(seed=0), row(seed=1), row(seed=1, env_steps=2)])
    results.replace(path, [row(seed=1, value=7.0)], obsolete=lambda r: r.seed == 1)
    assert results.rows_of(path) == [row(seed=0), row(seed=1, value=7.0)]


def test_a_foreign_file_is_refused_in_one_line_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    path.write_text("time,loss\n1,2\n")
    with pytest.raises(DatasetError, match="time,loss") as error:
        results.append(path, [row()])
    assert "\n" not in str(error.value)
    assert path.read_text() == "time,loss\n1,2\n"
    assert [p.name for p in tmp_path.iterdir()] == ["demo.csv"]


def test_a_damaged_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    results.append(path, [row(), row()])
    path.write_text(path.read_text().replace("512.25", "many", 1))
    with pytest.raises(DatasetError, match=r"demo.csv, line 2: .*'many'"):
        results.read(path)


def test_a_file_cut_short_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "demo.csv"
    results.append(path, [row(), row()])
    torn = path.read_text()[:-60]
    path.write_text(torn)
    with pytest.raises(DatasetError, match="line 3"):
        results.append(path, [row()])
    assert path.read_text() == torn


def test_a_failed_write_keeps_the_rows_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "demo.csv"
    results.append(path, [row()])

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full_disk)
    with pytest.raises(DatasetError, match="No space left"):
        results.append(path, [row(seed=1)])
    assert results.rows_of(path) == [row()]
    assert [p.name for p in tmp_path.iterdir()] == ["demo.csv"]


def test_an_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    results.append(tmp_path / "gorl-controls.csv", [row()])
    assert results.find("gorl-controls", tmp_path) == tmp_path / "gorl-controls.csv"
    with pytest.raises(ConfigError, match="Did you mean 'gorl-controls'") as error:
        results.find("gorl-contrls", tmp_path)
    assert error.value.exit_code == 2


def test_an_installed_package_writes_into_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert results.results_folder() == results.checkout() / "assets" / "results"
    monkeypatch.setattr(results, "_packaged", lambda: tmp_path / "genpol" / "assets" / "results")
    assert results.checkout() is None
    assert results.results_folder() == Path("results")
    results.append(tmp_path / "genpol" / "assets" / "results" / "shipped.csv", [row()])
    assert results.find("shipped").parent.parent.name == "assets"

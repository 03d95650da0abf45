"""What `genpol eval` says of the returns that an evaluation found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from genpol.cli import eval as evaluating
from genpol.cli import reproduce_folders
from genpol.cli.reproduce_folders import Provenance
from genpol.report import risk
from genpol.report.plan import Evaluation as Planned
from genpol.report.plan import Run
from genpol.training.evaluation import Evaluation

LEVELS = ("5%", "25%")


def said(returns: list[float], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the JSON of an evaluation in which every other episode was a success."""
    values = torch.tensor(returns, dtype=torch.float64)
    found = Evaluation(values, torch.ones(len(values)), torch.arange(len(values)) % 2 == 0, 0)
    evaluating._print(evaluating._statistics(found), as_json=True)
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_values_at_risk_are_those_of_the_returns(capsys: pytest.CaptureFixture[str]) -> None:
    returns = [float(x) for x in range(100, 0, -1)]
    found = said(returns, capsys)
    assert found["returns"] == returns
    assert found["value_at_risk_5%"] == pytest.approx(5.95)
    assert found["conditional_value_at_risk_5%"] == pytest.approx(3.0)
    assert found["value_at_risk_25%"] == pytest.approx(25.75)
    assert found["conditional_value_at_risk_25%"] == pytest.approx(13.0)
    assert found["success_low"] < found["success_mean"] == 0.5 < found["success_high"]
    assert not any(key.endswith("_note") for key in found)


def test_every_number_lies_in_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    found = said([float(x * x) for x in range(100)], capsys)
    assert found["return_low"] < found["return_mean"] < found["return_high"]
    for level in LEVELS:
        for name in (f"value_at_risk_{level}", f"conditional_value_at_risk_{level}"):
            assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]


def test_the_intervals_are_those_of_the_bootstrap(capsys: pytest.CaptureFixture[str]) -> None:
    returns = [float(x * x) for x in range(30)]
    found = said(returns, capsys)
    expected = risk.estimate(returns, risk.cvar(0.25))
    assert found["conditional_value_at_risk_25%_low"] == expected.low
    assert found["conditional_value_at_risk_25%_high"] == expected.high


def test_a_tail_of_less_than_one_episode_has_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    found = said([3.0, 1.0, 2.0, 4.0, 5.0], capsys)
    assert found["conditional_value_at_risk_5%"] == 1.0
    assert "episodes=20 or more" in found["value_at_risk_5%_note"]
    assert "value_at_risk_25%_note" not in found


def test_one_episode_has_no_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    found = said([7.0], capsys)
    assert found["value_at_risk_25%"] == found["conditional_value_at_risk_5%"] == 7.0
    assert not any(key.startswith(("return_low", "return_high")) for key in found)
    assert not any(key.endswith(("%_low", "%_high")) for key in found)


@pytest.mark.parametrize("returns", [[], [1.0, math.nan]])
def test_without_finite_returns_there_is_no_tail(
    returns: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(returns, capsys)
    assert found["return_mean"] is None
    assert not any("risk" in key for key in found)


def test_the_table_leaves_the_returns_of_single_episodes_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Evaluation(torch.tensor([12321.0, 2.0]), torch.ones(2), torch.zeros(0), 0)
    evaluating._print({"checkpoint": "here", **evaluating._statistics(found)}, as_json=False)
    out = capsys.readouterr().out
    assert "value at risk 25%" in out
    assert "returns" not in out


def test_an_experiment_finds_every_number_that_it_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evals.csv").write_text(
        "env_steps,agent_steps,gradient_steps,wall_clock_s,episodes,return_mean\n5,5,1,2.0,5,0.0\n"
    )
    run = Run(name="x", overrides=(), experiment="x", label="gorl", env="HopperStand", seed=0)
    item = Planned(label="plain", run=run, others=(), arguments=())
    answer = said([float(x) for x in range(40)], capsys)
    rows = reproduce_folders.rows_of_evaluation(tmp_path, item, answer, Provenance())
    assert {row.metric: row.value for row in rows} == {
        "return": 19.5,
        "success": 0.5,
        "var_5": answer["value_at_risk_5%"],
        "cvar_5": answer["conditional_value_at_risk_5%"],
        "var_25": answer["value_at_risk_25%"],
        "cvar_25": answer["conditional_value_at_risk_25%"],
    }
    assert {row.episodes for row in rows} == {40}

"""`genpol list` names what can be chosen, in a form that pipes well."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from genpol.cli import list as listing
from genpol.errors import ConfigError


@pytest.mark.usefixtures("stub_configs")
def test_pipe_gets_names_and_descriptions_by_tab(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.run(["envs"]) == 0
    assert capsys.readouterr().out == "CheetahRun\tRun.\ngym\t\nHopperStand\tStand.\n"


@pytest.mark.usefixtures("stub_configs")
def test_package_line_is_no_description() -> None:
    assert listing.describe("recipe", "gorl_HopperStand") == "Tuned."


def test_agent_is_described_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sac.py").write_text('"""Soft actor-critic.\n\nMore."""\nraise SystemExit\n')
    monkeypatch.setattr(listing, "package_folder", lambda package: tmp_path)
    assert listing.describe("agent", "sac") == "Soft actor-critic."


@pytest.mark.usefixtures("stub_configs")
def test_terminal_gets_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert listing.run(["envs"]) == 0
    out = capsys.readouterr().out
    assert "genpol envs" in out
    assert "HopperStand" in out
    assert "\t" not in out


def test_terminal_groups_environments_by_simulator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    listing.run(["envs"])
    plain = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    first_words = [line.split()[0] for line in plain.splitlines() if line.strip()]
    places = [
        first_words.index(word)
        for word in ("native", "HopperStand", "OGBench", "cube-single-play", "others", "gym")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("plural", sorted(listing.GROUPS))
def test_installed_configurations_are_found(
    plural: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert listing.run([plural]) == 0
    listed = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == listing.names(listing.GROUPS[plural])
    assert not any(name.endswith("_schema") for name in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to list"),
        (["env"], "cannot list 'env'. Did you mean 'envs'?"),
        (["envs", "agents"], "cannot list 'envs agents'."),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listing.run(arguments)
    assert str(caught.value).startswith(message)

"""`genpol info` gathers what a bug report needs."""

from __future__ import annotations

import json
from importlib import metadata

import pytest

from genpol.cli import info
from genpol.errors import ConfigError


def test_json_holds_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.run(["--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"versions", "devices", "threads", "mujoco", "extras"}
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["devices"]["logical_cores"] >= 1
    assert facts["devices"]["memory_gib"] > 0
    assert facts["threads"]["torch"] >= 1


def test_table_names_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.run([]) == 0
    out = capsys.readouterr().out
    for name in ("mujoco", "hydra-core", "processor", "GOMP_SPINCOUNT", "rendering", "dev"):
        assert name in out


def test_absent_package_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_PACKAGES", ("no-such-package",))
    versions = info.collect()["versions"]
    assert versions["no-such-package"] is None
    assert info._show("versions", "no-such-package", None) == "not installed"


def _requires(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(info.metadata, "requires", lambda name: list(lines))


def test_complete_extra_shows_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    _requires(monkeypatch, 'pytest; extra == "dev"', "torch")
    extra = info._extra("dev")
    version = metadata.version("pytest")
    assert extra == {"installed": True, "packages": {"pytest": version}, "install": None}


def test_incomplete_extra_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _requires(monkeypatch, 'pytest; extra == "x"', 'no-such-package; extra == "x"')
    extra = info._extra("x")
    assert extra["installed"] is False
    assert extra["install"] == "pip install 'genpol[x]'"
    assert info._show("extras", "x", extra).endswith(r"pip install 'genpol\[x]'")


def test_extra_for_another_python_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    _requires(monkeypatch, 'isaaclab; python_version >= "4" and extra == "isaaclab"')
    extra = info._extra("isaaclab")
    assert (extra["installed"], extra["install"]) == (False, 'needs python_version >= "4"')


def test_old_mujoco_is_told_what_native_tasks_need() -> None:
    assert "mujoco>=3.17,<4" in info._show("mujoco", "batch", False)


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown argument '--yaml'"):
        info.run(["--json", "--yaml"])

"""The commit and the machine that go with a number."""

from __future__ import annotations

import subprocess

import pytest

from genpol.provenance import GitState, code_version, git_state, machine, usable_cores


@pytest.fixture
def checkout(tmp_path):
    file = tmp_path / "checkout" / "genpol" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    git(file, "init", "--quiet", str(file.parent.parent))
    git(file, "add", ".")
    git(file, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    return file


def git(file, *arguments):
    command = ["git", "-C", str(file.parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_clean_checkout(checkout):
    state = git_state(checkout)
    assert state == GitState(git(checkout, "rev-parse", "HEAD"), dirty=False)


def test_changed_checkout_is_dirty(checkout):
    checkout.write_text("changed")
    assert git_state(checkout).dirty


def test_code_that_git_does_not_know_yet_is_a_change(checkout):
    (checkout.parent / "new.py").write_text("")
    assert git_state(checkout).dirty


def test_recorded_results_are_no_change_of_the_code(checkout):
    results = checkout.parent.parent / "assets" / "results" / "x.csv"
    results.parent.mkdir(parents=True)
    results.write_text("a")
    git(checkout, "add", str(results))
    assert not git_state(checkout).dirty


def test_a_copy_inside_a_checkout_of_something_else_has_no_commit(checkout):
    installed = checkout.parent.parent / "venv" / "genpol" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert git_state(installed) is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) is None


def test_machine_and_version_say_something():
    assert f"{usable_cores()} cores" in machine()
    assert code_version()

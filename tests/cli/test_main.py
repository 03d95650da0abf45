"""The entry point: speed of the help, exit codes, and errors in one line."""

from __future__ import annotations

import errno
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from genpol import __version__
from genpol.cli import main as entry
from genpol.errors import CheckpointError, ConfigError

PRESENT = [name for name, module in entry.COMMANDS.items() if importlib.util.find_spec(module)]
HEAVY = {"torch", "tensordict", "torchrl", "mujoco", "hydra", "numpy", "rich", "matplotlib"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Add a command ``probe`` whose ``run`` each test sets."""
    module = ModuleType("genpol.cli.probe")
    module.SUMMARY, module.USAGE = "probe", "\nusage: genpol probe\n"
    monkeypatch.setitem(sys.modules, "genpol.cli.probe", module)
    monkeypatch.setitem(entry.COMMANDS, "probe", "genpol.cli.probe")
    return module


def _raise(error: BaseException):
    def run(arguments: list[str]) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--version"], *([name, "--help"] for name in PRESENT)]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from genpol.cli.main import main; code = main(sys.argv[1:]);"
        f"sys.stderr.write(' '.join({HEAVY!r} & set(sys.modules))); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()


@pytest.mark.parametrize("name", PRESENT)
def test_every_command_is_listed_and_explained(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.main([]) == 0
    assert f"  {name}" in capsys.readouterr().out
    assert entry.main([name, "--help"]) == 0
    usage = capsys.readouterr().out
    assert usage.startswith(f"usage: genpol {name}")
    assert "example" in usage
    assert entry.main(["help", name]) == 0
    assert capsys.readouterr().out == usage


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"genpol {__version__}\n"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["lits"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "genpol: error: unknown command 'lits'. Did you mean 'list'? `genpol --help` shows all\n"
    )


def test_absent_command_does_not_break_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(entry.COMMANDS, "future", "genpol.cli.future")
    assert entry.main([]) == 0
    assert "future" not in capsys.readouterr().out
    assert entry.main(["future"]) == 2
    assert "is not part of this installation" in capsys.readouterr().err


def test_missing_dependency_is_not_taken_for_a_missing_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(entry.importlib, "import_module", find)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        entry.main(["list", "envs"])


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("a\nb  c"), 2), (CheckpointError("d"), 1)]
)
def test_errors_are_one_line_with_their_code(
    command: ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    command.run = _raise(error)
    assert entry.main(["probe"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"genpol: error: {' '.join(str(error).split())}\n"


def test_bug_keeps_its_traceback(command: ModuleType) -> None:
    command.run = _raise(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        entry.main(["probe"])


def test_interrupt_exits_130(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = _raise(KeyboardInterrupt())
    assert entry.main(["probe"]) == 130
    assert capsys.readouterr().err == "genpol: interrupted\n"


def test_arguments_and_exit_code_pass_through(command: ModuleType) -> None:
    seen: list[list[str]] = []
    command.run = lambda arguments: seen.append(arguments) or 3
    assert entry.main(["probe", "a=1", "b"]) == 3
    assert seen == [["a=1", "b"]]


def test_closed_pipe_is_quiet() -> None:
    script = (
        "import os, sys; from genpol.cli.main import main\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(main(['list', 'envs']))"
    )
    result = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, check=False)
    assert (result.returncode, result.stderr) == (0, b"")


def test_broken_pipe_of_a_worker_is_not_hushed(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command.run = _raise(BrokenPipeError())
    with (tmp_path / "out").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(BrokenPipeError):
            entry.main(["probe"])


def test_process_is_prepared_before_the_command_is_imported() -> None:
    environ: dict[str, str] = {}
    entry.prepare_process(environ)
    assert environ["GOMP_SPINCOUNT"] == "20000"
    assert environ["RL_LOGGING_LEVEL"] == "WARNING"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo needs no advice")
@pytest.mark.parametrize(("installed", "renderer"), [(True, "egl"), (False, None)])
def test_egl_draws_without_a_display_if_there_is_egl(
    monkeypatch: pytest.MonkeyPatch, installed: bool, renderer: str | None
) -> None:
    monkeypatch.setattr(entry, "_loads", lambda library: installed)
    environ: dict[str, str] = {}
    entry.prepare_process(environ)
    assert environ.get("MUJOCO_GL") == renderer


def test_settings_of_the_user_are_kept() -> None:
    environ = {"GOMP_SPINCOUNT": "1", "RL_LOGGING_LEVEL": "INFO", "MUJOCO_GL": "osmesa"}
    entry.prepare_process(environ)
    assert environ == {"GOMP_SPINCOUNT": "1", "RL_LOGGING_LEVEL": "INFO", "MUJOCO_GL": "osmesa"}


def test_display_keeps_the_renderer_of_mujoco() -> None:
    environ = {"DISPLAY": ":0"}
    entry.prepare_process(environ)
    assert "MUJOCO_GL" not in environ


def test_a_full_disk_is_told_in_one_line(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/metrics.csv")

    command.run = full
    assert entry.main(["probe"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "/runs/metrics.csv: cannot be written (No space left on device)" in error

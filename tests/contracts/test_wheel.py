"""The built wheel works away from the source tree, and keeps its names inside ``genpol``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("genpol", "agents", "envs", "configs", "assets")
TRAIN = [
    *("train", "env=CartpoleBalance", "env.action_repeat=50", "env.num_threads=1", "num_envs=4"),
    *("agent=ppo", "agent.rollout_steps=1", "agent.minibatches=2", "total_steps=200"),
    *("num_threads=1", "evaluation.episodes=2", "tensorboard=false", "video=false"),
]

pytestmark = pytest.mark.slow


def _run(*command: str | Path, cwd: Path) -> str:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environ, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that no ``build`` folder is left in the source tree."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for folder in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = ("build", "--wheel", "--no-isolation", "--outdir", source / "dist", source)
    _run(sys.executable, "-m", *build, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in an empty environment that borrows the dependencies of this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    install = ("pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    _run(python, "-m", *install, cwd=folder)
    # After the installation, or pip would think that genpol is there already. A folder named in a
    # .pth file comes last on the path and its own .pth files are not read, so an editable
    # installation of genpol in it stays out of sight.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def _shipped(folder: str, pattern: str) -> set[str]:
    files = (file.relative_to(ROOT) for file in (ROOT / folder).rglob(pattern))
    return {file.as_posix() for file in files}


def test_nothing_but_genpol_lands_in_site_packages(contents: set[str]) -> None:
    top = {name.split("/")[0] for name in contents}
    assert {name for name in top if not name.endswith(".dist-info")} == {"genpol"}


@pytest.mark.parametrize("folder", SOURCES)
def test_every_module_is_inside(contents: set[str], folder: str) -> None:
    within = "" if folder == "genpol" else "genpol/"
    assert {f"{within}{file}" for file in _shipped(folder, "*.py")} <= contents


def test_every_configuration_is_inside(contents: set[str]) -> None:
    files = _shipped("configs", "*.yaml")
    assert "configs/train.yaml" in files
    assert {f"genpol/{file}" for file in files} <= contents


def test_every_result_is_inside(contents: set[str]) -> None:
    assert {f"genpol/{file}" for file in _shipped("assets/results", "*.csv")} <= contents


def test_types_and_license_are_inside(contents: set[str]) -> None:
    assert "genpol/py.typed" in contents
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in contents)


def test_command_runs(bin_folder: Path, tmp_path: Path) -> None:
    assert "usage: genpol" in _run(bin_folder / "genpol", "--help", cwd=tmp_path)


def test_configurations_are_found(bin_folder: Path, tmp_path: Path) -> None:
    listed = _run(bin_folder / "genpol", "list", "envs", cwd=tmp_path)
    assert "HopperStand\t" in listed


@pytest.mark.parametrize("module", ["genpol.agents", "genpol.envs.mujoco", "genpol.configs"])
def test_installed_module_is_the_wheels(bin_folder: Path, tmp_path: Path, module: str) -> None:
    script = f"import {module}; print({module}.__file__)"
    printed = _run(bin_folder / "python", "-c", script, cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(bin_folder.parent)


def test_settings_compose(bin_folder: Path, tmp_path: Path) -> None:
    script = (
        "from genpol.cli.configuration import compose, to_settings\n"
        "print(to_settings(compose(['env=HopperStand'])).env.name)"
    )
    assert _run(bin_folder / "python", "-c", script, cwd=tmp_path) == "HopperStand\n"


def test_training_runs_on_nothing_but_the_wheel(bin_folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from genpol.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "for name, module in sorted(sys.modules.items()):\n"
        "    if name.split('.')[0] == 'genpol':\n"
        "        print('loaded', name, module.__file__)"
    )
    printed = _run(bin_folder / "python", "-c", script, *TRAIN, "output=runs", cwd=tmp_path)
    loaded = dict(
        line.split(maxsplit=2)[1:] for line in printed.splitlines() if line.startswith("loaded")
    )
    assert {"genpol", "genpol.agents.ppo", "genpol.envs.mujoco.env"} <= loaded.keys()
    strangers = {
        name: file
        for name, file in loaded.items()
        if not Path(file).is_relative_to(bin_folder.parent)
    }
    assert strangers == {}
    (run,) = tmp_path.glob("runs/CartpoleBalance/ppo/*")
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000000200"]

"""What git tracks and what the wheel's explicit lists in ``pyproject.toml`` name is the same.

The wheel itself is built and tried by the slow tests of ``test_wheel.py``; this compares lists.
"""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("genpol", "agents", "envs", "configs", "assets")
# For readers of the repository; nothing in the package opens them.
NOT_SHIPPED = ("assets/*/*.png",)


def _settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]


def _folder(package: str, folders: dict[str, str]) -> PurePosixPath:
    """Return where setuptools looks for ``package``: as its nearest named parent says."""
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        named = folders.get(".".join(parts[:length]))
        if named is not None:
            return PurePosixPath(named, *parts[length:])
    return PurePosixPath(folders.get("", ""), *parts)


@pytest.fixture(scope="module")
def tracked() -> list[PurePosixPath]:
    """Return what git tracks, or would, under the five source folders and has not been deleted."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of files to compare with")
    # Reading the list is safe whoever owns the checkout (a mounted one is often another user's).
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    # Files not added yet count, so that a forgotten package shows before its commit.
    command += ["--cached", "--others", "--exclude-standard", *SOURCES]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = [PurePosixPath(name) for name in names.split("\0") if name]
    return [file for file in files if (ROOT / file).exists()]


@pytest.fixture(scope="module")
def packages() -> dict[PurePosixPath, str]:
    """Return the listed packages by their folders."""
    settings = _settings()
    return {_folder(name, settings["package-dir"]): name for name in settings["packages"]}


def test_the_list_of_files_is_not_empty(tracked: list[PurePosixPath]) -> None:
    assert {file.parts[0] for file in tracked} == set(SOURCES)


def test_every_python_file_is_in_a_listed_package(
    tracked: list[PurePosixPath], packages: dict[PurePosixPath, str]
) -> None:
    forgotten = [file for file in tracked if file.suffix == ".py" and file.parent not in packages]
    assert forgotten == []


def _ships(file: PurePosixPath, packages: dict[PurePosixPath, str], data: dict) -> bool:
    """Return whether some listed package claims ``file`` as its data."""
    return any(
        PurePosixPath("/", file.relative_to(folder)).match("/" + pattern)
        for folder, package in packages.items()
        if file.is_relative_to(folder)
        for pattern in [*data.get(package, ()), *data.get("*", ())]
    )


def test_every_data_file_is_claimed_by_a_listed_package(
    tracked: list[PurePosixPath], packages: dict[PurePosixPath, str]
) -> None:
    data = _settings()["package-data"]
    files = [file for file in tracked if file.suffix != ".py"]
    shipped = [file for file in files if not any(file.match(name) for name in NOT_SHIPPED)]
    assert len(shipped) > 40
    assert [file for file in shipped if not _ships(file, packages, data)] == []


def test_every_listed_package_has_an_init(
    tracked: list[PurePosixPath], packages: dict[PurePosixPath, str]
) -> None:
    assert len(packages) == len(_settings()["packages"])
    absent = [name for folder, name in packages.items() if folder / "__init__.py" not in tracked]
    assert absent == []


def test_every_pattern_of_data_finds_something(
    tracked: list[PurePosixPath], packages: dict[PurePosixPath, str]
) -> None:
    data = _settings()["package-data"]
    assert set(data) <= set(packages.values())
    idle = [
        (package, pattern)
        for package, patterns in data.items()
        for pattern in patterns
        if not any(_ships(file, packages, {package: [pattern]}) for file in tracked)
    ]
    assert idle == []


@pytest.mark.parametrize("name", ["genpol.envs", "genpol.envs.mujoco", "genpol.envs.a.b"])
def test_folders_of_packages_follow_their_parent(name: str) -> None:
    folders = {"genpol": "genpol", "genpol.envs": "envs"}
    assert _folder(name, folders) == PurePosixPath("envs", *name.split(".")[2:])

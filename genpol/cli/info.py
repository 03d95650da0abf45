"""`genpol info`: the versions, devices, threads and extras that a bug report needs."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

from genpol import provenance
from genpol.errors import ConfigError

SUMMARY = "show versions, devices, threads and which extras are installed"
USAGE = """
usage: genpol info [--json]

Shows what genpol runs on: versions of the packages that matter, processor and
accelerators, threads, rendering, and the optional extras with the command that
installs each.

examples:
  genpol info
  genpol info --json | jq .versions
"""

_PACKAGES = (
    "genpol",
    "torch",
    "tensordict",
    "torchrl",
    "mujoco",
    "dm-control",
    "gymnasium",
    "diffusers",
    "hydra-core",
)
_NATIVE_MUJOCO = "3.17"


def run(arguments: list[str]) -> int:
    """Print the facts as tables, or as JSON.

    Raises:
        ConfigError: If an argument is not known.
    """
    unknown = [argument for argument in arguments if argument != "--json"]
    if unknown:
        raise ConfigError(f"unknown argument {unknown[0]!r}; `genpol info` knows only --json")
    facts = collect()
    if arguments:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        _print_tables(facts)
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Return all facts by section; what is missing is ``None``."""
    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in _PACKAGES},
        "devices": _devices(),
        "threads": _threads(),
        "mujoco": _mujoco(),
        "extras": {extra: _extra(extra) for extra in _extras()},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import psutil
    import torch  # the only slow import here: no one else knows what torch itself can reach

    gib = 2**30
    return {
        "processor": provenance.processor(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": provenance.usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / gib, 1),
        "memory_free_gib": round(psutil.virtual_memory().available / gib, 1),
        "cuda": [
            f"{properties.name}, {properties.total_memory / gib:.0f} GiB"
            for properties in map(
                torch.cuda.get_device_properties, range(torch.cuda.device_count())
            )
        ],
        "mps": torch.backends.mps.is_available(),
    }


def _threads() -> dict[str, Any]:
    import torch

    return {
        "torch": torch.get_num_threads(),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _mujoco() -> dict[str, Any]:
    # Looks for the file and does not import it: mujoco opens its rendering library on import.
    try:
        batch = importlib.util.find_spec("mujoco")
        folders = list(batch.submodule_search_locations or ()) if batch else []
    except ValueError:
        folders = []
    return {
        "rendering": os.environ.get("MUJOCO_GL", "glfw"),
        "display": os.environ.get("DISPLAY"),
        "batch": any(os.path.exists(os.path.join(folder, "batch.py")) for folder in folders),
    }


def _extras() -> list[str]:
    try:
        return sorted(metadata.metadata("genpol").get_all("Provides-Extra") or [])
    except metadata.PackageNotFoundError:
        return []


def _extra(extra: str) -> dict[str, Any]:
    """Say which packages of one extra are there, and how to install those that are not."""
    # From packaging's version of the standard, which hydra depends on; imported late for speed.
    from packaging.requirements import Requirement

    packages: dict[str, str | None] = {}
    unsuited = ""
    for line in metadata.requires("genpol") or []:
        requirement = Requirement(line)
        if requirement.marker is None or "extra" not in str(requirement.marker):
            continue
        if requirement.marker.evaluate({"extra": extra}):
            packages[requirement.name] = _version(requirement.name)
        elif f'extra == "{extra}"' in str(requirement.marker):
            unsuited = str(requirement.marker).replace(f'and extra == "{extra}"', "").strip()
    missing = [name for name, version in packages.items() if version is None]
    install = f"pip install 'genpol[{extra}]'" if missing else None
    if not packages and unsuited:
        install = f"needs {unsuited}"
    return {"installed": bool(packages) and not missing, "packages": packages, "install": install}


def _print_tables(facts: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, section in facts.items():
        table.add_row(f"[cyan]{title}[/cyan]", "")
        for name, value in section.items():
            table.add_row(f"  {name}", _show(title, name, value))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _show(section: str, name: str, value: Any) -> str:
    """Word one fact for a person."""
    if section == "extras":
        found = ", ".join(f"{package} {v}" for package, v in value["packages"].items() if v)
        install = str(value["install"] or "").replace("[", r"\[")  # rich's markup
        return found if value["installed"] else f"[yellow]not complete[/yellow]: {install}"
    if (section, name) == ("mujoco", "batch"):
        if value:
            return "yes"
        return f"[yellow]no[/yellow]: native tasks need pip install 'mujoco>={_NATIVE_MUJOCO},<4'"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not installed" if section == "versions" else "not set"
    return str(value)

"""`genpol list`: what can be named on the command line, with one line on each."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from genpol.errors import ConfigError, nearest

SUMMARY = "list agents, environments, recipes or experiments"
USAGE = """
usage: genpol list agents|envs|recipes|experiments

Prints each name with one line on what it is, environments by simulator. In a pipe the two are
separated by a tab, and all names sorted.

examples:
  genpol list envs
  genpol list envs | grep -i walker
  genpol list recipes | cut -f1
"""

_SIMULATORS = {
    "mujoco": "native",
    "multitask": "native",
    "ogbench": "OGBench",
    "metaworld": "Meta-World",
    "isaaclab": "Isaac Lab",
    "mjlab": "mjlab",
    "gym": "others",
    "dm_control": "others",
}

GROUPS = {"agents": "agent", "envs": "env", "recipes": "recipe", "experiments": "experiment"}


def run(arguments: list[str]) -> int:
    """Print one group.

    Raises:
        ConfigError: If the argument is not one of the groups.
    """
    if len(arguments) != 1 or arguments[0] not in GROUPS:
        given = " ".join(arguments)
        raise ConfigError(
            f"cannot list {given!r}.{nearest(given, GROUPS)} The lists are {', '.join(GROUPS)}"
            if arguments
            else f"nothing to list; write `genpol list` and one of {', '.join(GROUPS)}"
        )
    group = GROUPS[arguments[0]]
    rows = {name: describe(group, name) for name in names(group)}
    if sys.stdout.isatty():
        _print_table(arguments[0], _by_simulator(rows) if group == "env" else {"": rows})
    else:
        sys.stdout.writelines(f"{name}\t{text}\n" for name, text in rows.items())
    return 0


def names(group: str) -> list[str]:
    """Return what ``group=`` may be set to, sorted."""
    files = (config_folder() / group).glob("*.yaml")
    return sorted((file.stem for file in files), key=str.casefold)


def describe(group: str, name: str) -> str:
    """Return one line on one member of a group, or an empty string.

    An agent is described by the first line of its module, anything else by the first comment of its
    file. Both are read, not run: neither torch nor any algorithm is imported.
    """
    module = package_folder("genpol.agents") / f"{name}.py"
    if group == "agent" and module.is_file():
        docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
        if docstring:
            return docstring.splitlines()[0]
    return _first_comment(config_folder() / group / f"{name}.yaml")


def config_folder() -> Path:
    """Return the folder of the configurations that genpol was installed with."""
    return package_folder("genpol.configs")


def _first_comment(file: Path) -> str:
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        if text and not text.startswith("@package"):
            return text
    return ""


def _by_simulator(rows: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Divide environments by the simulator that their files name as ``<simulator>_schema``."""
    sections: dict[str, dict[str, str]] = {title: {} for title in _SIMULATORS.values()}
    for name, text in rows.items():
        content = (config_folder() / "env" / f"{name}.yaml").read_text(encoding="utf-8")
        schema = re.search(r"(\w+)_schema", content)
        title = _SIMULATORS.get(schema[1] if schema else "", "others")
        sections[title][name] = text
    return sections


def package_folder(package: str) -> Path:
    """Return the folder of an installed package."""
    # find_spec locates a package without running it, also where an editable install maps it.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"package {package} is missing; reinstall genpol")
    return Path(next(iter(spec.submodule_search_locations)))


def _print_table(title: str, sections: Mapping[str, Mapping[str, str]]) -> None:
    from rich.console import Console  # here: `genpol --help` reads SUMMARY and must stay fast
    from rich.table import Table

    table = Table(title=f"genpol {title}", title_justify="left", box=None, pad_edge=False)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is")
    for heading, rows in sections.items():
        if heading and rows:
            table.add_row(f"\n[dim]{heading}[/dim]", "")
        for name, text in rows.items():
            table.add_row(name, text)
    Console().print(table)

"""`genpol data`: look at data sets, check them and convert them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from genpol.errors import ConfigError, nearest

SUMMARY = "describe, check, convert, generate or record data sets"
USAGE = """
usage: genpol data info PATH [json=true]
       genpol data validate PATH
       genpol data convert SRC DST [format=genpol|ogbench|minari]
       genpol data generate env=NAME [num_transitions=1000000] [output=FILE.npz] [seed=0]
                            [num_workers=0] [kind=play|noisy]
       genpol data record RUN [RUN ...] output=DST [episodes=100] [format=minari] [seed=30000]
                          [stochastic=true] [key=value ...]

Reads data sets of genpol, OGBench, Minari, D4RL, robomimic and LeRobot v3; which one a path is, is
seen from its content.

  info             sizes, lengths, returns, success rate, and the range of every column
    json=true      as JSON
  validate         reads every value, and names the file, column and row of the first bad one
  convert          writes SRC as DST, which must not exist
    format=FORMAT  genpol (default): a folder that opens at once, whatever its size;
                   ogbench: an .npz file; minari: a folder NAME-v0

  generate         makes OGBench's play data of an environment with its scripted oracles, on all
                   cores; Ctrl-C keeps the finished episodes, and the same command goes on
  record           lets the policies of trained runs act for so many episodes each, and keeps what
                   they did: an expert's, that of an early checkpoint, or a mix of both

What is not in genpol's own format is converted once into a cache, $GENPOL_CACHE or ~/.cache/genpol;
convert does without where it writes genpol's format.

examples:
  genpol data info ~/.ogbench/data/cube-single-play-v0.npz
  genpol data validate recordings/monday
  genpol data convert hopper_medium-v2.hdf5 data/hopper-medium
  genpol data convert data/hopper-medium ~/.minari/datasets/hopper/medium-v0 format=minari
  genpol data generate env=cube-single-play
  genpol data record runs/HopperStand/gorl/20261122-101500-s0 output=data/hopper-expert-v0
"""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def run(arguments: list[str]) -> int:
    """Do what the first argument says.

    Raises:
        ConfigError: If it is not one of the actions, or the rest does not fit it.
        DatasetError: If a data set is damaged or inconsistent, or one cannot be written.
    """
    if not arguments or arguments[0] not in ACTIONS:
        given = arguments[0] if arguments else ""
        raise ConfigError(
            f"unknown action {given!r}.{nearest(given, ACTIONS)} The actions are "
            f"{', '.join(ACTIONS)}; see `genpol data --help`"
            if arguments
            else f"nothing to do; write `genpol data` and one of {', '.join(ACTIONS)}"
        )
    return ACTIONS[arguments[0]](arguments[1:])


def _info(arguments: list[str]) -> int:
    (path,), options = _split("info", arguments, ("PATH",), {"json": "false"})
    if options["json"] not in ("true", "false"):
        raise ConfigError(f"json = {options['json']!r}: must be true or false")
    from genpol.data import formats

    name = formats.detect(path)
    info = formats.open_dataset(path).info()
    facts = {"path": str(path), "format": name, "disk_bytes": _disk_bytes(path), **info}
    if options["json"] == "true":
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        _print_tables(facts)
    return 0


def _validate(arguments: list[str]) -> int:
    (path,), _ = _split("validate", arguments, ("PATH",), {})
    from genpol.data import formats

    name = formats.detect(path)
    num_trajectories, num_transitions = formats.validate(path)
    sys.stdout.write(
        f"{path}: valid ({name}, {num_trajectories:,} trajectories, "
        f"{num_transitions:,} transitions)\n"
    )
    return 0


def _convert(arguments: list[str]) -> int:
    (source, target), options = _split("convert", arguments, ("SRC", "DST"), {"format": "genpol"})
    from genpol.data import formats

    name = options["format"]
    formats.check_writable(name)
    if name == "genpol":
        formats.convert(source, target)
    else:
        formats.write(formats.open_dataset(source), target, name)
    sys.stdout.write(f"{target}\n")
    return 0


def _elsewhere(module: str) -> Callable[[list[str]], int]:
    def action(arguments: list[str]) -> int:
        run: Callable[[list[str]], int] = importlib.import_module(f"genpol.cli.{module}").run
        return run(arguments)

    return action


# What may follow `genpol data`. Each is given the rest of the command line and returns the exit
# code; it parses all of it before it imports numpy, h5py or torch.
ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "info": _info,
    "validate": _validate,
    "convert": _convert,
    "generate": _elsewhere("data_generate"),
    "record": _elsewhere("data_record"),
}


def _split(
    action: str, arguments: list[str], places: tuple[str, ...], defaults: Mapping[str, str]
) -> tuple[list[Path], dict[str, str]]:
    """Return the paths and the ``key=value`` options of an action.

    Raises:
        ConfigError: If an option is not known, or there are not as many paths as ``places``.
    """
    paths, options = [], dict(defaults)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not (equals and key.isidentifier()):  # ./a=b is a path
            paths.append(Path(argument).expanduser())
        elif key in defaults:
            options[key] = value
        else:
            known = (
                f"it takes {', '.join(f'{k}=' for k in defaults)}" if defaults else "it takes none"
            )
            raise ConfigError(
                f"unknown option {key!r} of `genpol data {action}`.{nearest(key, defaults)} "
                f"Beside {' and '.join(places)}, {known}"
            )
    if len(paths) != len(places):
        wanted = " ".join(places)
        raise ConfigError(
            f"`genpol data {action}` takes {wanted}, and was given {len(paths)} paths; see "
            "`genpol data --help`"
        )
    return paths, options


def _disk_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _print_tables(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    summary = Table(box=None, pad_edge=False, show_header=False)
    summary.add_column(style="bold", no_wrap=True)
    summary.add_column(overflow="fold")
    for name, text in _summary(facts).items():
        summary.add_row(name, escape(text))
    columns = Table(box=None, pad_edge=False)
    for name in ("column", "type", "width", "min", "max"):
        columns.add_column(name, justify="left" if name in ("column", "type") else "right")
    for name, column in facts["columns"].items():
        width = "x".join(map(str, column["shape"])) or "1"
        low, high = (_number(column[bound]) for bound in ("min", "max"))
        columns.add_row(escape(name), column["dtype"], width, low, high)
    console = Console()
    if not console.is_terminal:  # in a pipe rich assumes 80 columns and would cut paths
        console = Console(width=200)
    console.print(summary)
    console.print()
    console.print(columns)


def _summary(facts: dict[str, Any]) -> dict[str, str]:
    metadata = dict(facts["metadata"])
    came_from = metadata.pop("format", facts["format"])
    shown = facts["format"]
    if came_from != shown:
        shown += f", converted from {came_from}"
    lengths, returns = facts["length"], facts["return"]
    rows = {
        "path": facts["path"],
        "format": shown,
        "environment": str(metadata.pop("env", "not recorded")),
        "trajectories": f"{facts['num_trajectories']:,}",
        "transitions": f"{facts['num_transitions']:,}",
        "observation": f"{facts['observation_dim']} numbers",
        "action": f"{facts['action_dim']} numbers",
        "length": _spread(lengths),
        "return": _spread(returns) if returns else "no rewards",
        "success rate": _rate(facts["success_rate"]),
        "terminated": _rate(facts["terminated_rate"]),
        "size": f"{_size(facts['disk_bytes'])} on disk, {_size(facts['bytes'])} mapped",
    }
    return rows | {name: _short(value) for name, value in metadata.items()}


def _spread(found: Mapping[str, float]) -> str:
    low, high = _number(found["min"]), _number(found["max"])
    return f"{_number(found['mean'])} ± {_number(found['std'])}, from {low} to {high}"


def _rate(rate: float | None) -> str:
    return "not recorded" if rate is None else f"{rate:.1%} of trajectories"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _size(size: float) -> str:
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"

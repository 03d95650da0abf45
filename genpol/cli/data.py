"""`genpol data`: look at data sets, check them and convert them."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, nearest

if TYPE_CHECKING:
    from genpol.data.actions import ActionRange
    from genpol.data.dataset import OfflineDataset

SUMMARY = "describe, check, convert, generate or record data sets"
USAGE = """
usage: genpol data info PATH [json=true]
       genpol data validate PATH
       genpol data convert SRC DST [format=genpol|ogbench|minari]
                           [action_low=LOW action_high=HIGH | action_scale=data]
       genpol data generate env=NAME-play [num_transitions=1000000] [kind=play|noisy]
                            [output=FILE.npz] [seed=0] [num_workers=0]
       genpol data generate env=NAME-v3 [episodes=200] [noise=0] [reward=sparse|dense]
                            [output=FILE.npz] [seed=0] [num_workers=0]
       genpol data record RUN [RUN ...] output=DST [episodes=100] [format=minari] [seed=30000]
                          [stochastic=true] [key=value ...]

Reads data sets of genpol, OGBench, Minari, D4RL, robomimic and LeRobot v3; which one a path is, is
seen from its content.

  info             sizes, lengths, returns, success rate, and the range of every column
  validate         reads every value, and names the file, column and row of the first bad one
  convert          writes SRC as DST, which must not exist, and scales its actions if need be
  generate         makes data of an environment of OGBench or Meta-World with its own scripted
                   experts, on all cores; Ctrl-C keeps the finished episodes, and the same command
                   goes on
  record           lets the policies of trained runs act for so many episodes each, and keeps what
                   they did: an expert's, that of an early checkpoint, or a mix of both; Ctrl-C
                   keeps the finished episodes, and the same command goes on

`genpol data convert --help`, and so on, tells more of each. What is not in genpol's own format is
converted once into a cache, $GENPOL_CACHE or ~/.cache/genpol.

examples:
  genpol data info ~/.ogbench/data/cube-single-play-v0.npz
  genpol data validate recordings/monday
  genpol data convert hopper_medium-v2.hdf5 data/hopper-medium
  genpol data convert data/hopper-medium ~/.minari/datasets/hopper/medium-v0 format=minari
  genpol data generate env=cube-single-play
  genpol data record runs/HopperStand/gorl/20261122-101500-s0 output=data/hopper-expert-v0
"""
_USAGES = {
    "info": """
usage: genpol data info PATH [json=true]

Tells of a data set its sizes, lengths, returns, success rate, and the type and range of every
column. What is not in genpol's own format is converted into the cache for it.

  json=true      as JSON

example:
  genpol data info ~/.ogbench/data/cube-single-play-v0.npz
""",
    "validate": """
usage: genpol data validate PATH

Reads every value of a data set, and names the file, column and row of the first bad one.

example:
  genpol data validate recordings/monday
""",
    "convert": """
usage: genpol data convert SRC DST [format=genpol|ogbench|minari]
                           [action_low=LOW action_high=HIGH | action_scale=data]

Writes SRC as DST, which must not exist.

  format         genpol (default): a folder that opens at once, whatever its size; ogbench: an .npz
                 file; minari: a folder NAME-v0. All but genpol go through the cache.

Actions are kept in [-1, 1], the range of every environment of genpol. Minari's files say what range
theirs have; others are scaled as these options say, and `genpol data info` shows the bounds:

  action_low     what becomes -1: a number, or one for each dimension, such as -100,-100,0
  action_high    what becomes 1
  action_scale   data: take the least and the greatest value of each dimension, those of
                 meta/stats.json where LeRobot has it. A dimension that never changes becomes 0.

examples:
  genpol data convert hopper_medium-v2.hdf5 data/hopper-medium
  genpol data convert data/hopper-medium ~/.minari/datasets/hopper/medium-v0 format=minari
  genpol data convert lerobot/so101_pick data/pick action_low=-100,-100,0 action_high=100
""",
}

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_INTERRUPTED = {"SIGINT": 130, "SIGTERM": 143}


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


def usage_of(arguments: list[str]) -> str:
    """Return the help of the action that ``arguments`` begin with, or of all."""
    action = arguments[0] if arguments else ""
    if action in _MODULES:
        text: str = importlib.import_module(_MODULES[action]).USAGE
        return text
    return _USAGES.get(action, USAGE)


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
    defaults = {"format": "genpol", "action_low": "", "action_high": "", "action_scale": ""}
    (source, target), options = _split("convert", arguments, ("SRC", "DST"), defaults)
    bounds = _bounds(options)
    if options["action_scale"] not in ("", "data"):
        raise ConfigError(f"action_scale = {options['action_scale']!r}: must be data")
    if options["action_scale"] and bounds is not None:
        raise ConfigError("action_scale= and action_low= exclude each other: keep one")
    from genpol.data import formats

    formats.check_target(target, options["format"])  # before all of the source is read
    found = None if bounds is None else _action_range(*bounds)
    if options["action_scale"]:
        found = formats.find_action_range(source)
    formats.convert(source, target, options["format"], action_range=found)
    sys.stdout.write(f"{target}\n")
    return 0


def _bounds(options: Mapping[str, str]) -> tuple[list[float], list[float]] | None:
    """Return what is given as ``action_low`` and ``action_high``."""
    given = [key for key in ("action_low", "action_high") if options[key]]
    if not given:
        return None
    if len(given) == 1:
        raise ConfigError(f"{given[0]} is given alone: action_low and action_high go together")
    low, high = _numbers("action_low", options), _numbers("action_high", options)
    if len(low) != len(high) and 1 not in (len(low), len(high)):
        raise ConfigError(
            f"action_low has {len(low)} numbers, action_high {len(high)}: give one for each "
            "dimension, or one for all"
        )
    width = max(len(low), len(high))
    for least, greatest in zip(low * (width // len(low)), high * (width // len(high)), strict=True):
        if least > greatest:
            raise ConfigError(f"action_low = {least:g}: must not be above action_high {greatest:g}")
    return low, high


def _numbers(key: str, options: Mapping[str, str]) -> list[float]:
    try:
        found = [float(text) for text in options[key].strip("[]").split(",")]
    except ValueError:
        found = []
    if not found or not all(math.isfinite(number) for number in found):
        raise ConfigError(f"{key} = {options[key]!r}: must be a number, or some such as -1,0.5,2")
    return found


def _action_range(low: list[float], high: list[float]) -> ActionRange:
    import numpy as np

    from genpol.data.actions import ActionRange

    return ActionRange(np.array(low), np.array(high))


# The modules of actions that are more than a few lines.
_MODULES = {"generate": "genpol.cli.data_generate", "record": "genpol.cli.data_record"}


def _elsewhere(action: str) -> Callable[[list[str]], int]:
    def run_action(arguments: list[str]) -> int:
        run: Callable[[list[str]], int] = importlib.import_module(_MODULES[action]).run
        return run(arguments)

    return run_action


# What may follow `genpol data`. Each is given the rest of the command line and returns the exit
# code; it parses all of it before it imports numpy, h5py or torch.
ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "info": _info,
    "validate": _validate,
    "convert": _convert,
    "generate": _elsewhere("generate"),
    "record": _elsewhere("record"),
}


def whole_number(given: Mapping[str, str], key: str, default: int) -> int:
    """Read an integer, which may be written 1e6 or 1_000_000.

    Raises:
        ConfigError: If it is none.
    """
    if key not in given:
        return default
    readers: tuple[Callable[[str], float], ...] = (int, float)
    for reader in readers:
        try:
            number = reader(given[key])
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            continue
    raise ConfigError(f"{key} = {given[key]!r}: must be an integer")


def interrupted(signal: str | None, finished: int, total: int, folder: Path) -> int:
    """Say that a signal stopped the making of episodes; return the exit code.

    Args:
        signal: Name of the signal; ``None`` is Ctrl-C.
        finished: Episodes that are kept.
        total: Episodes that were asked for.
        folder: What keeps them.
    """
    name = signal or "SIGINT"
    kept = f"after {finished} of {total} episodes, which {folder} keeps; the same command goes on"
    if finished == 0:
        kept = f"before the first of {total} episodes was finished"
    sys.stdout.write(f"stopped by {name} {kept}\n")
    return _INTERRUPTED[name]


def warn_of_action_repeat(dataset: OfflineDataset, path: str, action_repeat: int) -> None:
    """Say in one line if actions were held for another time where the data come from.

    Args:
        dataset: What is learnt from.
        path: What it is called.
        action_repeat: For how many steps the environment holds an action.
    """
    found = dataset.metadata.get("action_repeat", action_repeat)
    if found != action_repeat:
        sys.stderr.write(
            f"warning: {path}: its actions are held for {found} steps, those of the environment "
            f"for {action_repeat}; set env.action_repeat={found}\n"
        )


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
            f"`genpol data {action} --help`"
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
    scaled = _bounds_of_actions(metadata)
    rows = {
        "path": facts["path"],
        "format": shown,
        "environment": str(metadata.pop("env", "not recorded")),
        "trajectories": f"{facts['num_trajectories']:,}",
        "transitions": f"{facts['num_transitions']:,}",
        "observation": f"{facts['observation_dim']} numbers",
        "action": f"{facts['action_dim']} numbers{scaled}",
        "length": _spread(lengths),
        "return": _spread(returns) if returns else "no rewards",
        "success rate": _rate(facts["success_rate"]),
        "terminated": _rate(facts["terminated_rate"]),
        "size": f"{_size(facts['disk_bytes'])} on disk, {_size(facts['bytes'])} mapped",
    }
    return rows | {name.replace("_", " "): _short(value) for name, value in metadata.items()}


def _bounds_of_actions(metadata: dict[str, Any]) -> str:
    """Take from the metadata what -1 and 1 were where the data come from, and say it."""
    low, high = metadata.pop("action_low", None), metadata.pop("action_high", None)
    if low is None or high is None:
        return ""
    shown = [f"[{a:.6g}, {b:.6g}]" for a, b in zip(low, high, strict=True)]
    alike = len(set(shown)) == 1
    return f", scaled from {shown[0] if alike else ' '.join(shown)}"


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

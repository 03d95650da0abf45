"""`genpol policies import`: a policy of another library as a policy folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from genpol.errors import ConfigError

if TYPE_CHECKING:
    from genpol.foreign import ImportOptions
    from genpol.pretrained import PretrainedPolicy

OPTIONS = (
    *("format", "output", "env", "steps", "action_steps", "control_period_s", "action_range"),
    *("config", "normalization"),
)
_USAGE = "write genpol policies import --format FORMAT PATH output=FOLDER"


def joined(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with ``--format X`` and ``--format=X`` as ``format=X``."""
    found: list[str] = []
    rest = iter(arguments)
    for text in rest:
        if text == "--format":
            found.append(f"format={next(rest, '')}")
        else:
            found.append(text.removeprefix("--") if text.startswith("--format=") else text)
    return found


def read(names: Sequence[str], options: Mapping[str, str]) -> PretrainedPolicy:
    """Read the policy that the command line names.

    Raises:
        ConfigError: If something is missing, or does not fit the policy.
        CheckpointError: If the file is of another kind, damaged, or holds what is not supported.
    """
    from genpol import foreign

    if len(names) != 1 or "format" not in options:
        raise ConfigError(f"{_USAGE}; the formats are {', '.join(foreign.FORMATS)}")
    path = Path(names[0]).expanduser()
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder")
    return foreign.read(options["format"], path, _options(options))


def _options(options: Mapping[str, str]) -> ImportOptions:
    from genpol.foreign import ImportOptions

    files = {x: Path(options[x]).expanduser() for x in ("config", "normalization") if x in options}
    return ImportOptions(
        env=options.get("env", ""),
        steps=int(_number(options, "steps", whole=True)),
        action_steps=int(_number(options, "action_steps", whole=True)),
        control_period_s=_number(options, "control_period_s"),
        action_range=_range(options.get("action_range", "[-1,1]")),
        **files,
    )


def _number(options: Mapping[str, str], name: str, *, whole: bool = False) -> float:
    text = options.get(name, "0")
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = -1
    if name in options and not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {text!r}: must be {'an integer' if whole else 'a number'} > 0")
    return value


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in text.strip("[]() ").split(","))
    except ValueError:
        low, high = 1.0, -1.0
    if not low < high:
        raise ConfigError(f"action_range = {text!r}: write action_range=[LOW,HIGH]")
    return low, high

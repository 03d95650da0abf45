"""Policy folders: a pretrained model of behaviour as three files that people share.

::

    weights.safetensors   the model's weights
    policy.json           all else of :class:`~genpol.pretrained.PretrainedPolicy`, the format's
                          version, and the SHA-256 of the weights
    README.md             a card for people, which no code reads

No pickle is ever read. The statistics of observations are numbers in ``policy.json``, which JSON
keeps exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import genpol
from genpol.data.staging import staged
from genpol.errors import CheckpointError
from genpol.pretrained import FIRST_MODEL_SETTINGS, PretrainedPolicy, complete

WEIGHTS = "weights.safetensors"
RECORD = "policy.json"
CARD = "README.md"
FORMAT = "genpol.policy"
FORMAT_VERSION = 2

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "observation_dim": int,
    "action_dim": int,
    "action_steps": int,
    "env": str,
    "action_repeat": int,
    "control_period_s": (int, float),
    "data": dict,
    "success": dict,
}
# What folders of the first policies lack.
_LATER_FIELDS: dict[str, Any] = {
    "observation_steps": 1,
    "observation_clip": 10.0,
    "action_low": None,
    "action_high": None,
}


def is_policy_folder(path: Path) -> bool:
    """Whether a folder says that it is one."""
    return (path / RECORD).is_file()


def write(target: Path, policy: PretrainedPolicy) -> None:
    """Write a policy folder, whole or not at all.

    Raises:
        DatasetError: If ``target`` exists or cannot be written.
    """
    with staged(target) as folder:
        folder.mkdir()
        weights = {name: x.contiguous() for name, x in policy.weights.items()}
        save_file(weights, folder / WEIGHTS)
        record = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "genpol_version": genpol.__version__,
            **{name: getattr(policy, name) for name in (*_FIELDS, *_LATER_FIELDS)},
            "statistics": _numbers(policy.statistics),
            "weights_sha256": _sha256(folder / WEIGHTS),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card(target.name, policy), encoding="utf-8")


def read(path: Path) -> PretrainedPolicy:
    """Read a policy folder after verifying it.

    Raises:
        CheckpointError: If a file is missing, damaged, foreign or of a newer format.
    """
    record = read_record(path)
    try:
        found = _sha256(path / WEIGHTS)
        if found != record["weights_sha256"]:
            raise CheckpointError(
                f"{path / WEIGHTS}: is not the file that {RECORD} was written with; get the whole "
                "folder again"
            )
        weights = {name: x.clone() for name, x in load_file(path / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: cannot be read ({_one_line(error)})") from None
    statistics = record["statistics"]
    if statistics is not None:
        statistics = {
            name: torch.tensor(statistics[name], dtype=torch.float64) for name in ("mean", "std")
        }
    return PretrainedPolicy(
        weights=weights,
        statistics=statistics,
        **{name: record[name] for name in (*_FIELDS, *_LATER_FIELDS)},
    )


def read_record(path: Path) -> dict[str, Any]:
    """Read ``policy.json`` alone.

    Raises:
        CheckpointError: If it is missing, damaged, foreign or of a newer format.
    """
    file = path / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: is no JSON ({_one_line(error)})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{file}: is not a policy of genpol (format {FORMAT!r})")
    version = record.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: has format version {version}, this genpol reads up to {FORMAT_VERSION}; "
            "update genpol"
        )
    _check(record, file)
    _check_bounds(record, file)
    later = {name: record.get(name, default) for name, default in _LATER_FIELDS.items()}
    return {**record, **later, "model": complete(record["model"])}


def _check(record: Mapping[str, Any], file: Path) -> None:
    for name, kind in {**_FIELDS, "weights_sha256": str}.items():
        if not isinstance(record.get(name), kind):
            raise CheckpointError(f"{file}: {name} is missing, or not what it should be")
    missing = [name for name in FIRST_MODEL_SETTINGS if name not in record["model"]]
    if missing:
        raise CheckpointError(f"{file}: model has no {missing[0]}")
    statistics, width = record.get("statistics"), record["observation_dim"]
    if (statistics is not None) != bool(record["model"]["normalize_observations"]):
        raise CheckpointError(
            f"{file}: has {'no ' * (statistics is None)}statistics of observations, but "
            f"normalize_observations = {record['model']['normalize_observations']}"
        )
    if statistics is None:
        return
    for name in ("mean", "std"):
        column = statistics.get(name) if isinstance(statistics, dict) else None
        if not isinstance(column, list) or not all(map(_is_number, column)):
            raise CheckpointError(f"{file}: statistics.{name} is no list of numbers")
        if len(column) != width:
            raise CheckpointError(
                f"{file}: statistics.{name} has {len(column)} numbers, the observation {width}"
            )


def _check_bounds(record: Mapping[str, Any], file: Path) -> None:
    bounds = [record.get("action_low"), record.get("action_high")]
    for name, own in zip(("action_low", "action_high"), bounds, strict=True):
        if own is None and bounds == [None, None]:
            continue
        if not isinstance(own, list) or not all(map(_is_number, own)):
            raise CheckpointError(f"{file}: {name} is no list of numbers")
        if len(own) != record["action_dim"]:
            raise CheckpointError(
                f"{file}: {name} has {len(own)} numbers, the action {record['action_dim']}"
            )
    steps, clip = record.get("observation_steps", 1), record.get("observation_clip", 10.0)
    if not isinstance(steps, int) or steps < 1 or record["observation_dim"] % steps:
        raise CheckpointError(
            f"{file}: observation_steps = {steps} does not divide the observation of width "
            f"{record['observation_dim']}"
        )
    if clip is not None and not (_is_number(clip) and clip > 0):
        raise CheckpointError(f"{file}: observation_clip = {clip} is no bound")


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def card(name: str, policy: PretrainedPolicy) -> str:
    """Return the card of a policy, in Markdown."""
    model, width = policy.model, "x".join(str(x) for x in policy.model["actor"]["hidden"])
    # Other libraries name environments as they please.
    env = "<name>" if "format" in policy.data else policy.env.split()[0]
    env = re.sub(r"-task(\d+)$", r" env.task=\1", env)  # OGBench's tasks, as the command names them
    return (
        f"# {name}\n\n"
        f"A {model['denoiser']} policy for `{policy.env}`, made with genpol {genpol.__version__}.\n"
        "\n| | |\n|---|---|\n"
        f"| observation | {policy.observation_dim} numbers"
        f"{f', of {policy.observation_steps} steps' * (policy.observation_steps > 1)}"
        f"{', standardised' if policy.statistics is not None else ''} |\n"
        f"| action | {policy.action_dim} numbers in [-1, 1] |\n"
        f"| period | {_period(policy)} |\n"
        f"| chunk | {model['horizon']} actions, {policy.action_steps} carried out |\n"
        f"| solver | {model['solver_steps']} steps |\n"
        f"| network | {model.get('network', 'mlp')} {width} |\n"
        f"| learned from | {_listed(policy.data)} |\n"
        f"| measured | {_listed(policy.success)} |\n\n"
        "```\n"
        f"genpol train env={env}"
        f"{f' env.observation_steps={policy.observation_steps}' * (policy.observation_steps > 1)}"
        f" agent=ogpo init={name}\n"
        "```\n"
    )


def _period(policy: PretrainedPolicy) -> str:
    return f"{policy.control_period_s:g} s" if policy.control_period_s else "not told"


def _listed(facts: Mapping[str, Any]) -> str:
    shown = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
    return ", ".join(shown) or "not told"


def _numbers(statistics: Mapping[str, torch.Tensor] | None) -> dict[str, list[float]] | None:
    if statistics is None:
        return None
    return {name: x.double().tolist() for name, x in statistics.items()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

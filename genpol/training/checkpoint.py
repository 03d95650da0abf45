"""Checkpoints: folders that are whole or absent, verified when read, and free of pickles.

A checkpoint is a folder such as ``checkpoints/step-000012345678/`` of three files::

    tensors.safetensors   every tensor, named by its place in the state: "agent/actor.0.weight"
    state.json            the state as a tree; each tensor is a reference to its name
    manifest.json         format, versions, metadata, size and SHA-256 of the two files above

:func:`save` writes them into a staging folder ``.tmp-<name>``, flushes each one to the disk and
renames the folder into place, so a crash, a full disk or a power cut leaves either the whole
checkpoint or none; older ones are removed only after that. :func:`load` checks every byte before it
believes any, and changes nothing.

What JSON cannot say is tagged by a key that begins with ``$``: ``{"$tensor": name}``,
``{"$float": "nan"}``, ``{"$tuple": [...]}``, ``{"$numpy": [dtype, value]}`` and, for dictionaries
with integer keys or with keys that begin with ``$``, ``{"$dict": [[key, value], ...]}``.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import genpol
from genpol.data.staging import flush
from genpol.errors import CheckpointError, nearest

State: TypeAlias = dict[str, Any]
"""Nested dictionaries, lists and tuples of tensors, numbers, strings, booleans and ``None``."""

FORMAT = "genpol.checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors.safetensors"
STAGING = ".tmp-"

_DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    }
)


def step_name(env_steps: int) -> str:
    """Return the name of the checkpoint at ``env_steps``; names sort as the steps do."""
    return f"step-{env_steps:012d}"


def save(
    folder: Path,
    name: str,
    state: Mapping[str, Any],
    *,
    metadata: Mapping[str, str | int | float],
    keep: int = 3,
) -> Path:
    """Write ``state`` to ``folder/name`` whole or not at all, then drop all but the last ``keep``.

    Tensors are stored by value: two that share memory come back apart, any device comes back as the
    CPU. The folder belongs to one process: staging folders that a killed one left are removed.

    Args:
        folder: The checkpoints of one run; made if absent.
        name: Name of the new checkpoint. Names must sort in the order of saving, see
            :func:`step_name`; an existing checkpoint of this name is replaced.
        state: What :func:`load` is to return. Keys are strings or integers.
        metadata: A few facts to read without loading, see :func:`read_metadata`.
        keep: How many checkpoints to keep; the new one is always among them.

    Returns:
        The folder of the new checkpoint.

    Raises:
        CheckpointError: If ``state`` holds something else than :data:`State` allows, or the folder
            cannot be written. Earlier checkpoints are then as they were.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: must be >= 1")
    if not name or name.startswith(".") or Path(name).name != name:
        raise ValueError(f"name = {name!r}: must be a plain file name that begins with no dot")
    target = folder / name
    write_folder(target, state, tag=FORMAT, metadata=metadata)
    others = [path for path in _list(folder) if path != target]
    _discard(others[: max(0, len(others) - (keep - 1))])
    return target


def load(path: Path) -> State:
    """Read one checkpoint after verifying all of it; return the state with the types it had.

    Raises:
        CheckpointError: If the checkpoint is damaged, foreign or of a newer format. The message
            names the file, what is wrong, and the newest older checkpoint that is intact.
    """
    try:
        return read_folder(path, tag=FORMAT)
    except CheckpointError as error:
        older = (other for other in reversed(_list(path.parent)) if other.name < path.name)
        intact = next((other for other in older if _is_intact(other)), None)
        mend = f"resume from {intact} instead" if intact else "no older intact one lies beside it"
        raise CheckpointError(f"{error}; {mend}") from None


def read_metadata(path: Path) -> dict[str, str | int | float]:
    """Read the ``metadata`` given to :func:`save`, without reading or verifying the state.

    Raises:
        CheckpointError: If the manifest is missing, damaged, foreign or of a newer format.
    """
    metadata: dict[str, str | int | float] = _decode(_read_manifest(path, FORMAT)["metadata"], {})
    return metadata


def kept(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest first."""
    return _list(folder)


def latest(folder: Path) -> Path | None:
    """Return the checkpoint in ``folder`` whose name sorts last, or ``None``."""
    return next(reversed(_list(folder)), None)


def resolve(path: Path) -> Path:
    """Return the checkpoint meant by a run folder, a checkpoints folder or one checkpoint.

    Raises:
        CheckpointError: If there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; give a run folder, or a checkpoint inside one")
    if not path.is_dir():
        names = [beside.name for beside in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"{path}: no such folder.{nearest(path.name, names)}")
    inside = path / "checkpoints"
    found = latest(inside if inside.is_dir() else path)
    if found is None:
        raise CheckpointError(
            f"{path}: no checkpoint in it; give a run folder, its checkpoints folder or one "
            f"checkpoint (a folder with a {MANIFEST})"
        )
    return found


def run_folder(path: Path) -> Path:
    """Return the run folder that checkpoint ``path`` lies in.

    Raises:
        CheckpointError: If it lies in none, as a copy of the checkpoint alone does.
    """
    folder = path.resolve().parent.parent
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{path}: lies in no run folder, whose config.yaml says what was trained; give a run "
            "folder, or a checkpoint inside one"
        )
    return folder


def discard_after(path: Path) -> None:
    """Remove the checkpoints that sort after ``path``: the future a run abandons by going back.

    Without it, :func:`latest` would return to that future when the run is next resumed.
    """
    _discard(other for other in _list(path.parent) if other.name > path.name)


def write_folder(
    target: Path, state: Mapping[str, Any], *, tag: str, metadata: Mapping[str, str | int | float]
) -> None:
    """Write a verified folder of safetensors and JSON to ``target``, whole or not at all.

    Args:
        target: The folder to make or replace; parents are made.
        state: See :data:`State`.
        tag: The format that the manifest declares and :func:`read_folder` insists on.
        metadata: See :func:`save`.

    Raises:
        CheckpointError: See :func:`save`.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "", tensors)
    header = {
        "format": tag,
        "format_version": FORMAT_VERSION,
        "genpol_version": genpol.__version__,
        "metadata": _encode(metadata, "metadata", {}),
    }
    staging = target.with_name(f"{STAGING}{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_staging(target.parent)
        staging.mkdir()
        _write_files(staging, tree, tensors, header)
        _move_into_place(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_why_not_saved(target, error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_folder(path: Path, *, tag: str) -> State:
    """Verify and read a folder that :func:`write_folder` wrote with the same ``tag``.

    Raises:
        CheckpointError: If any byte of it is not what was written, or it was written for another
            purpose or by a newer genpol.
    """
    try:
        _verify(path, tag)
        # A loaded file is one memory map in which tensors lie at odd addresses. Copies are aligned
        # as torch's own tensors are, so that vectorised sums round as they did before the save.
        tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
        tree = json.loads((path / STATE).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    state: State = _decode(tree, tensors)
    return state


def digest(path: Path, *, tag: str) -> str:
    """Return the SHA-256 of a folder that :func:`write_folder` wrote: that of its manifest.

    Raises:
        CheckpointError: If the manifest is missing, damaged, foreign or of a newer format.
    """
    return _digest(_read_manifest(path, tag))


# --- the state as a tree -----------------------------------------------------------------------


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as strict JSON and collect its tensors by name."""
    if isinstance(value, Tensor):
        return {"$tensor": _collect(value, place, tensors)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, place, tensors)
    # Before float: numpy.float64 is one.
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return {"$numpy": [value.dtype.name, _encode(value.item(), place, tensors)]}
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) in (list, tuple):
        items = [_encode(item, _join(place, index), tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    raise CheckpointError(
        f"{place}: {type(value).__name__} cannot be saved; use tensors, numbers, strings, "
        "booleans, None, and dictionaries or lists of them"
    )


def _encode_mapping(value: Mapping[Any, Any], place: str, tensors: dict[str, Tensor]) -> Any:
    pairs = []
    for key, item in value.items():
        if type(key) not in (str, int):
            raise CheckpointError(f"{place}: key {key!r} cannot be saved; use strings or integers")
        pairs.append((key, _encode(item, _join(place, key), tensors)))
    if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
        return dict(pairs)
    return {"$dict": pairs}


def _join(place: str, key: str | int) -> str:
    return f"{place}/{key}" if place else str(key)


def _collect(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> str:
    """Enter a tensor under a readable name that no other has, and return the name."""
    if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{place}: {tensor.layout} {tensor.dtype} tensors cannot be saved")
    readable = place.encode("utf-8", "replace").decode("utf-8")
    name, copies = readable, 1
    while name in tensors or name == "__metadata__":  # the key that safetensors keeps for itself
        copies += 1
        name = f"{readable}#{copies}"
    tensors[name] = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return name


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert :func:`_encode`."""
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    match next(iter(node.items()), None):
        case "$tensor", name:
            return tensors[name]
        case "$float", text:
            return float(text)
        case "$tuple", items:
            return tuple(_decode(item, tensors) for item in items)
        case "$numpy", [dtype, item]:
            return np.dtype(dtype).type(_decode(item, tensors))
        case "$dict", pairs:
            return {key: _decode(item, tensors) for key, item in pairs}
    return {key: _decode(item, tensors) for key, item in node.items()}


# --- files -------------------------------------------------------------------------------------


def _write_files(
    staging: Path, tree: Any, tensors: dict[str, Tensor], header: dict[str, Any]
) -> None:
    """Fill a staging folder and flush all of it to the disk."""
    save_file(_unshare(tensors), staging / TENSORS)
    (staging / STATE).write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
    shutil.copymode(staging / STATE, staging / TENSORS)  # safetensors shuts out all other users
    manifest = header | {"files": {name: _describe(staging / name) for name in (TENSORS, STATE)}}
    manifest["sha256"] = _digest(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False)
    (staging / MANIFEST).write_text(text, encoding="utf-8")
    for path in (staging / TENSORS, staging / STATE, staging / MANIFEST, staging):
        flush(path)


def _unshare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors whose memory another one also uses; safetensors refuses those."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return apart


def _move_into_place(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target`` and make the rename durable."""
    aside = target.with_name(f"{STAGING}{target.name}-replaced")
    replaces = target.exists()
    if replaces:  # a folder cannot be renamed over a full one
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        if replaces:
            aside.rename(target)
        raise
    flush(target.parent)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def _verify(path: Path, tag: str) -> None:
    """Compare every file of a folder with the manifest."""
    files: dict[str, dict[str, Any]] = _read_manifest(path, tag)["files"]
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    for name in sorted(present - files.keys()):
        raise CheckpointError(f"{path / name}: not listed in {MANIFEST}; remove it")
    for name, written in files.items():
        if name not in present:
            raise CheckpointError(f"{path / name}: missing")
        found = _describe(path / name)
        if found["size"] != written["size"]:
            sizes = f"{found['size']} bytes instead of {written['size']}"
            raise CheckpointError(f"{path / name}: damaged, {sizes}")
        if found["sha256"] != written["sha256"]:
            raise CheckpointError(f"{path / name}: damaged, its SHA-256 is not the recorded one")


def _read_manifest(path: Path, tag: str) -> dict[str, Any]:
    """Read a manifest and check its format, its own digest and its version, in this order."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{file}: missing; {path.name} is no {tag} or has lost it") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError:
        raise CheckpointError(f"{file}: damaged, not valid JSON") from None
    form = manifest.get("format") if isinstance(manifest, dict) else None
    if form != tag:
        raise CheckpointError(f"{file}: its format is {form!r}, not {tag!r}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointError(f"{file}: damaged, its SHA-256 is not the recorded one")
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {manifest['format_version']} of genpol "
            f"{manifest['genpol_version']}, this genpol {genpol.__version__} reads up to version "
            f"{FORMAT_VERSION}; run: pip install --upgrade genpol"
        )
    return manifest


def _is_intact(path: Path) -> bool:
    try:
        _verify(path, FORMAT)
    except (CheckpointError, OSError):
        return False
    return True


def _list(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder`` by name; staging and other folders are not seen."""
    visible = (path.parent for path in folder.glob(f"*/{MANIFEST}"))
    return sorted(path for path in visible if not path.name.startswith("."))


def _discard(paths: Iterable[Path]) -> None:
    """Remove checkpoints: out of sight first, so that none is ever seen half removed."""
    for path in paths:
        aside = path.with_name(f"{STAGING}{path.name}-discarded")
        with contextlib.suppress(OSError):  # what cannot be removed now is tried at the next save
            path.rename(aside)
            shutil.rmtree(aside)


def _remove_staging(folder: Path) -> None:
    for path in folder.glob(f"{STAGING}*"):
        if path.is_dir():
            shutil.rmtree(path)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _why_not_saved(target: Path, error: OSError | SafetensorError) -> str:
    """Return one line: what failed, how to mend it, and what is still there."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    # The safetensors library reports an operating system's error in words only.
    if getattr(error, "errno", None) in full or any(os.strerror(code) in reason for code in full):
        mend = "free some disk space"
    else:
        mend = "make the folder writable or run in another one"
    previous = latest(target.parent)
    kept = f"; {previous} is intact" if previous else ""
    return f"{target}: cannot be saved ({' '.join(reason.split())}); {mend}{kept}"

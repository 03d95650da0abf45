"""Files of other libraries, opened without running anything that is in them."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from yaml import YAMLError

from genpol.errors import CheckpointError

Array = np.ndarray[Any, Any]

_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\b")
_ABSENT = object()  # a setting may be null


def load_torch(path: Path) -> dict[str, Any]:
    """Return what ``torch.save`` wrote, if it is a dictionary of tensors, numbers and text.

    Raises:
        CheckpointError: If it is missing, damaged, or holds other objects.
    """
    _require_file(path)
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: holds other objects than tensors, numbers and text; a pickle of such can "
                "run any program, so it is not opened; where you trust it, load it with the "
                "library that wrote it and save it anew, as a dictionary of those alone"
            ) from None
        raise CheckpointError(f"{path}: is no file of torch.save, or damaged") from None
    except Exception as error:  # of other bytes the unpickler makes anything
        raise CheckpointError(
            f"{path}: is no file of torch.save, or damaged ({type(error).__name__}: "
            f"{_one_line(error)})"
        ) from None
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: holds a {type(record).__name__}, not a dictionary")
    return record


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: If it is missing or damaged.
    """
    _require_file(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(error)})") from None


def load_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: If it is missing, or holds something else.
    """
    _require_file(path)
    try:
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Return the object that a JSON text holds.

    Raises:
        CheckpointError: If it holds something else.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: is no JSON ({_one_line(error)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: holds no JSON object")
    return found


def load_npz(path: Path) -> dict[str, Array]:
    """Return the arrays of an npz file, without pickles.

    Raises:
        CheckpointError: If it is missing, damaged, or holds pickled objects.
    """
    _require_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(error)})") from None


class Record(dict[str, Any]):
    """A dictionary that tells where it is from when something is missing.

    Args:
        found: Its items.
        where: Where they are from.
    """

    def __init__(self, found: Mapping[str, Any], where: str) -> None:
        super().__init__(found)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.where}: has no {key}")


class YamlConfig:
    """A YAML file of Hydra's kind, whose references are followed only where a value is asked for.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is missing or no such file.
    """

    def __init__(self, path: Path) -> None:
        _require_file(path)
        self.path = path
        try:
            self._config = OmegaConf.load(path)
        except (OmegaConfBaseException, YAMLError, OSError) as error:
            raise CheckpointError(f"{path}: is no YAML ({_one_line(error)})") from None
        if not isinstance(self._config, DictConfig):
            raise CheckpointError(f"{path}: holds no settings")
        # A variable of this machine's environment could end up in a policy that others see.
        self._config = OmegaConf.create(_without_environment(self._config))

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the value at the first of these dotted keys that there is.

        Raises:
            CheckpointError: If it refers to something that is not in the file.
        """
        for key in keys:
            try:
                found = OmegaConf.select(self._config, key, default=_ABSENT, throw_on_missing=True)
            except OmegaConfBaseException as error:
                raise CheckpointError(
                    f"{self.path}: {key} refers to what is not in the file "
                    f"({_one_line(error)}); write its value there"
                ) from None
            if found is not _ABSENT:
                return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        return default

    def require(self, *keys: str) -> Any:
        """Return :meth:`get`, which must be there.

        Raises:
            CheckpointError: If none is.
        """
        found = self.get(*keys)
        if found is None:
            raise CheckpointError(f"{self.path}: has no {keys[0]}")
        return found


def weights_below(
    weights: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors whose names have a prefix, without it, and the names of all others."""
    own = {k.removeprefix(prefix): x.float() for k, x in weights.items() if k.startswith(prefix)}
    return own, [name for name in weights if not name.startswith(prefix)]


def entry(record: Mapping[str, Any], where: str, *keys: str) -> Any:
    """Return a value of nested dictionaries.

    Raises:
        CheckpointError: If there is none.
    """
    found: Any = record
    for depth, key in enumerate(keys):
        if not isinstance(found, Mapping) or key not in found:
            raise CheckpointError(f"{where}: has no {'.'.join(keys[: depth + 1])}")
        found = found[key]
    return found


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")


def _without_environment(config: DictConfig) -> Any:
    """Return settings in which what asks for a variable of the environment is missing."""

    def without(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: without(value) for key, value in x.items()}
        if isinstance(x, list):
            return [without(value) for value in x]
        return "???" if isinstance(x, str) and _ENVIRONMENT.search(x) else x

    return without(OmegaConf.to_container(config, resolve=False))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

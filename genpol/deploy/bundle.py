"""Bundles: a policy as a folder that runs without this library's training side, and without torch.

::

    contract.json    what goes in and out; see :mod:`genpol.deploy.contract`
    policy.onnx      the contract's inputs, float32 [1, ...], to a chunk [1, H, A] in [-1, 1]
    policy.pt2       the same for C++ (AOTInductor), where it was asked for
    policy.ts        the same as TorchScript, where it was asked for
    examples.npz     inputs and the trained policy's own chunks

Every file's SHA-256 stands in the contract and is checked before the policy acts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genpol.deploy import contract as contracts
from genpol.deploy.contract import Contract
from genpol.errors import CheckpointError, ConfigError, require
from genpol.settings import one_of

EXAMPLES = "examples.npz"
FILES = {"onnx": "policy.onnx", "aoti": "policy.pt2", "torchscript": "policy.ts"}
"""The file of each format."""

Array = np.ndarray[Any, np.dtype[np.float32]]

Plan = Callable[[Mapping[str, Array]], Array]
"""The contract's inputs ``[1, ...]`` by name to chunks ``[1, H, A]``, all float32."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are those that its contract tells of.

    Attributes:
        folder: Where it is.
        contract: What goes in and out.
    """

    folder: Path
    contract: Contract

    @property
    def formats(self) -> list[str]:
        """Formats that it has the policy in."""
        return [name for name, file in FILES.items() if file in self.contract.files]

    def examples(self) -> dict[str, Array]:
        """Return the contract's inputs ``[N, ...]`` and ``chunk`` ``[N, H, A]``, by name.

        Raises:
            CheckpointError: If they cannot be read.
        """
        path = self.folder / EXAMPLES
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in (*self.contract.inputs, "chunk")}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None

    def load(self, form: str = "onnx", *, num_threads: int = 1) -> Plan:
        """Return the policy.

        Args:
            form: ``onnx``, ``aoti`` or ``torchscript``.
            num_threads: Of the policy's arithmetic.

        Raises:
            ConfigError: If the bundle does not have it in this format.
            MissingExtraError: If what runs it is not installed.
        """
        one_of("format", form, FILES)
        if form not in self.formats:
            raise ConfigError(
                f"format = {form!r}: {self.folder} has {', '.join(self.formats)}; export it anew "
                f"with formats=[onnx,{form}]"
            )
        return load(self.folder / FILES[form], form, list(self.contract.inputs), num_threads)


def open_bundle(folder: Path) -> Bundle:
    """Open a bundle after verifying its files.

    Raises:
        CheckpointError: If a file is missing, damaged, foreign or of a newer format.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such bundle; make one with genpol export RUN")
    contract = contracts.read(folder / contracts.FILE)
    for name, wanted in contract.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path}: is missing; export the policy anew")
        if sha256(path) != wanted:
            raise CheckpointError(
                f"{path}: is not the file that {contracts.FILE} was written with; copy the whole "
                "bundle again, or export the policy anew"
            )
    return Bundle(folder, contract)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path, form: str, inputs: Sequence[str], num_threads: int = 1) -> Plan:
    """Load a policy from a file of one format.

    Args:
        path: The file.
        form: ``onnx``, ``aoti`` or ``torchscript``.
        inputs: Names of its inputs, in order.
        num_threads: Of the policy's arithmetic.

    Raises:
        CheckpointError: If it cannot be loaded.
        MissingExtraError: If what runs it is not installed.
    """
    if form == "onnx":
        return _load_onnx(path, num_threads)
    return _load_torch(path, form, inputs, num_threads)


def _load_onnx(path: Path, num_threads: int) -> Plan:
    onnxruntime: Any = require("onnxruntime", "deploy")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be loaded ({' '.join(str(error).split())})"
        ) from None
    taken = {x.name for x in session.get_inputs()}

    def plan(inputs: Mapping[str, Array]) -> Array:
        found: Array = session.run(None, {name: inputs[name] for name in taken})[0]
        return found

    return plan


def _load_torch(path: Path, form: str, names: Sequence[str], num_threads: int) -> Plan:
    import torch

    torch.set_num_threads(num_threads)
    model: Any
    if form == "aoti":
        model = torch._inductor.aoti_load_package(str(path))
    else:
        model = torch.jit.load(str(path))

    def plan(inputs: Mapping[str, Array]) -> Array:
        with torch.no_grad():
            found: Array = model(*(torch.from_numpy(inputs[name]) for name in names)).numpy()
        return found

    return plan

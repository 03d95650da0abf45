"""Writes bundles: a traced policy in one format or several, each compared with the trained one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import genpol
from genpol.data.staging import staged
from genpol.deploy import contract as contracts
from genpol.deploy.bundle import EXAMPLES, FILES, Bundle, Plan, load, sha256
from genpol.deploy.contract import Contract
from genpol.deploy.tracing import NoiseTape, TracedPolicy
from genpol.errors import GenpolError, require
from genpol.settings import one_of

TOLERANCE = 1e-5
"""Greatest difference from the trained policy's actions with which a bundle is written."""

NUM_EXAMPLES = 32


class ExportError(GenpolError):
    """A format cannot hold a policy, or does not do as the trained one."""


def write(
    target: Path,
    traced: TracedPolicy,
    act: Callable[..., Tensor],
    contract: Contract,
    observations: Tensor,
    *,
    formats: Sequence[str] = ("onnx",),
    seed: int = 0,
) -> Bundle:
    """Write a bundle, whole or not at all.

    Args:
        target: The folder to make.
        traced: The policy's graph.
        act: The policy itself, as :attr:`genpol.deploy.tracing.Acting.act`; compared with every
            format.
        contract: Of the bundle, without files, parity and versions.
        observations: What it is compared on, ``[N, d]``, as they come in acting.
        formats: ``onnx``, ``aoti``, ``torchscript``.
        seed: Of the noise that it is compared on.

    Raises:
        ExportError: If a format's actions differ by more than :data:`TOLERANCE`, or it cannot hold
            the policy.
        DatasetError: If ``target`` exists or cannot be written.
        MissingExtraError: If what writes a format is not installed.
    """
    for form in formats:
        one_of("formats", form, FILES)
    inputs = _examples(traced, observations, seed)
    chunks = []
    with torch.no_grad():
        for row in range(len(observations)):
            one = {name: x[row : row + 1] for name, x in inputs.items()}
            with NoiseTape(one.pop("noise")):
                chunks.append(act(*one.values()))
    wanted = torch.cat(chunks)
    with staged(target) as folder:
        folder.mkdir()
        for form in formats:
            one = {name: x[:1] for name, x in inputs.items()}
            _WRITERS[form](traced, one, folder / FILES[form])
        examples: dict[str, Any] = {
            name: x.numpy() for name, x in (inputs | {"chunk": wanted}).items()
        }
        np.savez(folder / EXAMPLES, **examples)
        names = [*(FILES[form] for form in formats), EXAMPLES]
        found = replace(
            contract,
            files={name: sha256(folder / name) for name in names},
            versions=_versions(),
        )
        bundle = Bundle(folder, found)
        parity = {form: difference(bundle, form) for form in formats}
        for form, worst in parity.items():
            if not worst <= TOLERANCE:
                raise ExportError(
                    f"export: {form} differs from the trained policy by {worst:.2g} on examples "
                    f"(allowed: {TOLERANCE:g}); nothing was written. Leave {form} out of formats="
                )
        text = contracts.to_json(replace(found, parity=parity))
        (folder / contracts.FILE).write_text(text, encoding="utf-8")
    return Bundle(target, contracts.read(target / contracts.FILE))


def single(traced: TracedPolicy, inputs: Mapping[str, Tensor], folder: Path, form: str) -> Plan:
    """Write one format of a policy into a folder, without a contract, and load it.

    The arguments and errors are those of :func:`write`; ``inputs`` are ``[1, ...]`` by name.
    """
    path = folder / FILES[form]
    _WRITERS[form](traced, inputs, path)
    return load(path, form, list(inputs))


def _examples(traced: TracedPolicy, observations: Tensor, seed: int) -> dict[str, Tensor]:
    """Return inputs ``[N, ...]``: observations as given, the rest drawn."""
    draw = torch.Generator().manual_seed(seed)
    rows = len(observations)
    drawn = {
        "noise": torch.randn(rows, traced.noise_dim, generator=draw),
        "previous": 2.0 * torch.rand(rows, traced.horizon, traced.action_dim, generator=draw) - 1.0,
        "kept": torch.rand(rows, traced.horizon, generator=draw),
    }
    return {"observation": observations} | {x: drawn[x] for x in traced.inputs if x in drawn}


def difference(bundle: Bundle, form: str) -> float:
    """Return the greatest difference of a format's actions from the bundle's examples."""
    plan, examples = bundle.load(form), bundle.examples()
    worst = 0.0
    chunks = examples.pop("chunk")
    for row, chunk in enumerate(chunks):
        found = plan({name: x[row : row + 1] for name, x in examples.items()})[0]
        if found.shape != chunk.shape or not np.isfinite(found).all():
            return float("inf")
        worst = max(worst, float(np.abs(found - chunk).max()))
    return worst


def _versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxruntime", "numpy")
    found = {"genpol": genpol.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


def _write_onnx(traced: TracedPolicy, inputs: Mapping[str, Tensor], path: Path) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "deploy")
    # It tells of packages that are not needed here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program: Any = _exported(
        "onnx",
        lambda: torch.onnx.export(
            traced.graph,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=["chunk"],
            verbose=False,
        ),
    )
    program.save(path, external_data=False)


def _write_aoti(traced: TracedPolicy, inputs: Mapping[str, Tensor], path: Path) -> None:
    program = _exported("aoti", lambda: torch.export.export(traced.graph, tuple(inputs.values())))
    _exported(
        "aoti",
        lambda: torch._inductor.aoti_compile_and_package(program, package_path=str(path)),
    )


def _write_torchscript(traced: TracedPolicy, inputs: Mapping[str, Tensor], path: Path) -> None:
    model: Any = _exported(
        "torchscript",
        lambda: torch.jit.trace(traced.graph, tuple(inputs.values()), check_trace=False),
    )
    model.save(str(path))


def _exported(form: str, make: Callable[[], Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated within torch
            return make()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"export: {form} cannot hold this policy ({type(error).__name__}: {reason}); leave "
            "it out of formats="
        ) from error


_WRITERS = {"onnx": _write_onnx, "aoti": _write_aoti, "torchscript": _write_torchscript}

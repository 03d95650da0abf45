"""DPPO's and ReinFlow's behaviour cloning: a file of weights, one of settings, one of statistics.

``checkpoint/state_*.pt`` holds the weights ``model`` and their average ``ema``. The settings are
the YAML file that the run was started with, ``.hydra/config.yaml`` in the folder of the run, and
the statistics ``normalization.npz`` of the data set, with ``obs_min``, ``obs_max``, ``action_min``
and ``action_max``; both are looked for beside the weights, and in the folder above.

Both codes carry out the first ``act_steps`` actions of a chunk, whatever ``cond_steps`` is. DPPO
samples by DDPM, or by DDIM whose epsilon is that of the clipped estimate. ReinFlow asks for the
velocity at ``i / (K - 1)`` and clips the state behind every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpol.errors import CheckpointError
from genpol.foreign.assembling import ForeignModel, ImportOptions, assemble, check_divides
from genpol.foreign.files import Array, YamlConfig, load_npz, load_torch, weights_below
from genpol.foreign.scaling import of_range
from genpol.offline.settings import DiffusionSettings, FlowSettings, NetworkSettings
from genpol.pretrained import PretrainedPolicy

_NETWORK = "network."
_MARGIN = 1e-6  # added to the range of every observation
_STATISTICS = ("obs_min", "obs_max", "action_min", "action_max")
_ACTIVATIONS = {"ReLU": "relu", "ELU": "elu", "GELU": "gelu", "Tanh": "tanh", "Mish": "mish"}


def read_dppo(path: Path, options: ImportOptions) -> PretrainedPolicy:
    """Read ``state_*.pt`` of DPPO.

    Raises:
        CheckpointError: If it is no such policy of vectors, or its settings or statistics are not
            found.
        ConfigError: If an option does not fit it.
    """
    return _read(path, options, flow=False)


def read_reinflow(path: Path, options: ImportOptions) -> PretrainedPolicy:
    """Read ``state_*.pt`` of ReinFlow; the errors are those of :func:`read_dppo`."""
    return _read(path, options, flow=True)


def _read(path: Path, options: ImportOptions, *, flow: bool) -> PretrainedPolicy:
    record = load_torch(path)
    config = YamlConfig(
        options.config or _beside(path, "config", "config.yaml", _settings_files(path))
    )
    _check_kind(config, flow)
    weights, residual = _weights(record, path)
    observation_dim, action_dim, history, horizon = (
        int(config.require(name, f"model.{name}"))
        for name in ("obs_dim", "action_dim", "cond_steps", "horizon_steps")
    )
    statistics = _statistics(path, options, observation_dim, action_dim)
    settings = FlowSettings(
        horizon=horizon,
        **_network(config, residual=residual),
        **(_flow(config, options) if flow else _diffusion(config, options)),
    )
    found = ForeignModel(
        settings=settings,
        weights=weights,
        observation_dim=observation_dim,
        observation_steps=history,
        observation=of_range(statistics["obs_min"], statistics["obs_max"], _MARGIN),
        action_dim=action_dim,
        action_low=statistics["action_min"],
        action_high=statistics["action_max"],
        action_steps=int(config.get("act_steps", default=horizon)),
        env=str(config.get("env_name", "env.name", "env", default="")),
        facts={"format": "reinflow" if flow else "dppo", "epochs": int(record.get("epoch", 0))},
    )
    return assemble(found, options, path)


def _settings_files(path: Path) -> list[Path]:
    folders = (path.parent, path.parent.parent)
    named = [x / name for x in folders for name in (".hydra/config.yaml", "config.yaml")]
    others = list(path.parent.glob("*.yaml"))
    return [*named, *(others if len(others) == 1 else ())]


def _beside(path: Path, option: str, name: str, candidates: list[Path]) -> Path:
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"{path}: no {name} beside it, nor in the folder above; name the file with {option}=FILE"
    )


def _check_kind(config: YamlConfig, flow: bool) -> None:
    """Refuse other models and networks, by the classes that the settings name."""
    model = str(config.require("model._target_"))
    network = str(config.require("model.network._target_", "model.actor._target_"))
    if config.get("shape_meta.obs.rgb") or network.rpartition(".")[2].startswith("Vision"):
        raise CheckpointError(
            f"{config.path}: {network} sees images; only policies of vectors are read"
        )
    kind, other = ("FlowMLP", "DiffusionMLP") if flow else ("DiffusionMLP", "FlowMLP")
    if network.rpartition(".")[2] == other:
        right = "dppo" if flow else "reinflow"
        raise CheckpointError(f"{config.path}: is a {network}; import it with format={right}")
    if network.rpartition(".")[2] != kind:
        raise CheckpointError(f"{config.path}: is a {network}; of this format only {kind} is read")
    if flow and model.rpartition(".")[2] != "ReFlow":
        raise CheckpointError(f"{config.path}: is a {model}; of this format only ReFlow is read")


def _weights(record: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the averaged weights under this library's names, and whether they are residual."""
    found = record.get("ema", record.get("model"))
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: has neither 'ema' nor 'model', as DPPO and ReinFlow have")
    if any(name.startswith("actor_ft.") for name in found):
        raise CheckpointError(
            f"{path}: is a finetuned policy (actor_ft), of two networks; import the pretrained one "
            "that it began from"
        )
    own, others = weights_below(found, _NETWORK)
    if others:
        raise CheckpointError(f"{path}: has weights that are not known: {others[0]}")
    residual = any(name.startswith("mlp_mean.layers.") for name in own)
    return _renamed(own, residual), residual


def _renamed(weights: Mapping[str, Tensor], residual: bool) -> dict[str, Tensor]:
    """Return the weights under the names of :class:`~genpol.policies.embedded.EmbeddedDenoiser`."""
    names = {"time_embedding.1": "embedding.first", "time_embedding.3": "embedding.last"}
    if residual:
        number = 1 + max(
            (int(k.split(".")[2]) for k in weights if k.startswith("mlp_mean.layers.")), default=0
        )
        names |= {"mlp_mean.layers.0": "first"}
        names |= {f"mlp_mean.layers.{number - 1}": f"layers.{number - 2}"}
        for block in range(1, number - 1):
            for theirs, own in (("1", "first"), ("2", "second")):
                names[f"mlp_mean.layers.{block}.l{theirs}"] = f"layers.{block - 1}.{own}.linear"
                names[f"mlp_mean.layers.{block}.norm{theirs}"] = f"layers.{block - 1}.{own}.norm"
    else:
        number = sum(k.endswith("linear_1.weight") for k in weights)
        names |= {"mlp_mean.moduleList.0.linear_1": "first"}
        for layer in range(number):
            # Theirs is linear, norm, activation; ours is norm, activation, linear.
            names[f"mlp_mean.moduleList.{layer}.norm_1"] = f"layers.{layer}.norm"
            names[f"mlp_mean.moduleList.{layer + 1}.linear_1"] = f"layers.{layer}.linear"
    found = {}
    for name, x in weights.items():
        module, _, kind = name.rpartition(".")
        found[f"{names.get(module, module)}.{kind}"] = x
    return found


def _network(config: YamlConfig, *, residual: bool) -> dict[str, Any]:
    def get(name: str, default: Any) -> Any:
        return config.get(f"model.network.{name}", f"model.actor.{name}", default=default)

    if get("cond_mlp_dims", None) is not None:
        raise CheckpointError(
            f"{config.path}: cond_mlp_dims: has a network of its own for observations, which is "
            "not supported"
        )
    activation, last = get("activation_type", "Mish"), get("out_activation_type", "Identity")
    if activation not in _ACTIVATIONS or last != "Identity":
        raise CheckpointError(
            f"{config.path}: activation_type = {activation}, out_activation_type = {last}: only "
            f"{', '.join(_ACTIVATIONS)}, and Identity at the end, are supported"
        )
    if bool(get("residual_style", False)) != residual:
        raise CheckpointError(
            f"{config.path}: residual_style = {get('residual_style', False)}, but the weights are "
            f"{'' if residual else 'not '}those of a residual network; name the settings that it "
            "was trained with, config=FILE"
        )
    norm = bool(get("use_layernorm", False))
    return {
        "network": "residual_mlp" if residual else "embedded_mlp",
        "time_dim": int(get("time_dim", 16)),
        "actor": NetworkSettings(
            hidden=list(get("mlp_dims", [256, 256])),
            activation=_ACTIVATIONS[activation],
            layer_norm="before" if norm else "none",
        ),
    }


def _flow(config: YamlConfig, options: ImportOptions) -> dict[str, Any]:
    bounds = (config.get("model.act_min", default=-1), config.get("model.act_max", default=1))
    if bounds != (-1, 1):
        raise CheckpointError(
            f"{config.path}: model.act_min, act_max = {bounds}: only -1 and 1 are supported"
        )
    steps = options.steps or int(config.require("denoising_steps", "model.max_denoising_steps"))
    return {"denoiser": "flow", "solver_steps": steps, "time_grid": "closed", "state_clip": 1.0}


def _diffusion(config: YamlConfig, options: ImportOptions) -> dict[str, Any]:
    levels = int(config.require("denoising_steps", "model.denoising_steps"))
    ddim = bool(config.get("model.use_ddim", default=False))
    steps = int(config.require("model.ddim_steps", "ddim_steps")) if ddim else levels
    steps = options.steps or steps
    check_divides(steps, levels)
    if ddim and config.get("model.eps_clip_value") is not None:
        raise CheckpointError(f"{config.path}: model.eps_clip_value: is not supported; set it null")
    epsilon = bool(config.get("model.predict_epsilon", default=True))
    return {
        "denoiser": "diffusion",
        "solver_steps": steps,
        "diffusion": DiffusionSettings(
            levels=levels,
            spacing="leading",
            prediction="epsilon" if epsilon else "sample",
            sampler="ddim" if ddim or options.steps else "ddpm",
            clean_clip=float(config.get("model.denoised_clip_value", default=1.0) or 0.0),
        ),
    }


def _statistics(
    path: Path, options: ImportOptions, observation_dim: int, action_dim: int
) -> dict[str, Tensor]:
    name = "normalization.npz"
    candidates = [folder / name for folder in (path.parent, path.parent.parent)]
    file = options.normalization or _beside(path, "normalization", name, candidates)
    found: dict[str, Array] = load_npz(file)
    widths = dict(zip(_STATISTICS, (observation_dim,) * 2 + (action_dim,) * 2, strict=True))
    for key, width in widths.items():
        if key not in found or found[key].size != width:
            size = f"{found[key].size} numbers" if key in found else "nothing"
            raise CheckpointError(f"{file}: has {size} under {key}, where {width} are needed")
    return {key: torch.from_numpy(found[key]).double() for key in _STATISTICS}

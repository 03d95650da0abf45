"""robomimic's diffusion policy: one file with weights, settings and statistics.

``model_epoch_*.pth`` holds ``model`` (``nets`` and the averaged ``ema``), ``config`` as a JSON
text, ``shape_metadata`` and, as nested lists, the statistics. The network is made with the code's
own sizes, not with those of the settings; they are read off the weights here. Observations are
concatenated in the order of ``shape_metadata.all_shapes``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpol.errors import CheckpointError
from genpol.foreign.assembling import ForeignModel, ImportOptions, assemble, check_divides
from genpol.foreign.files import Record, entry, load_torch, parse_json, weights_below
from genpol.foreign.scaling import Standard, joined, of_moments
from genpol.foreign.unet import renamed, sizes_of
from genpol.offline.settings import (
    DiffusionSettings,
    FlowSettings,
    NetworkSettings,
    UnetSettings,
)
from genpol.pretrained import PretrainedPolicy

_GROUPS = 8  # the code's; the settings' are not used there
_NETWORK = "policy.noise_pred_net."
_ENCODER = "policy.obs_encoder."


def read(path: Path, options: ImportOptions) -> PretrainedPolicy:
    """Read ``model_epoch_*.pth``.

    Raises:
        CheckpointError: If it is no diffusion policy of vectors.
        ConfigError: If an option does not fit it.
    """
    record, where = load_torch(path), str(path)
    algorithm = record.get("algo_name")
    if algorithm is None or "config" not in record:
        raise CheckpointError(f"{path}: is no checkpoint of robomimic, which has an algo_name")
    if algorithm != "diffusion_policy":
        raise CheckpointError(f"{path}: is robomimic's {algorithm}; only diffusion_policy is read")
    config = record["config"]
    config = parse_json(config, f"{path}, config") if isinstance(config, str) else config
    shapes = _observations(record, config, where)
    observation_dim = sum(shapes.values())
    algo = entry(config, where, "algo")
    history, horizon, action_steps = (
        int(entry(algo, where, "horizon", f"{name}_horizon"))
        for name in ("observation", "prediction", "action")
    )
    weights = _weights(record, path)
    sizes = sizes_of(weights, where)
    _check_network(algo, where)
    if sizes.condition_dim != observation_dim * history:
        raise CheckpointError(
            f"{path}: its network sees {sizes.condition_dim} numbers, but {history} observations "
            f"({', '.join(shapes)}) have {observation_dim * history}"
        )
    low, high = _action_range(record, config, sizes.action_dim, where)
    sampling, steps = _sampling(algo, options.steps, path)
    settings = FlowSettings(
        denoiser="diffusion",
        solver_steps=steps,
        horizon=horizon,
        actor=NetworkSettings(hidden=sizes.channels, layer_norm="none", init="lecun"),
        network="unet",
        time_dim=sizes.time_dim,
        unet=UnetSettings(
            kernel_size=sizes.kernel_size,
            groups=_GROUPS,
            scale=sizes.scale,
            past_steps=history - 1,
        ),
        diffusion=sampling,
    )
    found = ForeignModel(
        settings=settings,
        weights=weights,
        observation_dim=observation_dim,
        observation_steps=history,
        observation=_statistics(record, config, shapes, where),
        action_dim=sizes.action_dim,
        action_low=low,
        action_high=high,
        action_steps=action_steps,
        env=str(_environment(record).get("env_name") or ""),
        control_period_s=_control_period_s(record),
        facts={"format": "robomimic", "observation": " ".join(shapes)},
    )
    return assemble(found, options, path)


def _observations(record: Mapping[str, Any], config: Any, where: str) -> dict[str, int]:
    """Return the widths of the observations by name, in order."""
    modalities = entry(config, where, "observation", "modalities")
    for group in ("goal", "subgoal"):
        if any((modalities.get(group) or {}).values()):
            raise CheckpointError(f"{where}: is told a {group}, which is not supported")
    seen: Mapping[str, Any] = modalities.get("obs") or {}
    for modality, names in seen.items():
        if modality != "low_dim" and names:
            raise CheckpointError(
                f"{where}: sees images ({modality}: {', '.join(names)}); only policies of vectors "
                "are read"
            )
    if config["algo"].get("language_conditioned"):
        raise CheckpointError(f"{where}: is told a language instruction, which is not supported")
    shapes = entry(_only(record.get("shape_metadata"), where), where, "all_shapes")
    found = {k: math.prod(x) for k, x in shapes.items() if k in (seen.get("low_dim") or ())}
    if not found:
        raise CheckpointError(f"{where}: observation.modalities.obs.low_dim names nothing")
    return found


def _only(metadata: Any, where: str) -> Mapping[str, Any]:
    """Return the metadata; of several data sets, that which they share."""
    found = metadata if isinstance(metadata, list) else [metadata]
    if not found or not isinstance(found[0], Mapping) or any(x != found[0] for x in found):
        raise CheckpointError(f"{where}: has no shape_metadata, or several that differ")
    shared: Mapping[str, Any] = found[0]
    return shared


def _weights(record: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    model = entry(record, str(path), "model")
    averaged = model.get("ema")
    own, others = weights_below(averaged or entry(model, str(path), "nets"), _NETWORK)
    encoded = [name for name in others if name.startswith(_ENCODER)]
    if encoded:
        raise CheckpointError(
            f"{path}: has an encoder of observations ({encoded[0]}), as for images; only policies "
            "of vectors are read"
        )
    if others:
        raise CheckpointError(f"{path}: has weights that are not known: {others[0]}")
    return renamed(own)


def _check_network(algo: Mapping[str, Any], where: str) -> None:
    unet = algo.get("unet") or {}
    if not unet.get("enabled", False):
        raise CheckpointError(f"{where}: is no unet (algo.unet.enabled), the only one that is read")
    if unet.get("n_groups", _GROUPS) != _GROUPS:
        raise CheckpointError(
            f"{where}: algo.unet.n_groups = {unet['n_groups']}, which robomimic's code does not "
            f"use; only {_GROUPS} is read"
        )


def _sampling(algo: Mapping[str, Any], steps: int, path: Path) -> tuple[DiffusionSettings, int]:
    name = "ddpm" if entry(algo, str(path), "ddpm", "enabled") else "ddim"
    own = Record(entry(algo, str(path), name), f"{path}, algo.{name}")
    if own["beta_schedule"] != "squaredcos_cap_v2":
        raise CheckpointError(
            f"{path}: algo.{name}.beta_schedule = {own['beta_schedule']}: only squaredcos_cap_v2 "
            "is read"
        )
    if not own.get("set_alpha_to_one", True) or own.get("steps_offset", 0):
        raise CheckpointError(
            f"{path}: algo.ddim has set_alpha_to_one = {own.get('set_alpha_to_one', True)} and "
            f"steps_offset = {own.get('steps_offset', 0)}: only true and 0 are read"
        )
    levels = int(own["num_train_timesteps"])
    number = steps or int(own["num_inference_timesteps"])
    check_divides(number, levels)
    sampler = "ddim_unclipped" if steps or name == "ddim" else "ddpm"
    return DiffusionSettings(
        levels=levels,
        spacing="leading",
        prediction=own["prediction_type"],
        sampler=sampler,
        clean_clip=float(bool(own["clip_sample"])),
    ), number


def _statistics(
    record: Mapping[str, Any], config: Any, shapes: Mapping[str, int], where: str
) -> Standard | None:
    """Return the standardisation; the older version says mean and std, the newer offset, scale."""
    if not entry(config, where, "train").get("hdf5_normalize_obs", False):
        return None
    stats = record.get("obs_normalization_stats")
    if not isinstance(stats, Mapping):
        raise CheckpointError(
            f"{where}: was trained with train.hdf5_normalize_obs, but has no "
            "obs_normalization_stats"
        )
    parts = []
    for name, width in shapes.items():
        own = entry(stats, f"{where}, obs_normalization_stats", name)
        columns = [own.get("mean", own.get("offset")), own.get("std", own.get("scale"))]
        mean, std = (_numbers([] if x is None else x) for x in columns)
        if len(mean) != width or len(std) != width:
            raise CheckpointError(
                f"{where}: obs_normalization_stats.{name} has not {width} means and deviations"
            )
        parts.append(of_moments(mean, std))
    return joined(parts)


def _action_range(
    record: Mapping[str, Any], config: Any, action_dim: int, where: str
) -> tuple[Tensor | None, Tensor | None]:
    stats = record.get("action_normalization_stats")
    if stats is None:
        return None, None
    train = entry(config, where, "train")
    names = train.get("action_keys") or list(stats)
    for name in names:
        form = ((train.get("action_config") or {}).get(name) or {}).get("format")
        if form == "rot_6d":
            raise CheckpointError(
                f"{where}: {name} is a rotation in six numbers, which robomimic turns into another "
                "form when it acts; that is not supported"
            )
    columns = [
        torch.cat([_numbers(entry(stats, where, name, x)) for name in names])
        for x in ("offset", "scale")
    ]
    offset, scale = columns
    if len(offset) != action_dim:
        raise CheckpointError(
            f"{where}: action_normalization_stats have {len(offset)} numbers, actions {action_dim}"
        )
    return offset - scale, offset + scale


def _numbers(nested: Any) -> Tensor:
    return torch.tensor(nested, dtype=torch.float64).flatten()


def _environment(record: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = record.get("env_metadata")
    metadata = metadata[0] if isinstance(metadata, list) and metadata else metadata
    return metadata if isinstance(metadata, Mapping) else {}


def _control_period_s(record: Mapping[str, Any]) -> float:
    options = _environment(record).get("env_kwargs")
    rate = options.get("control_freq") if isinstance(options, Mapping) else None
    return 1.0 / rate if isinstance(rate, int | float) and rate > 0 else 0.0

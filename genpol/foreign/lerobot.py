"""LeRobot's DiffusionPolicy of vectors: a folder with settings, weights and statistics.

``config.json`` and ``model.safetensors`` are those of ``save_pretrained``. Since version 0.4 the
statistics are in files of their own, which ``policy_preprocessor.json`` and
``policy_postprocessor.json`` name; before, they were among the weights. The observation is
``observation.state`` and, behind it, the environment's state, of ``n_obs_steps`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from genpol.errors import CheckpointError
from genpol.foreign.assembling import ForeignModel, ImportOptions, assemble, check_divides
from genpol.foreign.files import Record, entry, load_json, load_safetensors, weights_below
from genpol.foreign.scaling import Standard, identity, joined, of_moments, of_range
from genpol.foreign.unet import renamed
from genpol.offline.settings import (
    DiffusionSettings,
    FlowSettings,
    NetworkSettings,
    UnetSettings,
)
from genpol.pretrained import PretrainedPolicy

_STATE, _ACTION = "observation.state", "action"
_NETWORK = "diffusion.unet."
_ENCODER = "diffusion.rgb_encoder"
_SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear"}
_LINEAR_BETAS = (0.0001, 0.02)
_EPS = 1e-8
# Steps of the processors that leave the numbers as they are.
_NEUTRAL = (
    *("rename_observations_processor", "rename_processor"),
    *("to_batch_processor", "device_processor"),
)
_RANGES = {
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


def read(path: Path, options: ImportOptions) -> PretrainedPolicy:
    """Read a folder of LeRobot's.

    Raises:
        CheckpointError: If it is no DiffusionPolicy of vectors.
        ConfigError: If an option does not fit it.
    """
    folder = path / "pretrained_model" if (path / "pretrained_model").is_dir() else path
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no such folder; name that of config.json")
    where = str(folder / "config.json")
    config = Record(load_json(folder / "config.json"), where)
    kind = config.get("type", "diffusion")  # the oldest have none, and no input_features
    if kind != "diffusion":
        raise CheckpointError(f"{folder}: is a policy of type {kind!r}; only diffusion is read")
    widths, action_dim = _features(config, where)
    weights, scalings = _tensors(folder, config)
    history, horizon = int(config["n_obs_steps"]), int(config["horizon"])
    sampling, steps = _sampling(config, options.steps, folder)
    low, high = scalings.action(where, action_dim)
    observation = scalings.observations(where, widths)
    settings = FlowSettings(
        denoiser="diffusion",
        solver_steps=steps,
        horizon=horizon,
        actor=NetworkSettings(hidden=list(config["down_dims"]), layer_norm="none"),
        network="unet",
        time_dim=int(config["diffusion_step_embed_dim"]),
        unet=UnetSettings(
            kernel_size=int(config["kernel_size"]),
            groups=int(config["n_groups"]),
            scale=bool(config["use_film_scale_modulation"]),
            past_steps=history - 1,
        ),
        diffusion=sampling,
    )
    found = ForeignModel(
        settings=settings,
        weights=weights,
        observation_dim=sum(widths.values()),
        observation_steps=history,
        observation=observation,
        action_dim=action_dim,
        action_low=low,
        action_high=high,
        action_steps=int(config["n_action_steps"]),
        facts={"format": "lerobot", "observation": " ".join(widths)},
    )
    return assemble(found, options, folder)


def _features(config: Mapping[str, Any], where: str) -> tuple[dict[str, int], int]:
    """Return the widths of the observations by name, in order, and that of the action."""
    features = config.get("input_features")
    if not features:
        raise CheckpointError(
            f"{where}: has no input_features; load it with a LeRobot of 2025 or later and save it "
            "anew with save_pretrained"
        )
    images = [name for name, x in features.items() if x["type"] == "VISUAL"]
    if images:
        raise CheckpointError(
            f"{where}: sees images ({', '.join(images)}); only policies of vectors are read"
        )
    environment = [name for name, x in features.items() if x["type"] == "ENV"]
    names = [_STATE, *environment[:1]]
    others = [name for name in features if name not in names]
    if others or _STATE not in features:
        raise CheckpointError(
            f"{where}: observes {', '.join(features)}; only {_STATE} and one environment's state "
            "are supported"
        )
    action = entry(config, where, "output_features", _ACTION, "shape")
    return {name: math.prod(features[name]["shape"]) for name in names}, math.prod(action)


def _sampling(config: Mapping[str, Any], steps: int, folder: Path) -> tuple[DiffusionSettings, int]:
    schedule, kind = config["beta_schedule"], config["noise_scheduler_type"]
    betas = (config["beta_start"], config["beta_end"])
    if schedule not in _SCHEDULES or (schedule == "linear" and betas != _LINEAR_BETAS):
        raise CheckpointError(
            f"{folder}: beta_schedule = {schedule} from {betas[0]} to {betas[1]}: only "
            "squaredcos_cap_v2, and linear from 0.0001 to 0.02, are read"
        )
    if kind not in ("DDPM", "DDIM"):
        raise CheckpointError(
            f"{folder}: noise_scheduler_type = {kind}: only DDPM and DDIM are read"
        )
    levels = int(config["num_train_timesteps"])
    number = steps or int(config.get("num_inference_steps") or levels)
    check_divides(number, levels)
    return DiffusionSettings(
        levels=levels,
        schedule=_SCHEDULES[schedule],
        spacing="leading",
        prediction=config["prediction_type"],
        sampler="ddim_unclipped" if steps or kind == "DDIM" else "ddpm",
        clean_clip=float(config["clip_sample_range"]) if config["clip_sample"] else 0.0,
    ), number


@dataclass(frozen=True)
class _Scalings:
    """Statistics of all features, and how they are used.

    Attributes:
        stats: Tensors by ``<feature>.<statistic>``.
        modes: Kind of normalisation by the features' types, or by their names.
        margin: Added to every range, as before version 0.4.
        eps: Added to every standard deviation.
        types: Types of the features by name.
    """

    stats: Mapping[str, Tensor]
    modes: Mapping[str, str]
    margin: float
    eps: float
    types: Mapping[str, str]

    def observations(self, where: str, widths: Mapping[str, int]) -> Standard | None:
        if all(self._mode(name) == "IDENTITY" for name in widths):
            return None
        return joined([self._standard(where, name, width) for name, width in widths.items()])

    def action(self, where: str, width: int) -> tuple[Tensor | None, Tensor | None]:
        mode = self._mode(_ACTION)
        if mode == "IDENTITY":
            return None, None
        if mode not in _RANGES:
            raise CheckpointError(
                f"{where}: actions are normalised by {mode}, which has no bounds; only ranges and "
                "IDENTITY are supported"
            )
        low, high = (self._column(where, _ACTION, x, width) for x in _RANGES[mode])
        return low, high

    def _mode(self, name: str) -> str:
        return str(self.modes.get(self.types[name], "IDENTITY"))

    def _standard(self, where: str, name: str, width: int) -> Standard:
        mode = self._mode(name)
        if mode == "IDENTITY":
            return identity(width)
        if mode == "MEAN_STD":
            mean, std = (self._column(where, name, x, width) for x in ("mean", "std"))
            return of_moments(mean, std, self.eps)
        if mode not in _RANGES:
            raise CheckpointError(
                f"{where}: {name} is normalised by {mode}, which is not supported"
            )
        low, high = (self._column(where, name, x, width) for x in _RANGES[mode])
        return of_range(low, high, self.margin)

    def _column(self, where: str, name: str, statistic: str, width: int) -> Tensor:
        found = self.stats.get(f"{name}.{statistic}")
        if found is None or found.numel() != width or not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{where}: there are no {width} finite numbers for the {statistic} of {name}, by "
                "which it is normalised"
            )
        return found


def _tensors(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], _Scalings]:
    """Return the network's weights under this library's names, and the statistics."""
    file = folder / "model.safetensors"
    tensors = {k.replace("._orig_mod.", "."): x for k, x in load_safetensors(file).items()}
    weights, others = weights_below(tensors, _NETWORK)
    buffers = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
    unknown = [name for name in others if not name.startswith(buffers)]
    if unknown and unknown[0].startswith(_ENCODER):
        raise CheckpointError(
            f"{file}: has an encoder of images; only policies of vectors are read"
        )
    if unknown:
        raise CheckpointError(f"{file}: has weights that are not known: {unknown[0]}")
    features = {**config["input_features"], **config["output_features"]}
    types = {name: x["type"] for name, x in features.items()}
    if (folder / "policy_preprocessor.json").is_file():
        return renamed(weights), _of_processors(folder, types)
    stats: dict[str, Tensor] = {}
    for name in types:
        module = "unnormalize_outputs" if name == _ACTION else "normalize_inputs"
        prefix = f"{module}.buffer_{name.replace('.', '_')}."
        stats |= {f"{name}.{k}": x for k, x in weights_below(tensors, prefix)[0].items()}
    modes = config.get("normalization_mapping") or {}
    return renamed(weights), _Scalings(stats, modes, margin=_EPS, eps=_EPS, types=types)


def _of_processors(folder: Path, types: Mapping[str, str]) -> _Scalings:
    """Return the statistics of the files that the processors name."""
    before, own = _step(folder, "policy_preprocessor.json", "normalizer_processor")
    after, actions = _step(folder, "policy_postprocessor.json", "unnormalizer_processor")
    keys = before.get("normalize_observation_keys")
    stats = {k: x for k, x in own.items() if not k.startswith(f"{_ACTION}.")}
    stats |= {k: x for k, x in actions.items() if k.startswith(f"{_ACTION}.")}
    modes = {**before.get("norm_map", {}), "ACTION": after.get("norm_map", {}).get("ACTION")}
    modes["ACTION"] = modes["ACTION"] or "IDENTITY"
    if keys is not None:  # the others are left as they are
        types = {k: x if k in keys or k == _ACTION else "" for k, x in types.items()}
    eps = float(before.get("eps", _EPS))
    return _Scalings(stats, modes, margin=0.0, eps=eps, types=types)


def _step(folder: Path, name: str, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return settings and tensors of a processor's step."""
    file = folder / name
    steps = {x.get("registry_name", x.get("class")): x for x in load_json(file).get("steps", [])}
    unknown = [str(x) for x in steps if x not in (kind, *_NEUTRAL)]
    if unknown:
        raise CheckpointError(f"{file}: has a step {unknown[0]}, which is not supported")
    if "state_file" not in steps.get(kind, {}):
        raise CheckpointError(
            f"{file}: has no step {kind} with a state_file, so there are no statistics; save it "
            "anew with save_pretrained"
        )
    # A name within the folder: the file may come from anywhere.
    state = folder / Path(steps[kind]["state_file"]).name
    return dict(steps[kind].get("config", {})), load_safetensors(state)

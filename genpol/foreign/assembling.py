"""From what a checkpoint of another library holds to a policy of this one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genpol.errors import CheckpointError, ConfigError
from genpol.foreign.scaling import Standard, action_bounds
from genpol.offline.networks import make_denoiser
from genpol.offline.settings import FlowSettings
from genpol.policies.flow import FlowPolicy
from genpol.pretrained import PretrainedPolicy, model_of


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a checkpoint does not say, and what is to be otherwise than it says.

    Attributes:
        env: Name of the environment, for people; what the source says if it is empty.
        steps: Sample by DDIM, or by so many Euler steps; 0 for the source's own sampler.
        action_steps: Actions of a chunk that are carried out; 0 for what the source says.
        control_period_s: Seconds from one action to the next; 0 for what the source says.
        action_range: Bounds of the actions of the environment that it was trained in.
        config: The settings that it was trained with, where they are a file of their own.
        normalization: The statistics, where they are a file of their own.
    """

    env: str = ""
    steps: int = 0
    action_steps: int = 0
    control_period_s: float = 0.0
    action_range: tuple[float, float] = (-1.0, 1.0)
    config: Path | None = None
    normalization: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """What a checkpoint holds.

    Attributes:
        settings: Describe the model.
        weights: Of its network, under this library's names.
        observation_dim: Width of one observation.
        observation_steps: Observations that it sees at once.
        observation: How one is standardised; ``None`` if it is not.
        action_dim: Width of one action.
        action_low: What -1 of the model is in units of the environment, ``[A]``; ``None`` if its
            actions are the environment's.
        action_high: What 1 is.
        action_steps: Actions of a chunk that are carried out.
        env: Name of the environment; empty if that is not known.
        control_period_s: Seconds from one action to the next; 0 if that is not known.
        facts: What else is worth keeping.
    """

    settings: FlowSettings
    weights: Mapping[str, Tensor]
    observation_dim: int
    observation_steps: int
    observation: Standard | None
    action_dim: int
    action_low: Tensor | None = None
    action_high: Tensor | None = None
    action_steps: int
    env: str = ""
    control_period_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


def assemble(found: ForeignModel, options: ImportOptions, path: Path) -> PretrainedPolicy:
    """Make a policy, after trying whether the weights are those of the model described.

    Raises:
        ConfigError: If an option does not fit it.
        CheckpointError: If the weights are those of another model.
    """
    settings, steps = found.settings, options.action_steps or found.action_steps
    most = settings.horizon - settings.past_steps
    if not 1 <= steps <= most:
        raise ConfigError(f"action_steps = {steps}: must lie in [1, {most}] for this policy")
    low = high = None
    if found.action_low is not None and found.action_high is not None:
        low, high = action_bounds(found.action_low, found.action_high, options.action_range)
    if low is not None:
        _check_clip(settings, path)
    standard = found.observation
    if standard is not None:
        standard = standard.repeated(found.observation_steps)
    _check_finite({"weights": found.weights.values(), "statistics": standard or ()}, path)
    return PretrainedPolicy(
        model=model_of(settings, standard is not None),
        weights=_checked_weights(found, path),
        statistics=None if standard is None else {"mean": standard.mean, "std": standard.std},
        observation_clip=None,
        observation_dim=found.observation_dim * found.observation_steps,
        observation_steps=found.observation_steps,
        action_dim=found.action_dim,
        action_low=low,
        action_high=high,
        action_steps=steps,
        env=options.env or found.env or "unknown",
        action_repeat=1,
        control_period_s=options.control_period_s or found.control_period_s,
        data={"file": path.name, **found.facts},
    )


def _checked_weights(found: ForeignModel, path: Path) -> dict[str, Tensor]:
    width = found.observation_dim * found.observation_steps
    model = make_denoiser(width, found.action_dim, found.settings, torch.Generator())
    network = model.net if isinstance(model, FlowPolicy) else model.denoiser
    try:
        network.load_state_dict(dict(found.weights))
    except RuntimeError as error:
        lines = str(error).splitlines()
        first = (lines[1] if len(lines) > 1 else lines[0]).strip()
        raise CheckpointError(
            f"{path}: its weights are not those of the network that its settings describe "
            f"({first}); take weights and settings of one and the same run"
        ) from None
    return dict(model.state_dict())


def _check_finite(numbers: Mapping[str, Iterable[Tensor]], path: Path) -> None:
    for name, tensors in numbers.items():
        if not all(bool(x.isfinite().all()) for x in tensors):
            raise CheckpointError(f"{path}: its {name} are not all finite; take another checkpoint")


def _check_clip(settings: FlowSettings, path: Path) -> None:
    """Refuse models that overstep their data's bounds; here a chunk is clipped to them."""
    diffusion = settings.denoiser == "diffusion"
    clip = settings.diffusion.clean_clip if diffusion else settings.state_clip
    if not 0.0 < clip <= 1.0:
        raise CheckpointError(
            f"{path}: samples without a clip at 1 (clip = {clip:g}), so that its actions may lie "
            "beyond its data's, which is not supported; where that is rare, set the clip to 1 in "
            "its settings"
        )


def check_divides(steps: int, levels: int) -> None:
    """Refuse a number of steps that the noise levels cannot be visited in evenly.

    Raises:
        ConfigError: If it does not divide the levels.
    """
    if steps < 1 or levels % steps:
        raise ConfigError(
            f"{steps} steps do not divide its {levels} noise levels; give another number with "
            "steps=N"
        )

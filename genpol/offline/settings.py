"""Hyper-parameters that agents share which learn from a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from genpol import settings as check
from genpol.errors import ConfigError
from genpol.nn.mlp import ACTIVATIONS, INITIALISERS, LAYER_NORM
from genpol.policies.flow import TIME_GRIDS
from genpol.policies.schedules import PREDICTIONS, SAMPLERS

NETWORKS = ("mlp", "embedded_mlp", "residual_mlp", "unet")
SCHEDULES = ("cosine", "linear")
SPACINGS = ("trailing", "leading")


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Widths and layers of networks; as a whole those of FQL, QC and DQC."""

    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])
    """Widths of the hidden layers."""
    activation: str = "gelu"
    """Of the hidden layers; `gelu_tanh`, Flax's approximation, costs four times as much on CPUs."""
    layer_norm: str = "after"
    """Where hidden layers are normalised: `after` their activation, `before` it, or `none`."""
    init: str = "glorot"
    """Of the weights: `glorot` or `lecun`, both uniform."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.widths("hidden", self.hidden)
        check.one_of("activation", self.activation, ACTIVATIONS)
        check.one_of("layer_norm", self.layer_norm, LAYER_NORM)
        check.one_of("init", self.init, INITIALISERS)


def _actor_network() -> NetworkSettings:
    return NetworkSettings(layer_norm="none")


@dataclass(frozen=True, kw_only=True)
class OfflineSettings:
    """Hyper-parameters that agents share which learn from a data set."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "total_steps": 500_000,
        "evaluation.interval_steps": 100_000,
        "evaluation.episodes": 50,
        "checkpoint.interval_steps": 50_000,
    }

    horizon: int = 1
    """Actions per chunk H: what is planned at once, and the length of a critic's backup."""
    action_steps: int = 0
    """Actions of each plan that are carried out before the next; 0 for all."""
    batch_size: int = 256
    """Windows per update."""
    gamma: float = 0.99
    """Discount per transition."""
    learning_rate: float = 3e-4
    """Adam step size of all networks."""
    decay_updates: int = 0
    """Updates over which the step size falls, along half a cosine; 0 for none, as published."""
    final_learning_rate: float = 1e-5
    """Adam step size after that."""
    max_grad_norm: float = math.inf
    """The gradient of all networks together is clipped to this global norm."""
    actor: NetworkSettings = field(default_factory=_actor_network)
    """Networks that make actions."""
    critic: NetworkSettings = field(default_factory=NetworkSettings)
    """Networks that value them."""
    normalize_observations: bool = False
    """Whether observations are standardised with the statistics of the data."""
    replay_capacity: int = 1_000_000
    """Collected transitions that are held beside the data, with online_steps > 0."""
    updates_per_step: float = 1.0
    """Updates per action taken, with online_steps > 0."""
    online_warmup_steps: int = 5_000
    """Environment steps that are collected before the first update on them."""
    nonfinite_patience: int = 10
    """Non-finite losses in a row that stop the run."""
    compile: bool = False
    """Whether the losses are compiled, which costs a minute or two at the start of every run."""

    @property
    def past_steps(self) -> int:
        """Actions at the end of a plan that are not to be carried out."""
        return 0

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("horizon", "batch_size", "replay_capacity", "nonfinite_patience"):
            check.at_least(f"agent.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "final_learning_rate", "updates_per_step"):
            check.positive(f"agent.{name}", getattr(self, name))
        check.at_least("agent.decay_updates", self.decay_updates, 0)
        check.at_least("agent.max_grad_norm", self.max_grad_norm, 1e-9, infinite=True)
        check.at_least("agent.online_warmup_steps", self.online_warmup_steps, 0)
        check.within("agent.action_steps", self.action_steps, 0, self.horizon - self.past_steps)
        check.within("agent.gamma", self.gamma, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class UnetSettings:
    """What a U-Net over the actions of a chunk has beside its channels."""

    kernel_size: int = 5
    """Of the convolutions."""
    groups: int = 8
    """Of the group norms."""
    scale: bool = True
    """Whether observation and time scale the channels; else they only shift them."""
    past_steps: int = 0
    """Actions of the past that are modelled with a chunk: observations that are stacked, less one,
    in Diffusion Policy."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("kernel_size", "groups"):
            check.at_least(f"agent.unet.{name}", getattr(self, name), 1)
        check.at_least("agent.unet.past_steps", self.past_steps, 0)


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """Noise levels of a diffusion model, and how it is sampled."""

    levels: int = 0
    """Noise levels of training, a multiple of agent.solver_steps; 0 for as many."""
    schedule: str = "cosine"
    """Of the noise levels: `cosine` (squaredcos_cap_v2), or `linear` from beta 1e-4 to 0.02."""
    spacing: str = "trailing"
    """Levels that are visited: from the noisiest down (`trailing`), or down to the cleanest."""
    prediction: str = "epsilon"
    """What the network predicts: `epsilon`, `sample`, `v_prediction` or `epsilon_delta`."""
    sampler: str = "ddim"
    """`ddim`; `ddim_unclipped`, whose direction knows nothing of clean_clip, as in diffusers; or
    `ddpm`, whose steps have noise (but for dsrl, which takes their means)."""
    clean_clip: float = 1.0
    """Bound on the absolute estimate of the action in every step; 0 for none."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.at_least("agent.diffusion.levels", self.levels, 0)
        check.at_least("agent.diffusion.clean_clip", self.clean_clip, 0.0)
        check.one_of("agent.diffusion.schedule", self.schedule, SCHEDULES)
        check.one_of("agent.diffusion.spacing", self.spacing, SPACINGS)
        check.one_of("agent.diffusion.prediction", self.prediction, PREDICTIONS)
        check.one_of("agent.diffusion.sampler", self.sampler, SAMPLERS)


@dataclass(frozen=True, kw_only=True)
class FlowSettings(OfflineSettings):
    """Hyper-parameters of agents whose model of behaviour is a flow or a diffusion model."""

    denoiser: str = "flow"
    """Model of behaviour: `flow` or `diffusion`."""
    solver_steps: int = 10
    """Steps from noise to action."""
    network: str = "mlp"
    """Network of the model: `mlp`; `embedded_mlp` or `residual_mlp`, which learn how to embed the
    time (DPPO); or `unet`, whose channels are actor.hidden (Diffusion Policy)."""
    time_dim: int = 16
    """Width of the embedded time, of networks that learn it."""
    unet: UnetSettings = field(default_factory=UnetSettings)
    """What a `unet` has besides."""
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    """Noise levels of a diffusion model, and how it is sampled."""
    time_grid: str = "left"
    """Times at which a flow's K steps ask for the velocity: i/K (`left`), or i/(K-1) (`closed`) as
    in ReinFlow."""
    state_clip: float = 0.0
    """Bound on the absolute states behind a flow's steps, 1 in ReinFlow; 0 for none."""

    @property
    def past_steps(self) -> int:
        """Actions at the end of a plan that are not to be carried out."""
        return self.unet.past_steps if self.network == "unet" else 0

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.denoiser", self.denoiser, ("flow", "diffusion"))
        check.at_least("agent.solver_steps", self.solver_steps, 1)
        check.one_of("agent.network", self.network, NETWORKS)
        check.one_of("agent.time_grid", self.time_grid, TIME_GRIDS)
        check.at_least("agent.state_clip", self.state_clip, 0.0)
        if self.time_dim < 4 or self.time_dim % 2:
            raise ConfigError(f"agent.time_dim = {self.time_dim}: must be even, and at least 4")
        levels = self.diffusion.levels
        if self.denoiser == "diffusion" and levels % self.solver_steps:
            raise ConfigError(
                f"agent.diffusion.levels = {levels}: must be a multiple of agent.solver_steps = "
                f"{self.solver_steps}, or 0"
            )

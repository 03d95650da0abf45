"""Hyper-parameters that agents share which learn from a data set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from genpol import settings as check
from genpol.nn.mlp import ACTIVATIONS, INITIALISERS, LAYER_NORM


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

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("horizon", "batch_size", "replay_capacity", "nonfinite_patience"):
            check.at_least(f"agent.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "updates_per_step"):
            check.positive(f"agent.{name}", getattr(self, name))
        check.at_least("agent.max_grad_norm", self.max_grad_norm, 1e-9, infinite=True)
        check.at_least("agent.online_warmup_steps", self.online_warmup_steps, 0)
        check.within("agent.action_steps", self.action_steps, 0, self.horizon)
        check.within("agent.gamma", self.gamma, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class FlowSettings(OfflineSettings):
    """Hyper-parameters of agents whose model of behaviour is a flow or a diffusion model."""

    denoiser: str = "flow"
    """Model of behaviour: `flow` or `diffusion`."""
    solver_steps: int = 10
    """Steps from noise to action."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.denoiser", self.denoiser, ("flow", "diffusion"))
        check.at_least("agent.solver_steps", self.solver_steps, 1)

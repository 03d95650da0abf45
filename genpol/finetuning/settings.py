"""Hyper-parameters that agents share which finetune a pretrained policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genpol import settings as check
from genpol.errors import ConfigError
from genpol.objectives.critic_groups import SAMPLE_MEANS
from genpol.offline.settings import FlowSettings

TARGETS = ("mean", "min", "subset")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(FlowSettings):
    """Hyper-parameters that agents share which finetune a pretrained policy.

    What describes the policy's model (``denoiser``, ``solver_steps``, ``horizon``, ``actor``,
    ``normalize_observations``) comes with it.
    """

    decays: ClassVar[bool] = False
    """Whether a step size falls as ``decay_updates`` says."""
    run_defaults: ClassVar[Mapping[str, Any]] = {
        "total_steps": 200_000,
        "num_envs": 1,
        "evaluation.interval_steps": 20_000,
        "evaluation.episodes": 50,
        "checkpoint.interval_steps": 20_000,
    }

    num_critics: int = 10
    """Size of the ensemble of critics."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critics."""
    target: str = "mean"
    """What the ensemble says of the next state: its `mean`, its `min`, or the least of two members
    drawn for each update (`subset`, as in REDQ)."""
    target_samples: int = 1
    """Next chunks per state whose values are combined, to lower the target's variance."""
    target_sample_mean: str = "mean"
    """How they are combined: `mean`, `median` or `trimmed`, for each critic."""
    polyak: float = 0.05
    """Share of the live critics in every update of the averaged ones."""
    partial_windows: bool = False
    """Whether critics also learn from windows that an episode's end cut short, whose later actions
    are zeroed; else only from whole ones, of which one in H ends with the episode."""
    policy_period: int = 1
    """Updates of the critics for one of the policy."""
    updates_per_step: float = 1.0
    """Updates per action taken."""
    replay_capacity: int = 1_000_000
    """Transitions that the replay holds."""
    online_warmup_steps: int = 5_000
    """Environment steps that are collected before the first update."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        for name in ("num_critics", "target_samples", "policy_period"):
            check.at_least(f"agent.{name}", getattr(self, name), 1)
        check.positive("agent.critic_learning_rate", self.critic_learning_rate)
        if self.decay_updates > 0 and not self.decays:
            raise ConfigError(
                f"agent.decay_updates = {self.decay_updates}: the step sizes of this agent are "
                "constant; leave it 0"
            )
        check.one_of("agent.target", self.target, TARGETS)
        check.one_of("agent.target_sample_mean", self.target_sample_mean, SAMPLE_MEANS)
        check.within("agent.polyak", self.polyak, 0.0, 1.0)

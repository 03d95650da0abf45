"""Hyper-parameters of agents that plan in a world model of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from genpol import settings as check
from genpol.agent import Specs


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Widths of the networks.

    Attributes:
        encoder_dim: Hidden layers of the encoder.
        mlp_dim: Hidden layers of all other networks.
        latent_dim: State of the model.
        encoder_layers: Layers of the encoder, with the last.
        num_critics: Members of the ensemble that values actions.
    """

    encoder_dim: int
    mlp_dim: int
    latent_dim: int
    encoder_layers: int
    num_critics: int


def _size(encoder: int, mlp: int, latent: int, layers: int, critics: int) -> ModelSize:
    return ModelSize(
        encoder_dim=encoder,
        mlp_dim=mlp,
        latent_dim=latent,
        encoder_layers=layers,
        num_critics=critics,
    )


# The published ones are named after their parameters with the energy classifier, for 80 tasks.
SIZES: dict[str, ModelSize] = {
    "laptop": _size(128, 128, 128, 2, 2),
    "1.7M": _size(256, 384, 128, 2, 2),
    "6M": _size(256, 512, 512, 2, 5),
    "21M": _size(1024, 1024, 768, 3, 5),
    "54M": _size(1792, 1792, 768, 4, 5),
    "340M": _size(4096, 4096, 1376, 5, 8),
}


def episode_discount(episode_actions: int) -> float:
    """Return ``clip((L/5 - 1) / (L/5), 0.95, 0.995)`` for episodes of L actions.

    TD-MPC2's rule (arXiv 2310.16828, appendix): 0.99 for 500, 0.975 for 200, 0.95 for 100.
    """
    fifth = episode_actions / 5
    return min(0.995, max(0.95, (fifth - 1) / fifth))


@dataclass(frozen=True, kw_only=True)
class WorldModelSettings:
    """Hyper-parameters that planning agents share.

    An *action* is one decision; it lasts ``env.action_repeat`` *environment steps* (frames), and an
    episode L actions. What is counted here counts actions, but for ``warmup_steps``, which like all
    budgets of a run counts environment steps. TD-MPC2's curves are drawn over environment steps,
    MBDPO's over actions.

    With ``data=`` the model learns from that first, for ``total_steps`` updates, and nothing is
    collected before ``online_steps``.
    """

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "num_envs": 1,
        "total_steps": 200_000,
        "evaluation.interval_steps": 20_000,
        "evaluation.episodes": 10,
        "evaluation.num_envs": 10,
        "checkpoint.interval_steps": 50_000,
    }

    rollout_steps: int = 1
    """Actions of every environment between two rounds of updates."""
    updates_per_step: float = 1.0
    """Updates per action taken (not per environment step)."""
    batch_size: int = 256
    """Windows of `horizon` actions per update."""
    replay_capacity: int = 1_000_000
    """Actions that the replay holds."""
    offline_share: float | None = None
    """Share of each batch that comes from the data set, once steps are collected besides; by
    default each window, wherever it is, is equally likely."""
    gamma: float | None = None
    """Discount per action; by default clip((L/5 - 1) / (L/5), 0.95, 0.995)."""
    warmup_steps: int | None = None
    """Environment steps under uniformly random actions, without updates, at the start; by default
    those of max(1000, 5 L) actions, and none after learning from data or with `init`, where updates
    begin behind the first episode."""
    catch_up: bool = True
    """Whether the warm-up ends with as many updates as it would have had."""
    horizon: int = 3
    """Actions H that the model looks ahead, in learning and in planning."""
    size: str = "laptop"
    """Widths of all networks: `laptop`, or the published `1.7M`, `6M`, `21M`, `54M`, `340M`."""
    encoder_dim: int | None = None
    """Width of the encoder's hidden layers, in place of the size's."""
    mlp_dim: int | None = None
    """Width of all other hidden layers, in place of the size's."""
    latent_dim: int | None = None
    """Width of the latent state, in place of the size's."""
    encoder_layers: int | None = None
    """Layers of the encoder, in place of the size's."""
    num_critics: int | None = None
    """Members of the ensemble of critics, in place of the size's."""
    task_dim: int = 96
    """Width of the embedding of a task, where there are several (env=multitask)."""
    like_task: str = ""
    """With `init`: the task of the earlier run whose embedding those of `env.tasks` begin with that
    it did not have."""
    simplex_dim: int = 8
    """Width of the simplices that latent states consist of."""
    num_bins: int = 101
    """Bins of two-hot rewards and values."""
    bin_limit: float = 10.0
    """Outermost bin, in the space of symlog: 10 is a value of 22025."""
    dropout: float = 0.01
    """Share of the critics' first hidden layer that is dropped where they learn."""
    horizon_decay: float = 0.5
    """Weight of each step of the losses beside the step before it."""
    consistency_weight: float = 20.0
    """Weight of the error of predicted latents."""
    reward_weight: float = 0.1
    """Weight of the reward's loss."""
    value_weight: float = 0.1
    """Weight of the critics' loss."""
    termination_weight: float = 1.0
    """Weight of the loss of predicted ends, with `episodic`."""
    episodic: bool = False
    """Whether true ends of episodes are predicted and planned with."""
    learning_rate: float = 3e-4
    """Adam step size."""
    encoder_rate: float = 0.3
    """Share of that step size which the encoder takes."""
    max_grad_norm: float = 20.0
    """Gradients of model and policy are each clipped to this global norm."""
    polyak: float = 0.01
    """Share of the live critics in every update of the averaged ones, and of new in old scales."""
    entropy_weight: float = 1e-4
    """Weight of the policy's scaled entropy."""
    target_critics: str = "random"
    """Averaged critics whose least value is the target: two at `random` (TD-MPC2), or always the
    `first` two (MBDPO's released code)."""
    num_policy_plans: int = 4
    """Candidates that are rollouts of the policy."""
    diagnostics_interval: int = 1000
    """Updates between two measurements of how far plans lie from the policy; 0 for none."""
    diagnostics_rows: int = 32
    """States on which that is measured."""
    compile: bool = False
    """Whether losses and rounds of the search are compiled, the latter with CUDA graphs on a GPU: a
    wait of minutes at the start of a run, for faster steps."""
    nonfinite_patience: int = 10
    """Non-finite losses in a row that stop the run."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in (
            *("rollout_steps", "batch_size", "replay_capacity", "horizon", "task_dim"),
            *("diagnostics_rows", "nonfinite_patience", "simplex_dim"),
            *(field.name for field in fields(ModelSize)),
        ):
            if getattr(self, name) is not None:
                check.at_least(f"agent.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "encoder_rate", "max_grad_norm", "updates_per_step"):
            check.positive(f"agent.{name}", getattr(self, name))
        for name in (
            *("consistency_weight", "reward_weight", "value_weight", "termination_weight"),
            *("entropy_weight", "num_policy_plans", "diagnostics_interval"),
        ):
            check.at_least(f"agent.{name}", getattr(self, name), 0)
        for name in ("horizon_decay", "polyak"):
            check.within(f"agent.{name}", getattr(self, name), 0.0, 1.0)
        check.within("agent.dropout", self.dropout, 0.0, 0.99)
        check.positive("agent.bin_limit", self.bin_limit)
        check.at_least("agent.num_bins", self.num_bins, 3)
        check.one_of("agent.size", self.size, SIZES)
        check.one_of("agent.target_critics", self.target_critics, ("random", "first"))
        for name in ("gamma", "offline_share"):
            if getattr(self, name) is not None:
                check.within(f"agent.{name}", getattr(self, name), 0.0, 1.0)
        if self.warmup_steps is not None:
            check.at_least("agent.warmup_steps", self.warmup_steps, 0)

    def discounts(self, specs: Specs) -> tuple[float, ...]:
        """Return the discount per action of each task, or of the only one."""
        steps = [task.max_episode_steps for task in specs.tasks] or [specs.max_episode_steps]
        if self.gamma is not None:
            return (self.gamma,) * len(steps)
        return tuple(episode_discount(specs.actions(number)) for number in steps)

    def warmup(self, specs: Specs) -> int:
        """Return the environment steps of the warm-up of a run that begins from nothing."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return max(1000, 5 * specs.episode_actions) * specs.action_repeat

    @property
    def widths(self) -> ModelSize:
        """Widths of the networks, with what takes the place of the size's."""
        preset = SIZES[self.size]
        chosen = {field.name: getattr(self, field.name) for field in fields(ModelSize)}
        given = {name: value for name, value in chosen.items() if value is not None}
        return ModelSize(**{**vars(preset), **given})


def check_candidates(number: int, policy_plans: int, *, field: str = "num_plans") -> None:
    """Refuse a search with fewer than two candidates, or none beside those of the policy.

    Raises:
        ConfigError: Naming the setting.
    """
    check.at_least(f"agent.{field}", number, max(2, policy_plans + 1))

"""Decoupled Q-chunking (DQC): a critic of long chunks for a policy of short ones.

Li, Park & Levine 2025 (arXiv 2512.10926), goal-conditioned, rewards 1 on reaching the goal and 0
before, so that all values lie in [0, 1] and are kept as logits:

1. **Chunk critics** ``z_i(s, g, a_0..a_{h-1})`` learn ``y = r + gamma^k m V(s_k, g)`` by
   cross-entropy.
2. **Partial critics** ``p_i(s, g, a_0..a_{h_a-1})`` of the first h_a actions learn an upper
   expectile (``kappa_d``) of their own chunk critic over the continuations in the data.
3. **The state value** ``u(s, g)`` learns an upper quantile (``kappa_b``), in logits, of the
   averaged partial critics over the actions in the data. The (N - 1) / N quantile is about what the
   best of N samples is worth, so no policy is sampled in training.
4. **A flow of the first h_a actions**, which is not told the goal, is cloned.

Acting draws N chunks from the flow and carries out the one that the live partial critics rank
highest, by their logits. See :mod:`genpol.objectives.value_learning` for the losses and
:mod:`genpol.data.goals` for goals and rewards.

Without chunk critics (``distil=false``) the partial critics learn y themselves: with ``horizon``
and ``chunk`` equal that is QC with an implicit backup (the paper's "QC"), with ``chunk=1`` the
n-step return ("NS"), with both 1 the one-step return ("OS").

Choices: V's target is clamped to probabilities between 1e-6 and 1 - 1e-6, since a saturated
float32 sigmoid would make the released loss infinite. Layer norms have no gain and bias; GELU is
exact, where Flax approximates it.

Published settings (1M updates, 4 x 1024; here 3 x 256 by default, for two cores)::

    environment      data   aggregate  horizon  chunk  backup_quantile  distillation_expectile
    cube-triple      100M   min        25       5      0.93             0.8
    cube-quadruple   100M   min        25       5      0.93             0.8
    cube-octuple     1B     min        25       5      0.93             0.5
    humanoidmaze     4M     mean       25       1      0.5              0.8
    puzzle-4x5       3M     mean       25       5      0.9              0.5
    puzzle-4x6       1B     mean       25       1      0.7              0.5

Our defaults lie between them (mean, 25, 5, 0.9, 0.8).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.agent import Specs
from genpol.data.goals import GoalSettings
from genpol.data.windows import WindowSpec
from genpol.errors import ConfigError
from genpol.objectives.value_learning import (
    AGGREGATES,
    aggregate,
    aggregate_probability,
    bounded_logit,
    cross_entropy,
    expectile_cross_entropy,
    quantile_loss,
)
from genpol.offline import (
    Critic,
    Draws,
    FlowSettings,
    NetworkSettings,
    OfflineAgent,
    StateValue,
    Windows,
    make_denoiser,
)
from genpol.offline.behaviour import draw_imitation, imitation_loss, sample_chunks
from genpol.policies.guidance import GuidanceSettings


def _guidance() -> GuidanceSettings:
    return GuidanceSettings(best_of=32)


@dataclass(frozen=True, kw_only=True)
class Settings(FlowSettings):
    """Hyper-parameters of DQC."""

    horizon: int = 25
    """Actions h of the critic's chunks, and the length of its backup."""
    chunk: int = 5
    """Actions h_a of the policy's chunks."""
    distil: bool = True
    """Whether there are critics of whole chunks; without, partial ones learn from returns."""
    distillation_expectile: float = 0.8
    """`kappa_d`: 0.5 is the mean over continuations, 1 the best of them."""
    backup_quantile: float = 0.9
    """`kappa_b`: of the state value over the actions in the data."""
    aggregate: str = "mean"
    """Of the critics in backup and choice: `mean`, or `min`."""
    num_critics: int = 2
    """Size of each ensemble."""
    polyak: float = 0.005
    """Share of the live partial critics in every update of the averaged ones."""
    batch_size: int = 4096
    """Windows per update."""
    gamma: float = 0.999
    """Discount per transition."""
    goals: GoalSettings = field(default_factory=GoalSettings)
    """Which states serve as goals."""
    actor: NetworkSettings = field(default_factory=NetworkSettings)
    """Networks that make actions."""
    guidance: GuidanceSettings = field(default_factory=_guidance)
    """How the critics choose in acting."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.within("agent.chunk", self.chunk, 1, self.horizon)
        check.within("agent.action_steps", self.action_steps, 0, self.chunk)
        check.at_least("agent.num_critics", self.num_critics, 1)
        check.one_of("agent.aggregate", self.aggregate, AGGREGATES)
        for name in ("distillation_expectile", "backup_quantile", "polyak"):
            check.within(f"agent.{name}", getattr(self, name), 0.0, 1.0)
        if self.goals.rule != "reach":
            raise ConfigError(
                f"agent.goals.rule = {self.goals.rule!r}: values of DQC lie in [0, 1]; set "
                "agent.goals.rule=reach"
            )


class DQC(OfflineAgent):
    """Decoupled Q-chunking.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.

    Raises:
        ConfigError: If the environment states no goal.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        if specs.goal_dim == 0:
            raise ConfigError(
                "agent=dqc learns to reach goals, and the environment states none; set "
                "env.goal_conditioned=true where it can"
            )
        window = WindowSpec(
            steps=settings.horizon, gamma=settings.gamma, edges="whole", goals=settings.goals
        )
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        width, action_dim = specs.observation_dim + specs.goal_dim, specs.action_dim
        make = partial(
            Critic,
            width,
            action_dim,
            settings=settings.critic,
            num_members=settings.num_critics,
            generator=self.generator,
        )
        self.critic = make(horizon=settings.horizon) if settings.distil else None
        self.partial = make(horizon=settings.chunk)
        self.averaged = copy.deepcopy(self.partial).requires_grad_(False)
        self.guidance, self.takes_guidance = settings.guidance, True
        self.state_value = StateValue(width, settings.critic, generator=self.generator)
        self.flow = make_denoiser(
            specs.observation_dim, action_dim, settings, self.generator, horizon=settings.chunk
        )
        self.begin(plan_steps=settings.chunk, goal=True)

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        return draw_imitation(self.flow, rows, self.specs.action_dim, self.generator)

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        settings, goal, action = self.settings, batch["goal"], batch["action"]
        state = self.encode(batch["observation"])
        observation = torch.cat((state, goal), dim=-1)
        after = torch.cat((self.encode(batch["next", "observation"]), goal), dim=-1)
        start = action[:, : settings.chunk]
        with torch.no_grad():
            target = batch["reward"] + batch["discount"] * self.state_value(after).sigmoid()
            target = target.clamp(0.0, 1.0)
            backed = aggregate_probability(self.averaged(observation, start), settings.aggregate)
        logits = self.partial(observation, start)
        total, metrics = self._critic_loss(observation, action, logits, target)
        value = self.state_value(observation)
        backup = quantile_loss(value, bounded_logit(backed), settings.backup_quantile)
        imitation, more = imitation_loss(self.flow, state, action, batch["valid"], draws)
        return total + backup + imitation, metrics | more | {
            "loss/value": backup.detach(),
            "value/mean": value.detach().sigmoid().mean(),
            "value/target": target.mean(),
        }

    def _critic_loss(
        self, observation: Tensor, action: Tensor, logits: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses of chunk critics and partial critics, and metrics."""
        if self.critic is None:
            loss = cross_entropy(logits, target)
            return loss, {"loss/critic": loss.detach()}
        whole = self.critic(observation, action)
        critic = cross_entropy(whole, target)
        kappa = self.settings.distillation_expectile
        distillation = expectile_cross_entropy(logits, whole, kappa)
        return critic + distillation, {
            "loss/critic": critic.detach(),
            "loss/distillation": distillation.detach(),
        }

    def averages(self) -> Iterable[tuple[nn.Module, nn.Module, float]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        yield self.averaged, self.partial, self.settings.polyak

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        state = observation[:, : self.specs.observation_dim]

        def rank(_: Tensor, chunk: Tensor) -> Tensor:
            return self.value(observation, chunk)

        return sample_chunks(self.flow, state, noise, value=rank, guidance=self.guidance)

    def value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`: the live partial critics' logits."""
        return aggregate(self.partial(observation, chunk), self.settings.aggregate)

    def expected_return(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`: probabilities, discounted, of arriving."""
        return aggregate_probability(
            self.partial(observation, chunk), self.settings.aggregate
        ).sigmoid()


AGENT = DQC

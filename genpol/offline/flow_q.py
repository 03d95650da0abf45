"""Q-learning with a flow for a model of behaviour: what FQL and QC share.

:mod:`genpol.offline.flow_critic` has critics and flow. The policy is either ``best_of``: of N
samples of the flow the one that the critics value most (in their own target the *live* critics
choose and the averaged ones evaluate), or ``one_step``: a network ``mu(s, z)`` that stays near the
flow's output for the same noise and raises the value, ``alpha |mu(s, z) - F(s, z)|^2 -
Q(s, clip(mu(s, z)))``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.objectives.value_learning import flow_q_loss
from genpol.offline.behaviour import sample_chunks
from genpol.offline.chunk_agent import Draws, Windows
from genpol.offline.flow_critic import FlowCriticAgent, FlowCriticSettings
from genpol.offline.networks import ChunkNetwork
from genpol.policies.guidance import GuidanceSettings


@dataclass(frozen=True, kw_only=True)
class FlowQSettings(FlowCriticSettings):
    """Hyper-parameters of Q-learning with a flow for a model of behaviour."""

    policy: str = "one_step"
    """How actions are made: `one_step` by a network that follows the flow, or the `best_of` some of
    the flow's own."""
    best_of: int = 32
    """Samples N of which the critics choose, with `policy=best_of`."""
    alpha: float = 300.0
    """Weight of the distance to the flow against the value, with `policy=one_step`: the one setting
    that must be tuned to each environment."""
    normalize_q: bool = False
    """Whether the value's mean size is divided out, so that `alpha` is between 0.03 and 10."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.policy", self.policy, ("one_step", "best_of"))
        check.at_least("agent.best_of", self.best_of, 1)
        check.at_least("agent.alpha", self.alpha, 0.0)


class FlowQ(FlowCriticAgent):
    """Critics of chunks, a flow of behaviour, and a policy made of both.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: FlowQSettings

    def __init__(self, settings: FlowQSettings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        self.takes_guidance = settings.policy == "best_of"
        if self.takes_guidance:
            self.guidance = GuidanceSettings(best_of=settings.best_of)
        self.actor: ChunkNetwork | None = None
        if settings.policy == "one_step":
            self.actor = ChunkNetwork(
                specs.observation_dim,
                specs.action_dim,
                settings.horizon,
                settings.actor,
                chunk_input=True,
                generator=self.generator,
            )
        self.begin(plan_steps=settings.horizon)

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        draws = dict(super().draw(rows))
        if self.actor is not None:
            draws["policy"] = self.plan_noise(rows, self.generator)
        return draws

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        total, metrics = super().loss(batch, draws)
        if self.actor is not None:
            observation = self.encode(batch["observation"])
            loss, more = self._actor_loss(self.actor, observation, draws["policy"])
            total, metrics = total + loss, metrics | more
        return total, metrics

    def _actor_loss(
        self, actor: ChunkNetwork, observation: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        with torch.no_grad():
            flow_action = sample_chunks(self.flow, observation, noise)
        action = actor(observation, noise)
        # Of the critics only the gradient of the action is wanted.
        values = self.critic(observation, action.clamp(-1.0, 1.0), frozen=True)
        return flow_q_loss(
            action, flow_action, values, alpha=settings.alpha, normalize=settings.normalize_q
        )

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        if self.actor is not None:
            chunk: Tensor = self.actor(observation, noise)
            return chunk.clamp(-1.0, 1.0)
        return sample_chunks(
            self.flow, observation, noise, value=self.value, guidance=self.guidance
        )

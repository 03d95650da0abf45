"""Q-learning with a flow for a model of behaviour: what FQL and QC share.

From windows of H transitions, with ``R = sum_k gamma^k r_k`` and m = 0 behind a terminated one:

* **Critics** regress ``R + gamma^H m Q'(s_H, a')`` where the window does not leave its trajectory;
  Q' is the averaged ensemble and a' a chunk of the policy at ``s_H``.
* **Behaviour** is a flow learned by imitation of ``a_0 .. a_{H-1}``.
* **The policy** is either ``best_of``: of N samples of the flow the one that the critics value most
  (for a' the *live* critics choose and the averaged ones evaluate), or ``one_step``: a network
  ``mu(s, z)`` that stays near the flow's output for the same noise and raises the value,
  ``alpha |mu(s, z) - F(s, z)|^2 - Q(s, clip(mu(s, z)))``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.agent import Specs
from genpol.data.windows import WindowSpec
from genpol.objectives.value_learning import AGGREGATES, aggregate, critic_loss, flow_q_loss
from genpol.offline.agent import Draws, OfflineAgent, Windows
from genpol.offline.behaviour import draw_imitation, imitation_loss, sample_chunks
from genpol.offline.networks import ChunkNetwork, Critic, make_denoiser
from genpol.offline.settings import FlowSettings
from genpol.policies.guidance import GuidanceSettings


@dataclass(frozen=True, kw_only=True)
class FlowQSettings(FlowSettings):
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
    num_critics: int = 2
    """Size of the ensemble of critics."""
    aggregate: str = "mean"
    """Target of the critics: the ensemble's `mean`, or its `min`."""
    polyak: float = 0.005
    """Share of the live critics in every update of the averaged ones."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.policy", self.policy, ("one_step", "best_of"))
        check.one_of("agent.aggregate", self.aggregate, AGGREGATES)
        for name in ("best_of", "num_critics"):
            check.at_least(f"agent.{name}", getattr(self, name), 1)
        check.at_least("agent.alpha", self.alpha, 0.0)
        check.within("agent.polyak", self.polyak, 0.0, 1.0)


class FlowQ(OfflineAgent):
    """Critics of chunks, a flow of behaviour, and a policy made of both.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: FlowQSettings

    def __init__(self, settings: FlowQSettings, specs: Specs, *, device: str, seed: int) -> None:
        window = WindowSpec(steps=settings.horizon, gamma=settings.gamma)
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        generator, sizes = self.generator, (specs.observation_dim, specs.action_dim)
        self.critic = Critic(
            *sizes,
            settings.horizon,
            settings.critic,
            num_members=settings.num_critics,
            generator=generator,
        )
        self.averaged = copy.deepcopy(self.critic).requires_grad_(False)
        self.flow = make_denoiser(*sizes, settings, generator)
        self.takes_guidance = settings.policy == "best_of"
        if self.takes_guidance:
            self.guidance = GuidanceSettings(best_of=settings.best_of)
        self.actor: ChunkNetwork | None = None
        if settings.policy == "one_step":
            self.actor = ChunkNetwork(
                *sizes, settings.horizon, settings.actor, noise=True, generator=generator
            )
        self.begin(plan_steps=settings.horizon)

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        generator = self.generator
        draws = {"next": self.plan_noise(rows, generator)}
        draws |= draw_imitation(self.flow, rows, self.specs.action_dim, generator)
        if self.actor is not None:
            draws["policy"] = self.plan_noise(rows, generator)
        return draws

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        observation = self.encode(batch["observation"])
        total, metrics = self._critic_loss(batch, observation, draws["next"])
        imitation, more = imitation_loss(
            self.flow, observation, batch["action"], batch["valid"], draws
        )
        total, metrics = total + imitation, metrics | more
        if self.actor is not None:
            loss, more = self._actor_loss(self.actor, observation, draws["policy"])
            total, metrics = total + loss, metrics | more
        return total, metrics

    def _critic_loss(
        self, batch: Windows, observation: Tensor, noise: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            after = self.encode(batch["next", "observation"])
            values = self.averaged(after, self.plan(after, noise))
            following = aggregate(values, self.settings.aggregate)
            target = batch["reward"] + batch["discount"] * following
        values = self.critic(observation, batch["action"])
        loss = critic_loss(values, target, batch["weight"])
        return loss, {"loss/critic": loss.detach(), "value/mean": values.detach().mean()}

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

    def averages(self) -> Iterable[tuple[nn.Module, nn.Module, float]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        yield self.averaged, self.critic, self.settings.polyak

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        if self.actor is not None:
            chunk: Tensor = self.actor(observation, noise)
            return chunk.clamp(-1.0, 1.0)
        return sample_chunks(
            self.flow, observation, noise, value=self.value, guidance=self.guidance
        )

    def value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return the live critics' mean ``[..., B]`` at chunks ``[..., B, H, A]``."""
        mean: Tensor = self.critic(observation, chunk).mean(0)
        return mean

"""Critics of chunks beside a flow of behaviour: what FQL, QC and Fisher Decorator share.

From windows of H transitions, with ``R = sum_k gamma^k r_k`` and m = 0 behind a terminated one:

* **Critics** regress ``R + gamma^H m Q'(s_H, a')`` where the window does not leave its trajectory;
  Q' is the averaged ensemble and a' a chunk of the policy at ``s_H``.
* **Behaviour** is a flow learned by imitation of ``a_0 .. a_{H-1}``.

The policy is the subclass's.
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
from genpol.objectives.value_learning import AGGREGATES, aggregate, critic_loss
from genpol.offline.agent import OfflineAgent
from genpol.offline.behaviour import draw_imitation, imitation_loss
from genpol.offline.chunk_agent import Draws, Windows
from genpol.offline.networks import Critic, make_denoiser
from genpol.offline.settings import FlowSettings


@dataclass(frozen=True, kw_only=True)
class FlowCriticSettings(FlowSettings):
    """Hyper-parameters of critics beside a flow of behaviour."""

    num_critics: int = 2
    """Size of the ensemble of critics."""
    aggregate: str = "mean"
    """Target of the critics: the ensemble's `mean`, or its `min`."""
    polyak: float = 0.005
    """Share of the live critics in every update of the averaged ones."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.aggregate", self.aggregate, AGGREGATES)
        check.at_least("agent.num_critics", self.num_critics, 1)
        check.within("agent.polyak", self.polyak, 0.0, 1.0)


class FlowCriticAgent(OfflineAgent):
    """Critics of chunks and a flow of behaviour, for a policy that the subclass adds.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: FlowCriticSettings

    def __init__(
        self, settings: FlowCriticSettings, specs: Specs, *, device: str, seed: int
    ) -> None:
        window = WindowSpec(steps=settings.horizon, gamma=settings.gamma)
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        self.critic = Critic(
            specs.observation_dim,
            specs.action_dim,
            settings.horizon,
            settings.critic,
            num_members=settings.num_critics,
            generator=self.generator,
        )
        self.averaged = copy.deepcopy(self.critic).requires_grad_(False)
        self.flow = make_denoiser(specs.observation_dim, specs.action_dim, settings, self.generator)

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        draws = {"next": self.plan_noise(rows, self.generator)}
        return draws | draw_imitation(self.flow, rows, self.specs.action_dim, self.generator)

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses of critics and flow, and metrics; a subclass adds its policy's."""
        observation = self.encode(batch["observation"])
        total, metrics = self._critic_loss(batch, observation, draws["next"])
        imitation, more = imitation_loss(
            self.flow, observation, batch["action"], batch["valid"], draws
        )
        return total + imitation, metrics | more

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

    def averages(self) -> Iterable[tuple[nn.Module, nn.Module, float]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        yield self.averaged, self.critic, self.settings.polyak

    def value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return the live critics' mean ``[..., B]`` at chunks ``[..., B, H, A]``."""
        mean: Tensor = self.critic(observation, chunk).mean(0)
        return mean

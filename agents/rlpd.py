"""Reinforcement learning with prior data (RLPD): soft actor-critic, half of each batch from data.

Ball et al. 2023 (arXiv 2302.02948). No pretrained policy: a soft actor-critic learns from scratch,
and half of every batch is drawn from a data set. Ten critics with layer normalisation, whose target
is the least of two at random, and many updates per step make that work. ``horizon`` above 1 gives
it chunks of actions (RLPD-AC in the comparisons of Q-chunking, arXiv 2507.07969).

It has no phase of learning from the data alone: ``total_steps`` is 0 and ``online_steps`` counts.

The critics regress ``R + gamma^H m (min_2 Q'(s_H, a') - lambda log pi(a'))`` (``entropy_backup``
takes the last term in), the actor minimises ``lambda log pi - mean_i Q_i``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrl.envs import ExplorationType, exploration_type

from genpol import settings as check
from genpol.agent import Specs
from genpol.data.windows import WindowSpec
from genpol.objectives.actor_critic import entropy_term, mdpo_actor_loss, temperature_loss
from genpol.objectives.value_learning import critic_loss
from genpol.offline import Critic, Draws, OfflineAgent, OfflineSettings, Windows
from genpol.policies.squashed import SquashedGaussianPolicy


@dataclass(frozen=True, kw_only=True)
class Settings(OfflineSettings):
    """Hyper-parameters of RLPD."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "total_steps": 0,
        "online_steps": 200_000,
        "num_envs": 1,
        "evaluation.interval_steps": 20_000,
        "evaluation.episodes": 50,
        "checkpoint.interval_steps": 20_000,
    }

    offline_share: float = 0.5
    """Share of every batch that comes from the data set."""
    num_critics: int = 10
    """Size of the ensemble of critics."""
    target_critics: int = 2
    """Members, drawn anew for every update, whose least value is the target."""
    polyak: float = 0.005
    """Share of the live critics in every update of the averaged ones."""
    entropy_backup: bool = True
    """Whether the target pays for the next action's likelihood."""
    temperature: float = 1.0
    """Weight of the entropy at the start."""
    entropy_per_dimension: float = -0.5
    """Entropy to hold, in nats per dimension of a chunk."""
    updates_per_step: float = 1.0
    """Updates per action taken (published: up to 20)."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.within("agent.offline_share", self.offline_share, 0.0, 1.0)
        check.at_least("agent.num_critics", self.num_critics, 1)
        check.within("agent.target_critics", self.target_critics, 1, self.num_critics)
        check.within("agent.polyak", self.polyak, 0.0, 1.0)
        check.positive("agent.temperature", self.temperature)


class RLPD(OfflineAgent):
    """Soft actor-critic from two sources.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        window = WindowSpec(steps=settings.horizon, gamma=settings.gamma)
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        self.offline_share = settings.offline_share
        self.actor = SquashedGaussianPolicy(
            specs.observation_dim,
            settings.horizon * specs.action_dim,
            settings.actor.hidden,
            generator=self.generator,
        )
        self.critic = Critic(
            specs.observation_dim,
            specs.action_dim,
            settings.horizon,
            settings.critic,
            num_members=settings.num_critics,
            generator=self.generator,
        )
        self.averaged = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.temperature)))
        self.begin(plan_steps=settings.horizon)

    @property
    def temperature(self) -> Tensor:
        """Weight of the entropy, a constant scalar."""
        return self.log_temperature.detach().exp()

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        generator, number = self.generator, self.settings.num_critics
        shape = (rows, self.actor.action_dim)
        chance = torch.rand(number, generator=generator, device=generator.device)
        return {
            "next": torch.randn(shape, generator=generator, device=generator.device),
            "policy": torch.randn(shape, generator=generator, device=generator.device),
            "members": chance.topk(self.settings.target_critics).indices,
        }

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        observation = self.encode(batch["observation"])
        of_critics, metrics = self._critic_loss(batch, observation, draws)
        drawn = self.actor.draw(observation, draws["policy"])
        value = self.critic(observation, self._chunk(drawn.action), frozen=True).mean(0)
        of_actor = mdpo_actor_loss(
            drawn.log_prob,
            drawn.log_prob.detach(),
            value,
            kl_coefficient=self.temperature,
            temperature=self.temperature,
        )
        term = entropy_term(drawn.log_prob.detach())
        wanted = self.settings.entropy_per_dimension * self.actor.action_dim
        of_temperature = temperature_loss(self.log_temperature, term, wanted)
        return of_critics + of_actor + of_temperature, metrics | {
            "loss/policy": of_actor.detach(),
            "policy/entropy": -term.mean(),
            "policy/temperature": self.temperature,
        }

    def _critic_loss(
        self, batch: Windows, observation: Tensor, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            after = self.encode(batch["next", "observation"])
            drawn = self.actor.draw(after, draws["next"])
            values = self.averaged(after, self._chunk(drawn.action))
            following = values[draws["members"]].amin(0)
            if self.settings.entropy_backup:
                following = following - self.temperature * entropy_term(drawn.log_prob)
            target = batch["reward"] + batch["discount"] * following
        values = self.critic(observation, batch["action"])
        loss = critic_loss(values, target, batch["weight"])
        return loss, {"loss/critic": loss.detach(), "value/mean": values.detach().mean()}

    def averages(self) -> Iterable[tuple[nn.Module, nn.Module, float]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        yield self.averaged, self.critic, self.settings.polyak

    def plan_noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draw what plans begin from; zero, for the mode, where it does not explore."""
        noise = super().plan_noise(rows, generator)
        explores = exploration_type() in (ExplorationType.RANDOM, None)
        return noise if explores else torch.zeros_like(noise)

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        return self._chunk(self.actor.sample(observation, noise.flatten(-2)))

    def value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return the live critics' mean ``[..., B]`` at chunks ``[..., B, H, A]``."""
        mean: Tensor = self.critic(observation, chunk).mean(0)
        return mean

    def _chunk(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.settings.horizon, -1))


AGENT = RLPD

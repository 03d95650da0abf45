"""Implicit Q-learning (IQL): values without ever asking for an action that is not in the data.

Kostrikov et al. 2021 (arXiv 2110.06169): ``V(s)`` is an upper expectile of ``Q(s, a)`` over the
actions of the data (equation 5), and Q regresses ``R + gamma^H m V(s_H)`` (equation 6).
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
from genpol.objectives.value_learning import AGGREGATES, aggregate, critic_loss, expectile_loss
from genpol.offline.agent import OfflineAgent
from genpol.offline.chunk_agent import Windows
from genpol.offline.networks import Critic, StateValue
from genpol.offline.settings import OfflineSettings


@dataclass(frozen=True, kw_only=True)
class ImplicitQSettings(OfflineSettings):
    """Hyper-parameters of implicit Q-learning, whatever policy is made of it."""

    expectile: float = 0.9
    """Of the state value: 0.5 is the mean of the data, 1 the best action in it."""
    num_critics: int = 2
    """Size of the ensemble of critics."""
    aggregate: str = "min"
    """How the ensemble's values are combined: `min` or `mean`."""
    polyak: float = 0.005
    """Share of the live critics in every update of the averaged ones."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.at_least("agent.num_critics", self.num_critics, 1)
        check.one_of("agent.aggregate", self.aggregate, AGGREGATES)
        for name in ("expectile", "polyak"):
            check.within(f"agent.{name}", getattr(self, name), 0.0, 1.0)


class ImplicitQ(nn.Module):
    """Critics of chunks and a state value that learn from each other.

    Attributes:
        critic: The ensemble that is trained.
        averaged: Its Polyak average, which V regresses and policies ask.
        value: The state value.

    Args:
        settings: Layers, horizon, and how values are learned.
        specs: Sizes of the environment.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        settings: ImplicitQSettings,
        specs: Specs,
        *,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.critic = Critic(
            specs.observation_dim,
            specs.action_dim,
            settings.horizon,
            settings.critic,
            num_members=settings.num_critics,
            generator=generator,
        )
        self.averaged = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = StateValue(specs.observation_dim, settings.critic, generator=generator)
        self._expectile = settings.expectile
        self._how = settings.aggregate

    def loss(
        self, observation: Tensor, after: Tensor, batch: Windows
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both losses, and metrics.

        Args:
            observation: As the networks see it, ``[B, d]``.
            after: That behind each window.
            batch: Windows ``[B]``.
        """
        weight = batch["weight"]
        with torch.no_grad():
            target = batch["reward"] + batch["discount"] * self.value(after)
            best = self.chunk_value(observation, batch["action"])
        values = self.critic(observation, batch["action"])
        state_value = self.value(observation)
        critic = critic_loss(values, target, weight)
        value = expectile_loss(state_value, best, self._expectile, weight)
        return critic + value, {
            "loss/critic": critic.detach(),
            "loss/value": value.detach(),
            "value/mean": state_value.detach().mean(),
            "value/advantage": (best - state_value.detach()).mean(),
        }

    @torch.no_grad()
    def advantage(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return ``Q'(s, a) - V(s)`` of chunks ``[B, H, A]``, ``[B]``."""
        state_value: Tensor = self.value(observation)
        return self.chunk_value(observation, chunk) - state_value

    def chunk_value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return the averaged ensemble's value ``[..., B]`` of chunks ``[..., B, H, A]``."""
        return aggregate(self.averaged(observation, chunk), self._how)


class ImplicitQAgent(OfflineAgent):
    """An agent whose values are learned implicitly, whatever policy it makes of them.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    def __init__(
        self, settings: ImplicitQSettings, specs: Specs, *, device: str, seed: int
    ) -> None:
        window = WindowSpec(steps=settings.horizon, gamma=settings.gamma)
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        self.values = ImplicitQ(settings, specs, generator=self.generator)
        self._polyak = settings.polyak

    def averages(self) -> Iterable[tuple[nn.Module, nn.Module, float]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        yield self.values.averaged, self.values.critic, self._polyak

    def value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`; the averaged critics are asked."""
        return self.values.chunk_value(observation, chunk)

"""Implicit Q-learning (IQL) with a Gaussian policy.

Kostrikov et al. 2021 (arXiv 2110.06169): V is an expectile of Q over the actions in the data, Q
regresses on V, and the policy is cloned from the data with the weights ``exp(beta (Q - V))``, at
most 100 (equation 7). See :mod:`genpol.offline.implicit_q`. The policy is a Gaussian of constant
spread (its mean is learned by least squares), clipped to the range of actions; acting takes the
mean.

Deviations: with ``horizon`` above 1 all of it works on chunks; networks are GELU with a layer norm,
as those of the agents it is compared with here; expectile 0.9 and beta 10 by default (published:
0.7 and 3 for locomotion, 0.9 and 10 for mazes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.objectives.value_learning import advantage_weight
from genpol.offline.chunk_agent import Draws, Windows
from genpol.offline.implicit_q import ImplicitQAgent, ImplicitQSettings
from genpol.offline.networks import ChunkNetwork


@dataclass(frozen=True, kw_only=True)
class Settings(ImplicitQSettings):
    """Hyper-parameters of IQL."""

    inverse_temperature: float = 10.0
    """`beta` of the policy's weights: 0 is behaviour cloning."""
    max_weight: float = 100.0
    """Bound on a row's weight."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.at_least("agent.inverse_temperature", self.inverse_temperature, 0.0)
        check.positive("agent.max_weight", self.max_weight)


class IQL(ImplicitQAgent):
    """Implicit Q-learning, offline and then perhaps online.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        self.actor = ChunkNetwork(
            specs.observation_dim,
            specs.action_dim,
            settings.horizon,
            settings.actor,
            generator=self.generator,
        )
        self.begin(plan_steps=settings.horizon)

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        observation = self.encode(batch["observation"])
        after = self.encode(batch["next", "observation"])
        total, metrics = self.values.loss(observation, after, batch)
        settings, action = self.settings, batch["action"]
        weight = advantage_weight(
            self.values.advantage(observation, action),
            inverse_temperature=settings.inverse_temperature,
            maximum=settings.max_weight,
        )
        error = (self.actor(observation) - action).square().sum((-2, -1)) / 2
        policy = torch.where(batch["weight"] != 0, weight * error, 0.0).mean()
        return total + policy, metrics | {
            "loss/policy": policy.detach(),
            "policy/weight": weight.mean(),
        }

    def plan_noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return nothing; see :class:`~genpol.offline.OfflineAgent`."""
        return torch.empty(0, device=generator.device)

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`; the noise is not used."""
        mean: Tensor = self.actor(observation)
        return mean.clamp(-1.0, 1.0)


AGENT = IQL

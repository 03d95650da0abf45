"""A small Gaussian policy in front of or behind a frozen one, learned as in soft actor-critic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.finetuning.agent import Parts
from genpol.finetuning.settings import FinetuneSettings
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.actor_critic import entropy_term, mdpo_actor_loss, temperature_loss
from genpol.policies.squashed import SquashedGaussianPolicy, SquashedSample


@dataclass(frozen=True, kw_only=True)
class SoftSettings(FinetuneSettings):
    """Hyper-parameters of agents that learn a small policy around a frozen one."""

    num_critics: int = 10
    """Size of the ensemble of critics."""
    target: str = "subset"
    """What the ensemble says of the next state: its `mean`, its `min`, or the least of two members
    drawn for each update (`subset`, as in REDQ)."""
    polyak: float = 0.005
    """Share of the live critics in every update of the averaged ones."""
    small_hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Widths of the small policy's hidden layers."""
    learning_rate: float = 3e-4
    """Adam step size of the small policy and the temperature."""
    temperature: float = 0.1
    """Weight of the entropy at the start."""
    entropy_per_dimension: float = 0.0
    """Entropy to hold, in nats per dimension of the small policy's output."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.widths("agent.small_hidden", self.small_hidden)
        check.positive("agent.temperature", self.temperature)


class SoftActor(nn.Module):
    """``tanh(mean + scale xi)`` of an observation, and a temperature that holds its entropy.

    Args:
        input_dim: Width of what it sees.
        output_dim: Width of what it makes.
        settings: Hyper-parameters.
        generator: Source of the initial weights.
    """

    def __init__(
        self, input_dim: int, output_dim: int, settings: SoftSettings, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.settings = settings
        self.policy = SquashedGaussianPolicy(
            input_dim, output_dim, settings.small_hidden, generator=generator
        )
        self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.temperature)))

    def parts(self) -> Parts:
        """Return what is trained and the step sizes, for the agent's optimisers."""
        rate = self.settings.learning_rate
        return {
            "policy": ([*self.policy.parameters()], rate),
            "temperature": ([self.log_temperature], rate),
        }

    @property
    def temperature(self) -> Tensor:
        """Weight of the entropy, a constant scalar."""
        return self.log_temperature.detach().exp()

    def draw(self, observation: Tensor, generator: torch.Generator) -> SquashedSample:
        """Return a draw ``[B, D]`` with its density, differentiable in the weights."""
        shape = (len(observation), self.policy.action_dim)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return self.policy.draw(observation, noise)

    def entropy_term(self, drawn: SquashedSample) -> Tensor:
        """Return ``lambda log pi`` of draws, ``[B]``, a constant."""
        return self.temperature * entropy_term(drawn.log_prob.detach())

    def step(
        self,
        observation: Tensor,
        value: Callable[[Tensor], Tensor],
        optimizers: dict[str, GuardedOptimizer],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Take a step up the value with the entropy's help, and one of the temperature.

        Args:
            observation: What it sees, ``[B, d]``.
            value: Of what it makes ``[B, D]``, ``[B]``, differentiable.
            optimizers: Of its ``policy`` and its ``temperature``.
            generator: Source of the draws.
        """
        drawn = self.draw(observation, generator)
        loss = mdpo_actor_loss(
            drawn.log_prob,
            drawn.log_prob.detach(),
            value(drawn.action),
            kl_coefficient=self.temperature,
            temperature=self.temperature,
        )
        metrics = optimizers["policy"].step(loss)
        term = entropy_term(drawn.log_prob.detach())
        wanted = self.settings.entropy_per_dimension * self.policy.action_dim
        optimizers["temperature"].step(temperature_loss(self.log_temperature, term, wanted))
        return metrics | {
            "loss/policy": loss.detach(),
            "policy/entropy": -term.mean(),
            "policy/temperature": self.temperature,
        }

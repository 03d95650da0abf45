"""Residual learning: a small policy corrects the chunks of a frozen one.

Policy Decorator (Yuan et al. 2024, arXiv 2412.13630) on chunks. The pretrained policy makes a base
chunk; a soft actor that sees the state and that chunk adds to it, within ``scale``. Critics value
the sum, which is what the replay holds. Exploration is progressive: the correction is applied with
a probability that rises from 0 to 1 over ``progress_steps`` environment steps.

Deviations: ten critics whose target is the least of two at random (released: two); the correction
is made once for each chunk, as all agents that finetune here plan, not at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.finetuning import FinetuningAgent
from genpol.finetuning.agent import Parts
from genpol.finetuning.soft_actor import SoftActor, SoftSettings
from genpol.offline.behaviour import draw_start, sample_chunks
from genpol.offline.chunk_agent import Windows


@dataclass(frozen=True, kw_only=True)
class Settings(SoftSettings):
    """Hyper-parameters of residual learning."""

    scale: float = 0.1
    """Bound on the absolute correction of an action."""
    progress_steps: int = 30_000
    """Environment steps over which corrections become the rule; 0 for at once."""
    entropy_per_dimension: float = -1.0
    """Entropy to hold, in nats per dimension of the small policy's output."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.positive("agent.scale", self.scale)
        check.at_least("agent.progress_steps", self.progress_steps, 0)


class Residual(FinetuningAgent):
    """A frozen policy, and a small one that corrects it.

    Attributes:
        correction: The small policy.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        self.actor.requires_grad_(False)
        width = settings.horizon * specs.action_dim
        self.correction = SoftActor(specs.observation_dim + width, width, settings, self.generator)
        self.begin()

    def parts(self) -> Parts:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        return super().parts() | self.correction.parts()

    def choose(self, observation: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        base = self.base(observation, generator)
        seen = _seen(observation, base)
        if not explore:
            return self.corrected(base, self.correction.policy.mode(seen))
        chunk = self.corrected(base, self.correction.draw(seen, generator).action)
        chance = torch.rand(len(base), 1, 1, generator=generator, device=base.device)
        return torch.where(chance < self.progress, chunk, base)

    @property
    def progress(self) -> float:
        """The share of chunks that are corrected while exploring."""
        steps = self.settings.progress_steps
        return 1.0 if steps == 0 else min(1.0, self._env_steps / steps)

    def base(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """Return chunks of the frozen policy, ``[B, H, A]``."""
        noise = draw_start(self.actor, (len(observation),), self.specs.action_dim, generator)
        return sample_chunks(self.actor, observation, noise)

    def corrected(self, base: Tensor, output: Tensor) -> Tensor:
        """Return base chunks ``[B, H, A]`` with corrections by outputs ``[B, H A]``."""
        moved = base + self.settings.scale * output.view_as(base)
        return moved.clamp(-1.0, 1.0)

    def next_chunks(self, observation: Tensor) -> Tensor:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        return self._next(observation)[0].unsqueeze(0)

    def next_value(self, observation: Tensor) -> Tensor:
        """Return the averaged critics' word, less ``lambda log pi``, ``[B]``."""
        chunk, entropy_term = self._next(observation)
        return self.combine(self.averaged(observation, chunk)) - entropy_term

    def _next(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        base = self.base(observation, self.generator)
        drawn = self.correction.draw(_seen(observation, base), self.generator)
        return self.corrected(base, drawn.action), self.correction.entropy_term(drawn)

    def update_policy(self, batch: Windows, successful: Windows) -> dict[str, Tensor]:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        observation = self.encode(batch["observation"])
        base = self.base(observation, self.generator)

        def value(output: Tensor) -> Tensor:
            found: Tensor = self.critic(observation, self.corrected(base, output), frozen=True)
            return found.mean(0)

        seen = _seen(observation, base)
        metrics = self.correction.step(seen, value, self._optimizers, self.generator)
        return metrics | {"policy/progress": torch.tensor(self.progress)}


def _seen(observation: Tensor, base: Tensor) -> Tensor:
    return torch.cat((observation, base.flatten(-2)), dim=-1)


AGENT = Residual

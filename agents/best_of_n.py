"""Best of N: a frozen policy's samples, among which critics learned online choose.

The simplest way to improve a pretrained policy: nothing of it is trained. Of N chunks the one is
carried out that the ensemble values most, and the critics' target does the same at the next state
(the live critics choose there, the averaged ones evaluate), which is Q-chunking (arXiv 2507.07969)
without its imitation of the replay. It bounds what choosing alone can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.finetuning import FinetuneSettings, FinetuningAgent
from genpol.offline.behaviour import draw_start, sample_chunks
from genpol.policies.guidance import best_of


@dataclass(frozen=True, kw_only=True)
class Settings(FinetuneSettings):
    """Hyper-parameters of best of N."""

    best_of: int = 16
    """Chunks N of which the critics choose."""
    target_best_of: int = 4
    """Chunks of which they choose at the next state, for each update."""
    polyak: float = 0.005
    """Share of the live critics in every update of the averaged ones."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.at_least("agent.best_of", self.best_of, 1)
        check.at_least("agent.target_best_of", self.target_best_of, 1)


class BestOfN(FinetuningAgent):
    """A frozen policy, and critics that choose among its chunks.

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
        self.begin()

    def choose(self, observation: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """See :class:`~genpol.finetuning.FinetuningAgent`; exploration is the sampling itself."""
        return self._best(observation, self.settings.best_of, generator)

    def next_chunks(self, observation: Tensor) -> Tensor:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        number = self.settings.target_best_of
        samples = range(self.settings.target_samples)
        return torch.stack([self._best(observation, number, self.generator) for _ in samples])

    def _best(self, observation: Tensor, number: int, generator: torch.Generator) -> Tensor:
        leading = (number, len(observation))
        noise = draw_start(self.actor, leading, self.specs.action_dim, generator)
        candidates = sample_chunks(self.actor, observation, noise)
        return best_of(candidates, self.critic(observation, candidates).mean(0))


AGENT = BestOfN

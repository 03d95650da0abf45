"""Returns of the episodes that training itself runs through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor


@dataclass(frozen=True)
class FinishedEpisodes:
    """The episodes that ended in one batch.

    Attributes:
        terms: Undiscounted returns ``[E, R]`` of each reward term, weighted.
        of_step: Return of the episode that each step belongs to, ``[num_envs, time]``, all terms
            together; NaN where that episode did not end in the batch or does not count.
    """

    terms: Tensor
    of_step: Tensor

    @property
    def returns(self) -> Tensor:
        """Undiscounted returns ``[E]``, all terms together."""
        return self.terms.sum(-1)


class EpisodeTracker:
    """Sums rewards over batches ``[num_envs, time]`` and reports the episodes that end in them.

    First episodes may be cut short by staggered clocks and episodes that diverge are not the
    policy's doing; neither is reported.

    Args:
        num_envs: Number of environments.
        num_rewards: Width R of the reward.
        weights: Factor on each term; 1 each by default.
    """

    def __init__(
        self, num_envs: int, num_rewards: int = 1, *, weights: Sequence[float] | None = None
    ) -> None:
        weights = [1.0] * num_rewards if weights is None else weights
        self._weights = torch.tensor(weights, dtype=torch.float64)
        self._return = torch.zeros(num_envs, num_rewards, dtype=torch.float64)
        self._whole = torch.zeros(num_envs, dtype=torch.bool)

    def update(self, batch: TensorDict) -> FinishedEpisodes:
        """Add the rewards of ``batch`` and return the episodes that ended in it."""
        after = batch["next"]
        reward = after["reward"].double().cpu() * self._weights
        done = after["done"].squeeze(-1).cpu()
        diverged = after["diverged"].squeeze(-1).cpu()
        counted: list[Tensor] = []
        final = torch.full(done.shape, torch.nan, dtype=torch.float64)
        for step in range(done.shape[1]):
            self._return += reward[:, step]
            ended = done[:, step]
            if ended.any():
                counts = ended & self._whole & ~diverged[:, step]
                counted.append(self._return[counts])
                final[counts, step] = counted[-1].sum(-1)
                self._return[ended] = 0.0
                self._whole |= ended
        if not counted:
            return FinishedEpisodes(torch.empty(0, reward.shape[-1], dtype=torch.float64), final)
        return FinishedEpisodes(torch.cat(counted), _until_the_end(final, done))

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return {"return": self._return.clone(), "whole": self._whole.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self._return.copy_(state["return"].view_as(self._return))
        self._whole.copy_(state["whole"])


def _until_the_end(final: Tensor, done: Tensor) -> Tensor:
    """Carry what stands at the last step of each episode back to its other steps."""
    carried = torch.full_like(final, torch.nan)
    later = torch.full_like(final[:, 0], torch.nan)
    for step in range(final.shape[1] - 1, -1, -1):
        later = torch.where(done[:, step], final[:, step], later)
        carried[:, step] = later
    return carried

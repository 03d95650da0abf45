"""Returns of the episodes that training itself runs through."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor


class EpisodeTracker:
    """Sums rewards over batches ``[num_envs, time]`` and reports the episodes that end in them.

    First episodes may be cut short by staggered clocks and episodes that diverge are not the
    policy's doing; neither is reported.

    Args:
        num_envs: Number of environments.
    """

    def __init__(self, num_envs: int) -> None:
        self._return = torch.zeros(num_envs, dtype=torch.float64)
        self._whole = torch.zeros(num_envs, dtype=torch.bool)

    def update(self, batch: TensorDict) -> Tensor:
        """Return the undiscounted returns ``[E]`` of episodes that ended in ``batch``."""
        after = batch["next"]
        reward = after["reward"].squeeze(-1).double().cpu()
        done = after["done"].squeeze(-1).cpu()
        diverged = after["diverged"].squeeze(-1).cpu()
        finished: list[Tensor] = []
        for step in range(reward.shape[1]):
            self._return += reward[:, step]
            ended = done[:, step]
            if ended.any():
                finished.append(self._return[ended & self._whole & ~diverged[:, step]])
                self._return[ended] = 0.0
                self._whole |= ended
        return torch.cat(finished) if finished else torch.empty(0, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return {"return": self._return.clone(), "whole": self._whole.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self._return.copy_(state["return"])
        self._whole.copy_(state["whole"])

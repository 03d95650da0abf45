"""Running scales: of the classifier's logits, and of the values that the policy follows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEAST_STD = 1e-6


class EnergyScale(nn.Module):
    """Standardises the classifier's logits with averages over past batches, and clips them.

    ``F_norm = clip((F - mean) / std, -5, 5)`` (MBDPO, arXiv 2605.26282, official code), where mean
    and population std of the pooled logits of positives and negatives are averaged with momentum
    0.99 from 0 and 1. They are buffers and saved with the model, which the official code forgets.

    Args:
        weight: ``eta``, the weight of the energy in the imagined reward.
        momentum: Of the averages.
        clip: Bound of the result's absolute value.
        warmup: Batches to see before the energy counts at all.
    """

    mean: Tensor
    std: Tensor
    batches: Tensor

    def __init__(
        self, weight: float, *, momentum: float = 0.99, clip: float = 5.0, warmup: int = 1000
    ) -> None:
        super().__init__()
        self.weight = weight
        self.momentum = momentum
        self.clip = clip
        self.warmup = warmup
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, mean: Tensor, std: Tensor) -> None:
        """Take in the mean and the population std of a batch's logits, unless they are not finite.

        Args:
            mean: Scalar.
            std: Scalar; floored at 1e-6.
        """
        good = mean.isfinite() & std.isfinite()
        share = 1.0 - self.momentum
        self.mean.copy_(torch.where(good, torch.lerp(self.mean, mean, share), self.mean))
        moved = torch.lerp(self.std, std.clamp_min(_LEAST_STD), share)
        self.std.copy_(torch.where(good, moved, self.std))
        self.batches.add_(good)

    def normalised(self, logits: Tensor) -> Tensor:
        """Return ``F_norm`` of logits ``[...]``."""
        return ((logits - self.mean) / self.std).clamp(-self.clip, self.clip)

    def bonus(self, logits: Tensor) -> Tensor:
        """Return ``eta F_norm``, to be added to rewards; 0 during the warm-up."""
        counts = self.batches >= self.warmup
        return torch.where(counts, self.weight * self.normalised(logits), 0.0)

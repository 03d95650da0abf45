"""Means over batches in which some entries do not count."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(value: Tensor, weight: Tensor | None = None) -> Tensor:
    """Average ``value`` with non-negative weights that broadcast to its shape.

    Entries of weight zero are selected away rather than multiplied, so they may be NaN or infinite.
    The *gradient* through such an entry is zero only up to the operations that made it: clean NaN
    inputs before the network sees them. If all weights are zero, so is the mean.
    """
    if weight is None:
        return value.mean()
    weight = weight.to(value.dtype).expand_as(value)
    total = torch.where(weight != 0, value * weight, 0.0).sum()
    return total / weight.sum().clamp_min(torch.finfo(value.dtype).tiny)

"""Scalars as categorical distributions over bins of their symmetric logarithm.

Rewards and values of any scale become logits over the same bins (DreamerV3, arXiv 2301.04104;
TD-MPC2, arXiv 2310.16828, section 3.1): a target puts its weight on the two bins beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genpol.settings import at_least, positive


def symlog(x: Tensor) -> Tensor:
    """Return ``sign(x) ln(1 + |x|)``, ``[...]``."""
    return x.sign() * x.abs().log1p()


def symexp(y: Tensor) -> Tensor:
    """Return ``sign(y) (e^|y| - 1)``, ``[...]``, the inverse of :func:`symlog`."""
    return y.sign() * y.abs().expm1()


class TwoHot(nn.Module):
    """Bins ``-limit .. limit`` in the space of :func:`symlog`, evenly spaced.

    The decoded value is the expectation in that space, brought back: it is not the mean of a
    distribution that is spread out. An even mixture of 0 and 100 decodes to 9.05.

    Args:
        num_bins: How many; odd, so that one of them is zero.
        limit: Outermost bin; at 10 a scalar lies within 22025.

    Raises:
        ConfigError: If there are fewer than 3 bins, or the limit is not above zero.
    """

    bins: Tensor

    def __init__(self, num_bins: int = 101, limit: float = 10.0) -> None:
        super().__init__()
        at_least("num_bins", num_bins, 3)
        positive("limit", limit)
        self.num_bins = num_bins
        self.limit = limit
        self.width = 2.0 * limit / (num_bins - 1)
        self.register_buffer("bins", torch.linspace(-limit, limit, num_bins), persistent=False)

    def place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the lower bin, the upper bin, and the upper one's weight, ``[...]`` each.

        Beyond the last bin lies the first, with weight zero.
        """
        position = (symlog(x).clamp(-self.limit, self.limit) + self.limit) / self.width
        # Rounding may put the topmost value just above its bin.
        lower = position.floor().clamp(0, self.num_bins - 1)
        weight = (position - lower).clamp(0.0, 1.0)
        lower = lower.long()
        upper = (lower + 1) % self.num_bins
        return lower, upper, torch.where(upper == 0, 0.0, weight)

    def encode(self, x: Tensor) -> Tensor:
        """Return the two-hot weights of scalars ``[...]``, ``[..., num_bins]``."""
        lower, upper, weight = (part.unsqueeze(-1) for part in self.place(x))
        empty = x.new_zeros((*x.shape, self.num_bins))
        return empty.scatter_add(-1, lower, 1.0 - weight).scatter_add(-1, upper, weight)

    def decode(self, logits: Tensor) -> Tensor:
        """Return ``symexp(sum_k softmax(l)_k c_k)`` of logits ``[..., num_bins]``, ``[...]``."""
        return symexp(logits.softmax(-1) @ self.bins)

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return ``-sum_k twohot(x)_k log_softmax(l)_k``, ``[...]``.

        Args:
            logits: ``[..., num_bins]``.
            target: Scalars; their shape broadcasts to the logits' leading one.
        """
        lower, upper, weight = self.place(target.expand(logits.shape[:-1]))
        at_lower = logits.gather(-1, lower.unsqueeze(-1)).squeeze(-1)
        at_upper = logits.gather(-1, upper.unsqueeze(-1)).squeeze(-1)
        return logits.logsumexp(-1) - torch.lerp(at_lower, at_upper, weight)

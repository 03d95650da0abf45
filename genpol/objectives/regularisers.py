"""What is added to a surrogate: critic, prior and entropy terms; each a scalar and its metrics.

Optional weights, one per row ``[...]``, are non-negative and average: ``sum(w x) / sum(w)``. Rows
of weight zero may hold NaN: neither loss nor gradient with respect to the arguments sees it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from genpol.nn.masked import weighted_mean

Loss = tuple[Tensor, dict[str, Tensor]]


def value_loss(value: Tensor, target: Tensor, weight: Tensor | None = None) -> Loss:
    """Return ``mean (target - value)^2``, without a half and without clipping."""
    error = _masked(target, weight) - _masked(value, weight)
    loss = weighted_mean(error.square(), weight)
    return loss, {"loss/value": loss.detach()}


def ridge(mean: Tensor, scale: Tensor, weight: Tensor | None = None) -> Loss:
    """Return ``mean mu^2 + mean sigma^2`` over rows and dimensions (GoRL's code).

    Not a KL divergence: its optimum is the point mass at zero.
    """
    rows = _rows(weight)
    power = _masked(mean, rows).square() + _masked(scale, rows).square()
    loss = weighted_mean(power.mean(-1), weight)
    return loss, {"loss/ridge": loss.detach()}


def standard_normal_kl(mean: Tensor, scale: Tensor, weight: Tensor | None = None) -> Loss:
    """Return ``KL(N(mu, sigma^2) || N(0, I))``, summed over dimensions, averaged over rows."""
    rows = _rows(weight)
    mean, scale = _masked(mean, rows), _masked(scale, rows, fill=1.0)
    kl = 0.5 * (mean.square() + scale.square() - 1.0) - scale.log()
    loss = weighted_mean(kl.sum(-1), weight)
    return loss, {"loss/prior_kl": loss.detach()}


def tanh_entropy_correction(sample: Tensor, weight: Tensor | None = None) -> Loss:
    """Return ``mean sum_i log(1 - tanh(x_i)^2)`` at fresh samples ``[..., A]``.

    Added to a Gaussian's entropy it is that of the squashed action. Computed as
    ``2 (log 2 - x - softplus(-2 x))``, which does not saturate.
    """
    x = _masked(sample, _rows(weight))
    log_slope = 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))
    correction = weighted_mean(log_slope.sum(-1), weight)
    return correction, {"policy/tanh_entropy_correction": correction.detach()}


def _masked(x: Tensor, weight: Tensor | None, fill: float = 0.0) -> Tensor:
    """Replace entries of weight zero before any arithmetic, so that their gradient is zero too."""
    return x if weight is None else torch.where(weight != 0, x, fill)


def _rows(weight: Tensor | None) -> Tensor | None:
    """Turn row weights ``[...]`` into a mask of vectors ``[..., 1]``."""
    return None if weight is None else weight.unsqueeze(-1)

"""Values learned from data alone: temporal differences, and optimism without sampling actions.

All losses are means over rows of which each may have a weight. Heads may be squashed: a *logit*
``z`` then stands for the value ``sigmoid(z)`` in [0, 1], and everything is kept in logits, because
``sigmoid`` saturates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genpol.settings import one_of, within

AGGREGATES = ("min", "mean")

_LARGEST_LOGIT = 13.8  # sigmoid is 1 - 1e-6 there


def aggregate(values: Tensor, how: str) -> Tensor:
    """Return the least or the mean of an ensemble's values ``[K, ...]``, ``[...]``."""
    one_of("aggregate", how, AGGREGATES)
    return values.min(0).values if how == "min" else values.mean(0)


def aggregate_probability(logits: Tensor, how: str) -> Tensor:
    """Return the logit of the least or mean probability of logits ``[K, ...]``, ``[...]``.

    The least is the same as that of the logits; the mean is not, and ranks otherwise: logits (0, 8)
    have the mean 4 but a mean probability of 0.75, logits (3, 3) 3 and 0.95.
    """
    if how == "min":
        return aggregate(logits, how)
    # log p - log (1 - p) of the mean, each from its own logarithm, so that nothing saturates.
    log_yes = torch.logsumexp(F.logsigmoid(logits), 0)
    return log_yes - torch.logsumexp(F.logsigmoid(-logits), 0)


def critic_loss(values: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ``mean_i mean_b (Q_i - y)^2``, the mean over members and rows.

    Args:
        values: ``[K, B]``.
        target: ``[B]``; no gradient flows into it.
        weight: Of each row ``[B]``. Rows of weight zero count in the mean, as zero (QGF, QC), and
            their targets may be NaN.
    """
    return _mean((values - _target(target, weight)).square(), weight)


def cross_entropy(logits: Tensor, probability: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean of ``-y log sigmoid(z) - (1 - y) log sigmoid(-z)``.

    Its gradient in z is ``sigmoid(z) - y``, so that the minimiser is the mean of y.

    Args:
        logits: ``z``, ``[..., B]``.
        probability: ``y`` in [0, 1], ``[..., B]`` or ``[B]``; no gradient flows into it.
        weight: Of each row, as for :func:`critic_loss`.
    """
    target = _target(probability, weight).expand_as(logits)
    return _mean(F.binary_cross_entropy_with_logits(logits, target, reduction="none"), weight)


def expectile_loss(
    values: Tensor, target: Tensor, expectile: float, weight: Tensor | None = None
) -> Tensor:
    """Return ``mean |tau - 1[u < 0]| u^2`` with ``u = y - V`` (IQL, arXiv 2110.06169, equation 5).

    Args:
        values: ``V``, ``[..., B]``.
        target: ``y``; no gradient flows into it.
        expectile: ``tau``; 0.5 is half the squared error, 1 tends to the maximum.
        weight: Of each row, as for :func:`critic_loss`.
    """
    within("expectile", expectile, 0.0, 1.0)
    error = _target(target, weight) - values
    return _mean(_tilt(error, expectile) * error.square(), weight)


def expectile_cross_entropy(
    logits: Tensor, target_logits: Tensor, expectile: float, weight: Tensor | None = None
) -> Tensor:
    """Return ``mean |kappa - 1[y < p]| BCE(p, y)`` of probabilities given by logits.

    Since the gradient of the cross-entropy in the logit is ``p - y``, its minimiser is the very
    expectile of y (DQC, arXiv 2512.10926, optimistic distillation). Ties count as ``y >= p``.

    Args:
        logits: Of p, ``[..., B]``.
        target_logits: Of y; no gradient flows into them.
        expectile: ``kappa``.
        weight: Of each row, as for :func:`critic_loss`.
    """
    within("expectile", expectile, 0.0, 1.0)
    target = _target(target_logits, weight).expand_as(logits)
    error = F.binary_cross_entropy_with_logits(logits, target.sigmoid(), reduction="none")
    return _mean(_tilt(target - logits.detach(), expectile) * error, weight)


def quantile_loss(
    values: Tensor, target: Tensor, quantile: float, weight: Tensor | None = None
) -> Tensor:
    """Return ``mean |kappa - 1[u < 0]| |u|`` with ``u = y - V``, whose minimiser is the quantile.

    Quantiles do not depend on the scale: in logits it has the minimiser that it has in
    probabilities (DQC's implicit backup). Pass logits clamped by :func:`bounded_logit`.

    Args:
        values: ``V``, ``[..., B]``.
        target: ``y``; no gradient flows into it.
        quantile: ``kappa``.
        weight: Of each row, as for :func:`critic_loss`.
    """
    within("quantile", quantile, 0.0, 1.0)
    error = _target(target, weight) - values
    return _mean(_tilt(error, quantile) * error.abs(), weight)


def bounded_logit(logits: Tensor) -> Tensor:
    """Clamp logits to probabilities between 1e-6 and 1 - 1e-6; infinite targets teach nothing."""
    return logits.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def _tilt(error: Tensor, share: float) -> Tensor:
    """Return ``share`` where the target lies above, else ``1 - share``."""
    return torch.where(error.detach() >= 0, share, 1.0 - share)


def _target(target: Tensor, weight: Tensor | None) -> Tensor:
    """Return a constant target, clean where it does not count: NaN would reach the gradient."""
    target = target.detach()
    return target if weight is None else torch.where(weight != 0, target, 0.0)


def _mean(rows: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return rows.mean()
    return torch.where(weight != 0, rows * weight, 0.0).mean()


def advantage_weight(advantage: Tensor, *, inverse_temperature: float, maximum: float) -> Tensor:
    """Return ``min(exp(beta A), maximum)``, the weights of AWR and IQL's policy (equation 7).

    Args:
        advantage: ``Q - V``, ``[B]``; no gradient flows into it.
        inverse_temperature: ``beta``.
        maximum: 100 in IQL's released code.
    """
    return (inverse_temperature * advantage.detach()).exp().clamp(max=maximum)


def flow_q_loss(
    action: Tensor,
    flow_action: Tensor,
    values: Tensor,
    *,
    alpha: float,
    normalize: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a one-step policy: close to the flow, and high in value.

    ``alpha mean |mu(s, z) - F(s, z)|^2 - lambda mean_b mean_i Q_i(s, clip(mu(s, z)))`` with
    ``lambda = 1 / mean |Q|`` if it is normalised, else 1 (FQL, arXiv 2502.02538, equation 8).

    Args:
        action: ``mu(s, z)`` ``[B, ...]``, not clipped: beyond the bound it then still hears of the
            flow, though no more of the value.
        flow_action: What the flow makes of the same noise, clipped; no gradient flows into it.
        values: ``[K, B]`` or ``[B]`` at the clipped action.
        alpha: Weight of the distance.
        normalize: Whether the value's scale is divided out.
    """
    distance = (action - flow_action.detach()).square().mean()
    value = values.mean()
    scale = values.detach().abs().mean().clamp_min(1e-8).reciprocal() if normalize else 1.0
    loss = alpha * distance - scale * value
    return loss, {"loss/distillation": distance.detach(), "loss/value": -value.detach()}

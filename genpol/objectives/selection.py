"""Which rows of a batch count for the policy, and how much: BAPO, Clip-Cov, KL-Cov, CAPO, PIPO.

Arguments as in :mod:`genpol.objectives.surrogates`. These look at a batch as a whole and count
every row they are given: select the rows first.

Released code deviates from its papers, and we choose: BAPO measures contributions by clipped
values, so raising the lower bound can only lower the share of positives; ``"grad"`` counts the rows
that carry gradient. KL-Cov's original code gives its share of rows in percent (0.2 is 2e-3); ours
is a fraction.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genpol.errors import ConfigError


@torch.no_grad()
def bapo_bounds(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    low_start: float,
    low_end: float,
    high_start: float,
    high_end: float,
    low_step: float,
    high_step: float,
    share: float,
    measure: str = "grad",
) -> tuple[Tensor, Tensor, Tensor]:
    """Search the ratio bounds at which positive advantages contribute their share (BAPO).

    First the lower bound rises from ``low_start`` to ``low_end``, then the upper one from
    ``high_start`` to ``high_end``; the first pair to reach ``share`` is taken, else the last
    (arXiv 2510.18927). Then ``ppo_clip(..., clip_low=1 - low, clip_high=high - 1)``, in released
    code with ``dual_clip=3``. All pairs are tried at once, without waiting for the device.

    Args:
        log_ratio: See the module.
        advantage: See the module; rows of advantage zero count for neither side.
        low_start: First lower bound on the ratio.
        low_end: Last.
        high_start: First upper bound.
        high_end: Last.
        low_step: Step of the lower bound.
        high_step: Step of the upper bound.
        share: Wanted part of the positives in the sum of both. The released target is the ratio
            of positives to negatives: 0.5 there is a share of 1/3.
        measure: What a row contributes: ``"grad"`` (ours) ``r |A|`` if it carries gradient, else
            0; ``"value"``, as released, its clipped value.

    Returns:
        Lower bound, upper bound and the share reached, ``[]`` each.

    Raises:
        ConfigError: If a range or step is not positive, or the measure unknown.
    """
    if measure not in ("grad", "value"):
        raise ConfigError(f"bapo measure = {measure!r}: must be one of grad, value")
    lows = _levels("low", low_start, low_end, low_step)
    highs = _levels("high", high_start, high_end, high_step)
    pairs = [(low, high_start) for low in lows] + [(low_end, high) for high in highs[1:]]
    bounds = log_ratio.new_tensor(pairs)
    low, high = bounds[:, :1], bounds[:, 1:]
    ratio, weight = log_ratio.exp().flatten(), advantage.flatten()
    if measure == "grad":
        up, down = torch.where(ratio <= high, ratio, 0.0), torch.where(ratio >= low, ratio, 0.0)
    else:
        up, down = torch.minimum(ratio, high), torch.maximum(ratio, low)
    positive = (up * weight.clamp_min(0.0)).sum(-1)
    total = positive - (down * weight.clamp_max(0.0)).sum(-1)
    reached = positive >= share * total
    reached[-1] = True
    first = reached.int().argmax()
    reached_share = positive / total.clamp_min(torch.finfo(total.dtype).tiny)
    return bounds[first, 0], bounds[first, 1], reached_share[first]


def _levels(name: str, start: float, end: float, step: float) -> list[float]:
    """Return ``start``, ``start + step``, ... below ``end``, and ``end``."""
    if not (start <= end and step > 0.0):
        raise ConfigError(
            f"bapo {name} bound from {start!r} to {end!r} by {step!r}: must rise by a positive step"
        )
    count = math.ceil((end - start) / step - 1e-9)
    return [start + step * i for i in range(count)] + [end]


# -- Clip-Cov and KL-Cov -------------------------------------------------------------------------


@torch.no_grad()
def advantage_covariance(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Return ``(A - mean A)(log pi - mean log pi)`` ``[...]`` (arXiv 2505.22617).

    Its mean is, up to sign and learning rate, how much a policy-gradient step changes the entropy.
    """
    return (advantage - advantage.mean()) * (log_prob - log_prob.mean())


@torch.no_grad()
def clip_cov_mask(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    log_prob: Tensor,
    low: float,
    high: float,
    fraction: float,
    clip_low: float,
    clip_high: float,
    generator: torch.Generator,
    quantiles: bool = False,
) -> Tensor:
    """Choose at random rows of high covariance whose loss to drop (Clip-Cov, arXiv 2505.22617).

    Of the rows with :func:`advantage_covariance` strictly between ``low`` and ``high`` that PPO
    does not clip already, ``floor(fraction N)`` (at least one) are dropped. The dropped loss
    is zero, but the row still counts in the mean.

    Args:
        log_ratio: See the module.
        advantage: See the module.
        log_prob: Log-densities under the current policy, ``[...]``.
        low: Lower end of the window.
        high: Upper end.
        fraction: Part of all N rows to drop.
        clip_low: As in :func:`~genpol.objectives.surrogates.ppo_clip`.
        clip_high: As in :func:`~genpol.objectives.surrogates.ppo_clip`.
        generator: Source of the choice.
        quantiles: Whether ``low`` and ``high`` are quantiles of the covariance, such as 0.95 and
            0.998, not values (ours: continuous log-densities grow with the number of dimensions).

    Returns:
        Booleans ``[...]``, False for the rows to drop.
    """
    covariance = advantage_covariance(log_prob, advantage).flatten()
    window = covariance.new_tensor((low, high))
    if quantiles:
        window = covariance.quantile(window)
    ratio = log_ratio.exp()
    clipped = ((advantage > 0) & (ratio > 1.0 + clip_high)) | (
        (advantage < 0) & (ratio < 1.0 - clip_low)
    )
    eligible = (covariance > window[0]) & (covariance < window[1]) & ~clipped.flatten()
    # The largest of random keys: a random subset of fixed size without asking how many there are.
    key = torch.rand(covariance.shape, generator=generator, device=generator.device)
    key = torch.where(eligible, key.to(covariance.device), -1.0)
    chosen = key.topk(max(int(fraction * len(key)), 1)).indices
    keep = torch.ones_like(eligible)
    keep[chosen] = ~eligible[chosen]
    return keep.view_as(advantage)


def kl_cov(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    log_prob: Tensor,
    fraction: float,
    coefficient: float,
    penalty: Literal["square", "absolute"] = "square",
) -> Tensor:
    """Return ``-r A``, plus a penalty on the rows of highest covariance (KL-Cov, 2505.22617).

    Args:
        log_ratio: See the module.
        advantage: See the module.
        log_prob: Log-densities under the current policy, ``[...]``, for
            :func:`advantage_covariance`; no gradient flows into them.
        fraction: Part of the rows to penalise, rounded down, at least one. A quantile, so it
            suits continuous actions as it is: 0.01 there, 2e-4 to 2e-3 in the paper.
        coefficient: Of the penalty.
        penalty: ``"square"``, ``l^2 / 2``, is smooth at 0 (ours); ``"absolute"``, ``|l|``, is
            the released one.

    Raises:
        ConfigError: If the penalty is unknown.
    """
    if penalty not in ("square", "absolute"):
        raise ConfigError(f"kl_cov penalty = {penalty!r}: must be one of absolute, square")
    covariance = advantage_covariance(log_prob, advantage).flatten()
    chosen = covariance.topk(max(int(fraction * len(covariance)), 1)).indices
    selected = torch.zeros_like(covariance, dtype=torch.bool)
    selected[chosen] = True
    distance = log_ratio.square() / 2 if penalty == "square" else log_ratio.abs()
    loss = -log_ratio.exp() * advantage
    return torch.where(selected.view_as(advantage), loss + coefficient * distance, loss)


# -- CAPO ----------------------------------------------------------------------------------------


@torch.no_grad()
def gaussian_score(mean: Tensor, scale: Tensor, action: Tensor) -> Tensor:
    """Return the gradient of ``log N(action; mean, scale^2)`` in (mean, log scale), ``[..., 2A]``.

    Args:
        mean: Means ``[..., A]``.
        scale: Standard deviations, broadcast to them.
        action: Actions ``[..., A]``.
    """
    standard = (action - mean) / scale
    return torch.cat((standard / scale, standard.square() - 1.0), dim=-1)


@torch.no_grad()
def gaussian_fisher(scale: Tensor, shift: Tensor) -> Tensor:
    """Return ``u^T F u`` ``[...]`` of shifts u ``[..., 2A]`` of (mean, log scale).

    F is ``1 / scale^2`` for the means and 2 for the log scales, without cross terms.
    """
    mean_shift, log_scale_shift = shift.chunk(2, dim=-1)
    return ((mean_shift / scale).square() + 2.0 * log_scale_shift.square()).sum(-1)


@torch.no_grad()
def softmax_score(logits: Tensor, action: Tensor) -> Tensor:
    """Return the gradient of ``log softmax(logits)[action]`` in the logits, ``[..., K]``.

    Args:
        logits: ``[..., K]``.
        action: Indices ``[...]``.
    """
    return F.one_hot(action, logits.shape[-1]) - logits.softmax(-1)


@torch.no_grad()
def softmax_fisher(logits: Tensor, shift: Tensor) -> Tensor:
    """Return ``u^T F u`` ``[...]`` of shifts u ``[..., K]``: their variance under the softmax."""
    probabilities = logits.softmax(-1)
    mean = (probabilities * shift).sum(-1, keepdim=True)
    return (probabilities * (shift - mean).square()).sum(-1)


@torch.no_grad()
def adam_shift(
    score: Tensor,
    hidden: Tensor,
    advantage: Tensor,
    *,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """Return how far Adam's next step on one row alone would move the head's outputs.

    With the last layer's loss gradient ``g = -A score hidden^T`` the step is ``Delta = -lr m / (
    sqrt v + eps)``, bias-corrected moments after g, and the shift ``u = Delta hidden``
    (CAPO, arXiv 2510.00819). The optimiser is only read. Takes memory ``[..., D, H]``.

    Args:
        score: Gradient of the log-density in the outputs, ``[..., D]``.
        hidden: Inputs of the last layer, ``[..., H]``.
        advantage: ``[...]``.
        exp_avg: First moment of the last layer's weight ``[D, H]``, from the optimiser's state.
        exp_avg_sq: Second moment ``[D, H]``.
        step: Steps taken so far.
        learning_rate: Adam's.
        betas: Adam's.
        eps: Adam's.

    Returns:
        Shifts ``[..., D]``.
    """
    weighted = -advantage.unsqueeze(-1) * score
    gradient = weighted.unsqueeze(-1) * hidden.unsqueeze(-2)
    first = torch.lerp(gradient, exp_avg, betas[0]) / (1.0 - betas[0] ** (step + 1))
    second = torch.lerp(gradient.square(), exp_avg_sq, betas[1]) / (1.0 - betas[1] ** (step + 1))
    direction = first / (second.sqrt() + eps)
    return -learning_rate * (direction @ hidden.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def capo_mask(
    advantage: Tensor,
    score: Tensor,
    shift: Tensor,
    fisher: Tensor,
    *,
    max_kl: float,
    max_change: float,
    exact: bool = True,
    symmetric: bool = True,
) -> Tensor:
    """Choose the rows whose own optimiser step would not move the policy too far (CAPO).

    A row is kept if its KL shift ``m_F = u^T F u / 2`` stays below ``max_kl`` and its objective
    shift ``m_H = A (s.u + ((s.u)^2 - u^T F u) / 2)`` below ``max_change`` (arXiv 2510.00819;
    Gaussian heads ours). The surrogate's formula is unchanged.

    Args:
        advantage: ``[...]``.
        score: s, ``[..., D]``, from :func:`gaussian_score` or :func:`softmax_score`.
        shift: u, ``[..., D]``, from :func:`adam_shift`.
        fisher: ``u^T F u`` ``[...]``, from :func:`gaussian_fisher` or :func:`softmax_fisher`.
        max_kl: Bound on the KL shift.
        max_change: Bound on the objective shift.
        exact: False replaces ``m_F`` by the released ``(s.u)^2 / 2``, its estimate from the
            action taken.
        symmetric: Whether ``m_H`` must exceed ``-max_change``; otherwise it must not be negative.

    Returns:
        Booleans ``[...]``, True for the rows to keep.
    """
    along = (score * shift).sum(-1)
    kl = (fisher if exact else along.square()) / 2
    change = advantage * (along + (along.square() - fisher) / 2)
    above = change > -max_change if symmetric else change >= 0
    return (kl < max_kl) & (change < max_change) & above


# -- PIPO ----------------------------------------------------------------------------------------


@torch.no_grad()
def pipo_multiplier(
    mean_return: Tensor,
    history: Tensor,
    *,
    negative_scale: float,
    maximum: float = math.inf,
    gate: float = 0.0,
    correction: Literal[0, 1] = 0,
) -> Tensor:
    """Return how much the last update is worth repeating (PIPO, arXiv 2604.00860).

    ``xi = (mean_return - mean(history)) / std(history)``, times ``negative_scale`` if negative.
    :func:`~genpol.objectives.surrogates.ppo_clip` on the *previous* batch with
    :func:`pipo_coefficients` for its advantage then repeats or undoes that update. The released
    clip of ``mean_return - mean`` to +-5 presumes scores in [0, 1] and is left out.

    Args:
        mean_return: Mean return of the batch just collected, ``[]``; undiscounted and not
            normalised, so that iterations compare.
        history: Mean returns of the iterations before, ``[K]``.
        negative_scale: Weight of a decline (paper: 0.1).
        maximum: Bound on ``|xi|`` (released code with PPO: 2).
        gate: ``|xi|`` up to which the multiplier is zero, as noise of a plateau (ours).
        correction: Of the standard deviation: 0 as in the released code, 1 for the sample's. A
            deviation of zero counts as one.
    """
    std, mean = torch.std_mean(history, correction=correction)
    xi = (mean_return - mean) / torch.where(std > 0, std, 1.0)
    xi = xi.clamp(-maximum, maximum)
    scaled = torch.where(xi < 0, negative_scale * xi, xi)
    return torch.where(xi.abs() > gate, scaled, 0.0)


@torch.no_grad()
def pipo_coefficients(
    advantage: Tensor, multiplier: Tensor, *, grouped: bool, maximum: float = 10.0
) -> Tensor:
    """Return what replaces the previous batch's advantages (PIPO, arXiv 2604.00860).

    Args:
        advantage: The previous batch's, ``[...]``, or ``[..., G]`` in groups.
        multiplier: From :func:`pipo_multiplier`, ``[]``.
        grouped: Whether to scale each group to a mean absolute advantage of one first; a group
            of zeros stays zero. Not for GAE.
        maximum: Bound on the absolute coefficient, as released.
    """
    if grouped:
        size = advantage.abs().mean(-1, keepdim=True)
        advantage = advantage / torch.where(size > 0, size, 1.0)
    return (multiplier * advantage).clamp(-maximum, maximum)

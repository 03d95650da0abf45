"""Losses of latent world models over several open-loop steps, as pure functions.

Tensors are time-major: ``[H, B, ...]`` for H steps of B windows. Step t counts ``rho^t``, and a
step outside its episode does not count (``valid``). Equations: TD-MPC2 (arXiv 2310.16828, section
3) and MBDPO (arXiv 2605.26282), both as in their official codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from genpol.nn.masked import weighted_mean
from genpol.nn.two_hot import TwoHot

_LEAST_RANGE = 1.0  # small values are left as they are


def over_horizon(values: Tensor, valid: Tensor, decay: float) -> Tensor:
    """Return ``(1/H) sum_t rho^t mean_B x_t``, a scalar.

    Args:
        values: Of each step, ``[H, B]``.
        valid: Whether it counts, bool ``[H, B]``; the mean at each t is over those that do.
        decay: ``rho``.
    """
    steps = [weighted_mean(x, counts) * decay**t for t, (x, counts) in _each(values, valid)]
    return torch.stack(steps).mean()


def _each(values: Tensor, valid: Tensor) -> enumerate[tuple[Tensor, Tensor]]:
    return enumerate(zip(values.unbind(0), valid.unbind(0), strict=True))


def consistency_loss(predicted: Tensor, encoded: Tensor, valid: Tensor, decay: float) -> Tensor:
    """Return ``(1/H) sum_t rho^t mean (zhat_{t+1} - h(o_{t+1}))^2``.

    Args:
        predicted: Latents ``zhat_1 .. zhat_H``, ``[H, B, L]``.
        encoded: Of what was observed there; constants, ``[H, B, L]``.
        valid: See :func:`over_horizon`.
        decay: See :func:`over_horizon`.
    """
    return over_horizon((predicted - encoded.detach()).square().mean(-1), valid, decay)


def two_hot_loss(
    scalar: TwoHot, logits: Tensor, target: Tensor, valid: Tensor, decay: float
) -> Tensor:
    """Return ``(1/H) sum_t rho^t mean CE(logits_t, target_t)``, and over members if there are any.

    Args:
        scalar: How scalars become bins.
        logits: ``[H, B, bins]`` or ``[M, H, B, bins]``.
        target: Constants, ``[H, B]``.
        valid: See :func:`over_horizon`.
        decay: See :func:`over_horizon`.
    """
    entropy = scalar.cross_entropy(logits, target.detach())
    if entropy.dim() == 3:
        entropy = entropy.mean(0)
    return over_horizon(entropy, valid, decay)


@torch.no_grad()
def td_target(reward: Tensor, terminated: Tensor, values: Tensor, gamma: float | Tensor) -> Tensor:
    """Return ``r + gamma (1 - terminated) min_j Q_j(z', a')``, ``[H, B]``.

    Args:
        reward: ``[H, B]``.
        terminated: Bool ``[H, B]``; a step that was cut by a time limit is not.
        values: Of the next state, under M averaged critics, ``[M, H, B]``.
        gamma: Discount, broadcasting to ``[H, B]``.
    """
    return reward + gamma * torch.where(terminated, 0.0, values.amin(0))


def as_pairs(latents: Tensor, actions: Tensor, *, legacy: bool = False) -> tuple[Tensor, Tensor]:
    """Return latents ``[H B, L]`` and the actions taken there ``[H B, A]``, row by row.

    Args:
        latents: ``[H, B, L]``.
        actions: ``[H, B, A]``.
        legacy: Flatten the actions batch-major, as MBDPO's released code does: all but a few rows
            then pair a latent with the action of another window or step, and a classifier learns
            the marginal density of actions.
    """
    if legacy:
        actions = actions.transpose(0, 1)
    return latents.flatten(0, 1), actions.flatten(0, 1)


def density_ratio_loss(
    positive: Tensor, negative: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``0.5 BCE(F+, 1) + 0.5 BCE(F-, 0)`` and the share that is classified rightly.

    With classes of equal weight the optimum is ``F = ln b(a|z) - ln nu(a|z)``, where b is the
    density of the positives and nu that of the negatives (implicit energy of MBDPO).

    Args:
        positive: Logits of actions from the replay, ``[M]``.
        negative: Logits of others at the same states, ``[M]``.
        valid: Rows that count, bool ``[M]``; all by default.
    """
    accuracy = 0.5 * (positive.detach() > 0).float() + 0.5 * (negative.detach() < 0).float()
    loss = 0.5 * (F.softplus(-positive) + F.softplus(negative))
    return weighted_mean(loss, valid), weighted_mean(accuracy, valid)


def hardest(logits: Tensor, candidates: Tensor) -> Tensor:
    """Return of each row the candidate with the largest logit, ``[M, A]``.

    Args:
        logits: ``[C, M]``.
        candidates: ``[C, M, A]``.
    """
    chosen = logits.argmax(0)[None, :, None].expand(1, *candidates.shape[1:])
    return candidates.gather(0, chosen).squeeze(0)


def scaled_entropy(noise: Tensor, log_std: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``-A ln N(u; mean, std^2)`` of draws ``u = mean + std noise``, ``[...]``.

    These are the draws before the tanh. It is what the scaled entropy of TD-MPC2's official code
    reduces to: the tanh's correction cancels.

    Args:
        noise: ``[..., A]``.
        log_std: ``[..., A]``.
        mask: Which A dimensions are in use, bool, broadcasting to ``[..., A]``; all by default. The
            official code counts a constant for each of the others.
    """
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    if mask is None:
        return -noise.shape[-1] * log_prob.sum(-1)
    return -mask.sum(-1) * torch.where(mask, log_prob, 0.0).sum(-1)


def policy_prior_loss(
    values: Tensor,
    entropy: Tensor,
    valid: Tensor,
    *,
    scale: Tensor,
    entropy_weight: float,
    decay: float,
) -> Tensor:
    """Return ``mean_t rho^t mean_B -(q_t / S + c Hs_t)``.

    Args:
        values: Of the policy's own actions, ``[H + 1, B]``.
        entropy: Of :func:`scaled_entropy`, ``[H + 1, B]``.
        valid: See :func:`over_horizon`, ``[H + 1, B]``.
        scale: ``S``, of :func:`value_range`.
        entropy_weight: ``c``.
        decay: ``rho``.
    """
    return over_horizon(-(values / scale + entropy_weight * entropy), valid, decay)


@torch.no_grad()
def value_range(values: Tensor) -> Tensor:
    """Return ``max(1, P95 - P5)`` of values ``[B]``, by which the policy's are divided."""
    bounds = torch.tensor([0.05, 0.95], dtype=values.dtype, device=values.device)
    low, high = torch.quantile(values, bounds).unbind()
    return (high - low).clamp_min(_LEAST_RANGE)

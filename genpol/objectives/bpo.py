"""Bounded policy optimisation (BPO) and its group version, as pure functions (arXiv 2604.18578).

Arguments as in :mod:`genpol.objectives.surrogates`. The sigmoid target, as released, leaves ties
with the median at the middle of the box, and the ratios then no longer average to one;
:func:`bpo_exact_target` splits the atom.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from genpol.errors import ConfigError

MAX_TARGET_LOGIT = 10.0


def bpo(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    target: Tensor,
    huber: float = 0.0,
    weight_offset: float = 0.0,
) -> Tensor:
    """Return ``(|A| + weight_offset) |r - target|`` (BPO, arXiv 2604.18578).

    With the target ``1 +- clip`` by the sign of A it is
    :func:`~genpol.objectives.surrogates.ppo_clip` plus a constant, plus a slope back once the ratio
    has overshot. No gradient flows into ``advantage`` and ``target``, which come from live critics.
    Advantages are those of the reward, *not* normalised.

    Args:
        log_ratio: See the module.
        advantage: Mean advantage ``G - V``.
        target: Target ratios ``[...]``, from :func:`bpo_target`.
        huber: Within this distance of the target the error is quadratic, which stops the chatter
            of the constant slope (ours; 0.02 is a sensible radius).
        weight_offset: Added to every weight (the paper's ablation finds 0 as good).
    """
    weight = advantage.detach().abs() + weight_offset
    return weight * F.smooth_l1_loss(log_ratio.exp(), target.detach(), reduction="none", beta=huber)


@torch.no_grad()
def bpo_target(median_advantage: Tensor, *, low: float, high: float, temperature: float) -> Tensor:
    """Return the target ratio ``low + (high - low) sigmoid(A_median / temperature)``.

    For a symmetric box it equals ``1 + eps tanh(A_median / (2 temperature))`` (arXiv 2604.18578).
    The sigmoid's argument is clamped to +-10, as in the authors' code for rsl_rl.

    Args:
        median_advantage: ``G - u`` ``[...]``, return minus its (soft) median.
        low: Smallest ratio.
        high: Largest.
        temperature: In units of the return. Zero is the hard target: ``high`` above the median,
            ``low`` below it, 1 on exact ties (ours).

    Raises:
        ConfigError: Unless ``low < 1 < high``.
    """
    _check_box(low, high)
    if temperature == 0.0:
        below = torch.where(median_advantage < 0, low, torch.ones_like(median_advantage))
        return torch.where(median_advantage > 0, high, below)
    logit = (median_advantage / temperature).clamp(-MAX_TARGET_LOGIT, MAX_TARGET_LOGIT)
    return low + (high - low) * logit.sigmoid()


@torch.no_grad()
def bpo_exact_target(
    probabilities: Tensor, values: Tensor, *, low: float, high: float, temperature: float = 0.0
) -> Tensor:
    """Solve BPO's problem for finitely many actions; return the target ratios ``[..., K]``.

    It is ``max E[r Q]`` over ``low <= r <= high`` and ``E[r] = 1``, expectations under the old
    policy (arXiv 2604.18578; atoms and asymmetric boxes ours). The best actions get ``high``, the
    worst ``low``; the one action value at the quantile where ``high`` would be spent gets what
    is left, the same ratio for all actions tied at it. ``low = 0`` is the cross-entropy method
    with elite fraction ``1 / high``. A temperature adds the binary entropy of ``(r - low) /
    (high - low)``, times ``temperature (high - low)``: ``r = low + (high - low) sigmoid((Q - mu) /
    temperature)`` with mu, the soft median, found to machine precision by bisection.

    Args:
        probabilities: Those of the old policy, ``[..., K]``; they sum to one.
        values: Action values, ``[..., K]``.
        low: Smallest ratio.
        high: Largest.
        temperature: In units of the values; zero is the hard problem.

    Raises:
        ConfigError: Unless ``low < 1 < high``.
    """
    _check_box(low, high)
    mass = (1.0 - low) / (high - low)  # what E[(r - low) / (high - low)] must be
    if temperature == 0.0:
        other, own = values.unsqueeze(-2), values.unsqueeze(-1)
        weight = probabilities.unsqueeze(-2)
        above = torch.where(other > own, weight, 0.0).sum(-1)
        tied = torch.where(other == own, weight, 0.0).sum(-1)
        tiny = torch.finfo(tied.dtype).tiny
        return low + (high - low) * ((mass - above) / tied.clamp_min(tiny)).clamp(0.0, 1.0)
    # At either end all sigmoids lie on the same side of `mass`, so the root is between them.
    logit = math.log(mass) - math.log1p(-mass)
    lower = values.amin(-1, keepdim=True) - temperature * logit
    upper = values.amax(-1, keepdim=True) - temperature * logit
    for _ in range(64):
        middle = (lower + upper) / 2
        share = ((values - middle) / temperature).sigmoid()
        too_low = (probabilities * share).sum(-1, keepdim=True) > mass
        lower, upper = torch.where(too_low, middle, lower), torch.where(too_low, upper, middle)
    return low + (high - low) * ((values - (lower + upper) / 2) / temperature).sigmoid()


@torch.no_grad()
def group_bpo_target(
    rewards: Tensor, *, low: float, high: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and target ratios of groups of samples (GBPO, arXiv 2604.18578, code).

    ``A = (R - mean) / (std + 1e-6)``, and :func:`bpo_target` of ``(R - median) / (std + 1e-6)``
    with the sample standard deviation; the median of an even group lies midway. A group of one
    has mean and median 0 and standard deviation 1. With many ties, as of 0/1 rewards, the majority
    *is* the median and stays put; :func:`bpo_exact_target` with equal probabilities moves it.

    Args:
        rewards: One reward per sample, ``[..., G]``.
        low: Smallest ratio.
        high: Largest.
        temperature: In standard deviations.

    Returns:
        Advantages and targets for :func:`bpo`, ``[..., G]`` each.
    """
    if rewards.shape[-1] == 1:
        mean = median = torch.zeros_like(rewards)
        std = torch.ones_like(rewards)
    else:
        std, mean = torch.std_mean(rewards, dim=-1, keepdim=True)
        median = rewards.quantile(0.5, dim=-1, keepdim=True)
    scale = std + 1e-6
    target = bpo_target((rewards - median) / scale, low=low, high=high, temperature=temperature)
    return (rewards - mean) / scale, target


def soft_median_loss(prediction: Tensor, target: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return ``T log(2 cosh(x / 2T))``, ``x = target - prediction``: a median critic's loss.

    At its minimum ``E[sigmoid(x / T)] = 1/2``. As T falls it tends to ``|x| / 2``, the pinball
    loss, and the prediction to the median; as T grows, to a quadratic and the mean. BPO's code
    (arXiv 2604.18578) has T = 1; T equal to the temperature of :func:`bpo_target` is consistent
    with it (ours).

    Args:
        prediction: Predicted medians ``[...]``.
        target: Returns ``[...]``.
        temperature: The positive T, in units of the return.
    """
    error = target - prediction
    return F.softplus(error, beta=1.0 / temperature) - error / 2


def _check_box(low: float, high: float) -> None:
    if not 0.0 <= low < 1.0 < high:
        raise ConfigError(
            f"ratio box [{low!r}, {high!r}]: needs 0 <= low < 1 < high, such as [0.8, 1.2]"
        )

"""Advantages: from values along time, from the returns of a group, or from several of either.

* Along time, tensors ``[..., T]``: :func:`gae`, :func:`brax_gae`. ``next_value`` is the value of
  the *true* next observation, never of the one after an automatic reset, so a truncated step
  bootstraps from where the episode was cut.
* Within groups, the last dimension of ``[..., G]``: :func:`group_relative` for one stream of
  returns, :func:`gdpo` and :func:`dvao` for K streams. A group is G samples that share a baseline
  or, with what :func:`gae` made of K rewards flattened to ``[K, N]``, a whole rollout.
* By rank among all returns: :func:`mixed_value_at_risk`, with quantiles of
  :class:`QuantileTracker`.

None carries a gradient. Entries that a ``mask`` leaves out may hold NaN; their advantage is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from genpol import parallel
from genpol.errors import ConfigError
from genpol.settings import at_least, one_of, positive


@torch.no_grad()
def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages by GAE (Schulman et al., arXiv 1506.02438, equation 16).

    ``delta_t = r_t + gamma (1 - terminated_t) V'_t - V_t`` and
    ``A_t = delta_t + gamma lam (1 - done_t) A_{t+1}``.

    Args:
        reward: Rewards ``[..., T]``.
        value: Values of the observations.
        next_value: Values of the true next observations; ignored where terminated.
        terminated: True where the episode ended for good.
        done: True where it ended for any reason.
        gamma: Discount.
        lam: Decay of the longer estimates.

    Returns:
        Advantage and value target ``A + V``, ``[..., T]``.
    """
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    advantage = _discounted_sums(delta, torch.where(done, 0.0, gamma * lam))
    return advantage, advantage + value


@torch.no_grad()
def brax_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages as Brax's PPO does, which GoRL and FPO build on.

    With ``gamma_t = gamma (1 - terminated_t)`` and ``k_t = 1 - truncated_t``:
    ``delta_t = k_t (r_t + gamma_t V'_t - V_t)``, ``e_t = delta_t + gamma_t lam k_t e_{t+1}``,
    target ``V_t + e_t``, advantage ``A_t = delta_t + k_t gamma_t e_{t+1}``. Two differences from
    :func:`gae`: the first link of the advantage has no lambda, and a truncated step has zero
    advantage and zero value error instead of bootstrapping.

    Arguments and returns are those of :func:`gae`.
    """
    truncated = done & ~terminated
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    delta = torch.where(truncated, 0.0, delta)
    discount = torch.where(done, 0.0, torch.full_like(delta, gamma))
    error = _discounted_sums(delta, discount * lam)
    following = torch.cat((error[..., 1:], torch.zeros_like(error[..., :1])), dim=-1)
    return delta + discount * following, value + error


@torch.no_grad()
def normalize_advantage(advantage: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ``(A - mean) / (std + 1e-8)`` over all entries, those of weight zero left out.

    The standard deviation is that of the population, as in Brax. Of several ranks
    (:mod:`genpol.parallel`), unweighted entries count among those of all.
    """
    if weight is None:
        std, mean = parallel.std_mean(advantage)
        return (advantage - mean) / (std + 1e-8)
    counted = advantage[(weight != 0).expand_as(advantage)]
    if counted.numel() == 0:
        return torch.zeros_like(advantage)
    std, mean = torch.std_mean(counted, correction=0)
    return torch.where(weight != 0, (advantage - mean) / (std + 1e-8), 0.0)


@torch.no_grad()
def group_relative(
    returns: Tensor,
    *,
    centre: Literal["mean", "median"] = "mean",
    scale: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Return ``(R - centre) / (std + 1e-6)`` within each group (GRPO, arXiv 2402.03300).

    The standard deviation is that of a sample (divided by G - 1) and always taken about the mean,
    as in the released codes of GRPO and GBPO. GBPO (arXiv 2604.18578) builds its weight with the
    mean and its target ratio with the median. Ours: a group of one has advantage 0, where those
    codes return ``R`` itself, which has no baseline.

    Args:
        returns: ``[..., G]``, the last dimension being a group.
        centre: The baseline; the median of an even group lies midway between the middle two.
        scale: Whether to divide; without, the advantage of Dr. GRPO (arXiv 2503.20783).
        mask: Boolean, True for the entries that count; broadcasts to the shape.

    Returns:
        Advantage ``[..., G]``.

    Raises:
        ConfigError: If ``centre`` is neither.
    """
    one_of("centre", centre, ("mean", "median"))
    deviation, std = _deviation_and_std(returns, mask, correction=1)
    if centre == "median":
        counted = _counted(returns, mask)
        known = torch.where(counted, deviation, torch.nan)
        median = known.nanquantile(0.5, dim=-1, keepdim=True)
        deviation = torch.where(counted, deviation - median, 0.0)
    return deviation / (std + 1e-6) if scale else deviation


@torch.no_grad()
def gdpo(
    streams: Tensor, weights: Sequence[float] | Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Normalise each stream within its groups, then their weighted sum over everything.

    GDPO (arXiv 2601.05242): ``A = whiten(sum_k w_k (R_k - mean R_k) / (std R_k + 1e-4))``, where
    mean and std are those of a group and ``whiten`` subtracts the mean over all entries and divides
    by their std + 1e-4. Normalising the sum instead, as GRPO would, merges different tuples of
    returns into one advantage. A stream without variance in a group adds nothing there.

    Ours: standard deviations are those of a population, where the released code has samples'. With
    groups of one size that is the same but for the final factor ``sqrt(n / (n - 1))``. For a return
    that is missing the released code puts 0; do so before the call if wanted.

    Args:
        streams: Returns ``[K, ..., G]``; or the advantages of K rewards, flattened to ``[K, N]``.
        weights: K weights of the streams; only their ratios matter.
        mask: Boolean, True for the entries that count; broadcasts to ``[..., G]``.

    Returns:
        Advantage ``[..., G]``.

    Raises:
        ConfigError: If there are not K weights.
    """
    deviation, std = _deviation_and_std(streams, mask)
    combined = _weighted_sum(weights, deviation / (std + 1e-4))
    everything = None if mask is None else mask.expand_as(combined).flatten()
    deviation, std = _deviation_and_std(combined.flatten(), everything)
    return (deviation / (std + 1e-4)).view_as(combined)


@torch.no_grad()
def dvao(
    streams: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    std: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Combine the normalised streams with weights in proportion to ``w_k std_k``.

    DVAO (arXiv 2605.25604): with ``A_k = (R_k - mean R_k) / std_k`` of a group,
    ``A = sum_k w_k std_k A_k / sum_k w_k std_k``. We compute what this comes to,
    ``sum_k w_k (R_k - mean R_k) / sum_k w_k std_k``. It is never larger than the weighted sum
    divided by its own std, and the smaller the more the streams conflict. A stream without variance
    drops out. Ours: without any variance A = 0, of which the paper is silent.

    The result has a scale of its own: do not whiten it again. The scales of the streams enter it,
    so bring the rewards to comparable units first.

    Args:
        streams: Returns ``[K, ..., G]``; or the advantages of K rewards, flattened to ``[K, N]``.
        weights: K weights of the streams, not negative; only their ratios matter.
        std: Standard deviations ``[K]`` or ``[K, ..., 1]`` to divide by in place of those of this
            batch, such as running averages of :func:`group_std` (ours).
        mask: Boolean, True for the entries that count; broadcasts to ``[..., G]``.

    Returns:
        Advantage ``[..., G]``.

    Raises:
        ConfigError: If there are not K weights.
    """
    deviation, batch_std = _deviation_and_std(streams, mask)
    scale = _weighted_sum(weights, batch_std if std is None else std)
    combined = _weighted_sum(weights, deviation)
    return torch.where(scale > 0, combined / scale, 0.0)


@torch.no_grad()
def group_std(returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return each group's population standard deviation ``[..., 1]`` of ``[..., G]``.

    It is exactly zero where all entries are equal.
    """
    return _deviation_and_std(returns, mask)[1]


@torch.no_grad()
def mixed_value_at_risk(
    returns: Tensor,
    low_quantile: Tensor,
    high_quantile: Tensor,
    *,
    low_level: float,
    high_level: float,
    mixing: float,
    baseline: bool = True,
) -> Tensor:
    """Weigh the middle of the returns against their lower tail (RiskPO, arXiv 2510.00911).

    With quantiles ``q_a < q_b`` at levels ``a < b`` and ``w = mixing``:
    ``A = (w A_tail + A_mid) / (1 + w)``, ``A_mid = (clip(S, q_a, q_b) - q_b) / (b - a)`` and
    ``A_tail = -max(q_a - S, 0) / a``. Above ``q_b`` returns no longer differ: the best have
    advantage 0 and all others less. It has a scale of its own: centre it over the batch if it is
    added to another advantage, but do not whiten it.

    Args:
        returns: Undiscounted returns S of episodes, ``[...]``.
        low_quantile: Quantile ``q_a``; broadcasts to the shape.
        high_quantile: Quantile ``q_b``.
        low_level: Level a; RiskPO has 0.2.
        high_level: Level b; RiskPO has 0.8, or 0.9 where tasks are easy.
        mixing: Weight w of the tail; RiskPO has 1.5.
        baseline: Whether ``A_mid`` counts down from ``q_b``; otherwise up from ``q_a``, as in
            RiskPO's configuration for hard tasks.

    Returns:
        Advantage ``[...]``.

    Raises:
        ConfigError: Unless ``0 < low_level < high_level < 1`` and ``mixing >= 0``.
    """
    _check_levels((low_level, high_level))
    at_least("mixing", mixing, 0.0)
    middle = returns.clamp(low_quantile, high_quantile)
    middle = (middle - (high_quantile if baseline else low_quantile)) / (high_level - low_level)
    tail = -(low_quantile - returns).clamp_min(0.0) / low_level
    return (mixing * tail + middle) / (1.0 + mixing)


class QuantileTracker(nn.Module):
    """Follow quantiles of a stream of returns (RiskPO, arXiv 2510.00911).

    The first batch gives ``quantile(S, level)``, each later one the stochastic step
    ``q <- q + rate (level - mean 1{S < q})``. All state is in the buffers. Use::

        tracker = QuantileTracker((0.2, 0.8), rate=0.1, iqr_window=100)
        tracker.update(returns, ~truncated)
        low, high = tracker.quantile

    RiskPO's rule presumes returns of the order of one. Ours: ``iqr_window`` multiplies the rate by
    the interquartile range of the last so many returns, which makes the tracker indifferent to
    their unit; while the middle half of those are equal, it rests. Ours too: quantiles that a step
    has made cross are sorted.

    Args:
        levels: Increasing levels in (0, 1).
        rate: Step size; in units of the returns if ``iqr_window`` is 0, else of their range.
        iqr_window: How many returns the range is taken of; 0 for RiskPO's rule.

    Attributes:
        quantile: ``[len(levels)]``; NaN until the first update.
        recent: The last returns ``[iqr_window]``; NaN where there are none yet.

    Raises:
        ConfigError: If levels, rate or window are out of bounds.
    """

    levels: Tensor
    quantile: Tensor
    recent: Tensor

    def __init__(self, levels: Sequence[float], rate: float, *, iqr_window: int = 0) -> None:
        super().__init__()
        _check_levels(levels)
        positive("rate", rate)
        at_least("iqr_window", iqr_window, 0)
        self.rate = rate
        self.iqr_window = iqr_window
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("quantile", torch.full((len(levels),), torch.nan))
        self.register_buffer("recent", torch.full((iqr_window,), torch.nan))

    @torch.no_grad()
    def update(self, returns: Tensor, mask: Tensor | None = None) -> None:
        """Learn from a batch of returns ``[...]``; one without returns changes nothing.

        Args:
            returns: Returns of episodes.
            mask: Boolean ``[...]``, True for those to count; truncated episodes should not.
        """
        returns = (returns.flatten() if mask is None else returns[mask]).to(self.quantile)
        if returns.numel() == 0:
            return
        if self.iqr_window > 0:
            self.recent.copy_(torch.cat((self.recent, returns))[-self.iqr_window :])
        if self.quantile.isnan().any():
            self.quantile.copy_(returns.quantile(self.levels))
            return
        below = (returns.unsqueeze(-1) < self.quantile).to(returns.dtype).mean(0)
        step = self._step_size() * (self.levels - below)
        self.quantile.copy_((self.quantile + step).sort().values)

    def _step_size(self) -> Tensor | float:
        if self.iqr_window == 0:
            return self.rate
        low, high = self.recent.nanquantile(self.recent.new_tensor((0.25, 0.75)))
        return self.rate * (high - low)


def _check_levels(levels: Sequence[float]) -> None:
    if any(low >= high for low, high in pairwise((0.0, *levels, 1.0))):
        raise ConfigError(f"levels = {list(levels)}: must increase within (0, 1), such as 0.2, 0.8")


def _weighted_sum(weights: Sequence[float] | Tensor, streams: Tensor) -> Tensor:
    """Sum ``[K, ...]`` over its first dimension, with one weight for each stream."""
    weights = torch.as_tensor(weights, dtype=streams.dtype, device=streams.device)
    if weights.shape != streams.shape[:1]:
        raise ConfigError(
            f"weights of shape {list(weights.shape)} for streams of shape {list(streams.shape)}: "
            "give one weight for each stream, which are the first dimension"
        )
    return torch.tensordot(weights, streams, dims=1)


def _deviation_and_std(
    values: Tensor, mask: Tensor | None, correction: int = 0
) -> tuple[Tensor, Tensor]:
    """Return deviations ``[..., G]`` from the group's mean and their std ``[..., 1]``.

    Both leave out what the mask does; its deviation is 0.
    """
    counted = _counted(values, mask)
    # From the least entry on: where all are equal, mean and deviations are then exactly zero, not
    # rounding errors that a division by their own std would blow up.
    least = torch.where(counted, values, torch.inf).amin(-1, keepdim=True)
    above = torch.where(counted, values - least, 0.0)
    count = counted.sum(-1, keepdim=True)
    mean = above.sum(-1, keepdim=True) / count.clamp_min(1)
    deviation = torch.where(counted, above - mean, 0.0)
    variance = deviation.square().sum(-1, keepdim=True) / (count - correction).clamp_min(1)
    return deviation, variance.sqrt()


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones_like(values, dtype=torch.bool)
    return mask.expand_as(values)


def _discounted_sums(delta: Tensor, decay: Tensor) -> Tensor:
    """Return ``e_t = delta_t + decay_t e_{t+1}`` with ``e`` zero behind the last step."""
    # Time first and contiguous: a column of [N, T] would touch one cache line per environment.
    delta, decay = (x.expand_as(delta).movedim(-1, 0).contiguous() for x in (delta, decay))
    sums = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for step in range(delta.shape[0] - 1, -1, -1):
        running = torch.addcmul(delta[step], decay[step], running, out=sums[step])
    return sums.movedim(0, -1).contiguous()

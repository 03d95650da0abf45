"""Risk in the lower tail of the returns of an evaluation, with bootstrap intervals over episodes.

    VaR_level  = the empirical quantile of the returns at ``level``
    CVaR_level = the mean of the returns that do not exceed it

Small values are bad: the value at risk of 5 % is a return that 19 of 20 episodes exceed, and the
conditional one is what the others have on average (definitions of CDSA's risk metrics, Liu et al.
2024, as far as its summaries give them).

Two policies that were evaluated from equal start states are better compared by :func:`difference`,
which resamples pairs of episodes: what the start states alone do to the returns then cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from genpol.errors import ConfigError, DatasetError
from genpol.report.statistics import CONFIDENCE, REPETITIONS

Returns: TypeAlias = Sequence[float] | np.ndarray
Measure: TypeAlias = Callable[..., np.ndarray]
"""Maps returns ``[..., E]`` to ``[...]``, along ``axis``."""

METHODS = ("linear", "lower", "higher", "nearest", "midpoint", "inverted_cdf")
# Resampled returns that are held at once: 32 MiB of them.
_BATCH = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its bootstrap interval.

    Attributes:
        value: The number, of the returns as they are.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def value_at_risk(returns: Returns, level: float, *, method: str = "linear") -> float:
    """Return the empirical quantile of ``returns`` ``[E]`` at ``level``.

    Args:
        returns: Return of each episode.
        level: Share of the episodes in the tail, in (0, 1].
        method: Which quantile, by numpy's name: ``linear`` lies between two returns, ``lower`` and
            ``inverted_cdf`` are one of them.

    Raises:
        ConfigError: If the level or the method is not one.
        DatasetError: If there are no returns, or one is not finite.
    """
    return float(_quantile(_checked(returns), level=level, method=method))


def conditional_value_at_risk(returns: Returns, level: float, *, method: str = "linear") -> float:
    """Return the mean of those of ``returns`` ``[E]`` that do not exceed their value at risk.

    The arguments and errors are those of :func:`value_at_risk`.
    """
    return float(_tail_mean(_checked(returns), level=level, method=method))


def mean() -> Measure:
    """Return the measure "mean", for :func:`estimate` and :func:`difference`."""
    return np.mean


def var(level: float, *, method: str = "linear") -> Measure:
    """Return the measure of :func:`value_at_risk`."""
    return partial(_quantile, level=level, method=method)


def cvar(level: float, *, method: str = "linear") -> Measure:
    """Return the measure of :func:`conditional_value_at_risk`."""
    return partial(_tail_mean, level=level, method=method)


def estimate(
    returns: Returns,
    measure: Measure,
    *,
    confidence: float = CONFIDENCE,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> Estimate:
    """Return a measure of ``returns`` ``[E]`` with its percentile interval over episodes.

    Of a quantile far out in the tail an interval cannot reach below the worst return that was seen:
    it is too narrow where ``level`` times ``E`` is a small number.

    Raises:
        ConfigError: If the measure's level or method is not one.
        DatasetError: If there are fewer than two returns, or one is not finite.
    """
    values = _checked(returns, at_least=2)
    low, high = _interval((values,), measure, confidence, repetitions, seed)
    return Estimate(value=float(measure(values, axis=-1)), low=low, high=high)


def difference(
    returns: Returns,
    baseline: Returns,
    measure: Measure,
    *,
    confidence: float = CONFIDENCE,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> Estimate:
    """Return how much a measure of ``returns`` ``[E]`` exceeds that of ``baseline`` ``[E]``.

    The interval is that of a paired bootstrap: episode ``i`` of both must have begun in the same
    state. `genpol eval ... json=true` gives such returns for equal ``seed``, ``episodes`` and
    number of environments, as long as neither run has an episode that diverged and was left out.

    Raises:
        ConfigError: If the measure's level or method is not one.
        DatasetError: If they are unequally many, fewer than two, or one is not finite.
    """
    pair = _checked(returns, at_least=2), _checked(baseline, at_least=2)
    if len(pair[0]) != len(pair[1]):
        raise DatasetError(
            f"{len(pair[0])} and {len(pair[1])} returns make no pairs; evaluate both with equal "
            "episodes and seed, and leave out none"
        )

    def exceeding(first: np.ndarray, second: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(measure(first, axis=axis) - measure(second, axis=axis))

    low, high = _interval(pair, exceeding, confidence, repetitions, seed)
    return Estimate(value=float(exceeding(*pair, axis=-1)), low=low, high=high)


def few(episodes: int, level: float) -> str:
    """Return one line on a tail that holds less than one of so many episodes, or nothing."""
    if level * episodes >= 1.0 - 1e-9:
        return ""
    return (
        f"{level:.0%} of {episodes} episodes are less than one, so the tail is the worst alone; "
        f"take episodes={math.ceil(1.0 / level - 1e-9)} or more"
    )


def _quantile(values: np.ndarray, *, level: float, method: str, axis: int = -1) -> np.ndarray:
    if not 0.0 < level <= 1.0:
        raise ConfigError(f"level = {level}: must be > 0 and at most 1, such as 0.05")
    if method not in METHODS:
        raise ConfigError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
    chosen: Any = method  # numpy's own type lists the names
    return np.asarray(np.quantile(values, level, axis=axis, method=chosen))


def _tail_mean(values: np.ndarray, *, level: float, method: str, axis: int = -1) -> np.ndarray:
    limit = np.expand_dims(_quantile(values, level=level, method=method, axis=axis), axis)
    # A quantile that is one of the returns may come out less than it, by rounding: level 0.29 of
    # 101 returns. The tail is never empty, since no quantile is less than the least return.
    rounding = 1e-12 * np.ptp(values, axis=axis, keepdims=True)
    return np.asarray(np.mean(values, axis=axis, where=values <= limit + rounding))


def _interval(
    samples: tuple[np.ndarray, ...],
    statistic: Measure,
    confidence: float,
    repetitions: int,
    seed: int,
) -> tuple[float, float]:
    from scipy.stats import bootstrap  # costs a third of a second

    # Percentiles, since BCa's correction is 0 / 0 where all returns are equal.
    found = bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=repetitions,
        batch=max(1, _BATCH // len(samples[0])),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _checked(returns: Returns, *, at_least: int = 1) -> np.ndarray:
    values = np.asarray(returns, dtype=np.float64)
    if values.ndim != 1 or len(values) < at_least:
        raise DatasetError(
            f"returns of shape {list(values.shape)}: must be a list of at least {at_least}, one "
            "for each episode"
        )
    if not np.isfinite(values).all():
        worst = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DatasetError(f"return of episode {worst} is {values[worst]}: must be finite")
    return values

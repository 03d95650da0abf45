"""Search over plans of actions as pure functions: reverse diffusion, and MPPI.

Plans are ``[E, N, H, A]``: N candidates of H actions for each of E environments, with returns ``[E,
N]``. Diffusion levels are numbered from 0, the cleanest, to T - 1.

Reverse diffusion is that of Model-Based Diffusion (arXiv 2407.01573): the target density of plans
is ``p_0(U)`` proportional to ``exp(J(U) / lambda)``, noised as ``x = sqrt(abar) U + sqrt(1 - abar)
eps``. By Tweedie's formula its score at a level is ``(sqrt(abar) E[U | x] - x) / (1 - abar)``, and
``E[U | x]`` is estimated by weighting draws of ``N(x / sqrt(abar), sigma^2)`` with the target.
MBDPO (arXiv 2605.26282, official code) standardises J and keeps only the best draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from genpol.settings import at_least, positive

BETA_FIRST, BETA_LAST = 1e-4, 1e-2
"""Linear noise increments of MBD and MBDPO."""

_LEAST_STD = 1e-4  # below it returns are equal, and their standardisation would blow up noise


@dataclass(frozen=True)
class SearchSchedule:
    """Noise levels of a search, cleanest first, T of each.

    Attributes:
        alpha: Signal power kept in each step.
        alpha_bar: Signal power left at each level.
    """

    alpha: tuple[float, ...]
    alpha_bar: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Levels T; the search takes T - 1 steps, of which each is one round of candidates."""
        return len(self.alpha)

    def sigma(self, level: int) -> float:
        """Return the standard deviation of clean plans around ``x / sqrt(abar)`` at a level."""
        return math.sqrt((1.0 - self.alpha_bar[level]) / self.alpha_bar[level])

    def levels(self, number: int | None = None) -> list[int]:
        """Return the levels to denoise at, noisiest first.

        Args:
            number: How many of the T - 1, evenly spread from the noisiest down; all by default.
        """
        total = self.steps - 1
        number = total if number is None else min(number, total)
        return [total - index * total // number for index in range(number)]


def search_schedule(steps: int, *, widest: float | None = None) -> SearchSchedule:
    """Return the linear schedule of MBDPO over ``steps`` levels.

    With its increments as published, the widest proposal depends on the number of levels: 0.33 at
    T = 20, 0.16 at T = 5.

    Args:
        steps: Levels T, at least 2.
        widest: ``sigma`` of the noisiest level, to which the increments are scaled together; by
            default they are as published.

    Raises:
        ConfigError: If there are fewer than 2 levels, or the width is not above zero.
    """
    at_least("agent.diffusion_steps", steps, 2)
    rise = (BETA_LAST - BETA_FIRST) / (steps - 1)
    betas = [BETA_FIRST + rise * level for level in range(steps)]
    scale = 1.0
    if widest is not None:
        positive("agent.widest_search", widest)
        scale = _scale_to(betas, 1.0 / (1.0 + widest**2))
    alpha = tuple(1.0 - scale * beta for beta in betas)
    return SearchSchedule(alpha, tuple(accumulate(alpha, mul)))


def _scale_to(betas: list[float], last: float) -> float:
    """Return by which factor the increments leave this signal power behind them all."""
    low, high = 0.0, 1.0 / betas[-1]
    for _ in range(100):
        middle = (low + high) / 2
        left = math.prod(1.0 - middle * beta for beta in betas)
        low, high = (middle, high) if left > last else (low, middle)
    return (low + high) / 2


def known(returns: Tensor) -> Tensor:
    """Return ``[E, N]`` with 0 for what is not a finite number.

    The official codes do so with NaN alone, and make infinities the largest floats, whose standard
    deviation is infinite again.
    """
    return torch.where(returns.isfinite(), returns, 0.0)


def _among_elites(logits: Tensor, returns: Tensor, elites: int) -> Tensor:
    """Return logits that are minus infinity where the return is not among the best K."""
    if not 0 < elites < returns.shape[-1]:
        return logits
    least = returns.topk(elites, dim=-1).values[..., -1:]
    return torch.where(returns >= least, logits, -math.inf)


def search_weights(returns: Tensor, *, temperature: float, elites: int = 0) -> Tensor:
    """Return the softmax weights of candidates ``[E, N]``, zero outside the elites.

    ``l = (J - mean J) / std J / lambda`` over all candidates (sample std; 1 where it is below
    1e-4), then a softmax over the elites (MBDPO, official code). They do not change when J is
    scaled or shifted.

    Args:
        returns: ``[E, N]``, N >= 2.
        temperature: ``lambda``.
        elites: The best K by J; all if that is 0 or at least N. What ties with the K-th stays in:
            equal returns give equal weights.
    """
    std = returns.std(-1, keepdim=True)
    std = torch.where(std < _LEAST_STD, 1.0, std)
    logits = (returns - returns.mean(-1, keepdim=True)) / (std * temperature)
    return _among_elites(logits, returns, elites).softmax(-1)


def expected_plan(weights: Tensor, plans: Tensor) -> Tensor:
    """Return ``sum_i w_i U_i`` for weights ``[E, N]`` and plans ``[E, N, H, A]``, ``[E, H, A]``."""
    return torch.einsum("en,enha->eha", weights, plans)


def weighted_std(weights: Tensor, plans: Tensor, mean: Tensor) -> Tensor:
    """Return the standard deviation of plans under weights that sum to one, ``[E, H, A]``."""
    return torch.einsum("en,enha->eha", weights, (plans - mean.unsqueeze(1)).square()).sqrt()


def plan_score(x: Tensor, expected: Tensor, alpha_bar: float) -> Tensor:
    """Return ``(sqrt(abar) E[U | x] - x) / (1 - abar + 1e-8)``, ``[E, H, A]`` (Tweedie)."""
    return (math.sqrt(alpha_bar) * expected - x) / (1.0 - alpha_bar + 1e-8)


def reverse_step(x: Tensor, score: Tensor, alpha: float, alpha_bar: float) -> Tensor:
    """Return ``(x + (1 - abar) s) / sqrt(alpha)``, the noisy plan one level below, ``[E, H, A]``.

    With the score of :func:`plan_score` it is ``sqrt(abar_{tau-1}) E[U | x]``: the next proposal is
    centred on the weighted mean, and no noise is added.
    """
    return (x + (1.0 - alpha_bar) * score) / math.sqrt(alpha)


def mppi_weights(returns: Tensor, *, temperature: float, elites: int = 0) -> Tensor:
    """Return weights proportional to ``exp(temperature (J - max J))`` over the elites, ``[E, N]``.

    TD-MPC2 (arXiv 2310.16828, official code): the temperature multiplies raw returns.

    Args:
        returns: ``[E, N]``.
        temperature: Its inverse, in the usual sense.
        elites: See :func:`search_weights`.
    """
    return _among_elites(temperature * returns, returns, elites).softmax(-1)


def refit(
    weights: Tensor, plans: Tensor, *, least: float, greatest: float
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of weighted plans, ``[E, H, A]`` each (MPPI of TD-MPC2).

    Args:
        weights: Summing to one, ``[E, N]``.
        plans: ``[E, N, H, A]``.
        least: Lower bound of the standard deviation.
        greatest: Upper bound.
    """
    mean = expected_plan(weights, plans)
    return mean, weighted_std(weights, plans, mean).clamp(least, greatest)


def shifted(plan: Tensor) -> Tensor:
    """Return a plan ``[..., H, A]`` without its first action, and zeros behind its last."""
    return torch.cat((plan[..., 1:, :], torch.zeros_like(plan[..., :1, :])), dim=-2)

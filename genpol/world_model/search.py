"""Two searches over plans: reverse diffusion and MPPI, round by round.

A round draws candidates around a plan, values and weighs them; what it knows of a model is behind
a :data:`Sampler`, and so is what may be compiled of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genpol.objectives.plan_search import (
    SearchSchedule,
    expected_plan,
    known,
    plan_score,
    refit,
    reverse_step,
    weighted_std,
)

Hide = Callable[[Tensor], Tensor]
"""Zero what a task does not use of plans ``[E, ..., A]``."""


class Round(NamedTuple):
    """One round of a search.

    Attributes:
        candidates: ``[E, N, H, A]``.
        weights: ``[E, N]``.
        returns: ``[E, N]``.
        mean: Of the candidates under their weights, ``[E, H, A]``.
    """

    candidates: Tensor
    weights: Tensor
    returns: Tensor
    mean: Tensor


Sampler = Callable[[Tensor, Tensor, int], Round]
"""Makes the round of a number around plans ``[E, 1, H, A]`` with standard deviations that broadcast
to them."""


class Found(NamedTuple):
    """The last round of a search.

    Attributes:
        plan: ``[E, H, A]``.
        candidates: ``[E, N, H, A]``.
        weights: ``[E, N]``.
        returns: ``[E, N]``.
        std: Standard deviation of the candidates under their weights, ``[E, H, A]``.
    """

    plan: Tensor
    candidates: Tensor
    weights: Tensor
    returns: Tensor
    std: Tensor

    @property
    def value(self) -> Tensor:
        """Weighted mean return, ``[E]``."""
        return (self.weights * self.returns).sum(-1)

    @property
    def spread(self) -> Tensor:
        """Mean of the standard deviations, ``[E]``."""
        return self.std.mean((-2, -1))


def weigh_candidates(
    centre: Tensor,
    std: Tensor,
    noise: Tensor,
    returns: Callable[[Tensor], Tensor],
    weigh: Callable[[Tensor], Tensor],
    *,
    proposals: Tensor | None = None,
    hide: Hide = lambda plans: plans,
) -> Round:
    """Draw candidates within [-1, 1] around plans, value them and weigh them.

    Args:
        centre: ``[E, 1, H, A]``.
        std: Broadcasts to the noise.
        noise: Of all candidates but the proposals, standard normal, ``[E, N - P, H, A]``.
        returns: Values candidates ``[E, N, H, A]``, ``[E, N]``.
        weigh: Makes weights of finite returns ``[E, N]``.
        proposals: The first candidates, ``[E, P, H, A]``.
        hide: Of the tasks' unused dimensions.
    """
    fresh = (centre + std * noise).clamp(-1.0, 1.0)
    candidates = fresh if proposals is None else torch.cat((proposals, fresh), dim=1)
    candidates = hide(candidates)
    gained = known(returns(candidates))
    weights = weigh(gained)
    return Round(candidates, weights, gained, expected_plan(weights, candidates))


def reverse_diffusion(
    start: Tensor,
    sample: Sampler,
    schedule: SearchSchedule,
    *,
    hide: Hide = lambda plans: plans,
) -> Found:
    """Denoise plans whose score is estimated from weighted candidates (MBDPO, official code).

    The search begins at ``x_{T-1} = sqrt(abar_{T-1}) start``, without noise, as the official code
    does, and takes the T - 1 steps of :func:`~genpol.objectives.plan_search.reverse_step`.

    Args:
        start: Plan that the widest candidates are centred on, ``[E, H, A]``.
        sample: Makes a round.
        schedule: Noise levels.
        hide: Of the tasks' unused dimensions.
    """
    levels = schedule.levels()
    # As tensors: compiled code would be made anew for every number.
    sigmas = start.new_tensor([schedule.sigma(level) for level in levels]).unbind()
    x = hide(start) * schedule.alpha_bar[levels[0]] ** 0.5
    for index, level in enumerate(levels):
        alpha_bar = schedule.alpha_bar[level]
        found = sample((x / alpha_bar**0.5).unsqueeze(1), sigmas[index], index)
        score = plan_score(x, found.mean, alpha_bar)
        x = hide(reverse_step(x, score, schedule.alpha[level], alpha_bar))
    candidates, weights, returns, mean = found
    std = weighted_std(weights, candidates, mean)
    return Found(x.clamp(-1.0, 1.0), candidates, weights, returns, std)


def mppi(
    start: Tensor,
    sample: Sampler,
    rounds: int,
    *,
    least: float,
    greatest: float,
    hide: Hide = lambda plans: plans,
) -> Found:
    """Refit a Gaussian over plans to its best candidates, round by round (TD-MPC2, official code).

    Args:
        start: Mean of the first round, ``[E, H, A]``; its standard deviation is the greatest.
        sample: Makes a round.
        rounds: Of candidates.
        least: Lower bound of the standard deviation.
        greatest: Upper bound.
        hide: Of the tasks' unused dimensions.
    """
    mean, std = hide(start), torch.full_like(start, greatest)
    for index in range(rounds):
        found = sample(mean.unsqueeze(1), std.unsqueeze(1), index)
        mean, std = refit(found.weights, found.candidates, least=least, greatest=greatest)
    return Found(mean, found.candidates, found.weights, found.returns, std)

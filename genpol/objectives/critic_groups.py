"""Advantages of several actions for one state, by an ensemble of critics.

Off-policy generative policy optimisation (OGPO, arXiv 2605.03065) draws G actions for each state of
a replay, has M critics value them, and takes the group's mean for a baseline; no state value, no
rollout. Never divided by the group's standard deviation: where candidates are equally good that is
nothing but the critics' noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpol.settings import at_least, one_of

ADVANTAGES = ("mean", "min", "conservative", "second")
SAMPLE_MEANS = ("mean", "median", "trimmed")


@torch.no_grad()
def group_advantage(values: Tensor, *, how: str = "conservative") -> Tensor:
    """Return the advantage of each action over the mean of its group, ``[G, B]``.

    ``mean`` and ``min`` combine the critics first and then take the baseline away, so that a group
    sums to zero. The ``conservative`` advantage (OGPO+CA) asks every critic by itself, ``A_m =
    Q_m - mean_g Q_m``, and believes only what all agree upon: the least of the ``A_m`` where all
    are positive, the largest where all are negative, 0 elsewhere. ``second`` takes the second least
    and the second largest under the same condition. Neither is centred again. Of ten critics of
    pure noise a share of 2^-9 passes.

    Args:
        values: ``[G, M, B]``: G actions, M critics, B states.
        how: One of :data:`ADVANTAGES`.
    """
    one_of("how", how, ADVANTAGES)
    if how in ("mean", "min"):
        combined = values.mean(1) if how == "mean" else values.amin(1)
        return combined - combined.mean(0)
    each = (values - values.mean(0)).sort(dim=1).values
    place = min(1, values.shape[1] - 1) if how == "second" else 0
    lowest, highest = each[:, place], each[:, -1 - place]
    zero = torch.zeros_like(lowest)
    return torch.where(each[:, 0] > 0, lowest, torch.where(each[:, -1] < 0, highest, zero))


def sample_mean(values: Tensor, *, how: str = "mean", trim: float = 0.25) -> Tensor:
    """Combine n samples ``[n, ...]`` into one value ``[...]``, to lower a target's variance.

    With n = 8 draws the variance falls to 0.125 of one draw's by the ``mean``, 0.147 by the
    ``trimmed`` mean that leaves the two lowest and the two highest out, and 0.168 by the
    ``median`` (of an even number the mean of the middle two).

    Args:
        values: Of n actions drawn for the same state.
        how: One of :data:`SAMPLE_MEANS`.
        trim: Share that is left out at each end.
    """
    one_of("how", how, SAMPLE_MEANS)
    if how == "mean":
        return values.mean(0)
    number = len(values)
    cut = (number - 1) // 2 if how == "median" else int(trim * number)
    at_least("values", number - 2 * cut, 1)
    return values.sort(0).values[cut : number - cut].mean(0)

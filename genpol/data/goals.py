"""Goals for states of a data set, taken from the data themselves (hindsight relabelling)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genpol import settings as check
from genpol.errors import ConfigError

SAMPLING = ("uniform", "geometric")
RULES = ("reach", "step")


@dataclass(frozen=True, kw_only=True)
class GoalSettings:
    """Which states serve as goals, and what reaching one is worth."""

    current: float = 0.2
    """Share of goals that are the state itself."""
    future: float = 0.5
    """Share that lie ahead in the same trajectory."""
    random: float = 0.3
    """Share drawn from the whole data set."""
    sampling: str = "uniform"
    """How far ahead: `uniform` up to the trajectory's end, or `geometric`."""
    discount: float = 0.99
    """Of the geometric distribution: the mean distance is 1 / (1 - discount)."""
    rule: str = "reach"
    """Reward: 1 on arrival (`reach`), or -1 in every step before it (`step`)."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        shares = (self.current, self.future, self.random)
        for name in ("current", "future", "random"):
            check.within(f"agent.goals.{name}", getattr(self, name), 0.0, 1.0)
        if abs(sum(shares) - 1.0) > 1e-9:
            raise ConfigError(
                f"agent.goals.current, future and random add up to {sum(shares)}: must be 1"
            )
        check.within("agent.goals.discount", self.discount, 0.0, 1.0 - 1e-9)
        check.one_of("agent.goals.sampling", self.sampling, SAMPLING)
        check.one_of("agent.goals.rule", self.rule, RULES)


def draw_goals(
    rows: Tensor,
    last: Tensor,
    anywhere: Tensor,
    settings: GoalSettings,
    generator: torch.Generator,
) -> Tensor:
    """Return the row of each state's goal, int64 ``[B]``.

    A future goal at c ~ U[0, 1) is ``round((i + 1) c + last (1 - c))``, so that the two ends have
    half the weight of the rest (DQC's released code); geometric ones lie ``k >= 1`` rows ahead with
    probability ``(1 - discount) discount^(k - 1)``, at most at ``last`` (OGBench).

    Args:
        rows: The states, ``[B]``.
        last: The furthest row that may be a goal in each one's trajectory, ``[B]``.
        anywhere: Rows drawn from the whole data set, ``[B]``, for random goals; -1, a state from
            elsewhere, is passed on.
        settings: The mixture.
        generator: Source of the draws.
    """
    kind, share = torch.rand(2, len(rows), generator=generator, dtype=torch.float64)
    if settings.sampling == "uniform":
        future = ((rows + 1) * share + last * (1.0 - share)).round().long()
    else:
        # By inversion of P(K > k) = discount^k.
        ahead = torch.log1p(-share) / math.log(settings.discount) if settings.discount else share
        future = rows + 1 + ahead.long()
    future = torch.minimum(future, torch.maximum(last, rows))
    chosen = torch.where(kind < settings.current, rows, future)
    return torch.where(kind >= settings.current + settings.future, anywhere, chosen)


def relabel(
    rows: Tensor, goals: Tensor, *, steps: int, gamma: float, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return reward, discount and length of windows whose goal is a row, ``[B]`` each.

    A window from row i reaches its goal j if ``0 <= j - i < steps``: by index alone, so that equal
    states elsewhere do not count (DQC, arXiv 2512.10926, released code).

    * ``reach``: ``(gamma^(j - i), 0, j - i)`` if it does, ``(0, gamma^steps, steps)`` if not, so
      that values are ``gamma^distance``.
    * ``step``: the reward is minus the discounted number of steps until then.

    Args:
        rows: Where the windows begin.
        goals: From :func:`draw_goals`.
        steps: Transitions per window.
        gamma: Discount per transition.
        rule: See above.

    Returns:
        Reward and discount, float32, and how many rows ahead the state lies whose value the
        discount applies to, int64.
    """
    distance = goals - rows
    reached = (distance >= 0) & (distance < steps)
    taken = torch.where(reached, distance, steps)
    power = gamma ** taken.double()
    discount = torch.where(reached, 0.0, power)
    if rule == "reach":
        reward = torch.where(reached, power, 0.0)
    else:
        reward = -(taken.double() if gamma == 1.0 else (1.0 - power) / (1.0 - gamma))
    return reward.float(), discount.float(), taken

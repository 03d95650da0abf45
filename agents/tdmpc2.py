"""TD-MPC2: a latent world model, and plans that MPPI refines in it.

Hansen, Su & Wang 2024 (arXiv 2310.16828). An encoder, latent dynamics, reward and critics are
learned together over H open-loop steps; a Gaussian policy prior follows the critics::

    L = sum_t rho^t [20 |d(z_t, a_t) - h(o_{t+1})|^2 + 0.1 CE(R, r_t) + 0.1 CE(Q, y_t)]
    y_t = r_t + gamma min of 2 random averaged critics at (h(o_{t+1}), a' ~ pi)

Every step, N plans are imagined, valued by their H rewards and the critics behind them, and a
Gaussian over plans is refitted to the best, round by round; the search begins from what is left of
the last plan. See :mod:`genpol.world_model` for losses and search.

Choices: the networks and the search are small by default (``size=laptop``), for learning and acting
on one core. As published: ``env.action_repeat=2``, ``size=6M``, ``num_plans=512``,
``num_elites=64``, ``num_policy_plans=24``, ``iterations=6`` (8 for 20 or more action dimensions).
Windows may reach beyond their episode, where they do not count; the official replay draws whole
ones. The critics' dropout acts where they learn, and not where the policy asks them. The encoder of
images is left out. Recipes for its three uses are those of :mod:`genpol.agents.mbdpo`.
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol import settings as check
from genpol.agent import Specs
from genpol.world_model import (
    MPPIPlanner,
    PolicyPlanner,
    WorldModelAgent,
    WorldModelSettings,
    check_candidates,
)


@dataclass(frozen=True, kw_only=True)
class Settings(WorldModelSettings):
    """Hyper-parameters of TD-MPC2."""

    act: str = "search"
    """What acts: the `search`, or the `policy` prior by itself."""
    iterations: int = 6
    """Rounds of MPPI."""
    num_plans: int = 64
    """Candidates of each round, those of the policy among them."""
    num_elites: int = 16
    """Of which the best count."""
    temperature: float = 0.5
    """Multiplies returns in the elites' weights."""
    min_std: float = 0.05
    """Least standard deviation of plans, and so of exploration."""
    max_std: float = 2.0
    """Standard deviation that the search begins with."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.act", self.act, ("search", "policy"))
        check.at_least("agent.iterations", self.iterations, 1)
        check.within("agent.num_elites", self.num_elites, 1, self.num_plans)
        for name in ("temperature", "min_std", "max_std"):
            check.positive(f"agent.{name}", getattr(self, name))
        check.at_least("agent.max_std", self.max_std, self.min_std)
        check_candidates(self.num_plans, self.num_policy_plans)


class TDMPC2(WorldModelAgent):
    """TD-MPC2.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and noise.
    """

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        if settings.act == "policy":
            self.begin(PolicyPlanner(self.model, horizon=settings.horizon))
            return
        self.begin(
            MPPIPlanner(
                self.model,
                horizon=settings.horizon,
                rounds=settings.iterations,
                number=settings.num_plans,
                elites=settings.num_elites,
                policy_plans=settings.num_policy_plans,
                temperature=settings.temperature,
                least=settings.min_std,
                greatest=settings.max_std,
            )
        )


AGENT = TDMPC2

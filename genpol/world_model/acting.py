"""Acting by search: every step a new plan, begun from what is left of the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import ExplorationType, exploration_type

from genpol.agent import StatefulPolicy
from genpol.objectives.plan_search import shifted
from genpol.world_model.planning import Planned


class Searcher(Protocol):
    """Plans for raw observations."""

    def search(self, observation: Tensor, start: Tensor, generator: torch.Generator) -> Planned:
        """Plan from observations ``[E, d]`` and plans to start from, ``[E, H, A]``."""
        ...

    def hide(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return actions ``[E, A]`` with zeros in dimensions that are not in use."""
        ...


class SearchPolicy(StatefulPolicy):
    """The policy that acts: the first action of a plan that is made anew in every step.

    Each environment keeps its last plan, which without its first action is where the next search
    begins; an episode begins from zeros. During the warm-up exploration is uniform.

    Attributes:
        warming_up: Whether it is the warm-up.
        statistics: Scalars of the last search.

    Args:
        searcher: What plans.
        horizon: Actions H of a plan.
        action_dim: Width of an action.
        generator: Source of all noise.
    """

    def __init__(
        self, searcher: Searcher, *, horizon: int, action_dim: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.in_keys = ["observation", "is_init"]
        self.out_keys = ["action"]
        # In a tuple, so that the searcher, an agent that holds this policy, is no part of it.
        self._searcher = (searcher,)
        self._shape = (horizon, action_dim)
        self._generator = generator
        self._plans: Tensor | None = None
        self.warming_up = False
        self.statistics: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action`` ``[E, A]``."""
        observation = tensordict["observation"]
        exploring = exploration_type() in (ExplorationType.RANDOM, None)
        if exploring and self.warming_up:
            action = observation.new_empty((len(observation), self._shape[1]))
            action.uniform_(-1, 1, generator=self._generator)
            return tensordict.set("action", self._searcher[0].hide(observation, action))
        found = self._searcher[0].search(observation, self._start(tensordict), self._generator)
        self._plans = found.plan
        if found.value is not None and found.spread is not None:
            self.statistics = {
                "plan/return": found.value.mean(),
                "plan/spread": found.spread.mean(),
            }
        return tensordict.set("action", found.explored if exploring else found.action)

    def _start(self, tensordict: TensorDictBase) -> Tensor:
        """Return the plans that the searches begin from, ``[E, H, A]``."""
        observation, begins = tensordict["observation"], tensordict["is_init"]
        if self._plans is None or len(self._plans) != len(observation):
            return observation.new_zeros((len(observation), *self._shape))
        return torch.where(begins.view(-1, 1, 1), 0.0, shifted(self._plans))

    def start(self, seed: int) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        self._plans = None
        self.statistics = {}
        self._generator.manual_seed(seed)

    def acting_state(self) -> dict[str, Any]:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        return {
            "plans": self._plans,
            "statistics": dict(self.statistics),
            "generator": self._generator.get_state(),
        }

    def load_acting_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        device = self._generator.device
        plans = state["plans"]
        self._plans = None if plans is None else plans.to(device)
        self.statistics = {name: x.to(device) for name, x in state["statistics"].items()}
        self._generator.set_state(state["generator"].cpu())

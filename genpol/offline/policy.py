"""Acting by plans: a chunk of actions is made, part of it carried out, and another one made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from genpol.agent import StatefulPolicy


class Planner(Protocol):
    """Makes chunks of actions."""

    def plan_actions(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """Return the environment's actions ``[B, H, A]`` for raw observations ``[B, d]``."""
        ...


class PlanningPolicy(StatefulPolicy):
    """The policy that acts: the planner's chunks, one action after the other.

    Every environment has a queue of its own, which is emptied where an episode begins. Planners may
    draw noise also where they do not explore: that is what a generative policy is. Evaluations
    therefore start from a seed (:meth:`start`).

    Args:
        planner: What makes the chunks.
        action_steps: Actions of a chunk that are carried out.
        goal: Whether the planner's observation has the environment's ``goal`` behind it.
        generator: Source of the noise.
    """

    def __init__(
        self, planner: Planner, *, action_steps: int, goal: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.in_keys = ["observation", "is_init", *(("goal",) if goal else ())]
        self.out_keys = ["action"]
        # In a tuple, so that the planner, an agent that holds this policy, is no part of it.
        self._planner = (planner,)
        self._action_steps = action_steps
        self._goal = goal
        self._generator = generator
        self._queue: Tensor | None = None
        self._used = torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action`` ``[N, A]``."""
        observation = tensordict["observation"]
        if self._goal:
            observation = torch.cat((observation, tensordict["goal"]), dim=-1)
        due = tensordict["is_init"].squeeze(-1)
        if self._queue is None or len(self._queue) != len(due):
            due = torch.ones_like(due)
            self._used = torch.zeros(len(due), dtype=torch.int64, device=due.device)
            self._queue = None
        due = due | (self._used >= self._action_steps)
        if due.any():
            chunks = self._planner[0].plan_actions(observation[due], self._generator)
            if self._queue is None:
                self._queue = chunks
            else:
                self._queue = self._queue.masked_scatter(due[:, None, None], chunks)
            self._used = torch.where(due, 0, self._used)
        assert self._queue is not None
        rows = torch.arange(len(due), device=due.device)
        tensordict.set("action", self._queue[rows, self._used])
        self._used = self._used + 1
        return tensordict

    def start(self, seed: int) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        self._queue = None
        self._generator.manual_seed(seed)

    def acting_state(self) -> dict[str, Any]:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        return {
            "queue": self._queue,
            "used": self._used,
            "generator": self._generator.get_state(),
        }

    def load_acting_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        device = self._generator.device
        queue = state["queue"]
        self._queue = None if queue is None else queue.to(device)
        self._used = state["used"].to(device)
        self._generator.set_state(state["generator"].cpu())

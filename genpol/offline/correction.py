"""Corrected policies, and the choice of their step from data alone.

They stand here and not beside :mod:`genpol.policies.correction` because they know of agents,
critics and data sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType, set_exploration_type

from genpol.agent import Agent, StatefulPolicy
from genpol.data.columns import Array
from genpol.data.dataset import OfflineDataset
from genpol.data.windows import training_trajectories
from genpol.errors import ConfigError, DatasetError
from genpol.offline.agent import OfflineAgent
from genpol.policies.correction import CorrectionSettings, ScoreCorrector

GRID = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Weights that :func:`choose_step` tries, for actions and for states."""

TOLERATED_LOSS = 0.01
"""Share of the mean absolute value that a correction may cost by the critic's prediction."""


class CorrectedPolicy(StatefulPolicy):
    """A policy whose actions are corrected, one step of the environment after the other.

    It reads and writes what the policy does. The raw ``observation`` is what the corrector sees,
    whatever the policy makes of it, and the sampled action (or the mode, as torchrl's exploration
    type says) what it corrects. What the policy remembers is delegated to it.

    Args:
        policy: The policy.
        corrector: What corrects.
        settings: How.
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        corrector: ScoreCorrector,
        settings: CorrectionSettings,
    ) -> None:
        super().__init__()
        self.in_keys = list(dict.fromkeys([*policy.in_keys, "observation"]))
        self.out_keys = list(policy.out_keys)
        self.policy = policy
        self.corrector = corrector
        self.settings = settings
        self._sums: dict[str, Tensor] = {}
        self._rows = 0

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the corrected ``action`` ``[..., A]``, and what else the policy writes."""
        tensordict = self.policy(tensordict)
        action, found = self.corrector.correct(
            tensordict["observation"], tensordict["action"], self.settings
        )
        tensordict.set("action", action)
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double().sum()
        self._rows += action.shape[:-1].numel()
        return tensordict

    def means(self) -> dict[str, float]:
        """Return the means of :meth:`ScoreCorrector.correct`'s numbers since the last start.

        They are over all actions taken, those in environments that merely wait for the episodes of
        others to end included.
        """
        return {name: float(total) / self._rows for name, total in self._sums.items()}

    def start(self, seed: int) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`; counting begins anew."""
        self._sums, self._rows = {}, 0
        if isinstance(self.policy, StatefulPolicy):
            self.policy.start(seed)

    def acting_state(self) -> dict[str, Any]:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        return self.policy.acting_state() if isinstance(self.policy, StatefulPolicy) else {}

    def load_acting_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        if isinstance(self.policy, StatefulPolicy):
            self.policy.load_acting_state(state)


@dataclass(frozen=True)
class Choice:
    """A step that was chosen from data.

    Attributes:
        settings: The correction.
        tried: Of each correction tried, smallest first: ``action_weight``, ``state_weight``, the
            mean ``correction``, the mean ``support`` distance of corrected actions,
            ``value_change`` as a share of the mean absolute value (``None`` without a critic), and
            whether it is ``allowed``.
        support_of_data: Mean support distance of the data's own actions in the same states.
        by_value: Whether a critic had a say.
        supported: Whether some correction reached the support of the data; otherwise the chosen one
            is that which comes closest to it without costing too much value.
    """

    settings: CorrectionSettings
    tried: tuple[Mapping[str, Any], ...]
    support_of_data: float
    by_value: bool
    supported: bool


def choose_step(
    agent: Agent,
    corrector: ScoreCorrector,
    dataset: OfflineDataset,
    settings: CorrectionSettings,
    *,
    holdout: float,
    seed: int,
    states: int = 2000,
    deterministic: bool = True,
) -> Choice:
    """Choose the weights of a correction without acting in the environment.

    Of the grid it takes the largest correction, by its mean length, whose mean predicted change of
    value is above -1 % of the mean absolute value under the agent's critic, and whose corrected
    actions are no farther from the data than the data's own actions in these states are (in the
    mean; at ``noise_level``). The states are drawn from the trajectories that the corrector has
    not learned from. Where no correction reaches that support, the one that comes closest to it
    among those that the critic bears is taken.

    An agent without a critic is judged by support alone, and so are those that learn from replays
    and rollouts, whose critics are not asked. One that plans chunks of H actions is
    asked for a chunk of which the first action is corrected, and the change counts H times, since
    every action of the chunk will be corrected. One that is told a goal is told the one that its
    trajectory has achieved in the end.

    Args:
        agent: Whose actions are to be corrected.
        corrector: What corrects.
        dataset: What the corrector learned from.
        settings: The other settings of the correction.
        holdout: Share of trajectories held out from the corrector.
        seed: Seed of the states and of the agent's noise.
        states: How many states at most.
        deterministic: Whether the agent will act by its mode, and does so here.

    Raises:
        ConfigError: If nothing was held out.
        DatasetError: If the agent is told a goal and the data state none.
    """
    rows, ends = _held_out(dataset, holdout, seed, states)
    device = agent.generator.device

    def column(name: str, at: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(dataset.columns[name][at])).to(device)

    observation, theirs = column("observation", rows), column("action", rows)
    goal = column("goal", ends) if _told_goal(agent, dataset) else None
    acting = _Acting.at(agent, observation, goal, seed, deterministic)

    def support(action: Tensor) -> float:
        return float(corrector.score.denoise(observation, action, settings.noise_level)[2].mean())

    tried = []
    for weights in product(GRID, GRID if corrector.inverse_dynamics is not None else (0.0,)):
        trial = replace(settings, action_weight=weights[0], state_weight=weights[1])
        action, found = corrector.correct(observation, acting.action, trial)
        row = {
            "action_weight": weights[0],
            "state_weight": weights[1],
            "correction": float(found["correction"].mean()),
            "support": support(action),
            "value_change": acting.change(action),
        }
        tried.append(row)
    tried.sort(key=lambda row: (row["correction"], row["action_weight"], row["state_weight"]))
    return _choice(tried, settings, support(theirs))


def _told_goal(agent: Agent, dataset: OfflineDataset) -> bool:
    """Return whether the agent is told a goal, which the data must then state."""
    told = isinstance(agent, OfflineAgent) and agent.told_goal
    if told and "goal" not in dataset.columns:
        raise DatasetError(
            "corrector.select: the agent is told a goal, and the corrector's data have no column "
            "'goal'; give corrector.action_weight and corrector.state_weight"
        )
    return told


def _choice(
    tried: list[dict[str, Any]], settings: CorrectionSettings, support_of_data: float
) -> Choice:
    """Return the largest correction that is allowed, or the best supported of the harmless ones."""
    harmless = []
    for row in tried:
        change = row["value_change"]
        borne = change is None or change > -TOLERATED_LOSS
        row["allowed"] = borne and row["support"] <= support_of_data
        harmless += [row] if borne else []
    allowed = [row for row in tried if row["allowed"]]
    # No correction at all changes no value, so there always is a harmless one.
    best = allowed[-1] if allowed else min(harmless, key=lambda row: row["support"])
    weights = {name: best[name] for name in ("action_weight", "state_weight")}
    return Choice(
        settings=replace(settings, **weights),
        tried=tuple(tried),
        support_of_data=support_of_data,
        by_value=tried[0]["value_change"] is not None,
        supported=bool(allowed),
    )


def _held_out(
    dataset: OfflineDataset, holdout: float, seed: int, states: int
) -> tuple[Array, Array]:
    """Return rows of held-out transitions, in order, and the last rows of their trajectories."""
    number = dataset.num_trajectories
    kept = training_trajectories(number, holdout)
    if kept == number:
        raise ConfigError(
            "corrector.select: nothing of the corrector's data was held out to choose on; train it "
            "on several trajectories with agent.holdout=0.05, or give corrector.action_weight and "
            "corrector.state_weight"
        )
    first = int((dataset.ends - dataset.starts)[:kept].sum())
    candidates = np.arange(first, dataset.num_transitions)
    if len(candidates) > states:
        draw = np.random.default_rng(seed)
        candidates = np.sort(draw.choice(candidates, size=states, replace=False))
    rows = dataset.transition_row(candidates)
    return rows, dataset.ends[np.searchsorted(dataset.ends, rows)]


@dataclass(frozen=True)
class _Acting:
    """What an agent does in some states, and what its critic thinks of it.

    Attributes:
        agent: The agent.
        seen: The states as its networks see them; ``None`` where there is no critic.
        plan: Its chunks ``[B, H, A]``, H = 1 where it does not plan.
        value: Their values ``[B]``; ``None`` without a critic.
    """

    agent: Agent
    seen: Tensor | None
    plan: Tensor
    value: Tensor | None

    @classmethod
    @torch.no_grad()
    def at(
        cls,
        agent: Agent,
        observation: Tensor,
        goal: Tensor | None,
        seed: int,
        deterministic: bool,
    ) -> _Acting:
        """Let it act in states ``[B, d]``, and perhaps towards goals ``[B, g]``."""
        if not isinstance(agent, OfflineAgent):
            action = _asked(agent, observation, seed, deterministic)
            return cls(agent, None, action.unsqueeze(1), None)
        told = observation if goal is None else torch.cat((observation, goal), dim=-1)
        plan = agent.plan_actions(told, torch.Generator(observation.device).manual_seed(seed))
        seen = agent.encode(told)
        try:
            return cls(agent, seen, plan, agent.expected_return(seen, agent.own_actions(plan)))
        except ConfigError:  # it has no critic
            return cls(agent, None, plan, None)

    @property
    def action(self) -> Tensor:
        """The first actions, ``[B, A]``."""
        return self.plan[:, 0]

    @torch.no_grad()
    def change(self, action: Tensor) -> float | None:
        """Return what other first actions change, H times, as a share of the mean |value|."""
        if self.value is None or self.seen is None:
            return None
        assert isinstance(self.agent, OfflineAgent)
        plan = torch.cat((action.unsqueeze(1), self.plan[:, 1:]), dim=1)
        after = self.agent.expected_return(self.seen, self.agent.own_actions(plan))
        change = (after - self.value).mean() * plan.shape[1]
        return float(change / self.value.abs().mean().clamp_min(1e-12))


def _asked(agent: Agent, observation: Tensor, seed: int, deterministic: bool) -> Tensor:
    """Return its actions ``[B, A]``, in each state as if an episode began there."""
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    policy, size = agent.policy, len(observation)
    began = torch.ones(size, 1, dtype=torch.bool, device=observation.device)
    batch = TensorDict({"observation": observation, "is_init": began}, [size])
    kept = policy.acting_state() if isinstance(policy, StatefulPolicy) else None
    if isinstance(policy, StatefulPolicy):
        policy.start(seed)
    try:
        with set_exploration_type(kind):
            action: Tensor = policy(batch)["action"]
    finally:
        if isinstance(policy, StatefulPolicy) and kept is not None:
            policy.load_acting_state(kept)
    return action.clamp(-1.0, 1.0)  # as environments do with a Gaussian's

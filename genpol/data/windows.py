"""Batches of windows: some transitions on end, with what they earned and where they led.

A window from row i holds the actions ``a_i .. a_{i+H-1}``, the discounted sum of their rewards, and
the state behind them, for chunked and for n-step learning alike.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from genpol import settings as check
from genpol.data.dataset import OfflineDataset
from genpol.data.goals import GoalSettings, draw_goals, relabel
from genpol.errors import ConfigError, DatasetError

Edges = Literal["mask", "whole"]


@dataclass(frozen=True, kw_only=True)
class WindowSpec:
    """What windows an agent learns from.

    Attributes:
        steps: Transitions H per window.
        gamma: Discount per transition.
        edges: ``mask``: a window may begin at any transition; what lies beyond its trajectory is
            marked (QC, QGF). ``whole``: it begins only where more than H transitions of the
            trajectory are left (DQC, which leaves the last state out).
        goals: Draw a goal for each window, whose reward then takes the place of the data's.
        rewards: Whether rewards and discounts are wanted; imitation does without.
        every_step: Whether each transition by itself is wanted too, from which models of the world
            are learned.
        holdout: Share of the trajectories in which no window begins; see
            :func:`training_trajectories`.
    """

    steps: int = 1
    gamma: float = 0.99
    edges: Edges = "mask"
    goals: GoalSettings | None = None
    rewards: bool = True
    every_step: bool = False
    holdout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        check.within("holdout", self.holdout, 0.0, 0.5)
        check.at_least("steps", self.steps, 1)
        check.within("gamma", self.gamma, 0.0, 1.0)
        check.one_of("edges", self.edges, ("mask", "whole"))
        if self.goals is not None and self.edges != "whole":
            raise ConfigError("goals need edges=whole: a cut window would count as an arrival")
        if self.every_step and (self.goals is not None or not self.rewards):
            raise ConfigError("every_step needs the rewards of the data: it goes without goals")


def training_trajectories(number: int, holdout: float) -> int:
    """Return how many of so many trajectories are learned from; the others, the last, are held out.

    Where anything is held out, at least one trajectory is, but never the only one.
    """
    if holdout == 0.0:
        return number
    return number - min(number - 1, max(1, round(holdout * number)))


class WindowSampler:
    """Draws windows from a data set, uniformly and with replacement.

    A batch ``[B]`` has

    ====================== ============================================================
    ``observation``        ``[B, d]`` at the window's start
    ``action``             ``[B, H, A]``
    ``valid``              bool ``[B, H]``: the transition is of the same trajectory
    ``weight``             ``[B]``: 1 if all are, else 0
    ``reward``             ``[B]``: ``sum_k gamma^k r_k`` over valid transitions
    ``discount``           ``[B]``: ``gamma^n`` for n valid transitions; 0 if one of them
                           is terminated
    ``next, observation``  ``[B, d]`` behind the last valid transition
    ``observations``       with ``every_step``: ``[B, H + 1, d]``, of every state on the way
    ``rewards``            with ``every_step``: ``[B, H]``, of every transition
    ``terminated``         with ``every_step``: bool ``[B, H]``, likewise
    ``goal``               ``[B, g]``, with goals; reward, discount and next observation
                           are then those of :func:`~genpol.data.goals.relabel`
    ====================== ============================================================

    What comes behind a terminated transition, but within the window, still earns its reward: the
    recording went on (QC's released code).

    Args:
        dataset: What to draw from; it may lie on disk.
        spec: The windows.
        seed: Seed of the draws.

    Raises:
        DatasetError: If the data lack a column that the windows need, or are too short for them.
    """

    def __init__(self, dataset: OfflineDataset, spec: WindowSpec, *, seed: int) -> None:
        self.spec = spec
        self._generator = torch.Generator().manual_seed(seed)
        needed = ("goal",) if spec.goals is not None else ("reward", "terminated") * spec.rewards
        for name in needed:
            if name not in dataset.columns:
                raise DatasetError(
                    f"the data set has no column {name!r}, from which this agent learns; it has "
                    f"{', '.join(sorted(dataset.columns))}"
                )
        self._columns = {
            name: _shared(dataset.columns[name]) for name in ("observation", "action", *needed)
        }
        kept = training_trajectories(dataset.num_trajectories, spec.holdout)
        self._first = torch.from_numpy(dataset.starts[:kept])
        self._last = torch.from_numpy(dataset.ends[:kept])
        lengths = self._last - self._first
        margin = spec.steps if spec.edges == "whole" else 0
        self._starts_until = (lengths - margin).clamp_min(0).cumsum(0)
        self.num_starts = int(self._starts_until[-1])
        if self.num_starts == 0:
            raise DatasetError(
                f"windows of {spec.steps} transitions need trajectories of {spec.steps + 1}; the "
                f"longest has {int(lengths.max())}. Take a shorter horizon"
            )

    def sample(self, size: int) -> TensorDict:
        """Return windows ``[size]``."""
        return self.at(self._draw(size))

    def at(self, index: Tensor, *, anywhere: Tensor | None = None) -> TensorDict:
        """Return the windows of the given numbers.

        Args:
            index: 0 to ``num_starts - 1``, ``[B]``.
            anywhere: For windows with goals, the rows from which random goals are taken, ``[B]``;
                -1 for a state that is not of this data set. Where such a one is the goal,
                ``elsewhere`` ``[B]`` is true and ``goal`` is left to the caller. By default they
                are drawn here.
        """
        columns, spec = self._columns, self.spec
        rows, last = self.rows_of(index)
        window = rows[:, None] + torch.arange(spec.steps)
        valid = window < last[:, None]
        window = torch.minimum(window, last[:, None] - 1)
        if spec.goals is None and not spec.rewards:
            earned, following = {}, rows + valid.sum(1)
        elif spec.goals is None:
            reward, terminated = (columns[name][window] for name in ("reward", "terminated"))
            earned = discounted(reward, terminated, valid, spec.gamma)
            if spec.every_step:
                states = torch.minimum(rows[:, None] + torch.arange(spec.steps + 1), last[:, None])
                earned["observations"] = columns["observation"][states]
                earned |= {"rewards": reward, "terminated": terminated}
            following = rows + valid.sum(1)
        else:
            given = anywhere is not None
            if anywhere is None:
                anywhere, _ = self.rows_of(self._draw(len(index)))
            goals = draw_goals(rows, last - 1, anywhere, spec.goals, self._generator)
            reward, discount, steps = relabel(
                rows, goals, steps=spec.steps, gamma=spec.gamma, rule=spec.goals.rule
            )
            earned = {"reward": reward, "discount": discount, "goal": columns["goal"][goals]}
            earned |= {"elsewhere": goals < 0} if given else {}
            following = rows + steps
        observation = columns["observation"]
        fields = {
            "observation": observation[rows],
            "action": columns["action"][window],
            "valid": valid,
            "weight": valid[:, -1].float(),
            **earned,
            "next": TensorDict({"observation": observation[following]}, [len(index)]),
        }
        return TensorDict(fields, [len(index)])

    def _draw(self, size: int) -> Tensor:
        return torch.randint(self.num_starts, (size,), generator=self._generator)

    def goal(self, rows: Tensor) -> Tensor:
        """Return the goals that states have achieved, ``[B, g]``."""
        return self._columns["goal"][rows]

    def rows_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows where windows begin, and the final state of each one's trajectory."""
        trajectory = torch.searchsorted(self._starts_until, index, right=True)
        before = torch.where(trajectory > 0, self._starts_until[trajectory - 1], 0)
        return self._first[trajectory] + index - before, self._last[trajectory]

    @property
    def fingerprint(self) -> int:
        """A number that another data set will hardly share: of its shape and its first rows."""
        found = zlib.crc32(self._last.numpy().tobytes())
        for name in ("observation", "action"):
            found = zlib.crc32(self._columns[name][:1000].numpy().tobytes(), found)
        return found

    def state(self) -> dict[str, Any]:
        """Return the state of the generator, and whose it is."""
        return {"generator": self._generator.get_state(), "fingerprint": self.fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            DatasetError: If it was drawn from another data set.
        """
        if state["fingerprint"] != self.fingerprint:
            raise DatasetError(
                "data: is not the data set of the run that goes on; give that one, or begin a new "
                "run with init=<run>"
            )
        self._generator.set_state(state["generator"])


def _shared(column: Any) -> Tensor:
    """Return a tensor over the memory of a column, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(column)


def discounted(
    reward: Tensor, terminated: Tensor, valid: Tensor, gamma: float
) -> dict[str, Tensor]:
    """Return the ``reward`` and the ``discount`` of windows, ``[B]`` each.

    Args:
        reward: Of each transition, ``[B, H]``.
        terminated: Whether it is the task's end, ``[B, H]``.
        valid: Whether it belongs to the window, ``[B, H]``; the first always does.
        gamma: Discount per transition.
    """
    power = gamma ** torch.arange(reward.shape[1] + 1, device=reward.device)
    total = torch.where(valid, reward * power[:-1], 0.0).sum(1)
    over = (terminated & valid).any(1)
    return {"reward": total, "discount": torch.where(over, 0.0, power[valid.sum(1)])}

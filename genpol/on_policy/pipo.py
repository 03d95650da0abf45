"""What a rollout says of the update before it: repeat or undo it (PIPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genpol import settings as check
from genpol.objectives.selection import pipo_multiplier


@dataclass(frozen=True, kw_only=True)
class PIPOSettings:
    """Policy-improvement feedback (PIPO)."""

    enabled: bool = False
    """Whether each rollout's returns correct the update before it."""
    window: int = 8
    """Rollouts whose mean returns are the standard of comparison."""
    negative_scale: float = 0.1
    """Weight of a decline."""
    maximum: float = 2.0
    """Bound on the improvement, in standard deviations of the window."""
    gate: float = 1.0
    """Improvement up to which nothing is done, as noise of a plateau."""
    min_episodes: int = 20
    """Episodes that must have ended in a rollout for it to say anything."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.at_least("agent.pipo.window", self.window, 2)
        check.at_least("agent.pipo.min_episodes", self.min_episodes, 1)
        check.positive("agent.pipo.maximum", self.maximum)
        for name in ("negative_scale", "gate"):
            check.at_least(f"agent.pipo.{name}", getattr(self, name), 0.0)


class PIPO:
    """Judges each policy by the mean return of its episodes against those of late.

    arXiv 2604.00860; returns are undiscounted and unscaled, so that rollouts compare.

    Attributes:
        previous: Rows of the rollout before, with the advantages that were learned from.

    Args:
        settings: Hyper-parameters.
    """

    def __init__(self, settings: PIPOSettings) -> None:
        self.settings = settings
        self.previous: dict[str, Tensor] | None = None
        self._history: list[float] = []

    def judge(self, returns: Tensor) -> Tensor:
        """Return how much of the last update to repeat, negative to undo it, and remember.

        Args:
            returns: Of the episodes ``[E]`` that ended in the rollout just collected.
        """
        settings = self.settings
        if len(returns) < settings.min_episodes:
            return torch.zeros(())
        mean = returns.mean()
        multiplier = torch.zeros(())
        if len(self._history) == settings.window:
            multiplier = pipo_multiplier(
                mean,
                torch.tensor(self._history, dtype=mean.dtype),
                negative_scale=settings.negative_scale,
                maximum=settings.maximum,
                gate=settings.gate,
            ).float()
        self._history = [*self._history, float(mean)][-settings.window :]
        return multiplier

    def state(self) -> dict[str, Any]:
        """Return window and previous rollout."""
        return {"history": list(self._history), "previous": self.previous}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._history, self.previous = list(state["history"]), state["previous"]

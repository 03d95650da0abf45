"""What one update learns from, and what its pass through the model gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from genpol.objectives.plan_search import shifted


class Window(NamedTuple):
    """Steps of B windows, time-major.

    Attributes:
        observations: ``[H + 1, B, d]``; the window's first where a step does not count.
        actions: ``[H, B, A]``; zero there.
        rewards: ``[H, B]``; zero there.
        terminated: Bool ``[H, B]``.
        valid: Whether the step counts: it is of the window's episode and its physics did not
            diverge, bool ``[H, B]``.
        tasks: Number of each window's task, int64 ``[B]``; ``None`` where there is one.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    valid: Tensor
    tasks: Tensor | None = None

    def following(self) -> Tensor:
        """Return of each step's next state the actions that came there, ``[H, B, H, A]``.

        Zeros stand behind the window's end: at the last step it is the plan of an episode's start.
        """
        plans = [shifted(self.actions.transpose(0, 1))]
        for _ in range(len(self.actions) - 1):
            plans.append(shifted(plans[-1]))
        return torch.stack(plans)


class ModelLoss(NamedTuple):
    """What one pass through the model gives.

    Attributes:
        loss: Of the model, a scalar.
        latents: Open-loop ``zhat_0 .. zhat_H``, constants, ``[H + 1, B, L]``.
        encoded: Latents of what was observed at 1 .. H, constants, ``[H, B, L]``.
        metrics: Scalars.
    """

    loss: Tensor
    latents: Tensor
    encoded: Tensor
    metrics: dict[str, Tensor]

"""Which action of which chunk is due: chunks that overlap in time, and blend.

A chunk that was asked for in tick k has its first action for tick k, whenever it comes; if it comes
in tick k + d, its first d actions are past. So the one before goes on meanwhile, as far as it
reaches, and a policy that takes longer than a period needs chunks that are longer than what is
carried out of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from genpol.settings import at_least

Chunk = Sequence[Sequence[float]]
"""Actions ``[H][A]``."""


class Answer(NamedTuple):
    """A chunk.

    Attributes:
        tick: In which it was asked for.
        chunk: Its actions in [-1, 1].
        seconds: How long the policy took, without the way there and back.
    """

    tick: int
    chunk: Chunk
    seconds: float


class _Placed(NamedTuple):
    """A chunk whose first action is for a tick."""

    first: int
    actions: Chunk

    def action(self, tick: int) -> Sequence[float] | None:
        place = tick - self.first
        return self.actions[place] if 0 <= place < len(self.actions) else None


class ChunkPlayer:
    """Knows when to ask for a chunk, and what to do in each tick.

    Args:
        action_steps: Ticks from one question to the next.
        blend_steps: Ticks over which a chunk takes over from the one before.
    """

    def __init__(self, action_steps: int, *, blend_steps: int = 0) -> None:
        at_least("action_steps", action_steps, 1)
        at_least("blend_steps", blend_steps, 0)
        self._action_steps = action_steps
        self._blend_steps = blend_steps
        self.forget()

    def forget(self) -> None:
        """Begin anew, as where an episode begins."""
        self._chunk: _Placed | None = None
        self._offset: list[float] | None = None
        self._taken_over = 0
        self._due = -1

    def due(self, tick: int) -> bool:
        """Return whether a chunk is to be asked for in this tick, if none is on its way."""
        return tick >= self._due

    def asked(self, tick: int) -> None:
        """Take note that a chunk was asked for in this tick."""
        self._due = tick + self._action_steps

    def give(self, first: int, chunk: Chunk, tick: int) -> None:
        """Take a chunk that was asked for in tick ``first`` and comes in ``tick``."""
        before = self.action(tick) if self._blend_steps else None
        self._chunk, self._offset, self._taken_over = _Placed(first, chunk), None, tick
        new = self._chunk.action(tick)
        if before is not None and new is not None:
            self._offset = [old - x for old, x in zip(before, new, strict=True)]

    def action(self, tick: int) -> list[float] | None:
        """Return the action of a tick; ``None`` if no chunk reaches so far.

        What lay between the old chunk and the new one where that took over falls off evenly.
        """
        new = None if self._chunk is None else self._chunk.action(tick)
        if new is None:
            return None
        left = 1.0 - (tick - self._taken_over + 1) / (self._blend_steps + 1)
        if self._offset is None or left <= 0.0:
            return list(new)
        return [x + left * offset for x, offset in zip(new, self._offset, strict=True)]


def kept_weights(horizon: int, *, delay: int, left: int) -> list[float]:
    """Return how much a chunk is bound to each action of the one before.

    Equation 5 of real-time chunking (arXiv 2506.07339): 1 for what is carried out before it comes,
    falling off to 0 over what both hold.

    Args:
        horizon: Actions H of a chunk.
        delay: Actions d that are carried out before the new chunk comes.
        left: Actions of the old chunk that are left, H - s after s were carried out.
    """
    weights = []
    for i in range(horizon):
        if i >= left:
            weights.append(0.0)
        elif i < delay:
            weights.append(1.0)
        else:
            c = (left - i) / (left - delay + 1)
            weights.append(c * math.expm1(c) / math.expm1(1.0))
    return weights

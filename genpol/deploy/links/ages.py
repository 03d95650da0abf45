"""How old messages are, without trusting that two clocks agree."""

from __future__ import annotations

from collections import deque

_WINDOW_S = 2.0


class Ages:
    """Tells how much longer messages were on their way than the fastest of the last seconds.

    A delay that all of them have cannot be told from clocks that differ; one that begins can, for
    as long as the window, and so can clocks that jump.
    """

    def __init__(self) -> None:
        self._offsets: deque[tuple[float, float]] = deque()

    def age(self, stamp_s: float, now_s: float) -> float:
        """Return the age of a message in seconds, at least 0.

        Args:
            stamp_s: When it was sent, on the sender's clock.
            now_s: When it came, on one's own.
        """
        offset = now_s - stamp_s
        while self._offsets and now_s - self._offsets[0][0] > _WINDOW_S:
            self._offsets.popleft()
        # Those that a smaller one has followed can never be the smallest again.
        while self._offsets and self._offsets[-1][1] >= offset:
            self._offsets.pop()
        self._offsets.append((now_s, offset))
        return offset - self._offsets[0][1]

"""From files of transitions to rows of states.

Files that keep one row a transition lack the final state of each trajectory, unless they keep every
next observation too. What is done about it:

- With next observations, the last one of a trajectory is its final state.
- Without, a trajectory that *terminated* gets its last observation once more as final state:
  nothing is bootstrapped from there, so its value is never used, and the reward of the end is kept.
- Without, a trajectory that was merely *cut* loses its last transition: that one's observation
  becomes the final state. If it was the only one, nothing is left of the trajectory.

Other columns that describe the state, such as ``qpos``, are repeated with the observation; their
value in the final state is that of one step before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from genpol.data.columns import Array, Source
from genpol.data.sink import RowSink


class TransitionRows:
    """Hands transitions, which may come in pieces, to a sink of rows.

    Args:
        sink: Where the rows go.

    Attributes:
        num_dropped: Last transitions that were lost for want of a next observation.
        num_repeated: Final states that repeat the observation before them.
    """

    def __init__(self, sink: RowSink) -> None:
        self._sink = sink
        self._begins = True  # the next row is the first of a trajectory
        self.num_dropped = 0
        self.num_repeated = 0

    def append(
        self,
        columns: Mapping[str, Array],
        *,
        end: Array,
        terminated: Array,
        following: Array | None,
        source: Source,
    ) -> None:
        """Append transitions.

        Args:
            columns: Their columns ``[n, ...]``; an observation is the one before the step.
            end: Which are the last of their trajectories, bool ``[n]``.
            terminated: Which of those end the task rather than the recording, bool ``[n]``.
            following: The next observations ``[n, d]``, if they are known.
            source: Where the transitions come from; ``rows`` number them.

        Raises:
            DatasetError: As the sink does.
        """
        has_state = end if following is not None else end & terminated
        is_cut = end & ~has_state
        first = np.concatenate([[self._begins], end[:-1]])
        copies = 1 + has_state.astype(np.int64) - (is_cut & first)
        taken = np.repeat(np.arange(len(end)), copies)
        is_copy = np.diff(taken, prepend=-1) == 0
        rows = {name: np.asarray(values)[taken] for name, values in columns.items()}
        if following is not None:
            rows["observation"][is_copy] = following[taken[is_copy]]
        else:
            self.num_repeated += int(has_state.sum())
        numbers = np.asarray(source.rows)[taken] if source.rows is not None else taken
        source = Source(file=source.file, names=source.names, rows=numbers)
        self._sink.append_rows(rows, is_copy | is_cut[taken], source=source)
        self.num_dropped += int(is_cut.sum())
        self._begins = bool(end[-1])

    def notes(self) -> dict[str, Any]:
        """Return what the data set should say about its final states."""
        counts = {"dropped_transitions": self.num_dropped, "repeated_states": self.num_repeated}
        return {name: count for name, count in counts.items() if count}

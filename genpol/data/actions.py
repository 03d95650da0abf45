"""Actions that a file gives in units of its own, such as torques, degrees or counts of an encoder.

Every environment of genpol takes actions in [-1, 1] and maps them to the range of its controls, and
a data set holds what the environment takes. :class:`ActionRange` says what -1 and 1 are in the
file's units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genpol.data.columns import ROUNDING, Array, Source, canonical, verify_finite
from genpol.errors import DatasetError

LOW, HIGH = "action_low", "action_high"
"""Entries of the metadata: what -1 and 1 were where the data come from, a number for each width."""


@dataclass(frozen=True, eq=False)
class ActionRange:
    """The bounds between which a file's actions lie.

    Attributes:
        low: What becomes -1, float64 ``[A]``, or ``[1]`` if it is the same in each dimension.
        high: What becomes 1. Where it equals ``low``, the one value there is becomes 0.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ActionRange | None:
        """Return the range that data had where they come from, if it was another than [-1, 1]."""
        if LOW not in metadata or HIGH not in metadata:
            return None
        return cls(np.array(metadata[LOW], np.float64), np.array(metadata[HIGH], np.float64))

    def normalized(self, values: Any, last: Array, source: Source) -> Array:
        """Return actions as numbers in [-1, 1].

        Args:
            values: Actions of a file, ``[rows, A]``; integers will do.
            last: Which rows are final states, whose action means nothing, ``[rows]``.
            source: Whom to blame.

        Returns:
            float64 ``[rows, A]``.

        Raises:
            DatasetError: If one is not finite or lies out of the range by more than a rounding
                error, or the range is of another width.
        """
        actions = float_actions(values, source)
        low, high = self._bounds(actions.shape[1], source)
        # Of symmetric bounds the centre is 0, and bounds of -1 and 1 change no bit.
        centre, half = (low + high) / 2, (high - low) / 2
        actions[last] = centre
        verify_finite("action", actions, source)
        distance = np.abs(actions - centre)
        beyond = distance > half + ROUNDING * np.where(half > 0, half, np.maximum(1, abs(centre)))
        if beyond.any():
            row, dimension = (int(i) for i in np.argwhere(beyond)[0])
            raise DatasetError(
                f"{source.at('action', row)}: {actions[row, dimension]:.7g} is outside "
                f"[{low[dimension]:.7g}, {high[dimension]:.7g}], the range of dimension "
                f"{dimension}; give another with action_low= and action_high= of "
                "`genpol data convert`"
            )
        scaled = (actions - centre) / np.where(half > 0, half, 1)
        return np.clip(np.where(half > 0, scaled, 0), -1, 1)

    def describe(self, width: int, metadata: Mapping[str, Any]) -> dict[str, list[float]]:
        """Return the entries of the metadata.

        Args:
            width: Width A of the actions.
            metadata: What is known of the data. If they were scaled before, the entries are in the
                units of what they were scaled from.
        """
        low, high = self._bounds(width, Source())
        before = ActionRange.from_metadata(metadata)
        if before is not None:
            centre, half = (before.low + before.high) / 2, (before.high - before.low) / 2
            low, high = centre + half * low, centre + half * high
        return {LOW: low.tolist(), HIGH: high.tolist()}

    def _bounds(self, width: int, source: Source) -> tuple[Array, Array]:
        """Return both bounds ``[A]``."""
        for bound in (self.low, self.high):
            if len(bound) not in (1, width):
                raise DatasetError(
                    f"{source.at('action')}: is of width {width}, but its range is given by "
                    f"{len(bound)} numbers; one is expected for each dimension, or one for all"
                )
        return np.broadcast_to(self.low, width), np.broadcast_to(self.high, width)


def float_actions(values: Any, source: Source) -> Array:
    """Return actions ``[rows, A]`` of any kind of number as a new array of float64.

    Raises:
        DatasetError: If they are not numbers, or no vectors.
    """
    values = np.asarray(values)
    if values.dtype.kind in "biu":  # counts, since a range is given: no codes of discrete actions
        values = values.astype(np.float64)
    return canonical("action", values, source).astype(np.float64)

"""Checks that settings dataclasses run on themselves; each failure names the field."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from genpol.errors import ConfigError, nearest


def positive(field: str, value: float) -> None:
    """Refuse ``value`` unless it is a finite number above zero."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{field} = {value!r}: must be > 0")


def at_least(field: str, value: float, minimum: float, *, infinite: bool = False) -> None:
    """Refuse ``value`` below ``minimum``, and one that is not finite unless ``infinite`` may be."""
    if not value >= minimum or (value == math.inf and not infinite):
        raise ConfigError(f"{field} = {value!r}: must be >= {minimum}")


def within(field: str, value: float, low: float, high: float) -> None:
    """Refuse ``value`` outside the closed interval ``[low, high]``."""
    if not low <= value <= high:
        raise ConfigError(f"{field} = {value!r}: must lie in [{low}, {high}]")


def widths(field: str, value: Sequence[int]) -> None:
    """Refuse layer widths that are not all positive."""
    if any(width <= 0 for width in value):
        raise ConfigError(f"{field} = {list(value)}: widths must be > 0, such as [64, 64]")


def one_of(field: str, value: str, choices: Collection[str]) -> None:
    """Refuse ``value`` unless it is one of ``choices``; the message names the nearest."""
    if value not in choices:
        listed = ", ".join(sorted(choices))
        raise ConfigError(f"{field} = {value!r}: must be one of {listed}.{nearest(value, choices)}")

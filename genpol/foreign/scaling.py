"""How other libraries scale observations and actions, in this library's terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genpol.errors import ConfigError
from genpol.nn.normalizer import SMALLEST_STD

# Actions of some data overstep their environment's bounds by rounding.
_TOLERANCE = 0.01


class Standard(NamedTuple):
    """``(x - mean) / std`` of an observation, ``[d]`` each in float64."""

    mean: Tensor
    std: Tensor

    def repeated(self, times: int) -> Standard:
        """Return it for so many observations side by side."""
        return Standard(self.mean.repeat(times), self.std.repeat(times))


def identity(width: int) -> Standard:
    """Return what leaves an observation as it is."""
    return Standard(torch.zeros(width).double(), torch.ones(width).double())


def joined(parts: Sequence[Standard]) -> Standard:
    """Return what scales several observations that stand side by side."""
    return Standard(torch.cat([x.mean for x in parts]), torch.cat([x.std for x in parts]))


def of_range(low: Tensor, high: Tensor, margin: float = 0.0) -> Standard:
    """Return what takes ``[low, high]`` to [-1, 1]: ``2 (x - low) / (high - low + margin) - 1``.

    What never moves is -1 for the network, in these libraries, and its least motion is blown up a
    million times. Here it is -1, too, and its motion is left as it is.
    """
    low, high = low.double().flatten(), high.double().flatten()
    std = (high - low + margin) / 2
    constant = std <= SMALLEST_STD
    std = torch.where(constant, 1.0, std)
    return Standard(low + std, std)


def of_moments(mean: Tensor, std: Tensor, margin: float = 0.0) -> Standard:
    """Return what standardises with these moments: ``(x - mean) / (std + margin)``."""
    return Standard(mean.double().flatten(), std.double().flatten() + margin)


def action_bounds(
    low: Tensor, high: Tensor, action_range: tuple[float, float]
) -> tuple[list[float] | None, list[float] | None]:
    """Return what -1 and 1 of a model's actions are in an environment's [-1, 1]; None for that.

    Args:
        low: What -1 of the model is in units of its own environment, ``[A]``.
        high: What 1 is.
        action_range: Bounds of that environment's actions.

    Raises:
        ConfigError: If the actions lie outside them.
    """
    least, most = action_range
    low, high = (2 * (x.double().flatten() - least) / (most - least) - 1 for x in (low, high))
    if torch.equal(low, -torch.ones_like(low)) and torch.equal(high, torch.ones_like(high)):
        return None, None
    # Not the bounds themselves: where data never move, libraries put them 1 beside what is there.
    far = torch.maximum((high + low).abs() / 2, (high - low).abs() / 2)
    if not float(far.max()) <= 1.0 + _TOLERANCE:  # nor where it is no number
        raise ConfigError(
            f"action_range = [{least:g}, {most:g}]: the policy's actions lie outside of it; give "
            "the bounds of the environment that it was trained in, as action_range=[LOW,HIGH]"
        )
    return low.tolist(), high.tolist()

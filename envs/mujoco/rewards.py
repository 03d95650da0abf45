"""Soft indicator functions of dm_control (``dm_control.utils.rewards``) over tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _gaussian(x: Tensor, value: float) -> Tensor:
    scale = math.sqrt(-2 * math.log(value))
    return torch.exp(-0.5 * (x * scale) ** 2)


def _hyperbolic(x: Tensor, value: float) -> Tensor:
    return 1 / torch.cosh(x * math.acosh(1 / value))


def _long_tail(x: Tensor, value: float) -> Tensor:
    return 1 / ((x * math.sqrt(1 / value - 1)) ** 2 + 1)


def _reciprocal(x: Tensor, value: float) -> Tensor:
    return 1 / (x.abs() * (1 / value - 1) + 1)


def _cosine(x: Tensor, value: float) -> Tensor:
    scaled = x * (math.acos(2 * value - 1) / math.pi)
    return torch.where(scaled.abs() < 1, (1 + torch.cos(math.pi * scaled)) / 2, 0.0)


def _linear(x: Tensor, value: float) -> Tensor:
    scaled = x * (1 - value)
    return torch.where(scaled.abs() < 1, 1 - scaled, 0.0)


def _quadratic(x: Tensor, value: float) -> Tensor:
    scaled = x * math.sqrt(1 - value)
    return torch.where(scaled.abs() < 1, 1 - scaled**2, 0.0)


def _tanh_squared(x: Tensor, value: float) -> Tensor:
    return 1 - torch.tanh(x * math.atanh(math.sqrt(1 - value))) ** 2


_SIGMOIDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gaussian": _gaussian,
    "hyperbolic": _hyperbolic,
    "long_tail": _long_tail,
    "reciprocal": _reciprocal,
    "cosine": _cosine,
    "linear": _linear,
    "quadratic": _quadratic,
    "tanh_squared": _tanh_squared,
}


def tolerance(
    x: Tensor,
    bounds: tuple[float, float] = (0.0, 0.0),
    *,
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Tensor:
    """Return 1 where ``x`` lies in ``bounds``, falling off outside over ``margin``.

    Args:
        x: Values of any shape.
        bounds: Inclusive interval of full reward.
        margin: Distance from the bounds at which the value is ``value_at_margin``; 0 gives a step.
        sigmoid: Shape of the fall-off.
        value_at_margin: Value at distance ``margin``.
    """
    lower, upper = bounds
    in_bounds = (lower <= x) & (x <= upper)
    if margin == 0:
        return in_bounds.to(x.dtype)
    distance = torch.where(x < lower, lower - x, x - upper) / margin
    return torch.where(in_bounds, 1.0, _SIGMOIDS[sigmoid](distance, value_at_margin))

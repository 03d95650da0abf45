"""Parity of the soft indicator functions with ``dm_control.utils.rewards``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dm_control.utils import rewards as dm_rewards

from genpol.envs.mujoco.rewards import tolerance

_SIGMOIDS = (
    "gaussian",
    "hyperbolic",
    "long_tail",
    "reciprocal",
    "cosine",
    "linear",
    "quadratic",
    "tanh_squared",
)
_GRID = np.linspace(-5, 5, 401)
_BOUNDS = ((0.0, 0.0), (-1.0, 0.5), (0.3, float("inf")), (float("-inf"), -0.2))


@pytest.mark.parametrize("sigmoid", _SIGMOIDS)
@pytest.mark.parametrize("bounds", _BOUNDS)
def test_tolerance_equals_dm_control(sigmoid, bounds):
    for margin in (0.5, 2.0):
        for value in (0.1, 0.5, 0.9):
            expected = dm_rewards.tolerance(_GRID, bounds, margin, sigmoid, value)
            ours = tolerance(
                torch.from_numpy(_GRID),
                bounds,
                margin=margin,
                sigmoid=sigmoid,
                value_at_margin=value,
            )
            np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sigmoid", ["cosine", "linear", "quadratic"])
def test_value_at_margin_may_be_zero(sigmoid):
    expected = dm_rewards.tolerance(_GRID, (-1.0, 1.0), 2.0, sigmoid, 0.0)
    ours = tolerance(
        torch.from_numpy(_GRID), (-1.0, 1.0), margin=2.0, sigmoid=sigmoid, value_at_margin=0.0
    )
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bounds", _BOUNDS)
def test_without_margin_it_is_an_indicator(bounds):
    ours = tolerance(torch.from_numpy(_GRID), bounds)
    assert np.array_equal(ours.numpy(), dm_rewards.tolerance(_GRID, bounds))


def test_value_at_margin_is_reached_at_the_margin():
    x = torch.tensor([3.0], dtype=torch.float64)
    for sigmoid in _SIGMOIDS:
        value = tolerance(x, (0.0, 1.0), margin=2.0, sigmoid=sigmoid, value_at_margin=0.3)
        assert value.item() == pytest.approx(0.3, abs=1e-12)


def test_shape_and_dtype_are_kept():
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert tolerance(x, margin=1.0).shape == (2, 3)
    assert tolerance(x, margin=1.0).dtype == torch.float64
    assert tolerance(x).dtype == torch.float64

"""The scale of the energy."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.world_model import EnergyScale


def test_averages_move_by_a_hundredth_from_zero_and_one():
    scale = EnergyScale(0.01)
    scale.update(torch.tensor(2.0), torch.tensor(3.0))
    assert scale.mean.item() == pytest.approx(0.02)
    assert scale.std.item() == pytest.approx(1.02)
    assert scale.batches == 1


def test_what_is_not_finite_leaves_them_alone_and_little_is_floored():
    scale = EnergyScale(0.01, momentum=0.0)
    scale.update(torch.tensor(float("nan")), torch.tensor(1.0))
    assert (scale.mean, scale.std, scale.batches) == (0.0, 1.0, 0)
    scale.update(torch.tensor(1.0), torch.tensor(0.0))
    assert scale.std.item() == pytest.approx(1e-6)


def test_bonus_is_standardised_clipped_and_weighted():
    scale = EnergyScale(0.1, momentum=0.0, warmup=1)
    logits = torch.tensor([3.0, 5.0, 100.0, -100.0])
    assert (scale.bonus(logits) == 0).all()  # in the warm-up
    scale.update(torch.tensor(3.0), torch.tensor(2.0))
    torch.testing.assert_close(scale.bonus(logits), torch.tensor([0.0, 0.1, 0.5, -0.5]))


def test_averages_are_saved_with_the_model():
    scale = EnergyScale(0.1)
    scale.update(torch.tensor(3.0), torch.tensor(2.0))
    other = EnergyScale(0.1)
    other.load_state_dict(scale.state_dict())
    logits = torch.randn(5)
    assert other.normalised(logits).equal(scale.normalised(logits))
    assert other.batches == 1


def test_with_the_log_density_it_is_the_anchor_to_behaviour():
    """Oracle 11 by way of the scale: eta = lambda = 0.5 gives b(a) exp(G / lambda)."""
    scale = EnergyScale(0.5, clip=100.0, warmup=0)
    a = torch.linspace(-1.0, 1.0, 20_001)
    log_density = -0.5 * ((a - 0.3) / 0.2) ** 2 - math.log(0.2 * math.sqrt(2 * math.pi))
    weights = ((-2.0 * (a + 0.5).square() + scale.bonus(log_density)) / 0.5).softmax(0)
    mean = (weights * a).sum()
    assert mean.item() == pytest.approx(0.1061, abs=1e-4)
    assert (weights * (a - mean).square()).sum().sqrt().item() == pytest.approx(0.1741, abs=1e-4)

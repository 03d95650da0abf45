from __future__ import annotations

import pytest
import torch

from genpol.nn.masked import weighted_mean


def test_is_the_mean_without_weights():
    assert weighted_mean(torch.tensor([1.0, 2.0, 6.0])) == 3.0


def test_is_the_weighted_average():
    mean = weighted_mean(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert mean == pytest.approx(15 / 4)


def test_weight_zero_selects_nan_away():
    value = torch.tensor([1.0, torch.nan, torch.inf], requires_grad=True)
    mean = weighted_mean(value, torch.tensor([1.0, 0.0, 0.0]))
    mean.backward()
    assert mean == 1.0
    assert torch.equal(value.grad, torch.tensor([1.0, 0.0, 0.0]))


def test_weights_broadcast_over_leading_draws():
    value = torch.tensor([[1.0, 5.0], [3.0, 7.0]])
    assert weighted_mean(value, torch.tensor([1.0, 0.0])) == 2.0


def test_all_zero_weights_give_zero():
    assert weighted_mean(torch.tensor([torch.nan, 1.0]), torch.zeros(2)) == 0.0

"""An optimiser of which some parameters take smaller steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genpol.world_model.optimizer import GradedOptimizer


def make(**options):
    slow, fast = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    options = {"share": 0.3, "max_grad_norm": 1e9, "eps": 1e-8} | options
    return slow, fast, GradedOptimizer([slow], [fast], 0.1, **options)


def test_it_is_adam_with_two_step_sizes():
    slow, fast, optimizer = make()
    theirs = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    adam = torch.optim.Adam([{"params": theirs[:1], "lr": 0.03}, {"params": theirs[1:]}], lr=0.1)
    for step in range(5):
        for a, b in ((slow, fast), theirs):
            loss = (a - 1.0).square().sum() + (b.sum() - step) ** 2
            if a is slow:
                optimizer.step(loss)
            else:
                adam.zero_grad()
                loss.backward()
                adam.step()
    torch.testing.assert_close(slow, theirs[0])
    torch.testing.assert_close(fast, theirs[1])
    assert optimizer.learning_rate == 0.1


def test_gradients_are_clipped_over_both_parts_together():
    slow, fast, optimizer = make(max_grad_norm=1.0)
    metrics = optimizer.step(3.0 * slow[0] + 4.0 * fast[0])
    assert metrics["loss/grad_norm"].item() == pytest.approx(5.0)
    assert slow.grad[0].item() == pytest.approx(0.6, abs=1e-5)
    assert fast.grad[0].item() == pytest.approx(0.8, abs=1e-5)


def test_a_part_without_a_gradient_stays():
    slow, fast, optimizer = make()
    optimizer.step(fast.sum())
    assert (slow == 0).all()
    assert (fast != 0).all()

"""The guarded optimiser: equal to Adam, deaf to NaN, patient but not forever."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from genpol.errors import CheckpointError, NonFiniteError
from genpol.nn.optimizer import GuardedOptimizer, step_together


def make(size=3, **options):
    parameter = nn.Parameter(torch.arange(1.0, size + 1))
    options = {"max_grad_norm": math.inf, "eps": 1e-8, **options}
    return parameter, GuardedOptimizer([parameter], 0.1, **options)


def step(parameter, optimizer, factor=1.0):
    return optimizer.step(factor * parameter.square().sum())


def test_equals_adam_without_a_clip():
    parameter, optimizer = make()
    oracle = nn.Parameter(parameter.detach().clone())
    adam = torch.optim.Adam([oracle], lr=0.1, fused=True)
    for _ in range(5):
        step(parameter, optimizer)
        adam.zero_grad()
        oracle.square().sum().backward()
        adam.step()
    assert torch.equal(parameter, oracle)


def test_first_step_has_the_size_of_the_learning_rate():
    # Adam's first step is learning_rate * sign(gradient) where eps is small.
    parameter, optimizer = make()
    before = parameter.detach().clone()
    step(parameter, optimizer)
    torch.testing.assert_close(before - parameter.detach(), torch.full((3,), 0.1))


def test_gradient_is_clipped_by_its_norm_over_all_parameters():
    first, second = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))
    optimizer = GuardedOptimizer([first, second], 0.1, max_grad_norm=1.0, eps=1e-8)
    metrics = optimizer.step(0.5 * (first.square() + second.square()).sum())
    assert metrics["loss/grad_norm"].item() == pytest.approx(5.0)
    # Adam's first moment is a tenth of the clipped gradient.
    means = [optimizer.moments(x).exp_avg.item() for x in (first, second)]
    assert means == pytest.approx([0.06, 0.08], rel=1e-5)


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(factor):
    parameter, optimizer = make()
    step(parameter, optimizer)
    before = parameter.detach().clone()
    moments = optimizer.state_dict()["moments"][0]["exp_avg"].clone()
    metrics = step(parameter, optimizer, factor)
    assert torch.equal(parameter, before)
    assert torch.equal(optimizer.state_dict()["moments"][0]["exp_avg"], moments)
    assert metrics["loss/skipped"] == optimizer.skipped == 1


def test_a_finite_loss_with_an_infinite_gradient_is_skipped():
    parameter = nn.Parameter(torch.tensor([0.0]))
    optimizer = GuardedOptimizer([parameter], 0.1, max_grad_norm=1.0, eps=1e-8)
    optimizer.step(parameter.sqrt().sum())
    assert parameter.item() == 0.0
    assert optimizer.skipped == 1


def test_a_step_leaves_its_gradient_behind_and_a_skipped_one_none():
    parameter, optimizer = make()
    expected = 2 * parameter.detach().clone()
    step(parameter, optimizer)
    assert torch.equal(parameter.grad, expected)
    step(parameter, optimizer, math.nan)
    assert parameter.grad is None


def test_losses_of_several_optimisers_are_learned_as_if_alone():
    def start():
        net = nn.Linear(3, 2)
        with torch.no_grad():
            net.weight.copy_(torch.arange(6.0).view(2, 3) / 6)
            net.bias.zero_()
        options = {"max_grad_norm": 0.1, "eps": 1e-8}
        return net, GuardedOptimizer(net.parameters(), 0.1, name="net", **options), *make()

    x = torch.tensor([[1.0, -1.0, 2.0]])
    net, of_net, parameter, of_parameter = start()
    other, of_other, twin, of_twin = start()
    for factor in (1.0, math.nan, 2.0):  # a loss that is not finite spoils only its own step
        metrics = step_together(
            (of_net, net(x).square().sum()), (of_parameter, factor * parameter.square().sum())
        )
        of_other.step(other(x).square().sum())
        step(twin, of_twin, factor)
    assert torch.equal(net.weight, other.weight)
    assert torch.equal(net.bias, other.bias)
    assert torch.equal(parameter, twin)
    assert (of_net.skipped, of_parameter.skipped) == (0, 1)
    assert {"net/grad_norm", "loss/grad_norm"} <= metrics.keys()


def test_two_parameters_may_have_one_gradient():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GuardedOptimizer([first, second], 0.1, max_grad_norm=1.0, eps=1e-8)
    optimizer.step((first + second).sum())
    means = [optimizer.moments(x).exp_avg for x in (first, second)]
    torch.testing.assert_close(means[0], torch.full((2,), 0.05))
    assert torch.equal(*means)


def test_gradients_of_another_layout_are_learned_from():
    parameter = nn.Parameter(torch.arange(6.0).view(2, 3))
    optimizer = GuardedOptimizer([parameter], 0.1, max_grad_norm=math.inf, eps=1e-8)
    oracle = nn.Parameter(parameter.detach().clone())
    adam = torch.optim.Adam([oracle], lr=0.1, fused=True)
    weights = torch.tensor([[1.0, -2.0], [3.0, -4.0], [5.0, 6.0]])
    for _ in range(3):
        optimizer.step((parameter.t() * weights).sum())
        adam.zero_grad()
        (oracle.t() * weights).sum().backward()
        adam.step()
    assert torch.equal(parameter, oracle)


def test_a_loss_of_nothing_that_is_trained_changes_nothing():
    parameter, optimizer = make()
    before = parameter.detach().clone()
    metrics = optimizer.step(torch.ones(1, requires_grad=True).sum())
    assert torch.equal(parameter, before)
    assert metrics["loss/grad_norm"] == 0


def test_gives_up_after_so_many_in_a_row_and_names_the_loss():
    parameter, optimizer = make(patience=3, name="critic")
    step(parameter, optimizer, math.nan)
    step(parameter, optimizer, math.nan)
    with pytest.raises(NonFiniteError, match="critic: not finite in 3 updates in a row"):
        step(parameter, optimizer, math.nan)


def test_a_finite_update_restores_the_patience():
    parameter, optimizer = make(patience=2)
    for factor in (math.nan, 1.0, math.nan, 1.0):
        step(parameter, optimizer, factor)
    assert optimizer.skipped == 2


def test_learning_rate_can_be_set():
    parameter, optimizer = make()
    optimizer.learning_rate = 0.0
    before = parameter.detach().clone()
    step(parameter, optimizer)
    assert torch.equal(parameter, before)
    assert optimizer.learning_rate == 0.0


def test_state_carries_learning_rate_and_counters():
    parameter, optimizer = make(patience=2)
    optimizer.learning_rate = 0.025
    step(parameter, optimizer, math.nan)
    other, restored = make(patience=2)
    restored.load_state_dict(optimizer.state_dict())
    assert (restored.learning_rate, restored.skipped) == (0.025, 1)
    with pytest.raises(NonFiniteError):
        step(other, restored, math.nan)


def test_loading_copies_the_moments():
    parameter, optimizer = make()
    step(parameter, optimizer)
    other, restored = make()
    restored.load_state_dict(optimizer.state_dict())
    before = optimizer.state_dict()["moments"][0]["exp_avg"].clone()
    step(other, restored)
    assert torch.equal(optimizer.state_dict()["moments"][0]["exp_avg"], before)


def test_state_of_other_parameters_is_refused():
    _, optimizer = make(size=3)
    _, other = make(size=4)
    with pytest.raises(CheckpointError, match=r"shapes \[\[3\]\], here they are \[\[4\]\]"):
        other.load_state_dict(optimizer.state_dict())


def test_parameters_without_gradient_are_left_alone():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GuardedOptimizer([used, unused], 0.1, max_grad_norm=1.0, eps=1e-8)
    optimizer.step(used.sum())
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))

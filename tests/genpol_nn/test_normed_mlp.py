"""Perceptrons of TD-MPC2."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genpol.errors import ConfigError
from genpol.nn.normed_mlp import NormedEnsemble, NormedMLP, dropout_mask, mish

EXTREMES = torch.tensor([-200.0, -30.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 30.0, 60.0, 200.0])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_mish_is_that_of_torch_also_at_the_extremes():
    x = torch.cat((EXTREMES, 5.0 * torch.randn(1000)))
    torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-5, atol=5e-6)
    with_slope = x.clone().requires_grad_()
    torch.testing.assert_close(mish(with_slope), F.mish(x), rtol=1e-5, atol=5e-6)


def test_the_slope_of_mish_is_that_of_torch():
    x = torch.cat((EXTREMES, 5.0 * torch.randn(1000)))
    weight = torch.randn_like(x)
    slopes = []
    for function in (mish, F.mish):
        inputs = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(function(inputs), inputs, weight)[0])
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=5e-6)


def reference(net: NormedMLP) -> nn.Sequential:
    """Return the official layers with the same weights."""
    layers: list[nn.Module] = []
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
        linear.load_state_dict({"weight": weight, "bias": bias})
        layers.append(linear)
        if i < len(net.gains):
            norm = nn.LayerNorm(weight.shape[0])
            norm.load_state_dict({"weight": net.gains[i], "bias": net.shifts[i]})
            layers.append(norm)
        if i < len(net.weights) - 1:
            layers.append(nn.Mish())
    return nn.Sequential(*layers)


def disturb(module: nn.Module) -> None:
    with torch.no_grad():
        for x in module.parameters():
            x.add_(0.3 * torch.randn(x.shape, generator=generator()))


@pytest.mark.parametrize("group", [0, 4])
def test_layers_are_linear_norm_mish(group):
    net = NormedMLP(3, 8, [16, 12], group=group, generator=generator())
    disturb(net)
    x = torch.randn(2, 5, 3)
    expected = reference(net)(x)
    if group:
        expected = expected.view(2, 5, 4, 2).softmax(-2).view(2, 5, 8)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_initial_weights_have_one_width_everywhere():
    net = NormedMLP(200, 200, [200], generator=generator())
    for weight, bias in zip(net.weights, net.biases, strict=True):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert (bias == 0).all()
    assert (NormedMLP(3, 2, [4], zero_output=True)(torch.randn(5, 3)) == 0).all()


def test_members_of_an_ensemble_are_perceptrons():
    together = NormedEnsemble(3, 4, 2, [8, 6], generator=generator())
    disturb(together)
    x = torch.randn(7, 5, 4)
    outputs = together(x)
    assert outputs.shape == (3, 7, 5, 2)
    for member, output in enumerate(outputs):
        alone = NormedMLP(4, 2, [8, 6])
        with torch.no_grad():
            for own, theirs in zip(alone.weights, together.weights, strict=True):
                own.copy_(theirs[member].T)
            for name in ("biases", "gains", "shifts"):
                for own, theirs in zip(getattr(alone, name), getattr(together, name), strict=True):
                    own.copy_(theirs[member, 0])
        torch.testing.assert_close(output, alone(x), rtol=1e-4, atol=1e-5)


def test_chosen_members_answer_alone_and_frozen_ones_learn_nothing():
    together = NormedEnsemble(4, 3, 2, [8], generator=generator())
    x = torch.randn(5, 3, requires_grad=True)
    chosen = together(x, members=torch.tensor([2, 0]), frozen=True)
    torch.testing.assert_close(chosen, together(x)[[2, 0]])
    gradients = torch.autograd.grad(chosen.sum(), [x, *together.parameters()], allow_unused=True)
    assert (gradients[0] != 0).any()
    assert all(g is None for g in gradients[1:])


def test_dropout_stands_before_the_first_norm():
    together = NormedEnsemble(1, 3, 2, [8], generator=generator())
    x = torch.randn(4, 3)
    mask = torch.ones(1, 4, 8)
    mask[:, :, 5] = 0.0
    dropped = together(x, mask=mask)
    with torch.no_grad():
        together.weights[0][:, :, 5] = 0.0
        together.biases[0][:, :, 5] = 0.0
    torch.testing.assert_close(dropped, together(x))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4])
def test_a_dropout_mask_drops_its_share_and_keeps_the_mean(share):
    mask = dropout_mask((3, 50_000), share, generator())
    dropped = (mask == 0).float().mean().item()
    assert dropped == pytest.approx(share, abs=5 * (share * (1 - share) / 150_000) ** 0.5)
    assert set(mask.unique().tolist()) <= {0.0, mask.max().item()}
    assert mask.max().item() == pytest.approx(1 / (1 - share))


def test_places_that_are_dropped_are_independent():
    mask = dropout_mask((100_000,), 0.2, generator()) == 0
    after = (mask[1:] & mask[:-1]).float().mean().item()
    assert after == pytest.approx(0.04, abs=0.003)
    halves = mask.view(2, -1).float().mean(1)
    assert halves.tolist() == pytest.approx([0.2, 0.2], abs=0.01)


def test_an_output_that_simplices_do_not_fill_is_refused():
    with pytest.raises(ConfigError, match="output_dim = 10"):
        NormedMLP(3, 10, [8], group=8)

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from genpol.errors import ConfigError
from genpol.nn.mlp import ACTIVATIONS, MLP


def make(seed: int = 0, **options) -> MLP:
    return MLP(3, 2, (16, 16), generator=torch.Generator().manual_seed(seed), **options)


def test_same_seed_gives_same_weights():
    first, second, other = make(1).state_dict(), make(1).state_dict(), make(2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_construction_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    make()
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_lecun_uniform_and_biases_zero():
    net = MLP(300, 400, (), generator=torch.Generator().manual_seed(0))
    layer = net.linears[0]
    bound = (3 / 300) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > 0.99 * bound
    assert layer.weight.std().item() == pytest.approx(300**-0.5, rel=0.01)
    assert torch.equal(layer.bias, torch.zeros(400))


def test_output_gain_scales_only_the_last_layer():
    plain, scaled = make(), make(output_gain=0.25)
    assert torch.equal(plain.linears[0].weight, scaled.linears[0].weight)
    torch.testing.assert_close(0.25 * plain.linears[-1].weight, scaled.linears[-1].weight)


def test_zero_output_gain_gives_exact_zeros():
    assert torch.equal(make(output_gain=0.0)(torch.randn(5, 3)), torch.zeros(5, 2))


def test_forward_equals_sequential():
    net = make()
    modules = [net.linears[0], torch.nn.SiLU(), net.linears[1], torch.nn.SiLU(), net.linears[2]]
    x = torch.randn(5, 3)
    torch.testing.assert_close(net(x), torch.nn.Sequential(*modules)(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place_activations_change_nothing(activation: str):
    net = make(activation=activation)
    x = torch.randn(5, 3)
    kept = x.clone()
    with torch.no_grad():
        without_gradients = net(x)
    torch.testing.assert_close(without_gradients, net(x).detach())
    assert torch.equal(x, kept)


def test_reset_draws_new_weights_in_place():
    net = make(1)
    parameter = net.linears[0].weight
    net.reset_parameters(torch.Generator().manual_seed(2))
    assert net.linears[0].weight is parameter
    assert torch.equal(parameter, make(2).linears[0].weight)


def test_forward_mode_derivative_agrees_without_gradients():
    net, x, direction = make(), torch.randn(5, 3), torch.randn(5, 3)
    expected = torch.autograd.functional.jvp(net, x, direction)[1]
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(net, (x,), (direction,))[1], expected)


def test_can_be_copied_and_pickled():
    net, x = make(), torch.randn(2, 3)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_unknown_activation_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="silu"):
        make(activation="swilu")


@pytest.mark.parametrize("layer_norm", ["before", "after"])
def test_layer_norm_stands_on_its_side_of_the_activation(layer_norm: str):
    mlp = MLP(3, 2, [8, 5], layer_norm=layer_norm, generator=torch.Generator().manual_seed(0))
    x = torch.randn(7, 3)
    hidden = x
    for layer in mlp.linears[:-1]:
        hidden = layer(hidden)
        if layer_norm == "before":
            hidden = F.silu(F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6))
        else:
            hidden = F.layer_norm(F.silu(hidden), hidden.shape[-1:], eps=1e-6)
    torch.testing.assert_close(mlp.features(x), hidden)
    torch.testing.assert_close(mlp(x), mlp.linears[-1](hidden))


def test_glorot_weights_fill_their_range_and_no_more():
    mlp = MLP(200, 100, [300], init="glorot", generator=torch.Generator().manual_seed(0))
    for layer, bound in zip(mlp.linears, [(6 / 500) ** 0.5, (6 / 400) ** 0.5], strict=True):
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)

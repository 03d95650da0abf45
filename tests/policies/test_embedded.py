"""Perceptrons that learn how to embed the time."""

from __future__ import annotations

import pytest
import torch

from genpol.errors import ConfigError
from genpol.nn.time_embedding import TimeMLP
from genpol.policies.embedded import EmbeddedDenoiser


def make(hidden=(8, 8, 8), *, residual=True, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return EmbeddedDenoiser(
        3, 4, hidden, residual=residual, time_dim=6, generator=generator, **options
    )


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layer_norm", ["none", "before"])
def test_the_grid_is_the_network_at_its_times(residual, layer_norm):
    network = make(residual=residual, layer_norm=layer_norm)
    observation, x = torch.randn(5, 3), torch.randn(2, 5, 4)
    times = torch.tensor([[0.0], [3.0]])
    field = network.on_grid(observation, times)
    for step, time in enumerate(times):
        expected = network(observation, x, time)
        assert expected.shape == x.shape
        torch.testing.assert_close(field(x, step), expected)


def test_it_tells_times_apart():
    network = make()
    observation, x = torch.randn(5, 3), torch.randn(5, 4)
    near, far = (network(observation, x, torch.tensor([t])) for t in (1.0, 2.0))
    assert (near - far).abs().max() > 1e-3


def test_features_are_all_sines_and_then_all_cosines():
    embedding = TimeMLP(4, 4)
    torch.nn.init.eye_(embedding.first.weight)
    torch.nn.init.zeros_(embedding.first.bias)
    torch.nn.init.eye_(embedding.last.weight)
    torch.nn.init.zeros_(embedding.last.bias)
    angle = torch.tensor([2.0, 2e-4])
    expected = torch.nn.functional.mish(torch.cat((angle.sin(), angle.cos())))
    torch.testing.assert_close(embedding(torch.tensor([2.0])), expected)


@pytest.mark.parametrize("dim", [3, 2])
def test_an_embedding_needs_two_frequencies(dim):
    with pytest.raises(ConfigError, match="must be even, and at least 4"):
        TimeMLP(dim, 8)


def test_weights_are_those_of_the_generator():
    network, again = make(), make(seed=1)
    assert not torch.equal(network.first.weight, again.first.weight)
    before = torch.random.get_rng_state()
    again.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    found = again.state_dict()
    assert all(torch.equal(x, found[name]) for name, x in network.state_dict().items())


def test_an_output_gain_of_zero_starts_with_zero():
    for residual in (True, False):
        network = make(residual=residual, output_gain=0.0)
        out = network(torch.randn(5, 3), torch.randn(5, 4), torch.zeros(1))
        assert torch.equal(out, torch.zeros(5, 4))


@pytest.mark.parametrize("hidden", [(8, 8), (8, 4, 8)])
def test_a_residual_network_has_an_odd_number_of_equal_widths(hidden):
    with pytest.raises(ConfigError, match="an odd number of equal widths"):
        make(hidden)
    make(hidden, residual=False)


def test_there_must_be_a_hidden_layer():
    with pytest.raises(ConfigError, match="needs a hidden layer"):
        make((), residual=False)

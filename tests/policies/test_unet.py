"""The conditional U-Net over the actions of a chunk."""

from __future__ import annotations

import pytest
import torch

from genpol.errors import ConfigError
from genpol.policies.unet import ConditionalUnet1D


def make(horizon=4, channels=(8, 16), *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"time_dim": 6, "kernel_size": 3, **options}
    return ConditionalUnet1D(3, 2, horizon, channels, generator=generator, **options)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("channels", [(8,), (8, 16)])
def test_the_grid_is_the_network_at_its_times(scale, channels):
    network = make(channels=channels, scale=scale)
    observation, x = torch.randn(5, 3), torch.randn(2, 5, 8)
    times = torch.tensor([[0.0], [3.0]])
    field = network.on_grid(observation, times)
    for step, time in enumerate(times):
        expected = network(observation, x, time)
        assert expected.shape == x.shape
        # Norms over four numbers magnify rounding.
        torch.testing.assert_close(field(x, step), expected, atol=1e-4, rtol=1e-4)


def test_every_input_counts():
    network = make()
    inputs = [torch.randn(5, n, requires_grad=True) for n in (3, 8, 1)]
    network(*inputs).sum().backward()
    assert all((x.grad.abs().sum(-1) > 0).all() for x in inputs)


def test_actions_of_the_past_stand_at_the_end():
    plain, network = make(), make(past_steps=1)
    network.load_state_dict(plain.state_dict())
    observation, x, time = torch.randn(5, 3), torch.randn(5, 4, 2), torch.tensor([1.0])
    theirs = plain(observation, x.flatten(1), time).view_as(x)
    ours = network(observation, x.roll(-1, 1).flatten(1), time).view_as(x)
    torch.testing.assert_close(ours.roll(1, 1), theirs)


def test_weights_are_those_of_the_generator():
    network, again = make(), make(seed=1)
    before = torch.random.get_rng_state()
    again.reset_parameters(torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    found = again.state_dict()
    assert all(torch.equal(x, found[name]) for name, x in network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 5}, "needs a multiple of 2"),
        ({"channels": (8, 12)}, "must be divisible by unet.groups = 8"),
        ({"channels": (4, 8), "groups": 4}, "first channels of a unet must be divisible by 8"),
        ({"channels": ()}, "must be divisible"),
        ({"kernel_size": 4}, "must be odd"),
        ({"past_steps": 4}, r"must lie in \[0, 3\]"),
    ],
)
def test_sizes_that_do_not_suit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)

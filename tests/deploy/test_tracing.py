"""A traced policy is the policy: the same chunk for the same noise, whatever makes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrl.envs import ExplorationType

from genpol import agents
from genpol.agent import Agent, Specs
from genpol.deploy.tracing import NoiseTape, acting, trace
from genpol.errors import ConfigError
from genpol.offline.settings import NetworkSettings

SPECS = Specs(observation_dim=5, action_dim=2, num_envs=1, tells_success=True)
NET = NetworkSettings(hidden=[8])
FLOW = {"solver_steps": 3, "actor": NET}
CHUNKS = {
    "bc": FLOW | {"horizon": 4, "action_steps": 2},
    "fql": FLOW,
    "qc": FLOW | {"horizon": 3},
    "qgf": FLOW,
    "fisher_decorator": FLOW,
    "ogpo": FLOW | {"horizon": 3},
    "dsrl": FLOW | {"horizon": 3},
    "residual": FLOW | {"horizon": 3},
    "best_of_n": FLOW | {"horizon": 3},
    "iql": {"actor": NET},
}
PLAIN: dict[str, dict[str, Any]] = {
    name: {} for name in ("ppo", "bpo", "gorl", "fpo", "dppo", "sac", "mdpo")
}


def make(name: str, options: dict[str, Any]) -> Agent:
    agent = agents.make(name, agents.settings_class(name)(**options), SPECS, seed=0)
    for parameter in agent.parameters():  # heads that begin at zero would hide errors
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return agent


@pytest.mark.parametrize(("name", "options"), [*CHUNKS.items(), *PLAIN.items()])
def test_graph_is_the_policy(name: str, options: dict[str, Any]) -> None:
    agent = make(name, options)
    traced = trace(agent)
    found = acting(agent, ExplorationType.DETERMINISTIC)
    draw = torch.Generator().manual_seed(1)
    observation = torch.randn(1, traced.observation_dim, generator=draw)
    noise = torch.randn(1, traced.noise_dim, generator=draw)
    with torch.no_grad(), NoiseTape(noise):
        wanted = found.act(observation)
    torch.testing.assert_close(traced.graph(observation, noise), wanted)
    assert wanted.shape == (1, traced.horizon, traced.action_dim)
    assert traced.action_steps == found.action_steps
    assert wanted.abs().max() > 0


def test_other_noise_is_another_chunk() -> None:
    traced = trace(make("bc", CHUNKS["bc"]))
    assert (traced.noise_dim, traced.horizon, traced.action_steps) == (8, 4, 2)
    observation = torch.zeros(1, 5)
    first, second = (traced.graph(observation, torch.full((1, 8), x)) for x in (0.1, -0.1))
    assert not torch.allclose(first, second)


def test_noise_is_taken_in_the_order_of_the_draws() -> None:
    with NoiseTape(torch.arange(10.0).unsqueeze(0)) as tape:
        first = torch.randn(2, 3)
        second = torch.randn((4,), generator=torch.Generator())
    assert first.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert second.tolist() == [6.0, 7.0, 8.0, 9.0]
    assert tape.used == 10


def test_a_sampling_gaussian_takes_its_noise_too() -> None:
    traced = trace(make("ppo", {}), stochastic=True)
    assert traced.noise_dim == 2
    assert trace(make("ppo", {})).noise_dim == 0


def test_uniform_numbers_have_their_quantiles_on_the_tape() -> None:
    wanted = torch.linspace(0.01, 0.99, 7)
    with NoiseTape(torch.special.ndtri(wanted).unsqueeze(0)) as tape:
        found = torch.rand(7, generator=torch.Generator())
    torch.testing.assert_close(found, wanted)
    assert tape.used == 7
    with NoiseTape(torch.full((1, 1), 40.0)):
        assert torch.rand(1) < 1.0


def test_draws_that_are_neither_gaussian_nor_uniform_are_refused() -> None:
    with pytest.raises(ConfigError, match="randint numbers"), NoiseTape():
        torch.randint(3, (1,))
    with pytest.raises(ConfigError, match="normal_ numbers"), NoiseTape():
        torch.zeros(3).normal_(std=2.0)

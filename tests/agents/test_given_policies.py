"""What agents give as their policy acts the same in another agent."""

from __future__ import annotations

import pytest
import torch

from genpol import agents
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.offline.settings import NetworkSettings
from genpol.pretrained import PretrainedPolicy, model_of

HORIZON = 2
MODEL = {
    "horizon": HORIZON,
    "solver_steps": 2,
    "actor": NetworkSettings(hidden=[8], layer_norm="none"),
    "normalize_observations": True,
}


def make(name, **settings):
    on_policy = name in ("dppo", "reinflow")
    specs = Specs(observation_dim=3, action_dim=2 * (HORIZON if on_policy else 1), num_envs=2)
    return agents.make(name, agents.settings_class(name)(**(MODEL | settings)), specs, seed=0)


def given(agent):
    weights, statistics = agent.give_policy()
    return PretrainedPolicy(
        model=model_of(agent.settings, statistics is not None),
        weights=weights,
        statistics=statistics,
        observation_dim=3,
        action_dim=2,
        action_steps=HORIZON,
        env="toy",
        action_repeat=1,
        control_period_s=0.02,
        **agent.give_bounds(),
    )


@pytest.mark.parametrize("name", ["dppo", "reinflow", "best_of_n", "ogpo"])
def test_a_policy_acts_the_same_wherever_it_goes(name):
    first = make("bc")
    first.normalizer.set_statistics(torch.ones(3), torch.full((3,), 2.0))
    for parameter in first.flow.parameters():
        parameter.data.add_(0.1)
    middle = make(name, **({"preset": "ogpo"} if name == "ogpo" else {}))
    middle.load_policy(given(first))
    last = make("bc")
    last.load_policy(given(middle))
    seen = torch.randn(5, 3)
    chunks = [x.plan_actions(seen, torch.Generator().manual_seed(0)) for x in (first, last)]
    torch.testing.assert_close(*chunks)


def test_a_model_that_squashes_its_actions_is_not_given():
    with pytest.raises(ConfigError, match="others cannot go on with it; take a run of bc or ogpo"):
        given(make("dppo", actor=None))

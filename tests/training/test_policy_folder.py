"""Policy folders of today and of before, and what is refused of them."""

from __future__ import annotations

import json

import pytest
import torch

from genpol import agents
from genpol.agent import Specs
from genpol.errors import CheckpointError, ConfigError
from genpol.offline.settings import FlowSettings, NetworkSettings
from genpol.pretrained import PretrainedPolicy, complete, known_to, model_of
from genpol.training import policy_folder

SETTINGS = {
    "horizon": 2,
    "solver_steps": 2,
    "actor": NetworkSettings(hidden=[8], layer_norm="none"),
}


def make_agent(**settings):
    options = agents.settings_class("bc")(**(SETTINGS | settings))
    specs = Specs(observation_dim=4, action_dim=2, num_envs=2)
    return agents.make("bc", options, specs, seed=0)


def make_policy(**fields):
    agent = make_agent(normalize_observations=True)
    agent.normalizer.update(torch.randn(20, 4))
    weights, statistics = agent.give_policy()
    return PretrainedPolicy(
        model=model_of(agent.settings, True),
        weights=weights,
        statistics=statistics,
        observation_dim=4,
        action_dim=2,
        action_steps=1,
        env="toy",
        action_repeat=1,
        control_period_s=0.05,
        **(agent.give_bounds() | fields),
    )


@pytest.fixture
def folder(tmp_path):
    policy_folder.write(tmp_path / "policy", make_policy())
    return tmp_path / "policy"


def edit(folder, **changes):
    file = folder / policy_folder.RECORD
    record = json.loads(file.read_text())
    for name, value in changes.items():
        record.pop(name, None) if value is None else record.update({name: value})
    file.write_text(json.dumps(record))


def test_a_policy_comes_back_as_it_was(tmp_path):
    fields = {"observation_steps": 2, "observation_clip": None}
    policy = make_policy(**fields, action_low=[-0.5, 0.0], action_high=[0.5, 1.0])
    policy_folder.write(tmp_path / "policy", policy)
    found = policy_folder.read(tmp_path / "policy")
    for name in PretrainedPolicy.__dataclass_fields__:
        if name not in ("weights", "statistics"):
            assert getattr(found, name) == getattr(policy, name), name
    for name in ("weights", "statistics"):
        own, wanted = getattr(found, name), getattr(policy, name)
        assert all(torch.equal(own[k], x) for k, x in wanted.items())


def test_a_folder_of_the_first_version_acts_as_it_did(folder):
    new = policy_folder.read(folder)
    first = ("denoiser", "solver_steps", "horizon", "actor", "normalize_observations")
    edit(
        folder,
        format_version=1,
        model={k: new.model[k] for k in first},
        observation_steps=None,
        observation_clip=None,
        action_low=None,
        action_high=None,
    )
    record = json.loads((folder / policy_folder.RECORD).read_text())
    assert not {"observation_steps", "action_low"} & set(record)
    old = policy_folder.read(folder)
    assert old.model == new.model == complete(record["model"])
    assert (old.observation_steps, old.observation_clip, old.action_low) == (1, 10.0, None)
    chunks = []
    for policy in (old, new):
        agent = make_agent(normalize_observations=True)
        agent.load_policy(policy)
        seen = torch.full((3, 4), 100.0)
        chunks.append(agent.plan_actions(seen, torch.Generator().manual_seed(0)))
    assert torch.equal(*chunks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "has format version 3, this genpol reads up to 2; update"),
        ({"observation_steps": 3}, "observation_steps = 3 does not divide the observation"),
        ({"observation_clip": -1.0}, "observation_clip = -1.0 is no bound"),
        ({"action_low": [0.0, 0.0], "action_high": None}, "action_high is no list of numbers"),
        ({"action_low": [0.0], "action_high": [1.0]}, "action_low has 1 numbers, the action 2"),
        ({"action_low": ["a", 0], "action_high": [1, 1]}, "action_low is no list of numbers"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        policy_folder.read(folder)


def test_an_agent_that_does_not_know_all_of_a_model_says_so():
    model = model_of(FlowSettings(network="residual_mlp"), False)
    with pytest.raises(ConfigError, match="network = residual_mlp, which agent=fpo does not know"):
        known_to(agents.settings_class("fpo"), model, "fpo")
    plain = model_of(FlowSettings(), False)
    assert known_to(agents.settings_class("bc"), plain, "bc") == plain

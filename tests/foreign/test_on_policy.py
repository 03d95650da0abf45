"""On-policy agents that begin from an imported policy."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents, foreign
from genpol.agent import Specs
from genpol.foreign import ImportOptions
from genpol.offline.settings import DiffusionSettings, NetworkSettings, UnetSettings
from genpol.pretrained import known_to

ENVS, STEPS = 2, 8
SMALL = {"rollout_steps": STEPS, "epochs": 1, "minibatches": 2, "critic_hidden": [8]}
KINDS = {"actor": NetworkSettings, "unet": UnetSettings, "diffusion": DiffusionSettings}


def make(policy, name):
    model = known_to(agents.settings_class(name), policy.model, name)
    model = {k: KINDS[k](**x) if k in KINDS else x for k, x in model.items()}
    settings = agents.settings_class(name)(**(SMALL | model))
    specs = Specs(
        observation_dim=policy.observation_dim,
        action_dim=policy.action_dim * settings.horizon,
        num_envs=ENVS,
    )
    agent = agents.make(name, settings, specs, seed=0)
    agent.load_policy(policy)
    return agent


def rollout(agent, policy):
    width = policy.observation_dim
    batch = TensorDict({"observation": torch.randn(ENVS, STEPS, width)}, [ENVS, STEPS])
    with set_exploration_type(ExplorationType.RANDOM):
        agent.policy(batch)
    no = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
    batch["next"] = TensorDict(
        {
            "observation": torch.randn(ENVS, STEPS, width),
            "reward": torch.randn(ENVS, STEPS, 1),
            **{name: no for name in ("done", "terminated", "truncated", "diverged")},
        },
        [ENVS, STEPS],
    )
    return batch


@pytest.mark.parametrize(
    ("name", "form"),
    [("dppo", "dppo"), ("dppo", "robomimic"), ("dppo", "reinflow"), ("reinflow", "reinflow")],
)
def test_it_acts_and_learns(layouts, name, form):
    policy = foreign.read(form, getattr(layouts, form)().write(), ImportOptions(steps=2))
    agent = make(policy, name)
    batch = rollout(agent, policy)
    actions = batch["action"].unflatten(-1, (-1, policy.action_dim))
    low, high = (torch.tensor(x) for x in (policy.action_low, policy.action_high))
    assert (actions >= low - 1e-6).all()
    assert (actions <= high + 1e-6).all()
    before = {k: x.clone() for k, x in agent.behaviour.state_dict().items()}
    metrics = agent.update(batch)
    assert all(bool(torch.as_tensor(x).isfinite().all()) for x in metrics.values())
    after = agent.behaviour.state_dict()
    assert any(not torch.equal(x, after[k]) for k, x in before.items())
    assert agent.give_bounds()["action_high"] == pytest.approx(policy.action_high)


@pytest.mark.parametrize(("name", "form"), [("dppo", "dppo"), ("reinflow", "reinflow")])
def test_it_acts_as_the_other_library_does(layouts, name, form):
    run = getattr(layouts, form)()
    policy = foreign.read(form, run.write(), ImportOptions())
    agent = make(policy, name)
    observation, noise = layouts.draws(run)
    steps = torch.randn(len(noise), run.levels, *noise.shape[1:])
    agent.policy._chain.draw = lambda *_, **__: (noise, steps)
    batch = TensorDict({"observation": observation.flatten(1)}, [len(noise)])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        found = agent.policy(batch)["action"].view_as(noise)
    torch.testing.assert_close(found, run.actions(observation, noise, steps), atol=1e-5, rtol=0.0)


def test_only_actions_of_the_present_are_carried_out(layouts):
    policy = foreign.read("robomimic", layouts.robomimic().write(), ImportOptions(steps=2))
    assert make(policy, "dppo").policy.actor.past_steps == 1
    model = {k: KINDS[k](**x) if k in KINDS else x for k, x in policy.model.items()}
    names = {x for x in agents.settings_class("dppo").__dataclass_fields__}
    settings = agents.settings_class("dppo")(**{k: x for k, x in model.items() if k in names})
    assert tuple(settings.chunking) == (8, 7)

"""What begins from an imported policy: acting with a history, finetuning, packing it again."""

from __future__ import annotations

import copy
from dataclasses import asdict

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents, foreign
from genpol.envs.stacking import StackedEnv
from genpol.errors import ConfigError
from genpol.foreign import ImportOptions
from genpol.offline.settings import NetworkSettings
from genpol.pretrained import known_to, model_of
from genpol.training.evaluation import evaluate

FINETUNING = ("ogpo", "dsrl", "residual", "best_of_n")
SMALL = {"batch_size": 8, "num_critics": 2, "critic": NetworkSettings(hidden=[8])}
OWN = {"ogpo": {"preset": "ogpo", "group_size": 2, "policy_batch_size": 4}}


def imported(layouts, form, steps=2, **sizes):
    """Return a policy whose actions have bounds of their own; 0 steps for its own sampler."""
    return foreign.read(form, getattr(layouts, form)(**sizes).write(), ImportOptions(steps=steps))


def windows(policy, rows=8):
    horizon, width = policy.model["horizon"], policy.observation_dim
    return TensorDict(
        {
            "observation": torch.randn(rows, width),
            "action": torch.rand(rows, horizon, policy.action_dim) * 2 - 1,
            "valid": torch.ones(rows, horizon, dtype=torch.bool),
            "weight": torch.ones(rows),
            "reward": torch.randn(rows),
            "discount": torch.full((rows,), 0.9),
            "next": TensorDict({"observation": torch.randn(rows, width)}, [rows]),
        },
        [rows],
    )


@pytest.mark.parametrize("form", ["dppo", "reinflow"])
def test_a_clone_acts_in_an_environment_with_a_history(layouts, point_mass, form):
    policy = layouts.kept(imported(layouts, form, observation_dim=1, action_dim=1))
    agent = layouts.agent(policy, action_steps=2)
    env = StackedEnv(point_mass(num_envs=2), policy.observation_steps)
    found = evaluate(agent.policy, env, episodes=4, seed=0)
    assert found.returns.isfinite().all()
    assert torch.equal(found.returns, evaluate(agent.policy, env, episodes=4, seed=0).returns)


@pytest.mark.parametrize(
    ("name", "form", "steps"),
    [
        *((name, "dppo", 2) for name in FINETUNING),
        *(("ogpo", form, steps) for form, steps in (("dppo", 0), ("reinflow", 3))),
        *((name, "robomimic", 2) for name in ("ogpo", "dsrl")),
    ],
)
def test_agents_finetune_it(layouts, name, form, steps):
    policy = layouts.kept(imported(layouts, form, steps))
    agent = layouts.agent(policy, name, **SMALL, **OWN.get(name, {}))
    before = copy.deepcopy(agent.actor.state_dict())
    agent.check_ready()
    metrics = agent.update(windows(policy))
    assert all(bool(torch.as_tensor(x).isfinite().all()) for x in metrics.values())
    moved = any(not torch.equal(x, before[k]) for k, x in agent.actor.state_dict().items())
    assert moved == (name == "ogpo")
    seen = torch.randn(3, policy.observation_dim)
    actions = agent.plan_actions(seen, torch.Generator().manual_seed(0))
    low, high = (torch.tensor(x) for x in (policy.action_low, policy.action_high))
    assert (actions >= low - 1e-6).all()
    assert (actions <= high + 1e-6).all()


def test_an_agent_learns_actions_by_the_scale_of_the_policy(layouts):
    policy = imported(layouts, "reinflow")
    agent = layouts.agent(policy, "best_of_n", **SMALL)
    low, high = (torch.tensor(x) for x in (policy.action_low, policy.action_high))
    batch = windows(policy, 2)
    batch["action"][0], batch["action"][1] = low, high
    own = agent.windows(batch)["action"]
    torch.testing.assert_close(own[0], -torch.ones_like(own[0]))
    torch.testing.assert_close(own[1], torch.ones_like(own[1]))


@pytest.mark.parametrize("form", ["dppo", "reinflow"])
def test_it_can_be_given_on(layouts, form):
    policy = imported(layouts, form)
    giver = layouts.agent(policy, "ogpo", **SMALL, **OWN["ogpo"])
    weights, statistics = giver.give_policy()
    assert all(torch.equal(x, policy.weights[k]) for k, x in weights.items())
    for name, x in policy.statistics.items():
        torch.testing.assert_close(statistics[name], x)
    bounds = giver.give_bounds()
    assert bounds["observation_clip"] is None
    assert bounds["action_low"] == pytest.approx(policy.action_low)
    assert bounds["action_high"] == pytest.approx(policy.action_high)
    assert model_of(giver.settings, True) == policy.model


@pytest.mark.parametrize("name", ["best_of_n", "residual", "ogpo"])
def test_steps_have_their_noise_where_it_is_drawn(layouts, name):
    policy = imported(layouts, "dppo", 0)
    options = {"best_of": 1} if name == "best_of_n" else OWN.get(name, {})
    agent = layouts.agent(policy, name, **SMALL, **options)
    given = []
    sample = agent.behaviour.sample
    agent.behaviour.sample = lambda *noise: given.append(noise[1:]) or sample(*noise)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        agent.act(torch.randn(3, policy.observation_dim), torch.Generator().manual_seed(0))
    start, steps = given[0]
    assert steps.shape[-3:] == (policy.model["solver_steps"], 4, 2)
    assert steps.std() > 0.5
    assert not torch.equal(steps[..., 0, :, :], start)


def test_weights_of_before_actions_could_be_scaled_load(layouts):
    agent = layouts.agent(imported(layouts, "reinflow"), "best_of_n", **SMALL)
    old = {k: x for k, x in agent.state_dict().items() if not k.startswith("action_")}
    other = copy.deepcopy(agent)
    other.scale_actions(-torch.ones(2), torch.ones(2))
    other.load_state_dict(old)
    assert other.action_range() is None


@pytest.mark.parametrize("name", FINETUNING)
def test_models_are_known_to_the_agents(layouts, name):
    policy = imported(layouts, "dppo")
    found = known_to(agents.settings_class(name), policy.model, name)
    assert found == policy.model
    assert found["network"] == "residual_mlp"
    assert asdict(layouts.agent(policy).settings.diffusion) == found["diffusion"]


def test_actions_of_the_past_are_not_carried_out(layouts):
    policy = imported(layouts, "robomimic")
    agent = layouts.agent(policy)
    assert (agent.settings.horizon, agent.settings.past_steps) == (8, 1)
    assert agent.policy._action_steps == 7
    with pytest.raises(ConfigError, match=r"action_steps = 8: must lie in \[0, 7\]"):
        layouts.agent(policy, action_steps=8)


def test_actions_of_the_past_are_not_learned(layouts):
    policy = imported(layouts, "robomimic")
    agent = layouts.agent(policy)
    batch, draws = agent.windows(windows(policy)), agent.draw(8)
    loss, _ = agent.loss(batch, draws)
    batch["action"][:, -1] = 100.0
    assert torch.equal(agent.loss(batch, draws)[0], loss)
    batch["action"][:, -2] = 100.0
    assert not torch.equal(agent.loss(batch, draws)[0], loss)

"""Policies that are corrected, and the choice of their step from data."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.data.dataset import OfflineDataset
from genpol.errors import ConfigError, DatasetError
from genpol.offline.correction import CorrectedPolicy, choose_step
from genpol.policies.correction import CorrectionSettings, ScoreCorrector
from genpol.policies.density import Denoising
from genpol.training.evaluation import evaluate

FULL = {"action_weight": 1.0, "state_weight": 0.0, "max_norm": math.inf}
NOTHING = CorrectionSettings(action_weight=0.0, state_weight=0.0)


class Bell:
    """The exact score of actions from N(0, 0.3^2), whatever the state."""

    def __init__(self):
        self.seen = []

    def denoise(self, observation, action, sigma):
        self.seen.append(observation)
        moved = -action * sigma**2 / (0.09 + sigma**2)
        return Denoising(None, moved, moved.norm(dim=-1) / sigma)


class BellOfBoth(Bell):
    """The same with states from N(0, 1)."""

    def denoise(self, observation, action, sigma):
        of_actions = super().denoise(observation, action, sigma)
        return of_actions._replace(state=-observation * sigma**2 / (1 + sigma**2))


def make(name, *, goal_dim=0, **options):
    settings = agents.settings_class(name)(**options)
    specs = Specs(observation_dim=1, action_dim=1, num_envs=4, goal_dim=goal_dim)
    return agents.make(name, settings, specs, seed=0)


def constant(value):
    return TensorDictModule(
        lambda x: torch.full_like(x, value), in_keys=["observation"], out_keys=["action"]
    )


# --- oracle 13: risk ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "action", "safe"), [(0.1, 0.540, False), (0.2, 0.415, True), (0.3, 0.300, True)]
)
def test_a_correction_out_of_danger_raises_mean_and_value_at_risk(bandit, sigma, action, safe):
    luck = torch.Generator().manual_seed(0)

    def reward(x):
        unlucky = (x.abs() > 0.5) & (torch.rand(x.shape, generator=luck) < 0.2)
        return torch.where(unlucky, -10.0, x)

    env = bandit(reward, num_envs=1000)
    before = evaluate(constant(0.6), env, episodes=1000, seed=0).returns
    how = CorrectionSettings(noise_level=sigma, **FULL)
    policy = CorrectedPolicy(constant(0.6), ScoreCorrector(Bell()), how)
    after = evaluate(policy, env, episodes=1000, seed=0).returns
    assert before.mean().item() == pytest.approx(-1.52, abs=0.4)  # three standard errors
    assert torch.quantile(before, 0.1) == -10.0
    assert after.max().item() == pytest.approx(action, abs=1e-3)
    if safe:
        assert after.min().item() == pytest.approx(action, abs=1e-3)
    else:
        assert torch.quantile(after, 0.1) == -10.0


# --- acting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bc", "ppo"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_no_correction_leaves_an_evaluation_as_it_is(point_mass, name, deterministic):
    """Chunks, the noise they are made of, and exploration alike; and no weight changes."""
    options = {"horizon": 3, "solver_steps": 2} if name == "bc" else {}
    agent = make(name, **options)
    weights = {key: x.clone() for key, x in agent.state_dict().items()}
    env, returns = point_mass(num_envs=4), []
    for policy in (agent.policy, CorrectedPolicy(agent.policy, ScoreCorrector(None), NOTHING)):
        agent.generator.manual_seed(1)
        found = evaluate(policy, env, episodes=8, seed=2, deterministic=deterministic)
        returns.append(found.returns)
    assert torch.equal(*returns)
    assert all(torch.equal(x, weights[key]) for key, x in agent.state_dict().items())


def step(policy, observation, kind=ExplorationType.DETERMINISTIC):
    began = torch.ones(len(observation), 1, dtype=torch.bool)
    data = TensorDict({"observation": observation, "is_init": began}, [len(observation)])
    with set_exploration_type(kind):
        return policy(data)["action"]


@pytest.mark.parametrize("kind", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM])
def test_what_is_corrected_is_what_the_policy_does(kind):
    agent, observation = make("ppo"), torch.randn(5, 1)
    how = CorrectionSettings(noise_level=0.3, **FULL)
    agent.generator.manual_seed(0)
    own = step(agent.policy, observation, kind)
    agent.generator.manual_seed(0)
    bell = Bell()
    found = step(CorrectedPolicy(agent.policy, ScoreCorrector(bell), how), observation, kind)
    torch.testing.assert_close(found, own.clamp(-1, 1) / 2)
    assert torch.equal(bell.seen[0], observation)


def test_what_the_policy_remembers_is_delegated():
    agent = make("bc", horizon=3, solver_steps=2)
    policy = CorrectedPolicy(agent.policy, ScoreCorrector(Bell()), CorrectionSettings(**FULL))
    policy.start(5)
    observation = torch.randn(4, 1)
    one = step(policy, observation)
    kept = {k: v.clone() for k, v in policy.acting_state().items()}
    two = step(policy, observation)
    policy.load_acting_state(kept)
    assert torch.equal(step(policy, observation), two)
    policy.start(5)
    assert torch.equal(step(policy, observation), one)


def test_means_are_of_all_actions_since_the_start():
    how = CorrectionSettings(noise_level=0.3, **FULL)
    policy = CorrectedPolicy(constant(0.6), ScoreCorrector(Bell()), how)
    step(policy, torch.zeros(3, 1))
    policy.start(0)
    step(policy, torch.zeros(2, 1))
    policy.policy = constant(0.2)
    step(policy, torch.zeros(6, 1))
    means = policy.means()
    assert means["correction"] == pytest.approx((2 * 0.3 + 6 * 0.1) / 8)
    assert means["support_before"] == pytest.approx((2 * 1.0 + 6 / 3) / 8)
    assert means["support_after"] == pytest.approx((2 * 0.5 + 6 / 6) / 8)


# --- the choice of a step ----------------------------------------------------------------------


def recorded(size, *, goals=False, number=20, length=6):
    """Return trajectories whose states are their own row numbers; actions are ``+-size``."""
    made, row = [], 0
    for _ in range(number):
        state = np.arange(row, row + length + 1, dtype=np.float32)[:, None]
        action = size * np.sign(np.arange(length) % 2 - 0.5).astype(np.float32)[:, None]
        made.append({"observation": state, "action": action} | ({"goal": -state} if goals else {}))
        row += length + 1
    return OfflineDataset.from_trajectories(made)


def acting(action, *, horizon=1, value=None, told=None):
    """Return an agent that always plans this action, with a critic of its chunks or none."""
    agent = make("bc", horizon=horizon, solver_steps=1)

    def act(observation, generator):
        if told is not None:
            told.append(observation)
        return torch.full((len(observation), horizon, 1), action)

    agent.act = act
    if value is not None:
        agent.value = lambda observation, chunk: value(chunk)
    return agent


def choose(agent, dataset, score=None, inverse=None, **given):
    how = CorrectionSettings(noise_level=0.3, max_norm=math.inf)
    corrector = ScoreCorrector(score or Bell(), inverse)
    return choose_step(agent, corrector, dataset, how, **({"holdout": 0.1, "seed": 0} | given))


def slope(factor):
    """Return a critic of slope ``factor``, which is about 1 in size."""
    return lambda chunk: 1.0 + factor * chunk.sum((-2, -1))


@pytest.mark.parametrize(
    ("value", "weight"),
    [
        (None, 1.0),
        (slope(0.0), 1.0),
        (slope(-0.3), 1.0),  # it gains
        (slope(0.3), 0.25),  # 1 % of 1.075 buys 0.036 of the whole step of 0.125
        (slope(10.0), 0.0),
    ],
)
def test_the_largest_step_that_costs_no_value_is_taken(value, weight):
    choice = choose(acting(0.25, value=value), recorded(0.3))
    assert choice.settings.action_weight == weight
    assert choice.settings.state_weight == 0.0
    assert choice.by_value is (value is not None)
    assert choice.supported
    assert [row["action_weight"] for row in choice.tried] == [0.0, 0.1, 0.25, 0.5, 1.0]
    sizes = [row["correction"] for row in choice.tried]
    assert sizes == pytest.approx([0.125 * w for w in (0, 0.1, 0.25, 0.5, 1)], abs=1e-6)
    assert choice.support_of_data == pytest.approx(0.5)


def test_the_change_counts_for_every_action_of_a_chunk():
    value = slope(0.3)
    one = choose(acting(0.25, value=value), recorded(0.3)).tried[2]["value_change"]
    two = choose(acting(0.25, value=value, horizon=2), recorded(0.3)).tried[2]["value_change"]
    assert one == pytest.approx(-0.3 * 0.03125 / 1.075, rel=1e-4)
    assert two == pytest.approx(-2 * 0.3 * 0.03125 / 1.15, rel=1e-4)


def test_actions_must_be_as_well_supported_as_those_of_the_data():
    choice = choose(acting(0.6), recorded(0.35))  # a whole step leads to 0.3, half of it to 0.45
    assert [row["allowed"] for row in choice.tried] == [False] * 4 + [True]
    assert choice.settings.action_weight == 1.0


@pytest.mark.parametrize(("value", "weight"), [(None, 1.0), (slope(0.1), 0.1)])
def test_where_none_is_supported_the_nearest_harmless_one_is_taken(value, weight):
    choice = choose(acting(0.9, value=value), recorded(0.3))
    assert not choice.supported
    assert choice.settings.action_weight == weight


def test_states_are_corrected_where_the_models_can():
    choice = choose(
        acting(0.0), recorded(0.3), BellOfBoth(), lambda s, following: 0.01 * (following - s)
    )
    assert len(choice.tried) == 25
    assert choice.settings.state_weight > 0


def test_only_held_out_states_are_asked_about():
    dataset, told = recorded(0.3), []
    choose(acting(0.25, told=told), dataset)
    rows = dataset.transition_row(range(18 * 6, 20 * 6))
    assert told[0].squeeze(-1).tolist() == rows.tolist()
    choose(acting(0.25, told=told), dataset, states=5)
    assert len(told[1]) == 5
    assert set(told[1].squeeze(-1).tolist()) <= set(rows.tolist())


def test_without_held_out_trajectories_nothing_is_chosen():
    for dataset, holdout in ((recorded(0.3), 0.0), (recorded(0.3, number=1), 0.1)):
        with pytest.raises(ConfigError, match=r"nothing .* held out .* agent\.holdout=0\.05"):
            choose(acting(0.25), dataset, holdout=holdout)


def test_one_who_is_told_a_goal_is_told_where_the_trajectory_ended():
    agent = make("bc", goal_dim=1, goal_conditioned=True, horizon=1)
    told, act = [], agent.act
    agent.act = lambda observation, generator: (
        told.append(observation) or act(observation, generator)
    )
    dataset = recorded(0.3, goals=True)
    choose(agent, dataset)
    ends = np.repeat(dataset.ends[18:], 6)
    assert told[0][:, 1].tolist() == (-ends).tolist()
    with pytest.raises(DatasetError, match=re.escape("have no column 'goal'")):
        choose(agent, recorded(0.3))


def test_agents_that_learn_online_are_judged_by_support_and_left_as_they_are():
    agent = make("ppo")
    before = agent.training_state()["generator"].clone()
    choice = choose(agent, recorded(0.3))
    assert not choice.by_value
    assert torch.equal(agent.training_state()["generator"], before)
    own = step(agent.policy, torch.arange(18 * 7, 19 * 7 - 1).float()[:, None])
    assert choice.tried[0]["support"] == pytest.approx(
        float(own.clamp(-1, 1).abs().mean()) / 0.6, rel=0.2
    )


def test_a_change_is_a_share_of_returns_and_not_of_logits():
    """Near even odds logits are near zero, and a share of them says nothing."""
    agent = acting(0.25, value=lambda chunk: -0.01 * chunk.sum((-2, -1)))
    agent.expected_return = lambda observation, chunk: agent.value(observation, chunk).sigmoid()
    choice = choose(agent, recorded(0.3))
    assert choice.settings.action_weight == 1.0
    assert max(abs(row["value_change"]) for row in choice.tried) < 0.01


def test_an_agent_that_will_explore_is_asked_for_what_it_explores():
    specs = Specs(observation_dim=1, action_dim=1, num_envs=4)
    settings = agents.settings_class("ppo")()
    agent = agents.make("ppo", settings, specs, seed=0)
    by_mode, by_sample = (
        choose(agent, recorded(0.3), deterministic=mode).tried[0]["support"]
        for mode in (True, False)
    )
    assert by_sample > by_mode + 0.1

"""The agent that trains a corrector: what it learns from, what it is, what it is worth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from genpol import agents
from genpol.agent import Specs
from genpol.data.dataset import OfflineDataset
from genpol.data.windows import WindowSampler
from genpol.errors import ConfigError
from genpol.offline import NetworkSettings
from genpol.offline.correction import CorrectedPolicy
from genpol.policies.correction import CorrectionSettings
from genpol.training.evaluation import evaluate

NET = NetworkSettings(hidden=[64, 64], activation="silu", layer_norm="none", init="lecun")
FAST = {"actor": NET, "critic": NET, "learning_rate": 2e-3, "polyak": 0.01}
TINY = {"actor": NetworkSettings(hidden=[8]), "critic": NetworkSettings(hidden=[8])}


def regulator(number, *, spread=0.1, seed=0):
    """Return trajectories of ``x' = x + 0.3 a`` under ``a = -x`` and some noise."""
    draw, made = np.random.default_rng(seed), []
    for _ in range(number):
        x, actions = [0.4 * draw.normal(size=1)], []
        for _ in range(10):
            actions.append((-x[-1] + spread * draw.normal(size=1)).clip(-1, 1))
            x.append(x[-1] + 0.3 * actions[-1])
        made.append(
            {"observation": np.array(x, np.float32), "action": np.array(actions, np.float32)}
        )
    return OfflineDataset.from_trajectories(made)


def make(width=1, actions=1, **options):
    settings = agents.settings_class("cdsa")(**(TINY | options))
    specs = Specs(observation_dim=width, action_dim=actions, num_envs=1)
    return agents.make("cdsa", settings, specs, seed=0)


def learn(dataset, updates, **options):
    agent = make(**options)
    agent.prepare(dataset)
    windows = WindowSampler(dataset, agent.window, seed=0)
    for _ in range(updates):
        agent.update(windows.sample(agent.batch_size))
    return agent


# --- oracle 14: end to end ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """Return correctors of the regulator's data, by where their noise is."""
    torch.set_num_threads(1)
    data = regulator(300)
    return {
        "action": learn(data, 900, noise_on="action", **FAST),
        "joint": learn(data, 500, noise_on="joint", **FAST),
    }


def biased(bias):
    return TensorDictModule(lambda x: bias - x, in_keys=["observation"], out_keys=["action"])


@pytest.fixture
def returns(point_mass):
    """Return a function that evaluates a policy on ``-sum x^2``, always from the same states."""
    env = point_mass(num_envs=100)
    env._reward = lambda x: -x.square().sum(-1, keepdim=True)
    return lambda policy: evaluate(policy, env, episodes=100, seed=3).returns.double()


@pytest.mark.parametrize(("noise_on", "state_weight"), [("action", 0.0), ("joint", 0.25)])
def test_an_over_optimistic_policy_gains_by_correction(trained, returns, noise_on, state_weight):
    how = CorrectionSettings(action_weight=1.0, state_weight=state_weight, noise_level=0.3, steps=3)
    policy = CorrectedPolicy(biased(0.6), trained[noise_on].corrector(), how)
    before, after = returns(biased(0.6)), returns(policy)
    assert after.mean() > 0.5 * before.mean()  # both are negative
    assert torch.quantile(after, 0.1) > 0.5 * torch.quantile(before, 0.1)
    means = policy.means()
    assert means["support_after"] < 0.7 * means["support_before"]
    assert (means["state_step"] > 0.05) == (state_weight > 0)


def test_one_step_helps_a_bad_policy_and_leaves_the_behaviours_mean_alone(trained, returns):
    """With noise on actions: noise on states blurs them, and moves the mean's return by 2 %."""
    how = CorrectionSettings(state_weight=0.0, noise_level=0.3)
    good, bad = (CorrectedPolicy(biased(x), trained["action"].corrector(), how) for x in (0.0, 0.6))
    before, after = returns(biased(0.0)).mean(), returns(good).mean()
    assert abs(after - before) < 0.01 * abs(before)
    assert good.means()["correction"] > 0
    before, after = returns(biased(0.6)), returns(bad)
    assert after.mean() > before.mean() + 0.1
    assert torch.quantile(after, 0.1) > torch.quantile(before, 0.1) + 0.1


def test_acting_alone_it_does_what_the_data_do(trained, returns):
    for agent in trained.values():
        assert returns(agent.policy).mean() > -0.05  # the behaviour's mean: -0.008, idling: -0.1


# --- learning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_on", ["joint", "action"])
def test_an_update_changes_every_network_and_the_average_follows(noise_on):
    agent = make(noise_on=noise_on, polyak=0.5)
    data = regulator(20)
    agent.prepare(data)
    windows = WindowSampler(data, agent.window, seed=0)
    start = copy.deepcopy(agent)
    agent.update(windows.sample(64))
    names = {name.split(".")[0] for name, x in agent.named_parameters() if x.requires_grad}
    assert names == ({"score", "inverse_dynamics"} if noise_on == "joint" else {"score"})
    for name in names:
        pairs = zip(
            getattr(agent, name).parameters(), getattr(start, name).parameters(), strict=True
        )
        assert any(not torch.equal(a, b) for a, b in pairs), name
    once = copy.deepcopy(agent.score)
    agent.update(windows.sample(64))
    parameters = (agent.averaged, start.score, once)
    for average, first, second in zip(*(x.parameters() for x in parameters), strict=True):
        torch.testing.assert_close(average, (first + second) / 2)


def test_losses_fall_and_inverse_dynamics_are_found(trained):
    agent, data = trained["joint"], regulator(50, seed=5)
    batch = WindowSampler(data, agent.window, seed=0).sample(2000)
    _, metrics = agent.loss(batch, agent.draw(2000))
    assert metrics["loss/score"] < 0.97
    assert metrics["loss/inverse_dynamics"] < 1e-3


def test_held_out_trajectories_are_learned_from_by_nothing():
    """Neither the statistics nor the weights would be other with other data there."""
    data = regulator(20)
    columns = {name: values.copy() for name, values in data.columns.items()}
    first = data.starts[19]
    columns["observation"][first:] = 7.0
    columns["action"][first : data.ends[19]] = 0.9
    other = OfflineDataset(columns, data.ends)
    one, two = (learn(x, 5, holdout=0.05).state_dict() for x in (data, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    three = learn(other, 5, holdout=0.0).state_dict()
    assert not torch.equal(one["score.standardizer.mean"], three["score.standardizer.mean"])


def test_statistics_are_those_of_transitions():
    data = regulator(20)
    agent = make(holdout=0.0)
    agent.prepare(data)
    rows = data.transition_row(range(data.num_transitions))
    state, action = (data.columns[name][rows] for name in ("observation", "action"))
    y = np.concatenate((state, action), -1).astype(np.float64)
    moves = (data.columns["observation"][rows + 1] - state).astype(np.float64)
    for score in (agent.score, agent.averaged):
        np.testing.assert_allclose(score.standardizer.mean, y.mean(0), atol=1e-6)
        np.testing.assert_allclose(score.standardizer.scale, y.std(0), rtol=1e-5)
    inverse = agent.inverse_dynamics
    np.testing.assert_allclose(inverse.state.scale, y.std(0)[:1], rtol=1e-5)
    np.testing.assert_allclose(inverse.difference.mean, moves.mean(0), atol=1e-6)
    np.testing.assert_allclose(inverse.difference.scale, moves.std(0), rtol=1e-5)


def test_statistics_that_were_loaded_stay():
    agent = make()
    agent.prepare(regulator(20))
    other = make()
    other.load_state_dict(agent.state_dict())
    other.prepare(regulator(20, spread=0.3, seed=1))
    assert torch.equal(other.score.standardizer.scale, agent.score.standardizer.scale)


def test_training_goes_on_bit_for_bit():
    data = regulator(20)
    agent = learn(data, 3)
    weights, state = copy.deepcopy((agent.state_dict(), agent.training_state()))
    batch = WindowSampler(data, agent.window, seed=4).sample(32)
    agent.update(batch)
    other = make()
    other.load_state_dict(weights)
    other.load_training_state(state)
    other.update(batch)
    one, two = agent.state_dict(), other.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_averaged_score_is_what_corrects():
    agent = make()
    assert agent.corrector().score is agent.averaged
    assert make(noise_on="action").corrector().inverse_dynamics is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 5}, r"agent\.horizon = 5: single actions are corrected"),
        ({"normalize_observations": True}, "standardises states and actions anyway"),
        ({"noise_on": "actions"}, "Did you mean 'action'"),
        ({"min_noise": 0.9}, r"agent\.max_noise = 0\.5: must be >= 0\.9"),
        ({"holdout": 0.8}, r"agent\.holdout = 0\.8: must lie in"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)

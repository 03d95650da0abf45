"""Toy data from which every offline agent must learn in seconds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genpol import agents
from genpol.agent import Specs
from genpol.data.dataset import OfflineDataset
from genpol.data.goals import GoalSettings
from genpol.data.windows import WindowSampler
from genpol.offline import NetworkSettings
from genpol.policies.guidance import GuidanceSettings

NETS = {
    "actor": NetworkSettings(hidden=[64, 64], layer_norm="none"),
    "critic": NetworkSettings(hidden=[64, 64]),
}


def two_ways(trajectories=100, steps=10):
    """Return data of someone who goes left or right at random; where to go, the state says.

    The reward is ``a sign(s)``: the behaviour earns nothing, the best of its two modes 0.7.
    """
    draw = np.random.default_rng(0)
    made = []
    for _ in range(trajectories):
        state = draw.normal(size=(steps + 1, 2)).astype(np.float32)
        action = draw.choice([-0.7, 0.7], size=(steps, 1)) + 0.05 * draw.normal(size=(steps, 1))
        made.append(
            {
                "observation": state,
                "action": action.astype(np.float32),
                "reward": (action[:, 0] * np.sign(state[:-1, 0])).astype(np.float32),
                "terminated": np.zeros(steps, bool),
            }
        )
    return OfflineDataset.from_trajectories(made)


def learn(name, dataset, specs, updates, **options):
    settings = agents.settings_class(name)(
        **(NETS | {"batch_size": 64, "learning_rate": 1e-3, "gamma": 0.0} | options)
    )
    agent = agents.make(name, settings, specs, seed=0)
    windows = WindowSampler(dataset, agent.window, seed=0)
    for _ in range(updates):
        agent.update(windows.sample(agent.batch_size))
    return agent


def earned(agent):
    state = torch.randn(400, 2, generator=torch.Generator().manual_seed(1))
    action = agent.act(state, torch.Generator().manual_seed(2))[:, 0, 0]
    return (action * state[:, 0].sign()).mean().item(), action


def test_cloning_keeps_both_modes():
    specs = Specs(observation_dim=2, action_dim=1, num_envs=1)
    agent = learn("bc", two_ways(), specs, 600, learning_rate=3e-3, batch_size=128)
    reward, action = earned(agent)
    assert abs(reward) < 0.15
    assert (action.abs() > 0.4).double().mean() > 0.8
    assert 0.3 < (action > 0).double().mean() < 0.7


@pytest.mark.parametrize(
    ("name", "options", "enough"),
    [
        pytest.param("iql", {}, 0.5, marks=pytest.mark.slow),
        ("fql", {"alpha": 0.3}, 0.5),
        pytest.param("qc", {"horizon": 1, "best_of": 8}, 0.55, marks=pytest.mark.slow),
        ("qgf", {"horizon": 1, "guidance": GuidanceSettings(weight=1.0)}, 0.3),
        pytest.param(
            "fisher_decorator",  # a shift from one mode to the other is dear
            {"budget": 20.0, "multiplier_learning_rate": 1e-2, "metric_rows": 16},
            0.4,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "qgf",
            {"horizon": 1, "guidance": GuidanceSettings(weight=1.0, best_of=4)},
            0.5,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_better_mode_is_found(name, options, enough):
    specs = Specs(observation_dim=2, action_dim=1, num_envs=1)
    assert earned(learn(name, two_ways(), specs, 600, **options))[0] > enough


LENGTH, GAMMA = 8, 0.9
CHAIN = Specs(observation_dim=LENGTH, action_dim=1, num_envs=1, goal_dim=LENGTH)
FAST = {"gamma": GAMMA, "batch_size": 128, "learning_rate": 3e-3, "polyak": 0.05}


def chain(draw, steps, *, right):
    """Return a walk along a chain of one-hot states that goes right with this probability."""
    place, action = [0 if right == 1 else int(draw.integers(LENGTH))], []
    for _ in range(steps):
        move = 1 if draw.random() < right else -1
        action.append([0.8 * move])
        place.append(min(max(place[-1] + move, 0), LENGTH - 1))
    state = np.eye(LENGTH, dtype=np.float32)[place]
    return {"observation": state, "action": np.array(action, np.float32), "goal": state.copy()}


@pytest.mark.parametrize(
    ("horizon", "chunk", "distil"),
    [
        (3, 1, True),
        *(
            pytest.param(*sizes, False, marks=pytest.mark.slow)
            for sizes in ((1, 1), (3, 1), (3, 3))
        ),
    ],
)
def test_values_on_a_deterministic_chain_are_the_discounted_distance(horizon, chunk, distil):
    """One-step, n-step, chunked and decoupled learning agree, where each state comes once.

    Roughly, as networks do, and over one bootstrap at most; tests of tabular values are exact, and
    go further.
    """
    draw = np.random.default_rng(0)
    walk = chain(draw, LENGTH - 1, right=1)
    data = OfflineDataset.from_trajectories([walk])
    agent = learn(
        "dqc",
        data,
        CHAIN,
        600 if horizon > 1 else 1800,
        horizon=horizon,
        chunk=chunk,
        distil=distil,
        goals=GoalSettings(current=0.3, future=0.7, random=0.0),
        backup_quantile=0.5,  # there is one action a state; a higher one follows the net's noise
        **FAST,
    )
    known = LENGTH - 1 - horizon  # states at which windows begin
    states = torch.eye(LENGTH)[:known]
    for goal in range(known):
        together = torch.cat((states[: goal + 1], states[goal].expand(goal + 1, -1)), -1)
        right = torch.full((goal + 1, horizon, 1), 0.8)
        found = [agent.state_value(together), *agent.partial(together, right[:, :chunk])]
        found += agent.critic(together, right) if agent.critic is not None else ()
        expected = GAMMA ** torch.arange(goal, -1, -1)
        for logits in found:
            torch.testing.assert_close(logits.sigmoid(), expected, atol=0.06, rtol=0)


def test_short_plans_under_long_critics_go_where_the_goal_is():
    draw = np.random.default_rng(0)
    data = OfflineDataset.from_trajectories([chain(draw, 12, right=2 / 3) for _ in range(120)])
    agent = learn("dqc", data, CHAIN, 600, horizon=3, chunk=1, **FAST)
    states = torch.eye(LENGTH)
    for goal, sign in ((LENGTH - 1, 1.0), (0, -1.0)):
        together = torch.cat((states, states[goal].expand(LENGTH, -1)), -1)[2:-1]
        action = agent.act(together, torch.Generator().manual_seed(0))[:, 0, 0]
        assert (sign * action > 0).all()

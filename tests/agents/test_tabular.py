"""Values of DQC and of implicit Q-learning where tables stand for networks, against closed forms.

Each loss is then convex in each entry of its table, so that the sign of its slope tells on which
side the minimum lies: what an agent's own loss makes of a world is found exactly, without training.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from genpol import agents
from genpol.agent import Specs
from genpol.data.dataset import OfflineDataset
from genpol.data.goals import relabel
from genpol.data.windows import WindowSampler
from genpol.offline import NetworkSettings

GAMMA = 0.9
SMALL = {"actor": NetworkSettings(hidden=[2]), "critic": NetworkSettings(hidden=[2])}
LOWEST = -20.0  # a value of 2e-9, or a return below all that occur here


class Table(torch.nn.Module):
    """A number for each row of inputs, the lowest for those never seen; members are equal.

    Its entries may be those of several tables, ``[members, tables, entries]``: each then answers an
    equal part of a batch.
    """

    def __init__(self, *inputs, members=1):
        super().__init__()
        self.rows = torch.cat([x.flatten(1) for x in inputs], -1).unique(dim=0)
        self.entries = torch.nn.Parameter(torch.full((members, 1, len(self.rows)), LOWEST))

    def forward(self, observation, action=None, *, frozen=False):
        if action is None:
            return self.at(observation).squeeze(0)
        flat = action.flatten(-2)
        return self.at(torch.cat((observation.expand(*flat.shape[:-1], -1), flat), -1))

    def at(self, rows):
        same = (rows[..., None, :] == self.rows).all(-1)
        tables = self.entries.shape[1]
        table = torch.arange(tables).repeat_interleave(rows.shape[-2] // tables)
        found = self.entries[:, table, same.int().argmax(-1)]
        return torch.where(same.any(-1), found, LOWEST)


def settle(agent, batch, table, tables=100):
    """Set the entries of a table to where the agent's loss is least."""
    batch = torch.cat([batch] * tables)
    draws = agent.draw(len(batch))
    low, width = torch.full_like(table.entries.data, -20.0), 40.0
    for _ in range(4):
        width = width / (tables + 1)
        steps = torch.arange(1, tables + 1)[:, None] * width
        table.entries = torch.nn.Parameter(low + steps)
        (slope,) = torch.autograd.grad(agent.loss(batch, draws)[0], table.entries)
        low = low + (slope < 0).sum(1, keepdim=True) * width
    table.entries = torch.nn.Parameter(low + width / 2)


# --- DQC ---------------------------------------------------------------------------------------


def walked(walks, goal, horizon, num_states):
    """Return all windows of walks until they reach a goal, and the goal's own.

    A walk is a list of states and one of actions; what is done behind the goal is 0.
    """
    eye, windows = torch.eye(num_states), []
    for states, actions in walks:
        arrival = torch.tensor([states.index(goal)])
        padded = torch.tensor(actions[: int(arrival)] + [0.0] * horizon)
        for start in range(int(arrival) + 1):
            reward, discount, taken = relabel(
                torch.tensor([start]), arrival, steps=horizon, gamma=GAMMA, rule="reach"
            )
            window = {
                "observation": eye[states[start]][None],
                "goal": eye[goal][None],
                "action": padded[start : start + horizon].view(1, horizon, 1),
                "reward": reward,
                "discount": discount,
                "valid": torch.ones(1, horizon, dtype=torch.bool),
                "next": {"observation": eye[states[start + int(taken)]][None]},
            }
            windows.append(TensorDict(window, [1]))
    return torch.cat(windows)


def tabular(batch, *, horizon, chunk=1, distil=True, **options):
    """Return an agent with tables for all that its windows ask of its critics."""
    settings = agents.settings_class("dqc")(
        horizon=horizon, chunk=chunk, distil=distil, gamma=GAMMA, **(SMALL | options)
    )
    width = batch["observation"].shape[1]
    specs = Specs(observation_dim=width, action_dim=1, num_envs=1, goal_dim=width)
    agent = agents.make("dqc", settings, specs, seed=0)
    observation, action = torch.cat((batch["observation"], batch["goal"]), -1), batch["action"]
    if distil:
        agent.critic = Table(observation, action, members=2)
    agent.partial = Table(observation, action[:, :chunk], members=2)
    agent.averaged = Table(observation, action[:, :chunk], members=2)
    agent.state_value = Table(observation)
    return agent


def sweep(agent, batch):
    """Learn critics, what they distil into, and the state value, each to the end."""
    if agent.critic is not None:
        settle(agent, batch, agent.critic)
    settle(agent, batch, agent.partial)
    agent.averaged.entries.data = agent.partial.entries.data
    settle(agent, batch, agent.state_value)


def value(agent, part, state, goal, *actions):
    """Return the probability that a part of an agent gives to a chunk, or to a state alone."""
    width = agent.specs.observation_dim
    together = torch.eye(width)[[state, goal]].view(1, -1)
    chunk = (torch.tensor(actions).view(1, -1, 1),) if actions else ()
    least, most = getattr(agent, part)(together, *chunk).sigmoid().aminmax()
    assert least == most  # members agree
    return most.item()


AGREEING = {
    "one-step": {"horizon": 1, "distil": False},
    "n-step": {"horizon": 3, "distil": False},
    "chunked": {"horizon": 3, "chunk": 3, "distil": False},
    "decoupled": {"horizon": 3, "chunk": 1},
}


@pytest.mark.parametrize("kind", AGREEING)
def test_all_values_of_a_chain_are_powers_of_the_distance(kind):
    """The last sweep of the known number makes them so: the distance over the horizon.

    That number is right where the goal's own value, 1, is known; learning it takes one more.
    """
    length, options = 9, AGREEING[kind]
    horizon = options["horizon"]
    walk = (list(range(length + 1)), [0.8] * length)
    batch = walked([walk], length, horizon, length + 1)
    agent = tabular(batch, **options)
    observation = torch.cat((batch["observation"], batch["goal"]), -1)
    expected = GAMMA ** torch.arange(length, -1, -1)

    def furthest():
        """Return the largest error of any value."""
        chunks = {"critic": batch["action"], "partial": batch["action"][:, : agent.settings.chunk]}
        found = [agent.state_value(observation)[None]]
        found += [getattr(agent, x)(observation, chunks[x]) for x in chunks if getattr(agent, x)]
        return (torch.cat(found).sigmoid() - expected).abs().max().item()

    agent.state_value.entries.data[..., (agent.state_value.rows == observation[-1]).all(-1)] = 20.0
    for _ in range(length // horizon - 1):
        sweep(agent, batch)
    assert furthest() > 0.1
    sweep(agent, batch)
    assert furthest() < 1e-5


# From state 0 one goes to 1, and from there a quarter to the goal, 2; the others wait there once.
R, S = 1.0, -1.0
FORK = [([0, 1, 2], [R, R]), *[([0, 1, 1, 2], [R, S, R])] * 3]


def forked(**options):
    batch = walked(FORK, 2, options["horizon"], 3)
    agent = tabular(batch, **options)
    for _ in range(1 + 3 // options["horizon"]):  # 3 steps to the goal, and its own value
        sweep(agent, batch)
    assert value(agent, "state_value", 1, 2) == pytest.approx(0.9, abs=1e-5)
    return agent


@pytest.mark.parametrize(("kappa", "expected"), [(0.5, 0.74925), (0.8, 0.77529), (0.93, 0.79508)])
def test_a_fork_is_distilled_to_the_known_values(kappa, expected):
    agent = forked(horizon=2, distillation_expectile=kappa)
    assert value(agent, "critic", 0, 2, R, R) == pytest.approx(0.81, abs=1e-5)
    assert value(agent, "critic", 0, 2, R, S) == pytest.approx(0.729, abs=1e-5)
    for part in ("partial", "averaged"):
        assert value(agent, part, 0, 2, R) == pytest.approx(expected, abs=1e-5)
    assert value(agent, "state_value", 0, 2) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("horizon", "chunk", "actions", "expected"),
    [
        (1, 1, [R], 0.81),  # one step is optimistic: it goes on from the best that is known
        (2, 1, [R], 0.74925),  # more steps are those of the data
        (2, 2, [R, R], 0.81),
        (2, 2, [R, S], 0.729),
    ],
)
def test_at_a_fork_one_step_is_optimistic_and_more_steps_are_not(horizon, chunk, actions, expected):
    agent = forked(horizon=horizon, chunk=chunk, distil=False)
    assert value(agent, "partial", 0, 2, *actions) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_whole_chunks_are_distilled_into_what_they_are_worth(kappa):
    """Chance alone decides what the same chunk leads to; there is nothing to be optimistic of."""
    walks = [([0, 1, 3], [R, R]), ([0, 2, 2, 3], [R, R, R])]
    batch = walked(walks, 3, 2, 4)
    agent = tabular(batch, horizon=2, chunk=2, distillation_expectile=kappa)
    for _ in range(2):
        sweep(agent, batch)
    for part in ("critic", "partial"):
        expected = (0.81 + 0.81 * 0.9) / 2
        assert value(agent, part, 0, 3, R, R) == pytest.approx(expected, abs=1e-5)


def test_each_partial_critic_follows_its_own_chunk_critic():
    batch = walked(FORK, 2, 2, 3)
    agent = tabular(batch, horizon=2, distillation_expectile=0.8)

    class Constant(torch.nn.Module):
        def forward(self, observation, action):
            return torch.tensor([[-1.0], [2.0]]).expand(2, len(observation))

    agent.critic = Constant()
    settle(agent, batch, agent.partial)
    expected = torch.tensor([-1.0, 2.0])[:, None, None].expand_as(agent.partial.entries)
    torch.testing.assert_close(agent.partial.entries.data, expected, atol=1e-4, rtol=0)


class Given(torch.nn.Module):
    """A model of behaviour whose samples are the noise that it is given."""

    def __init__(self, horizon):
        super().__init__()
        self.horizon = horizon

    def sample(self, observation, noise):
        return noise


def planned(agent, state, goal, candidates):
    """Return which of some chunks an agent takes."""
    agent.flow = Given(agent.settings.chunk)
    together = torch.eye(agent.specs.observation_dim)[[state, goal]].view(1, -1)
    noise = torch.tensor(candidates).view(len(candidates), 1, -1, 1)
    return agent.plan(together, noise).flatten().tolist()


def test_plans_that_react_keep_what_chunks_promise_and_open_loop_ones_do_not():
    """Chance leads to 1, where one must go left, or 2, where one must go right: the data do."""
    left, right, go = -1.0, 1.0, 0.5
    walks = [([0, 1, 3], [go, left]), ([0, 2, 3], [go, right])]
    batch = walked(walks, 3, 2, 4)

    def learned(chunk):
        agent = tabular(batch, horizon=2, chunk=chunk)
        for _ in range(2):
            sweep(agent, batch)
        return agent

    right_way = {1: left, 2: right}
    whole, short = learned(2), learned(1)
    for agent in (whole, short):
        for action in (left, right):
            assert value(agent, "critic", 0, 3, go, action) == pytest.approx(0.81, abs=1e-5)
    assert value(short, "partial", 0, 3, go) == pytest.approx(0.81, abs=1e-5)
    _, second = planned(whole, 0, 3, [[go, left], [go, right]])
    blind = sum(0.5 * GAMMA**2 * (second == way) for way in right_way.values())
    assert blind == pytest.approx(0.405)
    assert planned(short, 0, 3, [[left], [right], [go]]) == [go]
    seen = [
        planned(short, place, 3, [[go], [right], [left]]) == [x] for place, x in right_way.items()
    ]
    assert sum(0.5 * GAMMA**2 * x for x in seen) == pytest.approx(0.81)


# --- implicit Q-learning -----------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 3])
def test_chunks_of_a_chain_are_worth_minus_the_discounted_steps_left(horizon):
    """Whatever the horizon; windows that leave the data count for nothing."""
    distance = 7
    states = torch.eye(distance + 1)[list(range(distance + 1)) + [distance] * 2 * horizon]
    steps = len(states) - 1
    data = OfflineDataset.from_trajectories(
        [
            {
                "observation": states.numpy(),
                "action": torch.full((steps, 1), 0.8).numpy(),
                "reward": -(torch.arange(steps) < distance).float().numpy(),
                "terminated": torch.zeros(steps, dtype=torch.bool).numpy(),
            }
        ]
    )
    settings = agents.settings_class("qgf")(horizon=horizon, gamma=GAMMA, **SMALL)
    specs = Specs(observation_dim=distance + 1, action_dim=1, num_envs=1)
    agent = agents.make("qgf", settings, specs, seed=0)
    sampler = WindowSampler(data, agent.window, seed=0)
    batch = sampler.at(torch.arange(sampler.num_starts))
    straddling = batch["weight"] == 0
    assert straddling.sum() == horizon - 1
    batch["reward"][straddling] = 1e3
    observation, values = batch["observation"], agent.values
    values.critic = Table(observation, batch["action"], members=2)
    values.averaged = Table(observation, batch["action"], members=2)
    values.value = Table(observation)
    values.value.entries.data[..., (values.value.rows == states[-1]).all(-1)] = 0.0
    for _ in range(-(-distance // horizon)):
        settle(agent, batch, values.critic)
        values.averaged.entries.data = values.critic.entries.data
        settle(agent, batch, values.value)
    left = torch.arange(distance, -1, -1)
    expected = -(1 - GAMMA**left) / (1 - GAMMA)
    chunks = torch.full((distance + 1, horizon, 1), 0.8)
    places = torch.eye(distance + 1)
    torch.testing.assert_close(values.value(places), expected, atol=1e-4, rtol=0)
    for critic in values.critic(places, chunks):
        torch.testing.assert_close(critic, expected, atol=1e-4, rtol=0)

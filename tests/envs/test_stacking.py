"""An environment that shows its last observations side by side."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from genpol import envs
from genpol.envs import MujocoSettings, make_chunked
from genpol.envs.stacking import StackedEnv
from genpol.errors import ConfigError

STEPS = 3


def act(env, value=0.5):
    action = torch.full(env.action_spec.shape, value)
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def parts(observation):
    return observation.unflatten(-1, (STEPS, -1))


@pytest.fixture
def pair(point_mass):
    """Return an environment with a history, and the same without."""
    return StackedEnv(point_mass(num_envs=2), STEPS), point_mass(num_envs=2)


def test_an_episode_begins_with_its_first_observation_repeated(pair):
    stacked, plain = pair
    first = plain.reset()["observation"]
    found = parts(stacked.reset()["observation"])
    assert all(torch.equal(found[:, i], first) for i in range(STEPS))


def test_the_last_observations_stand_in_order_the_oldest_first(pair):
    stacked, plain = pair
    seen = [plain.reset()["observation"]] * STEPS
    stacked.reset()
    for step in range(5):
        seen.append(act(plain, 0.1 * step)["observation"])
        found = act(stacked, 0.1 * step)["observation"]
        assert torch.equal(parts(found), torch.stack(seen[-STEPS:], dim=1))


def test_environments_whose_episode_is_over_begin_anew(pair):
    stacked, _ = pair
    stacked.reset()
    state = act(stacked)
    before = state["observation"].clone()
    after = stacked.reset(state.set("_reset", torch.tensor([[False], [True]])))["observation"]
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    first = parts(after)[1]
    assert torch.equal(first, first[-1].expand(STEPS, -1))


def test_the_end_of_an_episode_is_seen_before_the_next_begins(pair):
    stacked, plain = pair
    state, plain_state = stacked.reset(), plain.reset()
    for _ in range(plain.max_episode_steps):
        action = torch.full((2, 1), 0.1)
        step, state = stacked.step_and_maybe_reset(state.set("action", action))
        plain_step, plain_state = plain.step_and_maybe_reset(plain_state.set("action", action))
    assert step["next", "done"].all()
    last = parts(step["next", "observation"])
    assert torch.equal(last[:, -1], plain_step["next", "observation"])
    assert not torch.equal(last[:, 0], last[:, -1])
    again = parts(state["observation"])
    assert torch.equal(again, plain_state["observation"].unsqueeze(1).expand_as(again))


def test_specs_are_kept(pair):
    stacked, plain = pair
    assert stacked.observation_spec["observation"].shape == (2, STEPS)
    assert stacked.action_spec == plain.action_spec
    for name in ("name", "max_episode_steps", "action_repeat", "control_period_s"):
        assert getattr(stacked, name) == getattr(plain, name)
    for state in (stacked.reset(), act(stacked)):
        assert stacked.observation_spec.is_in(state.select(*stacked.observation_spec.keys()))


def test_goals_are_not_stacked(point_mass_to_goal):
    stacked = StackedEnv(point_mass_to_goal(num_envs=2), STEPS)
    state = stacked.reset()
    assert (state["observation"].shape, state["goal"].shape) == ((2, STEPS), (2, 1))
    assert "success" in act(stacked).keys()  # noqa: SIM118 - a TensorDict


def test_groups_are_refused(point_mass):
    env = point_mass(num_envs=2)
    env.group_size = 2
    with pytest.raises(ConfigError, match=r"leave env\.group_size at 1"):
        StackedEnv(env, 2)


def make(**options):
    return envs.make(MujocoSettings(name="PointMassEasy", **options), num_envs=2, seed=0)


def test_it_is_made_by_a_setting():
    env = make(observation_steps=STEPS)
    assert isinstance(env, StackedEnv)
    assert env.reset()["observation"].shape == (2, STEPS * 4)
    assert env.num_diverged == 0
    with pytest.raises(ConfigError, match=r"env\.observation_steps = 0"):
        make(observation_steps=0)


def test_a_simulation_goes_on_with_its_history():
    env = make(observation_steps=STEPS)
    env.reset()
    act(env)
    here = act(env, 0.3)["observation"]
    state = {k: x.clone() for k, x in env.state_dict_of_simulation().items()}
    wanted = act(env)["observation"]
    other = make(observation_steps=STEPS)
    other.load_simulation(state)
    assert torch.equal(other.reset()["observation"], here)
    assert torch.equal(act(other)["observation"], wanted)
    later = other.reset()["observation"]
    assert torch.equal(parts(later)[:, 0], parts(later)[:, -1])


def test_chunks_are_carried_out_with_a_history():
    chunked = make_chunked(lambda **options: make(observation_steps=STEPS), 2, 2)
    plain = make()
    seen = [chunked.reset()["observation"], plain.reset()["observation"]]
    assert torch.equal(parts(seen[0])[:, -1], seen[1])
    after = [act(plain)["observation"] for _ in range(2)]
    found = parts(act(chunked)["observation"])
    assert torch.equal(found, torch.stack([seen[1], *after], dim=1))

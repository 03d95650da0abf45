"""Groups of environments that set out from one state, and rewards in terms."""

from __future__ import annotations

import pytest
import torch

from genpol import envs
from genpol.envs import MujocoSettings
from genpol.errors import ConfigError


def make(name="HopperStand", num_envs=8, seed=0, training=True, **settings):
    return envs.make(
        MujocoSettings(name=name, num_threads=1, **settings),
        num_envs=num_envs,
        seed=seed,
        training=training,
    )


def advance(env, data, steps, generator):
    """Take random steps; return the last step's outcome and where the next one starts."""
    for _ in range(steps):
        shape = env.action_spec.shape
        data["action"] = 2 * torch.rand(shape, generator=generator) - 1
        step, data = env.step_and_maybe_reset(data)
    return step["next"], data


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def groups(x):
    return x.view(2, 4, -1)


def test_a_group_starts_in_one_state_and_groups_differ():
    env = make(group_size=4, group_steps=5)
    first = groups(env.reset()["observation"])
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert not torch.equal(first[0, 0], first[1, 0])


def test_the_group_follows_its_first_environment(generator):
    env = make(group_size=4, group_steps=5)
    after, data = advance(env, env.reset(), 5, generator)
    assert after["truncated"].all()
    assert not after["terminated"].any()
    reached, following = groups(after["observation"]), groups(data["observation"])
    assert not torch.equal(reached[0, 0], reached[0, 1])  # actions differed
    assert torch.equal(following, reached[:, :1].expand_as(reached))


def test_equal_actions_then_lead_to_equal_states(generator):
    env = make(group_size=4, group_steps=5)
    _, data = advance(env, env.reset(), 5, generator)
    for _ in range(4):
        action = 2 * torch.rand(2, 1, 4, generator=generator) - 1
        data["action"] = action.expand(2, 4, 4).reshape(8, 4)
        step, data = env.step_and_maybe_reset(data)
        reached = groups(step["next", "observation"])
        # Warm starts of the solver are copied with the state.
        assert torch.equal(reached, reached[:, :1].expand_as(reached))


def test_between_two_starts_nothing_is_truncated(generator):
    env = make(group_size=4, group_steps=5)
    after, _ = advance(env, env.reset(), 4, generator)
    assert not after["truncated"].any()


def test_the_leaders_episode_goes_on_and_ends_in_a_new_start(generator):
    env = make(group_size=4, group_steps=5, train_episode_steps=10, num_envs=8)
    env._stagger = False
    data = env.reset()
    clocks = []
    for _ in range(3):
        after, data = advance(env, data, 5, generator)
        clocks.append(env._elapsed.unique().tolist())
    assert clocks == [[5], [0], [5]]
    reached = groups(after["observation"])
    assert torch.equal(groups(data["observation"])[0, 0], reached[0, 0])


def test_a_group_keeps_in_step_where_all_its_episodes_end_at_once(generator):
    # 8 steps an episode, which end between the starts of groups at multiples of 5.
    env = make(num_envs=4, group_size=4, group_steps=5, train_episode_steps=8)
    data = env.reset()
    data = env.reset()  # collectors reset once more
    env._elapsed.zero_()  # clocks were staggered
    for _ in range(6):
        start = data["observation"]
        assert torch.equal(start, start[:1].expand_as(start))
        after, data = advance(env, data, 5, generator)
        assert after["done"].all()


def test_evaluation_has_no_groups():
    observation = make(group_size=4, group_steps=5, training=False).reset()["observation"]
    assert len(observation.unique(dim=0)) == 8


def test_a_saved_simulation_goes_on_in_its_groups(generator):
    env = make(group_size=4, group_steps=5)
    _, data = advance(env, env.reset(), 7, generator)
    state, draws = env.state_dict_of_simulation(), generator.get_state()
    expected, _ = advance(env, data, 3, generator)
    other = make(group_size=4, group_steps=5, seed=9)
    other.load_simulation(state)
    generator.set_state(draws)
    found, _ = advance(other, other.reset(), 3, generator)
    assert found["truncated"].all()
    assert torch.equal(found["observation"], expected["observation"])


@pytest.mark.parametrize("settings", [{"group_size": 3, "group_steps": 5}, {"group_size": 4}])
def test_groups_that_do_not_fit_are_refused(settings):
    with pytest.raises(ConfigError, match="group_size = "):
        make(**settings)


# --- rewards in terms --------------------------------------------------------------------------


def test_the_product_of_the_humanoids_terms_is_its_reward(generator):
    whole, apart = (
        make("HumanoidWalk", num_envs=4, training=training, vector_reward=True)
        for training in (False, True)
    )
    apart._stagger = False
    assert apart.reward_terms == ("stand", "upright", "move", "small_control")
    start, draws = whole.reset(), generator.get_state()
    rewards, _ = advance(whole, start, 3, generator)
    generator.set_state(draws)
    terms, _ = advance(apart, apart.reset(), 3, generator)
    assert rewards["reward"].shape == (4, 1)
    assert terms["reward"].shape == apart.reward_spec.shape == (4, 4)
    torch.testing.assert_close(terms["reward"].prod(-1, keepdim=True), rewards["reward"])
    assert ((terms["reward"] >= 0) & (terms["reward"] <= 1)).all()


def test_a_reward_without_terms_is_said_so():
    with pytest.raises(ConfigError, match="HumanoidWalk"):
        make(vector_reward=True)

"""An environment whose actions are chunks."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from genpol import envs
from genpol.envs import MujocoSettings, make_chunked


def make(steps=3, horizon=4, num_envs=2, name="PointMassEasy"):
    def inner(**options):
        return envs.make(MujocoSettings(name=name), **options)

    return make_chunked(inner, horizon, steps, num_envs=num_envs, seed=0), inner(
        num_envs=num_envs, seed=0
    )


def act(env, action):
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def test_a_step_is_so_many_steps_of_the_environment_within():
    chunked, plain = make()
    assert torch.equal(chunked.reset()["observation"], plain.reset()["observation"])
    chunk = torch.rand(2, 4, plain.action_spec.shape[-1]) * 2 - 1
    after = act(chunked, chunk.flatten(-2))
    reward = torch.zeros(2, 1)
    for index in range(3):
        inner = act(plain, chunk[:, index])
        reward += inner["reward"]
    assert torch.equal(after["observation"], inner["observation"])
    torch.testing.assert_close(after["reward"], reward)


def test_what_a_chunk_lasts_is_told():
    chunked, plain = make()
    assert chunked.action_repeat == 3 * plain.action_repeat
    assert chunked.control_period_s == pytest.approx(3 * plain.control_period_s)
    assert chunked.max_episode_steps == -(-plain.max_episode_steps // 3)
    assert chunked.action_spec.shape == (2, 4 * plain.action_spec.shape[-1])


def test_an_episode_that_ends_within_a_chunk_ends_the_step():
    chunked, plain = make(steps=4)
    chunked.reset()
    plain.reset()
    # The second environment has one step left.
    state = chunked.state_dict_of_simulation()
    clock = next(k for k, x in state.items() if "elapsed" in k or "step" in k)
    state[clock] = torch.tensor([0, plain.max_episode_steps - 1])
    for env in (chunked, plain):
        env.load_simulation(state)
        env.reset()
    action = torch.full((2, 4, plain.action_spec.shape[-1]), 0.3)
    step = TensorDict({"action": action.flatten(-2)}, [2])
    stepped, again = chunked.step_and_maybe_reset(step)
    after, once = stepped["next"], act(plain, action[:, 0])
    assert after["done"].squeeze(-1).tolist() == [False, True]
    assert torch.equal(after["observation"][1], once["observation"][1])
    assert torch.equal(after["reward"][1], once["reward"][1])
    assert not torch.equal(after["observation"][0], once["observation"][0])
    assert torch.equal(again["observation"][0], after["observation"][0])
    assert again["is_init"].squeeze(-1).tolist() == [False, True]


def test_a_simulation_between_chunks_is_restored():
    chunked, _ = make()
    chunked.reset()
    action = torch.full((2, 8), 0.2)
    act(chunked, action)
    state = chunked.state_dict_of_simulation()
    wanted = act(chunked, action)["observation"]
    other, _ = make()
    other.load_simulation(state)
    other.reset()
    assert torch.equal(act(other, action)["observation"], wanted)

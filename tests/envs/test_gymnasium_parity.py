"""The native tasks against gymnasium's own: same state and actions, same numbers."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from tensordict import TensorDict

from genpol.envs.mujoco import registry
from genpol.envs.mujoco.env import MujocoEnv

TASKS = sorted(name for name in registry.tasks() if name.endswith("-v5"))
NUM_ENVS = 3
STEPS = 200
FIRST_CLOCK = 150  # steps before the time limit at which the first episodes start
FORCED_RESETS = {(60, 1), (61, 2), (130, 1)}  # (step, environment), in the middle of an episode


def make(name: str, *, num_envs: int, seed: int = 0) -> MujocoEnv:
    return MujocoEnv(name, registry.tasks()[name](), num_envs=num_envs, seed=seed)


def oracle(name: str) -> TimeLimit:
    env = gymnasium.make(name, disable_env_checker=True)
    assert isinstance(env, TimeLimit)
    return env


def restart(reference: TimeLimit, env: MujocoEnv, index: int) -> np.ndarray:
    """Put ``reference`` where simulation ``index`` stands and return what it observes."""
    reference.reset(seed=0)
    reference.unwrapped.set_state(env.sim.qpos[index].numpy(), env.sim.qvel[index].numpy())
    return reference.unwrapped._get_obs()


def assert_observation(env: MujocoEnv, delivered: torch.Tensor, i: int, expected: np.ndarray):
    np.testing.assert_array_equal(delivered[i].numpy(), expected.astype(np.float32))
    np.testing.assert_allclose(env.task.observe(env.sim)[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_steps_equal_gymnasium(name: str) -> None:
    env = make(name, num_envs=NUM_ENVS)
    references = [oracle(name) for _ in range(NUM_ENVS)]
    root = env.reset()
    env._elapsed[:] = env.max_episode_steps - min(FIRST_CLOCK, env.max_episode_steps)
    for i, reference in enumerate(references):
        assert_observation(env, root["observation"], i, restart(reference, env, i))
        reference._elapsed_steps = int(env._elapsed[i])
    generator = torch.Generator().manual_seed(1)
    ends = 0
    for step in range(STEPS):
        action = torch.rand(env.action_spec.shape, generator=generator) * 2 - 1
        result = env.step(TensorDict({"action": action}, env.batch_size))["next"]
        reset = torch.zeros(NUM_ENVS, 1, dtype=torch.bool)
        for i, reference in enumerate(references):
            # Controls are float64 in the actuators' units; gymnasium squares what it is given.
            observation, reward, terminated, truncated, _ = reference.step(env.sim.ctrl[i].numpy())
            np.testing.assert_array_equal(env.sim.qpos[i], reference.unwrapped.data.qpos)
            np.testing.assert_array_equal(env.sim.qvel[i], reference.unwrapped.data.qvel)
            assert_observation(env, result["observation"], i, observation)
            assert result["reward"][i].item() == np.float32(reward)
            assert env.task.reward(env.sim)[i].item() == pytest.approx(reward, rel=0, abs=1e-12)
            assert result["terminated"][i].item() == terminated
            assert result["truncated"][i].item() == truncated
            reset[i] = result["done"][i] | ((step, i) in FORCED_RESETS)
            ends += int(terminated or truncated)
        assert not result["diverged"].any()
        if reset.any():
            root = env.reset(TensorDict({"_reset": reset}, env.batch_size))
            for i in reset.view(-1).nonzero().view(-1).tolist():
                expected = restart(references[i], env, i)
                np.testing.assert_array_equal(root["observation"][i], expected.astype(np.float32))
    assert ends > 0  # the comparison went over the end of an episode


@pytest.mark.parametrize("name", TASKS)
def test_specification_equals_gymnasium(name: str) -> None:
    env, reference = make(name, num_envs=1), oracle(name)
    assert env.max_episode_steps == gymnasium.spec(name).max_episode_steps
    assert env.observation_spec["observation"].shape == (1, *reference.observation_space.shape)
    assert env.action_spec.shape == (1, *reference.action_space.shape)
    assert env.task.control_period_s == reference.unwrapped.dt


@pytest.mark.parametrize("name", TASKS)
def test_start_distribution_equals_gymnasium(name: str) -> None:
    native = make(name, num_envs=2000)
    env, reference = native.sim, oracle(name).unwrapped
    states = [np.concatenate([env.qpos.numpy(), env.qvel.numpy()], -1)]
    rows = []
    reference.reset(seed=0)
    forward, reference.set_state = reference.set_state, lambda q, v: rows.append(np.r_[q, v])
    for _ in range(2000):
        reference.reset_model()
    reference.set_state = forward
    states.append(np.stack(rows))
    ours, theirs = states
    spread = theirs.std(0)
    # Means and deviations of 2000 draws: five standard errors.
    error = 5 * spread / np.sqrt(2000) + 1e-12
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 1.5 * error).all()
    assert (np.abs(ours.std(0) - spread) < 1.5 * error).all()
    bounded = np.abs(theirs - theirs.mean(0)).max(0) < 2 * spread  # uniform: support within 1.73
    width = 1.03 * np.abs(theirs - theirs.mean(0)).max(0) + 1e-12
    assert (np.abs(ours - theirs.mean(0)).max(0) < width)[bounded].all()

"""What is particular to environments that run through torchrl."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest
import torch
from dm_control import suite
from tensordict import TensorDict

from genpol import envs
from genpol.envs import DMControlSettings, GymSettings, Settings
from genpol.envs.wrapper import TorchrlEnv
from genpol.errors import CheckpointError, ConfigError, EnvironmentFault

FRAGILE = """
import gymnasium
import numpy as np

class Fragile(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        if action[0] > 0.9:
            raise ArithmeticError("too much")
        return np.zeros(2, np.float32), 0.0, False, False, {}

gymnasium.register("Fragile-v0", Fragile)
"""


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GymSettings]:
    """Return the settings of an environment without time limit that raises on big actions."""
    (tmp_path / "fragile_env.py").write_text(FRAGILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    yield GymSettings(id="fragile_env:Fragile-v0")
    sys.modules.pop("fragile_env", None)


def make(settings: Settings, num_envs: int = 1) -> TorchrlEnv:
    env = envs.make(settings, num_envs=num_envs, seed=0)
    assert isinstance(env, TorchrlEnv)
    return env


def act(env: TorchrlEnv, value: float | torch.Tensor) -> TensorDict:
    action = torch.zeros(env.action_spec.shape) + value
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def test_numbers_are_gymnasiums() -> None:
    env, reference = make(GymSettings(id="Pendulum-v1")), gymnasium.make("Pendulum-v1")
    root = env.reset()
    reference.reset()
    reference.unwrapped.state = env._probe._env.unwrapped.state.copy()
    np.testing.assert_array_equal(root["observation"][0], reference.unwrapped._get_obs())
    for step in range(200):
        observation, reward, _, truncated, _ = reference.step(np.array([0.5], np.float32))
        outcome = act(env, 0.25)  # bounds are ±2
        np.testing.assert_array_equal(outcome["observation"][0], observation)
        assert outcome["reward"].item() == np.float32(reward)
        assert outcome["truncated"].item() is truncated is (step == 199)
        assert not outcome["terminated"].item()


def test_numbers_are_dm_controls_in_its_order() -> None:
    env = make(DMControlSettings(domain="ball_in_cup", task="catch"))
    reference = suite.load("ball_in_cup", "catch")
    root = env.reset()
    reference.reset()
    with reference.physics.reset_context():
        reference.physics.set_state(env._probe._env.physics.get_state())
    for step in range(20):
        if step == 10:  # what lies between is longer, not different
            reference._step_count += 980
            env._probe._env._step_count += 980
            env._elapsed += 980
        time_step = reference.step([0.3, -1.0])
        outcome = act(env, torch.tensor([0.3, -1.0]))
        if step < 5:  # the action is float32 on one side
            vector = np.concatenate([x.ravel() for x in time_step.observation.values()])
            np.testing.assert_allclose(outcome["observation"][0], vector, rtol=1e-5, atol=1e-6)
            assert (outcome["observation"] != root["observation"]).any()
        assert outcome["truncated"].item() is time_step.last() is (step == 19)
    assert env.max_episode_steps == 1000
    assert not outcome["terminated"].item()


def test_termination_comes_through() -> None:
    env = make(GymSettings(id="InvertedPendulum-v5"))
    env.reset()
    outcome = next(x for x in iter(lambda: act(env, 1.0), None) if x["done"].item())
    assert outcome["terminated"].item()
    assert not outcome["truncated"].item()


def test_no_time_limit_becomes_a_thousand_steps(fragile: GymSettings) -> None:
    assert make(fragile).max_episode_steps == 1000


def test_staggered_episodes_end_apart() -> None:
    env = envs.make(GymSettings(), num_envs=1, seed=0, training=True)
    env.reset()
    assert 0 < env._elapsed[0] < 200
    env.reset()
    assert env._elapsed[0] == 0


def test_non_finite_observation_ends_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(GymSettings())
    root = env.reset()
    inner = env._probe._env.unwrapped
    monkeypatch.setattr(inner, "_get_obs", lambda: np.full(3, np.nan, np.float32))
    outcome = act(env, 0.0)
    assert outcome["diverged"].item()
    assert outcome["truncated"].item()
    assert outcome["reward"].item() == 0
    assert (outcome["observation"] == root["observation"]).all()
    assert env.num_diverged == 1


def test_physics_error_of_dm_control_is_divergence() -> None:
    env = make(DMControlSettings())
    root = env.reset()
    env._probe._env.physics.data.qvel[:] = 1e30
    outcome = act(env, 0.0)
    assert outcome["diverged"].item()
    assert outcome["done"].item()
    assert (outcome["observation"] == root["observation"]).all()
    env.reset()
    assert not act(env, 0.0)["diverged"].item()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GymSettings(id="Pendulm-v1"), "Did you mean 'Pendulum-v1'"),
        (GymSettings(id="Pendulum-v77"), "Did you mean 'Pendulum-v1'"),
        (GymSettings(id="no_such_module:Pendulum-v1"), "cannot import 'no_such_module'"),
        (GymSettings(id="Ant-v2"), "moved to the gymnasium-robotics"),
        (GymSettings(id="CartPole-v1"), r"actions in Discrete\(2\)"),
        (GymSettings(id="Blackjack-v1"), "only boxes"),
        (DMControlSettings(domain="cartpol"), "Did you mean 'cartpole'"),
        (DMControlSettings(task="swingupp"), "Did you mean 'swingup'"),
    ],
)
def test_wrong_names_and_spaces_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (gymnasium.spaces.Dict(a=gymnasium.spaces.Box(-1, 1)), None, "observations in Dict"),
        (gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8), None, "pixels"),
        (None, gymnasium.spaces.Box(-np.inf, np.inf, (1,)), "finite bounds"),
        (None, gymnasium.spaces.Box(-1, 1, (2, 2)), "only a vector of real"),
    ],
)
def test_unfit_spaces_are_refused(
    fragile: GymSettings,
    monkeypatch: pytest.MonkeyPatch,
    observation: gymnasium.Space | None,
    action: gymnasium.Space | None,
    message: str,
) -> None:
    module = __import__("fragile_env")
    if observation is not None:
        monkeypatch.setattr(module.Fragile, "observation_space", observation)
    if action is not None:
        monkeypatch.setattr(module.Fragile, "action_space", action)
    with pytest.raises(ConfigError, match=message):
        make(fragile)


def test_an_environment_that_raises_is_named(fragile: GymSettings) -> None:
    env = make(fragile)
    env.reset()
    act(env, 0.5)
    with pytest.raises(EnvironmentFault, match="Fragile-v0 raised ArithmeticError: too much"):
        act(env, 1.0)
    with pytest.raises(EnvironmentFault, match="make it anew"):
        env.reset()


def test_a_worker_that_raises_is_named(fragile: GymSettings) -> None:
    env = make(fragile, num_envs=2)
    env.reset()
    act(env, 0.5)
    with pytest.raises(EnvironmentFault, match=r"worker 1 .*Fragile-v0 raised an error"):
        act(env, torch.tensor([[0.0], [1.0]]))
    env.close()


def test_a_killed_worker_is_named_soon_and_none_stays_behind() -> None:
    threads = torch.get_num_threads()
    env = make(GymSettings(), num_envs=2)
    env.reset()
    assert torch.get_num_threads() == threads
    workers = [worker.pid for worker in env._workers]
    os.kill(workers[0], signal.SIGINT)  # Ctrl-C is the main process' to heed
    act(env, 0.0)
    os.kill(workers[1], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"worker 1 .*Pendulum-v1 was killed by SIGKILL"):
        env.rollout(3)
    assert time.monotonic() - started < 10
    assert not any(psutil.pid_exists(worker) for worker in workers)
    env.close()
    assert torch.get_num_threads() == threads


def test_simulations_cannot_be_saved() -> None:
    env = make(GymSettings())
    assert env.state_dict_of_simulation() is None
    env.load_simulation(None)
    with pytest.raises(CheckpointError, match="another environment"):
        env.load_simulation({"qpos": torch.zeros(1)})


def test_what_cannot_be_drawn_says_so(fragile: GymSettings) -> None:
    env = make(fragile)
    env.reset()
    with pytest.raises(EnvironmentFault, match=r"cannot be drawn|no rgb_array"):
        env.render()

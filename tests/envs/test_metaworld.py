"""What is particular to the environments of Meta-World."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from genpol import envs
from genpol.envs import MetaWorldSettings
from genpol.envs.settings import METAWORLD_NAMES
from genpol.envs.wrapper import TorchrlEnv

pytest.importorskip("metaworld", reason="needs Meta-World: make test-metaworld")

from metaworld.env_dict import (
    ALL_V3_ENVIRONMENTS,
    ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE,
)
from metaworld.policies import ENV_POLICY_MAP

from genpol.envs.metaworld import Task

pytestmark = pytest.mark.metaworld

PEG = MetaWorldSettings(name="peg-insert-side-v3")
REACH = MetaWorldSettings(name="reach-v3")


def make(settings: MetaWorldSettings, num_envs: int = 1) -> TorchrlEnv:
    env = envs.make(settings, num_envs=num_envs, seed=0)
    assert isinstance(env, TorchrlEnv)
    return env


def act(env: TorchrlEnv, action: np.ndarray) -> TensorDict:
    rows = torch.from_numpy(action).float().expand(env.action_spec.shape)
    return env.step(TensorDict({"action": rows}, env.batch_size))["next"]


def play_expert(env: TorchrlEnv, name: str) -> TensorDict:
    """Let the expert act until the task is solved."""
    observation = env.reset()["observation"]
    expert, outcomes = ENV_POLICY_MAP[name](), []
    while not outcomes or not (outcomes[-1]["success"] | outcomes[-1]["done"]).item():
        action = np.clip(expert.get_action(observation[0].double().numpy()), -1, 1)
        outcomes.append(act(env, action))
        observation = outcomes[-1]["observation"]
    return torch.stack(outcomes)


@pytest.fixture(scope="module")
def peg() -> Task:
    return Task(PEG)


def test_names_are_metaworlds() -> None:
    assert set(METAWORLD_NAMES) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)


def test_numbers_of_dense_rewards_are_metaworlds() -> None:
    env = make(MetaWorldSettings(name="peg-insert-side-v3", reward="dense"))
    reference = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["peg-insert-side-v3-goal-observable"](seed=1)
    root = env.reset()
    # Theirs stays at one place for good: that of ours.
    reference._last_rand_vec = env._probe._env.simulation._last_rand_vec
    observation, _ = reference.reset()
    np.testing.assert_array_equal(root["observation"][0], observation.astype(np.float32))
    for action in np.random.default_rng(0).uniform(-1, 1, (15, 4)).astype(np.float32):
        observation, reward, _, _, info = reference.step(action)
        outcome = act(env, action)
        np.testing.assert_array_equal(outcome["observation"][0], observation.astype(np.float32))
        assert outcome["reward"].item() == np.float32(reward)
        assert outcome["success"].item() == bool(info["success"])


def test_places_are_drawn_for_every_episode_and_the_goal_shows(peg: Task) -> None:
    starts = np.stack([peg.reset(seed=2)[0]["observation"], peg.reset()[0]["observation"]])
    objects, goals = starts[:, 4:6], starts[:, -3:]
    assert (objects[0] != objects[1]).all()
    assert (goals[0, :2] != goals[1, :2]).all()
    np.testing.assert_allclose(goals[1], peg.simulation._target_pos, rtol=1e-6)
    after = peg.step(np.zeros(4, np.float32))[0]["observation"]
    np.testing.assert_array_equal(after[-3:], goals[1])


def test_a_later_environment_starts_as_the_first_does_with_a_later_seed(
    peg: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = peg.reset(seed=5)
    monkeypatch.setattr(peg, "_index", 3)
    later, _ = peg.reset(seed=2)
    other, _ = peg.reset(seed=5)
    np.testing.assert_array_equal(first["observation"], later["observation"])
    assert (first["observation"] != other["observation"]).any()


def test_sparse_rewards_end_an_episode_at_success() -> None:
    history = play_expert(make(REACH), "reach-v3")
    unsolved = len(history) - 1
    assert unsolved > 5
    for key in ("success", "terminated", "done"):
        assert history[key].view(-1).tolist() == [False] * unsolved + [True]
    assert history["reward"].view(-1).tolist() == [-1.0] * unsolved + [0.0]
    assert not history["truncated"].any()


def test_dense_rewards_go_on_and_success_stays() -> None:
    env = make(MetaWorldSettings(name="reach-v3", reward="dense"))
    history = play_expert(env, "reach-v3")
    assert history["reward"].min() > 0
    assert history["reward"][-1] > history["reward"][0]
    up = np.array([0, 0, 1, 0])
    away = torch.stack([act(env, up) for _ in range(25)])
    simulation = env._probe._env.simulation
    assert np.linalg.norm(simulation.tcp_center - simulation._target_pos) > 0.05
    assert away["success"].all()
    assert not away["done"].any()


def test_time_limit_is_metaworlds(peg: Task) -> None:
    peg.reset(seed=0)
    peg.simulation.curr_path_length = 498
    truncated = [peg.step(np.zeros(4, np.float32))[3] for _ in range(2)]
    assert truncated == [False, True]
    assert make(PEG).max_episode_steps == 500


def test_a_restart_by_mujoco_is_divergence() -> None:
    env = make(REACH)
    root = env.reset()
    env._probe._env.simulation.data.qvel[:] = 1e12
    outcome = act(env, np.zeros(4))
    assert outcome["diverged"].item()
    assert outcome["truncated"].item()
    assert outcome["reward"].item() == 0
    assert (outcome["observation"] == root["observation"]).all()
    env.reset()
    assert not act(env, np.zeros(4))["diverged"].item()


@pytest.mark.usefixtures("opengl")
def test_drawings_have_the_size_that_is_asked_for(peg: Task) -> None:
    peg.reset(seed=0)
    for height, width in ((60, 80), (500, 700)):
        frame = peg.draw(height, width)
        assert frame.shape == (height, width, 3)
        assert frame.std() > 1
    # The cameras hang upside down: drawn upright, the empty background is at the top.
    assert frame[0].std() < 5 < frame[-1].std()
    peg.close()


def test_workers_continue_the_order_of_seeds() -> None:
    together, alone = make(PEG, num_envs=2), make(PEG)
    together.set_seed(4)
    root = together.reset()
    for index in range(2):
        alone.set_seed(4 + index)
        torch.testing.assert_close(root[index], alone.reset()[0], rtol=0, atol=0)
    together.close()


def test_native_tasks_say_in_one_line_that_they_are_elsewhere() -> None:
    from genpol.envs import MujocoSettings
    from genpol.errors import ConfigError

    with pytest.raises(ConfigError, match=r"need mujoco >= 3\.17, found 3\.3\.0") as caught:
        envs.make(MujocoSettings(), num_envs=2, seed=0)
    assert "\n" not in str(caught.value)

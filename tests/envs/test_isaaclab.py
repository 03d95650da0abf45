"""What is particular to the tasks of Isaac Lab."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from genpol import envs
from genpol.agent import Specs
from genpol.envs import IsaacLabSettings
from genpol.errors import CheckpointError, ConfigError, EnvironmentFault

pytest.importorskip("isaaclab", reason="needs Isaac Lab: make test-isaaclab")

from genpol.envs.isaaclab.env import IsaacLabEnv
from genpol.envs.isaaclab.worker import WorkerEnv

pytestmark = pytest.mark.isaaclab


@contextmanager
def opened(task: str = "cartpole", num_envs: int = 3, **settings) -> Iterator[IsaacLabEnv]:
    chosen = IsaacLabSettings(task=task, **settings)
    env = envs.make(chosen, num_envs=num_envs, seed=0, training=True)
    assert isinstance(env, IsaacLabEnv)
    try:
        yield env
    finally:
        env.close()


def act(env: IsaacLabEnv, action: Tensor | float) -> TensorDict:
    rows = torch.as_tensor(action, dtype=torch.float32).expand(env.action_spec.shape)
    return env.step(TensorDict({"action": rows}, env.batch_size))["next"]


def put(env: IsaacLabEnv, positions: list[float], velocities: list[float]) -> None:
    """Put the joints of every robot somewhere."""
    n = env.batch_size[0]
    rows = torch.arange(n, dtype=torch.int32)
    place, speed = (torch.tensor([x] * n) for x in (positions, velocities))
    env.sim.start(rows, place, speed)


def test_a_pole_falls_as_the_equations_of_motion_say() -> None:
    with opened() as env:
        env.reset()
        order = env.sim.robot.find_joints(["slider", "hinge"], preserve_order=True)[0]
        put(env, [0.0, 0.05] if order == [0, 1] else [0.05, 0.0], [0.0, 0.0])
        observation = [act(env, 0.0)["observation"][0] for _ in range(12)][-1]
    # Cart and rod of 1 kg and 1 m: angle'' = (g sin a (M + m) - m l a'^2 sin a cos a) /
    # (l (4/3 (M + m) - m cos^2 a)), l = 0.5, by small steps; the simulator makes 24 of 1/120 s.
    angle, speed, dt = 0.05, 0.0, 1e-4
    for _ in range(round(12 * env.control_period_s / dt)):
        sin, cos = math.sin(angle), math.cos(angle)
        turning = 0.5 * speed**2 * sin * cos
        speed += dt * (2 * 9.81 * sin - turning) / (0.5 * (4 / 3 * 2 - cos**2))
        angle += dt * speed
    assert observation[1].item() == pytest.approx(angle, rel=0.03)
    assert observation[3].item() == pytest.approx(speed, rel=0.03)


@pytest.mark.parametrize(
    ("task", "masses"),
    [
        ("cartpole", {"cart": 1.0, "pole": 1.0}),
        ("hopper", {"torso": 3.67, "thigh": 4.06, "shank": 2.78, "foot": 5.32}),
        ("quadruped", {"trunk": 6.0, "front_left_hip": 0.6, "rear_right_shank": 0.15}),
    ],
)
def test_robots_weigh_what_their_files_say(task: str, masses: dict[str, float]) -> None:
    with opened(task) as env:
        robot = env.sim.robot
        found = robot.data.body_mass.torch[0]
        for name, mass in masses.items():
            assert found[robot.body_names.index(name)].item() == pytest.approx(mass)
        if task == "quadruped":
            assert found.sum().item() == pytest.approx(12.6)


def test_the_quadruped_stands_where_it_begins() -> None:
    with opened("quadruped") as env:
        env.reset()
        for _ in range(100):  # two seconds
            outcome = act(env, 0.0)
            assert not outcome["terminated"].any()
        height = outcome["critic_observation"][:, -1]
        assert (height - 0.27).abs().max() < 0.02  # 0.3, less what its springs give way
        assert outcome["critic_observation"][:, -4:-1].abs().max() < 0.1  # it stands still


def test_the_hopper_stands_on_the_ground_at_first() -> None:
    with opened("hopper") as env:
        root = env.reset()
        assert (root["observation"][:, 0] - 1.21).abs().max() < 0.01
        outcome = act(env, 0.0)
        assert outcome["reward"].sub(1.0).abs().max() < 0.1
        assert not outcome["terminated"].any()


def test_critics_see_what_a_robot_cannot_measure() -> None:
    with opened("quadruped") as env:
        specs = Specs.from_env(env, num_envs=3)
        assert (specs.observation_dim, specs.critic_observation_dim) == (45, 49)
        env.reset()
        outcome = act(env, 0.3)
        told = outcome["critic_observation"]
        assert torch.equal(told[:, :45], outcome["observation"])
        data = env.sim.robot.data
        torch.testing.assert_close(told[:, 45:48], data.root_lin_vel_b.torch)
    with opened() as env:
        assert Specs.from_env(env, num_envs=3).critic_observation_dim == 0


def test_divergence_is_contained() -> None:
    with opened() as env:
        env.reset()
        before = act(env, 0.1)["observation"]
        put(env, [0.0, 0.0], [0.0, 0.0])
        env.sim.robot.data.joint_vel.torch[1] = math.nan
        outcome = act(env, 0.1)
        assert outcome["diverged"].view(-1).tolist() == [False, True, False]
        assert outcome["truncated"][1]
        assert not outcome["terminated"][1]
        assert outcome["reward"][1] == 0
        assert torch.equal(outcome["observation"][1], before[1])
        assert env.num_diverged == 1
        root = env.reset(TensorDict({"_reset": outcome["done"]}, env.batch_size))
        assert root["observation"].isfinite().all()
        assert act(env, 0.1)["observation"].isfinite().all()


def test_episodes_begin_at_random_clocks_in_training() -> None:
    with opened(num_envs=64) as env:
        env.reset()
        assert len(env._elapsed.unique()) > 20
        assert env._elapsed.max() < env.max_episode_steps


def test_overrides_and_bounds_reach_the_task() -> None:
    with opened(overrides=["env.episode_length_s=1.0", "env.force=50.0"]) as env:
        assert env.max_episode_steps == 60
        env.reset()
        act(env, 1.0)
        assert (env.sim._force == 50.0).all()
    with opened(action_bound=3.0) as env:
        env.reset()
        act(env, 1.0)
        assert (env.sim._force == 300.0).all()


def test_a_task_of_isaac_lab_s_own_is_known() -> None:
    with pytest.raises(ConfigError, match=r"registers no such task. Did you mean 'Isaac-Cart"):
        envs.make(IsaacLabSettings(task="Isaac-Cartpol"), num_envs=1, seed=0, training=True)


def test_an_override_that_does_not_fit_is_refused() -> None:
    for text, message in (
        ("env.episode_length=1.0", "no 'episode_length' to set. Did you mean 'episode_length_s'"),
        ("env.sim.dtt=0.1", "no 'dtt' to set. Did you mean 'dt'"),
        ("physics=nothing", r"env.overrides = \['physics=nothing'\]: "),
    ):
        with pytest.raises(ConfigError, match=message):
            envs.make(IsaacLabSettings(overrides=[text]), num_envs=1, seed=0, training=True)


def test_there_is_one_simulation_in_a_process_and_others_have_their_own() -> None:
    with opened() as env:
        with pytest.raises(EnvironmentFault, match="simulates with Isaac Lab already"):
            envs.make(IsaacLabSettings(), num_envs=1, seed=0, training=True)
        other = envs.make(IsaacLabSettings(), num_envs=2, seed=0)
        assert isinstance(other, WorkerEnv)
        try:
            starts = []
            for seed in (4, 4, 5):
                other.set_seed(seed)
                starts.append(other.reset()["observation"])
            assert torch.equal(starts[0], starts[1])
            assert not torch.equal(starts[0], starts[2])
            assert other.max_episode_steps == env.max_episode_steps
            root = other.reset().set("action", other.action_spec.zero())
            assert not other.step(root)["next", "done"].any()
            other._process.kill()
            with pytest.raises(EnvironmentFault, match="ended with exit code -9"):
                other.step(root)
            with pytest.raises(EnvironmentFault, match="has stopped: make it anew"):
                other.reset()
        finally:
            other.close()


def test_what_fails_in_its_own_process_is_told_here() -> None:
    with pytest.raises(ConfigError, match="registers no such task"):
        envs.make(IsaacLabSettings(task="Isaac-Cartpol"), num_envs=1, seed=0)


def test_simulations_are_not_kept() -> None:
    with opened() as env:
        assert env.state_dict_of_simulation() is None
        env.load_simulation(None)
        with pytest.raises(CheckpointError, match="cannot restore a simulation"):
            env.load_simulation({"x": torch.zeros(1)})
        with pytest.raises(EnvironmentFault, match="cannot be drawn here"):
            env.render()

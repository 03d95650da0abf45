"""Parity of the native tasks with the dm_control suite, the oracle.

dm_control's starts are copied into our simulations and both sides take the same controls. Physics
must agree bit for bit. Observations and rewards are computed by numpy there and by torch here,
whose ``log``, ``exp`` and sums of products may differ in the last place: in float64 they agree to
1e-12, and the float32 that is delivered is the rounding of dm_control's float64.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch
from dm_control import suite
from scipy import stats
from tensordict import TensorDict

from genpol.envs.mujoco import registry
from genpol.envs.mujoco.env import MujocoEnv
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import JointRandomizer, SuiteTask, draw_without_contact
from genpol.errors import EnvironmentFault

_ORACLES = {
    "AcrobotSwingup": ("acrobot", "swingup"),
    "BallInCup": ("ball_in_cup", "catch"),
    "CartpoleBalance": ("cartpole", "balance"),
    "CartpoleBalanceSparse": ("cartpole", "balance_sparse"),
    "CartpoleSwingup": ("cartpole", "swingup"),
    "CartpoleSwingupSparse": ("cartpole", "swingup_sparse"),
    "CheetahRun": ("cheetah", "run"),
    "DogRun": ("dog", "run"),
    "DogWalk": ("dog", "walk"),
    "FingerSpin": ("finger", "spin"),
    "FingerTurnEasy": ("finger", "turn_easy"),
    "FingerTurnHard": ("finger", "turn_hard"),
    "FishSwim": ("fish", "swim"),
    "HopperHop": ("hopper", "hop"),
    "HopperStand": ("hopper", "stand"),
    "HumanoidRun": ("humanoid", "run"),
    "HumanoidStand": ("humanoid", "stand"),
    "HumanoidWalk": ("humanoid", "walk"),
    "PendulumSwingup": ("pendulum", "swingup"),
    "PointMassEasy": ("point_mass", "easy"),
    "QuadrupedRun": ("quadruped", "run"),
    "QuadrupedWalk": ("quadruped", "walk"),
    "ReacherEasy": ("reacher", "easy"),
    "ReacherHard": ("reacher", "hard"),
    "Swimmer6": ("swimmer", "swimmer6"),
    "WalkerRun": ("walker", "run"),
    "WalkerStand": ("walker", "stand"),
    "WalkerWalk": ("walker", "walk"),
}
_NUM_ENVS = 2
_NUM_STEPS = {"dog": 60, "humanoid": 100, "quadruped": 100}  # dear domains; 200 elsewhere, and slow
_all_tasks = pytest.mark.parametrize("name", _ORACLES)


@functools.cache
def _oracle(name):
    """Return dm_control's environment; tests reset it before use."""
    domain, task = _ORACLES[name]
    return suite.load(domain, task, task_kwargs={"random": 0})


@functools.cache
def _compiled(name):
    return registry.tasks()[name]()


def _task(name) -> SuiteTask:
    """Return a task of its own; models are compiled once, which counts for the dog."""
    task = copy.copy(_compiled(name))
    task.memory = {}
    return task


def _env(name, num_envs=_NUM_ENVS, seed=0, num_threads=1) -> MujocoEnv:
    return MujocoEnv(name, _task(name), num_envs=num_envs, seed=seed, num_threads=num_threads)


def _flat(observation) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in observation.values()])


# ---------------------------------------------------------------- recorded episodes of the oracle


@dataclass
class Start:
    """What decides an episode apart from actions: state, warm start and model fields."""

    qpos: np.ndarray
    qvel: np.ndarray
    act: np.ndarray
    warmstart: np.ndarray
    model: dict[str, np.ndarray]


@dataclass
class Record:
    """One simulation's run in dm_control; starts by the step that they precede."""

    starts: dict[int, Start] = field(default_factory=dict)
    first: dict[int, np.ndarray] = field(default_factory=dict)
    observation: list[np.ndarray] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    qpos: list[np.ndarray] = field(default_factory=list)
    qvel: list[np.ndarray] = field(default_factory=list)
    last: list[bool] = field(default_factory=list)


def _capture(oracle, expanded) -> Start:
    data, model = oracle.physics.data, oracle.physics.model
    return Start(
        data.qpos.copy(),
        data.qvel.copy(),
        data.act.copy(),
        data.qacc_warmstart.copy(),
        {name: getattr(model, name).copy() for name in expanded},
    )


def _move_to_goal(domain, physics) -> None:
    """Alter a start such that the task's reward is within reach of a few steps."""
    data, model = physics.named.data, physics.named.model
    if domain in ("acrobot", "cartpole", "point_mass"):
        data.qpos[:] = 0.002
    elif domain == "pendulum":
        data.qpos[:] = 0.05
    elif domain == "ball_in_cup":
        data.qpos["ball_x"], data.qpos["ball_z"] = 0.0, 0.35
    elif domain == "cheetah":
        data.qvel["rootx"] = 5.0
    elif domain == "finger":
        data.qvel["hinge"] = -20.0
        model.site_pos["target"] = data.site_xpos["tip"]
    elif domain == "fish":
        model.geom_pos["target"] = data.geom_xpos["mouth"]
    elif domain == "reacher":
        model.geom_pos["target", ["x", "y"]] = data.geom_xpos["finger", ["x", "y"]] + 0.002
    elif domain == "swimmer":
        model.geom_pos["target", ["x", "y"]] = data.geom_xpos["nose", ["x", "y"]] + 0.08
    elif domain in ("hopper", "humanoid", "quadruped", "walker"):
        physics.data.qpos[:] = physics.model.qpos0
    physics.after_reset()


def _start_oracle(name, oracle, *, at_goal) -> np.ndarray:
    observation = oracle.reset().observation
    if at_goal:
        _move_to_goal(_ORACLES[name][0], oracle.physics)
        observation = oracle.task.get_observation(oracle.physics)
    return _flat(observation)


def _record(name, controls, resets, *, expanded) -> Record:
    """Run ``controls`` ``[T, A]`` in dm_control with new episodes before the steps ``resets``."""
    oracle, record = _oracle(name), Record()
    for step, control in enumerate(controls):
        if step in resets:
            record.first[step] = _start_oracle(name, oracle, at_goal=step > 0)
            record.starts[step] = _capture(oracle, expanded)
        time_step = oracle.step(control)
        record.observation.append(_flat(time_step.observation))
        record.reward.append(float(time_step.reward))
        record.qpos.append(oracle.physics.data.qpos.copy())
        record.qvel.append(oracle.physics.data.qvel.copy())
        record.last.append(time_step.last())
    return record


def _copy_starts(env, starts) -> None:
    """Let the next reset put simulation ``i`` at ``starts[i]``."""

    def initialize(sim, ids, generator):
        for index in ids.tolist():
            start = starts[index]
            sim.qpos[index] = torch.from_numpy(start.qpos)
            sim.qvel[index] = torch.from_numpy(start.qvel)
            sim.act[index] = torch.from_numpy(start.act)
            sim._batch.bind("qacc_warmstart")[index] = start.warmstart
            for name, value in start.model.items():
                sim.model_field(name)[index] = torch.from_numpy(value)

    env.task.initialize = initialize


def _controls(env, actions) -> np.ndarray:
    """Return what the task makes of ``actions`` ``[T, N, A]`` in the actuators' units."""
    controls = []
    for action in actions:
        env.task.before_step(env.sim, action.double())
        controls.append(env.sim.ctrl.clone().numpy())
    return np.stack(controls)


def _reset(env, mask) -> torch.Tensor:
    return env.reset(TensorDict({"_reset": mask.view(-1, 1)}, env.batch_size))["observation"]


def compare(name, num_steps) -> dict[str, float]:
    """Compare a task with its oracle; return the largest float64 differences and the reward."""
    env = _env(name)
    generator = torch.Generator().manual_seed(1)
    actions = torch.rand(num_steps, _NUM_ENVS, env.task.action_dim, generator=generator) * 2 - 1
    actions[:, 1:] *= 0.2  # calmer: some tasks reward that
    controls = _controls(env, actions)
    # Different steps for different simulations, so that resets are masked.
    third = num_steps * 7 // 20
    resets = [(0, third + 5 * i, 2 * third + 3 * i) for i in range(_NUM_ENVS)]
    expanded = env.task.expanded
    records = [
        _record(name, controls[:, i], resets[i], expanded=expanded) for i in range(_NUM_ENVS)
    ]
    worst = {"observation": 0.0, "reward": 0.0, "largest reward": 0.0}
    for step in range(num_steps):
        mask = torch.tensor([step in resets[i] for i in range(_NUM_ENVS)])
        if mask.any():
            starts = {i: records[i].starts[step] for i in mask.nonzero().view(-1).tolist()}
            _copy_starts(env, starts)
            observation = _reset(env, mask)
            observation64 = env.task.observe(env.sim)
            for i in starts:
                expected = records[i].first[step]
                assert np.array_equal(observation[i].numpy(), np.float32(expected)), (step, i)
                gap = np.abs(observation64[i].numpy() - expected).max()
                worst["observation"] = max(worst["observation"], gap)
        after = env.step(TensorDict({"action": actions[step]}, env.batch_size))["next"]
        observation64, reward64 = env.task.observe(env.sim), env.task.reward(env.sim)
        for i, record in enumerate(records):
            at = f"simulation {i}, step {step}"
            assert np.array_equal(env.sim.qpos[i].numpy(), record.qpos[step]), at
            assert np.array_equal(env.sim.qvel[i].numpy(), record.qvel[step]), at
            expected, reward = record.observation[step], record.reward[step]
            assert np.array_equal(after["observation"][i].numpy(), np.float32(expected)), at
            assert after["reward"][i].item() == float(np.float32(reward)), at
            assert after["done"][i].item() == record.last[step], at
            assert not after["terminated"][i].item(), at
            gaps = {
                "observation": np.abs(observation64[i].numpy() - expected).max(),
                "reward": abs(reward64[i].item() - reward),
                "largest reward": reward,
            }
            worst = {key: max(value, float(gaps[key])) for key, value in worst.items()}
    return worst


# -------------------------------------------------------------------------------------- the tests


def assert_equal_episodes(name, num_steps):
    worst = compare(name, num_steps)
    assert worst["observation"] <= 1e-12
    assert worst["reward"] <= 1e-12
    assert worst["largest reward"] > 0.01  # else the reward was not put to the test


@_all_tasks
def test_episodes_equal_dm_control(name):
    assert_equal_episodes(name, _NUM_STEPS.get(_ORACLES[name][0], 200))


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x, (domain, _) in _ORACLES.items() if domain in _NUM_STEPS])
def test_long_episodes_of_dear_domains_equal_dm_control(name):
    assert_equal_episodes(name, 200)


@_all_tasks
def test_sizes_and_clock_equal_dm_control(name):
    oracle, task = _oracle(name), _task(name)
    env = _env(name, num_envs=1)
    assert env.observation_spec["observation"].shape[-1] == len(_flat(oracle.reset().observation))
    assert task.action_dim == oracle.action_spec().shape[0]
    assert task.control_period_s == oracle.control_timestep()
    assert task.max_episode_steps == math.ceil(oracle._step_limit)
    assert env.max_episode_steps == task.max_episode_steps


@_all_tasks
def test_extreme_actions_are_the_bounds_of_the_controls(name):
    env, spec = _env(name, num_envs=3), _oracle(name).action_spec()
    ends = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    env.task.before_step(env.sim, ends.expand(3, env.task.action_dim))
    middle = (spec.minimum + spec.maximum) / 2
    expected = np.stack([spec.minimum, middle, spec.maximum])
    np.testing.assert_allclose(env.sim.ctrl.numpy(), expected, atol=1e-15)


_COSTLY = ("CheetahRun", "DogWalk", "HumanoidStand", "QuadrupedWalk")


@pytest.mark.parametrize(
    "name",
    [
        "AcrobotSwingup",
        "BallInCup",
        "CartpoleBalance",
        "CartpoleSwingup",
        "FingerSpin",
        "FingerTurnEasy",
        "FishSwim",
        "HopperStand",
        "PendulumSwingup",
        "PointMassEasy",
        "ReacherEasy",
        "Swimmer6",
        "WalkerWalk",
        *_COSTLY,
    ],
)
def test_starts_are_distributed_as_in_dm_control(name):
    count = 80 if name in _COSTLY else 300
    env, oracle = _env(name, num_envs=count, seed=3), _oracle(name)
    fields = [env.sim.model_field(x).flatten(1) for x in env.task.expanded]
    ours = torch.cat([env.sim.qpos, env.sim.qvel, env.sim.act, *fields], -1).numpy()
    theirs = []
    for _ in range(count):
        oracle.reset()
        start = _capture(oracle, env.task.expanded)
        fields = [np.ravel(x) for x in start.model.values()]
        theirs.append(np.concatenate([start.qpos, start.qvel, start.act, *fields]))
    # Kolmogorov-Smirnov, two samples; the bound is passed by chance once in 20 000 coordinates.
    bound = math.sqrt(-math.log(5e-5 / 2) / count)
    for column, (x, y) in enumerate(zip(ours.T, np.stack(theirs).T, strict=True)):
        if np.ptp(x) == np.ptp(y) == 0:
            assert x[0] == y[0], column
        else:
            assert stats.ks_2samp(x, y, method="asymp").statistic < bound, column


def test_cheetah_settles_exactly_as_in_dm_control():
    env, oracle = _env("CheetahRun", num_envs=3), _oracle("CheetahRun")
    task, generator = env.task, torch.Generator().manual_seed(7)
    draw = torch.rand(3, len(task._limited), generator=generator, dtype=torch.float64)
    joints = (task._low + draw * task._range).numpy()
    env.set_seed(7)
    env.reset()
    random = oracle.task._random
    try:
        for i in range(3):
            # Hand dm_control the joints that we drew.
            oracle.task._random = SimpleNamespace(uniform=lambda low, high, i=i: joints[i])
            oracle.reset()
            assert np.array_equal(env.sim.qpos[i].numpy(), oracle.physics.data.qpos)
            assert np.array_equal(env.sim.qvel[i].numpy(), oracle.physics.data.qvel)
    finally:
        oracle.task._random = random


@pytest.mark.parametrize(
    "name", ["BallInCup", "CheetahRun", "FingerTurnEasy", "FishSwim", "HumanoidStand", "DogWalk"]
)
def test_masked_reset_leaves_other_simulations_as_they_were(name):
    actions = torch.rand(20, 4, _task(name).action_dim, generator=torch.Generator().manual_seed(2))
    final = []
    for reset in (False, True):
        env = _env(name, num_envs=4)
        env.reset()
        for step, action in enumerate(actions):
            if reset and step == 10:
                _reset(env, torch.tensor([False, True, False, False]))
            after = env.step(TensorDict({"action": action}, env.batch_size))["next"]
        final.append((env.sim.state(), after["observation"]))
    (kept, kept_observation), (masked, masked_observation) = final
    others = [0, 2, 3]
    assert torch.equal(kept_observation[others], masked_observation[others])
    assert not torch.equal(kept_observation[1], masked_observation[1])
    for key, value in kept.items():
        assert torch.equal(value[others], masked[key][others]), key


@pytest.mark.parametrize("name", ["CheetahRun", "FingerTurnHard", "HumanoidRun", "DogRun"])
def test_number_of_threads_changes_nothing(name):
    actions = torch.rand(10, 6, _task(name).action_dim, generator=torch.Generator().manual_seed(4))
    runs = []
    for num_threads in (1, 2):
        env = _env(name, num_envs=6, num_threads=num_threads)
        observations = [env.reset()["observation"]]
        for action in actions:
            after = env.step(TensorDict({"action": action}, env.batch_size))["next"]
            observations += [after["observation"], after["reward"]]
        runs.append(observations)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_time_limit_truncates_at_dm_controls_step():
    env, oracle = _env("PendulumSwingup", num_envs=1), _oracle("PendulumSwingup")
    env.reset()
    oracle.reset()
    action = TensorDict({"action": torch.zeros(1, 1)}, [1])
    for _ in range(env.max_episode_steps):
        after, time_step = env.step(action)["next"], oracle.step(np.zeros(1))
        assert after["done"].item() == after["truncated"].item() == time_step.last()
        assert not after["terminated"].item()
    assert time_step.last()
    assert time_step.discount == 1.0  # a time limit, not a terminal state


def test_search_for_a_start_without_contact_gives_up_with_an_error():
    sim = BatchedSimulation(_task("BallInCup").model, 2, fields=("ncon",), num_threads=1)

    def sink(ids):
        sim.qpos[ids, 3] = -1.0  # into the ground

    with pytest.raises(EnvironmentFault, match="2 of 2 simulations"):
        draw_without_contact(sim, torch.arange(2), sink, max_tries=3)


def test_free_joints_start_as_in_dm_control_with_positive_quaternions():
    task = _task("HumanoidStand")
    sim = BatchedSimulation(task.model, 50, num_threads=1)
    JointRandomizer(task.model)(sim, torch.arange(50), torch.Generator().manual_seed(0))
    assert (sim.qpos[:, 3:7] >= 0).all()
    assert torch.allclose(sim.qpos[:, 3:7].norm(dim=-1), torch.ones(50, dtype=torch.float64))


def test_start_without_actuation_leaves_the_option_as_it_was():
    env = _env("DogWalk")
    disabled = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)
    assert not (env.sim.model_of(0).opt.disableflags & disabled)
    assert not (env.sim._batch.expand("opt.disableflags") & disabled).any()

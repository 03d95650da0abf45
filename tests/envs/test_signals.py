"""What the numbers of observations and actions are called: a name that is given is true."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase

from genpol import envs
from genpol.envs import GymSettings, MujocoSettings, signals
from genpol.envs.mujoco.env import MujocoEnv
from genpol.envs.signals import Actuator, Signal
from genpol.envs.stacking import StackedEnv

# Where a kind of number is in a joint's part of qpos or qvel.
AXES = {"x": 0, "y": 1, "z": 2}
FREE_QUATERNION = {"w": 3, "x": 4, "y": 5, "z": 6}
BALL_QUATERNION = {"w": 0, "x": 1, "y": 2, "z": 3}


def make(name: str, **options: int) -> EnvBase:
    return envs.make(MujocoSettings(name=name, num_threads=1, **options), num_envs=1, seed=0)


def names(env: EnvBase) -> list[str]:
    return [signal.name for signal in signals.observation(env)]


def state_of(env: MujocoEnv, name: str) -> float:
    """Return the number of the simulator's state that a name claims to be."""
    joint_name, _, what = name.rpartition(".")
    joint = env.task.model.joint(joint_name)
    kind, _, axis = what.rpartition("_")
    start, position = int(joint.qposadr[0]), env.sim.qpos[0]
    velocity, speed_start = env.sim.qvel[0], int(joint.dofadr[0])
    match kind or axis:
        case "position":
            return float(position[start + (AXES[axis] if kind else 0)])
        case "velocity":
            return float(velocity[speed_start + (AXES[axis] if kind else 0)])
        case "quaternion":
            free = int(joint.type[0]) == 0
            return float(position[start + (FREE_QUATERNION if free else BALL_QUATERNION)[axis]])
        case "angular_velocity":
            free = int(joint.type[0]) == 0
            return float(velocity[speed_start + AXES[axis] + 3 * free])
    raise AssertionError(name)


def assert_true(env: MujocoEnv, found: list[str], *, steps: int, strength: float) -> int:
    """Compare what is named with the simulator over some steps; return how many names there are."""
    draw = torch.Generator().manual_seed(2)
    claimed = {place: name for place, name in enumerate(found) if "." in name}
    assert len(set(claimed.values())) == len(claimed)
    env.reset()
    for _ in range(steps):
        action = strength * (2.0 * torch.rand(env.action_spec.shape, generator=draw) - 1.0)
        after = env.step(TensorDict({"action": action}, env.batch_size))["next"]
        seen = after["observation"][0]
        for place, name in claimed.items():
            wanted = state_of(env, name)
            assert float(seen[place]) == pytest.approx(wanted, rel=1e-6, abs=1e-9), name
        if after["done"].any():
            env.reset()
    return len(claimed)


# --- observations ------------------------------------------------------------------------------


def test_names_of_a_task_of_the_suite() -> None:
    joints = ["waist", "hip", "knee", "ankle"]
    root = ["rootz", "rooty"]
    found = signals.observation(make("HopperStand"))
    assert [signal.name for signal in found] == [
        *(f"{x}.position" for x in [*root, *joints]),
        *(f"{x}.velocity" for x in ["rootx", *root, *joints]),
        "observation[13]",  # touch
        "observation[14]",
    ]
    assert found[0] == Signal("rootz.position", "m")
    assert found[2] == Signal("waist.position", "rad")
    assert found[6] == Signal("rootx.velocity", "m/s")
    assert found[9] == Signal("waist.velocity", "rad/s")
    assert found[13].unit == "1"


def test_names_of_gymnasium_s_hopper() -> None:
    joints = ["rootz", "rooty", "thigh_joint", "leg_joint", "foot_joint"]
    wanted = [f"{x}.position" for x in joints]
    wanted += [f"observation[{i}]" for i in range(5, 11)]  # velocities, but clipped
    assert names(make("Hopper-v5")) == wanted


def test_names_of_a_free_body() -> None:
    found = signals.observation(make("Ant-v5"))
    assert [signal.name for signal in found[:7]] == [
        "root.position_z",
        *(f"root.quaternion_{x}" for x in "wxyz"),
        "hip_1.position",
        "ankle_1.position",
    ]
    assert Signal("root.angular_velocity_x", "rad/s") in found
    assert Signal("root.velocity_x", "m/s") in found
    assert Signal("root.quaternion_w", "1") in found


@pytest.mark.parametrize(
    ("name", "least"),
    [("HopperStand", 13), ("HalfCheetah-v5", 17), ("Pusher-v5", 14), ("Ant-v5", 27)],
)
def test_what_is_named_is_that_number_in_every_step(name: str, least: int) -> None:
    env = make(name)
    assert assert_true(env, names(env), steps=40, strength=0.3) >= least


def test_what_is_named_is_that_number_when_it_is_fast() -> None:
    """Gymnasium clips velocities at 10 here: a robot that tells them tells others."""
    env = make("Walker2d-v5")
    assert_true(env, names(env), steps=400, strength=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", envs.names())
def test_names_of_every_native_task_are_true(name: str) -> None:
    env = make(name)
    found = signals.observation(env)
    assert len(found) == env.observation_spec["observation"].shape[-1]
    assert_true(env, [signal.name for signal in found], steps=50, strength=1.0)
    driven = signals.actions(env)
    assert len(driven) == env.action_spec.shape[-1]
    assert len({x.name for x in driven}) == len(driven)


def test_names_do_not_depend_on_the_start_state() -> None:
    settings = MujocoSettings(name="Pusher-v5", num_threads=1)
    first, second = (names(envs.make(settings, num_envs=1, seed=seed)) for seed in (0, 7))
    assert first == second


def test_numbers_of_which_nothing_is_known_are_numbered() -> None:
    pytest.importorskip("gymnasium")
    env = envs.make(GymSettings(id="Pendulum-v1"), num_envs=1, seed=0)
    assert signals.observation(env) == [Signal(f"observation[{i}]", "1") for i in range(3)]
    assert signals.actions(env) == [Actuator("action[0]", "1", "velocity", -1.0, 1.0)]


def test_a_history_is_named_once() -> None:
    env = make("HopperStand", observation_steps=3)
    assert isinstance(env, StackedEnv)
    assert env.observation_spec["observation"].shape[-1] == 45
    assert signals.observation(env) == signals.observation(make("HopperStand"))
    assert signals.actions(env) == signals.actions(make("HopperStand"))


# --- actions -----------------------------------------------------------------------------------


def test_actuators_of_a_task_of_the_suite() -> None:
    wanted = [Actuator(x, "1", "effort", -1.0, 1.0) for x in ("waist", "hip", "knee", "ankle")]
    assert signals.actions(make("HopperStand")) == wanted


def test_actuators_without_names_are_those_of_their_joints() -> None:
    """Motors: a command is a share of what the gear makes of it, so that it has no unit."""
    arm = ("shoulder_pan", "shoulder_lift", "upper_arm_roll", "elbow_flex", "forearm_roll")
    wanted = [
        Actuator(f"r_{x}_joint", "1", "effort", -2.0, 2.0)
        for x in (*arm, "wrist_flex", "wrist_roll")
    ]
    assert signals.actions(make("Pusher-v5")) == wanted


def test_actuators_that_are_told_positions() -> None:
    found = signals.actions(make("QuadrupedWalk"))
    assert len(found) == 12
    assert {x.interface for x in found} == {"position"}
    assert found[0] == Actuator("yaw_front_left", "rad", "position", -1.0, 1.0)
    # A tendon over several joints has no unit of its own.
    assert found[1].name == "lift_front_left"
    assert (found[1].unit, found[1].low, found[1].high) == ("1", -1.0, pytest.approx(1.1))


@pytest.mark.parametrize("name", ["HopperStand", "Pusher-v5", "QuadrupedWalk", "Humanoid-v5"])
def test_an_action_of_one_is_the_highest_command(name: str) -> None:
    """What the simulation does with an action is what the contract says of it."""
    env = make(name)
    driven = signals.actions(env)
    for action in (-1.0, 0.0, 0.5, 1.0):
        env.reset()
        env.step(TensorDict({"action": torch.full((1, len(driven)), action)}, [1]))
        wanted = [x.low + 0.5 * (action + 1.0) * (x.high - x.low) for x in driven]
        assert env.sim.ctrl[0].tolist() == pytest.approx(wanted)

"""A decision with ``action_repeat=2`` is two control steps with one action, ends included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from genpol import envs
from genpol.envs import MujocoSettings
from genpol.envs.mujoco.env import MujocoEnv
from genpol.envs.mujoco.simulation import BatchedSimulation

N = 4
FLAGS = ("terminated", "truncated", "diverged", "done")


def make(name: str, action_repeat: int, *, training: bool = False) -> MujocoEnv:
    settings = MujocoSettings(
        name=name, num_threads=1, action_repeat=action_repeat, train_episode_steps=6
    )
    env = envs.make(settings, num_envs=N, seed=3, training=training)
    assert isinstance(env, MujocoEnv)
    env.reset()
    return env


def pair(name: str, *, training: bool = False) -> tuple[MujocoEnv, MujocoEnv]:
    """Return environments with repeats 2 and 1 in equal states."""
    return make(name, 2, training=training), make(name, 1, training=training)


def sequence(env: MujocoEnv, decisions: int) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return 2 * torch.rand(decisions, *env.action_spec.shape, generator=generator) - 1


def act(env: MujocoEnv, action: Tensor) -> TensorDict:
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def reset(env: MujocoEnv, mask: Tensor) -> Tensor:
    return env.reset(TensorDict({"_reset": mask}, env.batch_size))["observation"]


def lean(env: MujocoEnv, row: int, angle_rad: float) -> None:
    """Tilt a gymnasium hopper, which falls beyond 0.2 rad, by 0.008 rad a step."""
    env.sim.qpos[row, 2] = angle_rad
    env.sim.qvel[row] = 0.0
    env.sim.qvel[row, 2] = 1.0


def poison(env: MujocoEnv, row: int, *, control_step: int) -> None:
    """Break the velocity of ``row`` before the given control step from now."""
    original: Callable[..., None] = env.task.before_step
    calls = []

    def before_step(sim: object, action: Tensor) -> None:
        calls.append(None)
        if len(calls) == control_step:
            env.sim.qvel[row, 0] = float("nan")
        original(sim, action)

    env.task.before_step = before_step  # type: ignore[method-assign]


def assert_equal(outcome: TensorDict, expected: TensorDict, rows: slice | int) -> None:
    for key in ("observation", "reward", *FLAGS):
        assert torch.equal(outcome[key][rows], expected[key][rows]), key


def in_sum(first: TensorDict, second: TensorDict) -> TensorDict:
    """Return the outcome of two control steps of episodes that the first does not end."""
    return second.clone().set("reward", first["reward"] + second["reward"])


@pytest.mark.parametrize("name", ["HopperStand", "Hopper-v5", "InvertedPendulum-v5"])
def test_a_decision_is_two_steps_with_the_same_action(name: str) -> None:
    repeated, single = pair(name)
    for action in 0.03 * sequence(single, 5):  # gently: nobody falls
        outcome = act(repeated, action)
        first, second = act(single, action), act(single, action)
        assert (first["observation"] != second["observation"]).any(-1).all()
        assert not first["done"].any()
        assert_equal(outcome, in_sum(first, second), slice(None))
    assert torch.equal(repeated._elapsed, single._elapsed)


def test_a_decision_takes_twice_the_time() -> None:
    repeated, single = pair("Hopper-v5")
    assert repeated.control_period_s == pytest.approx(2 * single.control_period_s)
    assert repeated.max_episode_steps == single.max_episode_steps  # counted in control steps


# Row 0 falls in the first of the two steps, row 1 in the second, the others stay up.


@pytest.fixture
def falling() -> tuple[TensorDict, TensorDict, TensorDict, MujocoEnv]:
    """Return the decision's outcome, those of the two steps, and the repeating environment."""
    repeated, single = pair("Hopper-v5")
    for env in repeated, single:
        lean(env, 0, 0.196)
        lean(env, 1, 0.188)
    action = sequence(single, 1)[0]
    outcome, first, second = act(repeated, action), act(single, action), act(single, action)
    assert first["terminated"].view(-1).tolist() == [True, False, False, False]
    assert second["terminated"].view(-1).tolist()[1:] == [True, False, False]
    assert (second["reward"] != 0).all()
    return outcome, first, second, repeated


def test_a_fall_in_the_first_step_is_the_end(falling) -> None:
    outcome, first, _, _ = falling
    assert_equal(outcome, first, 0)


def test_a_fall_in_the_second_step_is_the_end(falling) -> None:
    outcome, first, second, _ = falling
    assert_equal(outcome, in_sum(first, second), 1)
    assert outcome["terminated"][1]
    assert not outcome["truncated"].any()


def test_a_fall_leaves_the_others_alone(falling) -> None:
    outcome, first, second, _ = falling
    assert_equal(outcome, in_sum(first, second), slice(2, None))


def test_the_clock_of_a_fallen_robot_stands_still(falling) -> None:
    assert falling[-1]._elapsed.tolist() == [1, 2, 2, 2]


def test_getting_up_in_the_second_step_does_not_undo_a_fall() -> None:
    repeated, single = pair("Hopper-v5")
    for env in repeated, single:
        angles_rad = iter([0.5, 0.0])

        def lift(sim: BatchedSimulation, angles_rad: Iterator[float] = angles_rad) -> None:
            sim.qpos[0, 2] = next(angles_rad)

        env.task.after_step = lift  # type: ignore[method-assign]
    action = sequence(single, 1)[0]
    outcome, first, second = act(repeated, action), act(single, action), act(single, action)
    assert first["terminated"][0]
    assert not second["terminated"][0]
    assert_equal(outcome, first, 0)


@pytest.mark.parametrize("control_step", [1, 2])
def test_divergence_in_either_step_ends_the_episode(control_step: int) -> None:
    repeated, single = pair("Hopper-v5")
    before, action = sequence(single, 2)
    last_good = act(repeated, before)["observation"]
    act(single, before), act(single, before)
    poison(repeated, 3, control_step=control_step)
    outcome = act(repeated, action)
    assert outcome["diverged"].view(-1).tolist() == [False, False, False, True]
    assert outcome["truncated"][3]
    assert outcome["done"][3]
    assert not outcome["terminated"][3]
    assert outcome["reward"][3] == 0
    assert torch.equal(outcome["observation"][3], last_good[3])
    assert repeated.num_diverged == 1
    assert repeated._elapsed.tolist() == [4, 4, 4, 2 + control_step]
    assert_equal(outcome, in_sum(act(single, action), act(single, action)), slice(0, 3))


def test_divergence_after_a_fall_is_no_divergence() -> None:
    repeated, single = pair("Hopper-v5")
    for env in repeated, single:
        lean(env, 0, 0.196)
    poison(repeated, 0, control_step=2)
    action = sequence(single, 1)[0]
    outcome, first = act(repeated, action), act(single, action)
    assert first["terminated"][0]
    assert_equal(outcome, first, 0)
    assert repeated.num_diverged == 0


# Clocks of training start at whole decisions; an odd one cuts an episode between the two steps.


@pytest.fixture
def timed() -> tuple[TensorDict, TensorDict, TensorDict, MujocoEnv]:
    """Return what ``falling`` does, for episodes of 6 steps with 1, 2, 3 and 6 to go.

    Row 0 falls right after its time has run out.
    """
    repeated, single = pair("Hopper-v5", training=True)
    for env in repeated, single:
        assert env.max_episode_steps == 6
        env.set_seed(1)
        env.reset()
        lean(env, 0, 0.188)
        env._elapsed[:] = torch.tensor([5, 4, 3, 0])
    action = sequence(single, 1)[0]
    outcome, first, second = act(repeated, action), act(single, action), act(single, action)
    assert second["terminated"].view(-1).tolist() == [True, False, False, False]
    return outcome, first, second, repeated


def test_time_that_runs_out_in_the_first_step_ends_the_episode_there(timed) -> None:
    outcome, first, _, _ = timed
    assert_equal(outcome, first, 0)
    assert outcome["truncated"][0]


def test_time_that_runs_out_in_the_second_step_ends_the_episode_there(timed) -> None:
    outcome, first, second, _ = timed
    assert_equal(outcome, in_sum(first, second), 1)
    assert outcome["truncated"].view(-1).tolist() == [True, True, False, False]
    assert not outcome["terminated"].any()


def test_clocks_go_on_by_two_and_stop_at_the_limit(timed) -> None:
    repeated = timed[-1]
    assert repeated._elapsed.tolist() == [6, 6, 5, 2]
    reset(repeated, timed[0]["done"])
    assert repeated._elapsed.tolist() == [0, 0, 5, 2]


def test_episodes_that_follow_a_cut_one_are_whole(timed) -> None:
    repeated = timed[-1]
    reset(repeated, timed[0]["done"])
    done = []
    for action in 0.1 * sequence(repeated, 3):
        outcome = act(repeated, action)
        done.append(outcome["done"].view(-1)[:2].tolist())
        if outcome["done"].any():
            reset(repeated, outcome["done"])
    assert done == [[False, False], [False, False], [True, True]]


def test_a_rollout_over_many_ends_is_that_of_single_steps() -> None:
    repeated, single = pair("Hopper-v5")
    ended_in = torch.zeros(2, dtype=torch.int64)
    for action in sequence(single, 60):
        outcome = act(repeated, action)
        first, second = act(single, action), act(single, action)
        expected = torch.where(first["done"].squeeze(-1), first, in_sum(first, second))
        assert_equal(outcome, expected, slice(None))
        ended_in += torch.stack([first["done"].sum(), (expected["done"] & ~first["done"]).sum()])
        mask = outcome["done"]
        if mask.any():
            assert torch.equal(reset(repeated, mask)[mask[:, 0]], reset(single, mask)[mask[:, 0]])
    assert (ended_in > 0).all()  # in the middle of decisions and at their end

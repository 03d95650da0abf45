"""What is particular to the environments of OGBench."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from genpol import envs
from genpol.envs import OGBenchSettings
from genpol.envs.settings import OGBENCH_NAMES
from genpol.envs.wrapper import TorchrlEnv
from genpol.errors import MissingExtraError

ogbench = pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")

import gymnasium  # noqa: E402

from genpol.envs.ogbench import Task  # noqa: E402
from genpol.envs.ogbench_simulation import make_simulation, max_episode_steps  # noqa: E402

PUZZLE = OGBenchSettings(name="puzzle-3x3", goal_conditioned=True)


def make(settings: OGBenchSettings, num_envs: int = 1) -> TorchrlEnv:
    env = envs.make(settings, num_envs=num_envs, seed=0)
    assert isinstance(env, TorchrlEnv)
    return env


def act(env: TorchrlEnv, action: np.ndarray) -> TensorDict:
    rows = torch.from_numpy(action).float().expand(env.action_spec.shape)
    return env.step(TensorDict({"action": rows}, env.batch_size))["next"]


@pytest.fixture(scope="module")
def puzzle() -> Task:
    return Task(PUZZLE)


@pytest.mark.parametrize("timing", ["pre", "post"])
def test_numbers_of_a_single_task_are_ogbenchs(timing: str) -> None:
    env = make(OGBenchSettings(name="cube-double", task=3, success_timing=timing))
    reference = gymnasium.make(
        "cube-double-singletask-task3-v0", success_timing=timing, disable_env_checker=True
    )
    env.set_seed(7)
    root = env.reset()
    reference.reset(seed=7)
    observation, _ = reference.reset()  # torchrl resets to seed
    np.testing.assert_array_equal(root["observation"][0], observation.astype(np.float32))
    assert not root["success"].item()
    assert "goal" not in root
    for action in np.random.default_rng(0).uniform(-1, 1, (15, 5)).astype(np.float32):
        observation, reward, terminated, truncated, info = reference.step(action)
        outcome = act(env, action)
        np.testing.assert_array_equal(outcome["observation"][0], observation.astype(np.float32))
        assert outcome["reward"].item() == reward
        assert outcome["terminated"].item() == terminated
        assert outcome["truncated"].item() == truncated
        assert outcome["success"].item() == info["success"]


def test_goals_are_ogbenchs_oracle_representations() -> None:
    env = make(OGBenchSettings(name="cube-double", goal_conditioned=True, task=5))
    root = env.reset()
    goal = root["goal"]
    # Task 5 stacks the cubes at (0.425, 0), in an order that is drawn.
    heights = sorted(goal.view(2, 3)[:, 2].tolist())
    assert heights == pytest.approx([0.2, 0.6], abs=0.05)
    assert goal.view(2, 3)[:, :2].abs().max() < 0.2
    assert (act(env, np.zeros(5))["goal"] == goal).all()
    achieved = act(env, np.full(5, 0.3))["achieved_goal"]
    dataset = {"qpos": env._probe._env.simulation.data.qpos[None].copy()}
    ogbench.relabel_utils.add_oracle_reps("cube-double", env._probe._env.simulation, dataset)
    np.testing.assert_allclose(dataset["oracle_reps"], achieved, rtol=0, atol=1e-6)


def test_tasks_come_in_turn(puzzle: Task) -> None:
    goals = [puzzle.reset(seed=10 if turn == 0 else None)[0]["goal"] for turn in range(6)]
    assert len(np.unique(goals[:5], axis=0)) == 5
    np.testing.assert_array_equal(goals[5], goals[0])


def test_a_task_can_be_fixed(puzzle: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = OGBenchSettings(name="puzzle-3x3", goal_conditioned=True, task=2)
    monkeypatch.setattr(puzzle, "_settings", fixed)
    wanted = puzzle.simulation.task_infos[1]["goal_button_states"]
    for _ in range(2):
        np.testing.assert_array_equal(puzzle.reset()[0]["goal"], wanted)


def test_a_later_environment_starts_as_the_first_does_with_a_later_seed(
    puzzle: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = puzzle.reset(seed=5)
    monkeypatch.setattr(puzzle, "_index", 3)
    later, _ = puzzle.reset(seed=2)
    other, _ = puzzle.reset(seed=5)
    for key in first:
        np.testing.assert_array_equal(first[key], later[key])
    assert (first["goal"] != other["goal"]).any()


def test_equal_seeds_give_equal_goals_of_noisy_scenes() -> None:
    # The full observation of the goal shows where the arm went while the scene settled.
    simulation = make_simulation("cube-single")
    goals = [simulation.reset(seed=seed, options={"task_id": 1})[1]["goal"] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(goals[0], goals[1])
    assert (goals[0] != goals[2]).any()


@pytest.mark.parametrize(
    ("settings", "delay", "rewards"),
    [
        (OGBenchSettings(), 1, (-1, 0)),
        (OGBenchSettings(success_timing="post"), 0, (-1, 0)),
        (OGBenchSettings(goal_conditioned=True, task=2), 0, (0, 1)),
    ],
)
def test_oracle_reaches_success_which_ends_the_episode(
    settings: OGBenchSettings, delay: int, rewards: tuple[int, int]
) -> None:
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    env = make(settings)
    root = env.reset()
    simulation = env._probe._env.simulation
    oracle = CubePlanOracle(env=simulation, noise=0.0)
    target = {
        "privileged/target_block": 0,
        "privileged/target_block_pos": simulation.data.mocap_pos[0].copy(),
        "privileged/target_block_yaw": np.zeros(1),
    }
    observation = root["observation"][0].numpy()
    oracle.reset(observation, simulation.compute_ob_info() | target)
    outcomes, solved = [], []
    np.random.seed(0)
    while not outcomes or not outcomes[-1]["done"].item():
        action = oracle.select_action(observation, simulation.compute_ob_info())
        outcomes.append(act(env, action))
        solved.append(all(simulation._compute_successes()))
    history = torch.stack(outcomes)
    assert history["success"].view(-1).tolist() == [False] * (len(outcomes) - 1) + [True]
    assert (history["terminated"] == history["success"]).all()
    assert not history["truncated"].any()
    assert solved.index(True) == len(outcomes) - 1 - delay
    assert set(history["reward"][:-1].view(-1).tolist()) == {rewards[0]}
    assert history["reward"][-1].item() == rewards[1]


@pytest.mark.parametrize("name", OGBENCH_NAMES)
def test_time_limits_are_ogbenchs(name: str) -> None:
    for task in ("", "-singletask", "-singletask-task5"):
        assert max_episode_steps(name) == gymnasium.spec(f"{name}{task}-v0").max_episode_steps


def test_a_restart_by_mujoco_is_divergence() -> None:
    env = make(OGBenchSettings())
    root = env.reset()
    env._probe._env.simulation.data.qvel[:] = 1e12
    outcome = act(env, np.zeros(5))
    assert outcome["diverged"].item()
    assert outcome["truncated"].item()
    assert outcome["reward"].item() == 0
    assert (outcome["observation"] == root["observation"]).all()
    env.reset()
    assert not act(env, np.zeros(5))["diverged"].item()


@pytest.mark.usefixtures("opengl")
def test_drawings_have_the_size_that_is_asked_for(puzzle: Task) -> None:
    for height, width in ((60, 80), (700, 900)):
        frame = puzzle.draw(height, width)
        assert frame.shape == (height, width, 3)
        assert frame.std() > 1
    puzzle.close()


@pytest.mark.slow
def test_workers_continue_the_order_of_tasks_and_seeds() -> None:
    together, alone = make(PUZZLE, num_envs=3), make(PUZZLE)
    together.set_seed(4)
    root = together.reset()
    for index in range(3):
        alone.set_seed(4 + index)
        expected = alone.reset()
        for key in ("goal", "observation"):
            torch.testing.assert_close(root[key][index], expected[key][0], rtol=0, atol=0)
    together.close()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'genpol\[ogbench\]'"):
        make(OGBenchSettings())

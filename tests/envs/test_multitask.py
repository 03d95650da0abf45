"""Several native tasks in one environment, and their data as one data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from genpol import envs
from genpol.data.dataset import OfflineDataset
from genpol.data.store import DatasetWriter
from genpol.envs import MultiTaskSettings
from genpol.envs.multitask_data import joined
from genpol.errors import ConfigError, DatasetError

# Observations of 5, 3 and 6, actions of 1, 1 and 2.
TASKS = ["CartpoleSwingup", "PendulumSwingup", "ReacherEasy"]


def make(num_envs=6, *, seed=0, training=False, **settings):
    options = {"tasks": TASKS, "num_threads": 1} | settings
    return envs.make(MultiTaskSettings(**options), num_envs=num_envs, seed=seed, training=training)


def actions(env, steps, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [2 * torch.rand(env.action_spec.shape, generator=draw) - 1 for _ in range(steps)]


def run(env, given):
    """Return what is seen and earned: ``[steps, num_envs, ...]`` each."""
    seen, earned = [env.reset()["observation"]], []
    for action in given:
        after = env.step(TensorDict({"action": action}, env.batch_size))["next"]
        seen.append(after["observation"])
        earned.append(after["reward"])
    return torch.stack(seen), torch.stack(earned)


def test_it_keeps_the_promises_of_an_environment():
    check_env_specs(make())


def test_every_task_is_what_it_is_alone():
    env = make()
    assert env.row_tasks == (*TASKS, *TASKS)
    assert make(only=TASKS[1], num_envs=2).row_tasks == (TASKS[1],) * 2
    given = actions(env, 4)
    seen, earned = run(env, given)
    assert seen.shape == (5, 6, 6 + 3)
    assert env.tasks == tuple(zip(TASKS, (1, 1, 2), (1000,) * 3, strict=True))
    for index, name in enumerate(TASKS):
        settings = MultiTaskSettings(tasks=TASKS, num_threads=1).of(name)
        alone = envs.make(settings, num_envs=2, seed=index)
        width = alone.observation_spec["observation"].shape[-1]
        own, reward = run(alone, [x[index::3, : alone.action_spec.shape[-1]] for x in given])
        assert seen[:, index::3, :width].equal(own)
        assert earned[:, index::3].equal(reward)
        assert (seen[:, index::3, width:6] == 0).all()
        assert seen[:, index::3, 6:].equal(torch.eye(3)[index].expand(5, 2, 3))


def test_dimensions_that_a_task_does_not_have_move_nothing():
    env = make()
    given = actions(env, 3)
    other = [x.clone() for x in given]
    for x in other:
        x[[0, 1, 3, 4], 1] *= -1.0
    first, again = run(env, given), run(make(), other)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_one_task_is_played_alone_and_looks_the_same():
    env = make(2, only="PendulumSwingup")
    seen, _ = run(env, actions(env, 1))
    assert seen.shape == (2, 2, 9)
    assert seen[..., 6:].equal(torch.tensor([0.0, 1.0, 0.0]).expand(2, 2, 3))
    assert [name for name, *_ in env.tasks] == TASKS
    assert env.control_period_s != make().control_period_s


def test_widths_leave_room_for_tasks_to_come():
    env = make(observation_width=39, action_width=6)
    seen, _ = run(env, actions(env, 1))
    assert seen.shape == (2, 6, 42)
    assert env.action_spec.shape == (6, 6)
    for name in ("observation", "action"):
        with pytest.raises(ConfigError, match=f"env.{name}_width = 1: the widest"):
            make(**{f"{name}_width": 1})


def test_episodes_of_each_task_end_and_begin_by_themselves():
    env = make(training=True, action_repeat=8)  # at random clocks
    tensordict = env.reset()
    ended = torch.zeros(6, dtype=torch.int64)
    for action in actions(env, 130):
        tensordict = env.step(tensordict.set("action", action))
        done = tensordict["next", "done"].squeeze(-1)
        ended += done
        tensordict = env.maybe_reset(env.step_mdp(tensordict))
        assert tensordict["is_init"].squeeze(-1).equal(done)
    assert (ended >= 1).all()
    assert ended.sum() < 13


def test_what_is_saved_goes_on_bit_for_bit():
    env = make()
    seen, _ = run(env, actions(env, 3))
    other = make(seed=5)
    other.load_simulation(env.state_dict_of_simulation())
    assert other.reset()["observation"].equal(seen[-1])
    given = actions(env, 5, seed=1)
    pairs = [
        [x.step(TensorDict({"action": a}, [6]))["next", "observation"] for a in given]
        for x in (env, other)
    ]
    assert all(a.equal(b) for a, b in zip(*pairs, strict=True))


def test_environments_are_shared_out_evenly():
    with pytest.raises(ConfigError, match="num_envs = 7: cannot be shared out evenly among 3"):
        make(7)
    with pytest.raises(ConfigError, match=r"env\.only"):
        make(1, training=True)
    seen = make(1).reset()["observation"]  # for a video
    assert seen[0, 6:].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "give each of some tasks once"),
        ({"tasks": ["CartpoleSwingup"] * 2}, "give each of some tasks once"),
        ({"tasks": ["Cartpole"]}, "not a native task"),
        ({"only": "CartpoleSwing"}, "not one of env.tasks. Did you mean 'CartpoleSwingup'"),
        ({"observation_width": -1}, "env.observation_width"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        MultiTaskSettings(**({"tasks": TASKS} | settings))


def test_labels_tell_what_is_played():
    assert envs.label(MultiTaskSettings(tasks=TASKS)) == "multitask"
    assert envs.label(MultiTaskSettings(tasks=TASKS, only=TASKS[1])) == "multitask-PendulumSwingup"


# -- data ----------------------------------------------------------------------------------------


def trajectories(width, dims, length=3, number=2, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {
            "observation": draw.normal(size=(length + 1, width)).astype(np.float32),
            "action": draw.uniform(-1, 1, size=(length, dims)).astype(np.float32),
            "reward": draw.normal(size=length).astype(np.float32),
            "terminated": np.arange(length) == length - 1,
        }
        for _ in range(number)
    ]


def dataset(*args, metadata=None, **options):
    return OfflineDataset.from_trajectories(trajectories(*args, **options), metadata)


def test_data_of_tasks_become_one_data_set():
    a, b = dataset(5, 1), dataset(6, 2, length=4)
    whole = joined({"x": [a], "z": [b, b]}, ["x", "y", "z"], 9, 2)
    assert (whole.num_trajectories, whole.num_transitions) == (6, 6 + 8 + 8)
    observation, action = whole.columns["observation"], whole.columns["action"]
    assert np.array_equal(observation[:8, :5], a.columns["observation"])
    assert (observation[:8, 5:6] == 0).all()
    assert (observation[:8, 6:] == [1, 0, 0]).all()
    assert np.array_equal(observation[8:18, :6], b.columns["observation"])
    assert (observation[8:, 6:] == [0, 0, 1]).all()
    assert np.array_equal(action[:8, :1], a.columns["action"])
    assert (action[:8, 1] == 0).all()
    assert whole.ends.tolist() == [3, 7, 12, 17, 22, 27]
    assert np.array_equal(whole.columns["reward"][18:], b.columns["reward"])
    assert np.array_equal(whole.columns["terminated"][:8], a.columns["terminated"])


def test_data_that_do_not_suit_the_tasks_are_refused():
    with pytest.raises(
        DatasetError, match="data of x: observations of width 7 do not fit in the 6"
    ):
        joined({"x": [dataset(7, 1)]}, ["x"], 7, 2)
    with pytest.raises(DatasetError, match="actions of width 3 do not fit in the 2"):
        joined({"x": [dataset(5, 3)]}, ["x"], 7, 2)
    columns = dict(dataset(5, 1).columns)
    del columns["reward"]
    with pytest.raises(DatasetError, match="has no column 'reward'"):
        joined({"x": [OfflineDataset(columns, [3, 7])]}, ["x"], 7, 2)


def write(path, *args, repeat=2, **options):
    with DatasetWriter(path, metadata={"action_repeat": repeat}) as writer:
        for trajectory in trajectories(*args, **options):
            writer.append_trajectory(trajectory)


def open_folder(folder, **settings):
    options = MultiTaskSettings(tasks=TASKS, **settings)
    return envs.open_data(folder, options, 9, 2)


def test_a_folder_holds_the_data_of_every_task(tmp_path):
    write(tmp_path / "CartpoleSwingup", 5, 1)
    write(tmp_path / "PendulumSwingup-expert-v0", 3, 1)
    write(tmp_path / "PendulumSwingup-medium-v0", 3, 1)
    with pytest.raises(DatasetError, match="has no data set for ReacherEasy"):
        open_folder(tmp_path)
    write(tmp_path / "ReacherEasy", 6, 2)
    write(tmp_path / "ReacherEasyOther", 6, 2)  # of another task
    whole = open_folder(tmp_path)
    assert whole.num_trajectories == 8
    assert whole.metadata["action_repeat"] == 2
    numbers = whole.columns["observation"][:, 6:].argmax(1)
    assert numbers.tolist() == [0] * 8 + [1] * 16 + [2] * 8
    alone = open_folder(tmp_path, only="PendulumSwingup")
    assert alone.num_trajectories == 4
    with pytest.raises(DatasetError, match="no such folder"):
        open_folder(tmp_path / "nothing")


def test_actions_that_are_not_held_for_equally_long_are_refused(tmp_path):
    for name, sizes, repeat in zip(TASKS, ((5, 1), (3, 1), (6, 2)), (2, 4, 2), strict=True):
        write(tmp_path / name, *sizes, repeat=repeat)
    message = r"\(2 in those of CartpoleSwingup, ReacherEasy; 4 in those of PendulumSwingup\)"
    with pytest.raises(DatasetError, match=message):
        open_folder(tmp_path)
    assert open_folder(tmp_path, only="PendulumSwingup").metadata["action_repeat"] == 4


def test_data_that_do_not_say_how_long_actions_are_held_go_with_any():
    told, silent = dataset(5, 1, metadata={"action_repeat": 2}), dataset(5, 1)
    assert joined({"x": [silent], "y": [told]}, ["x", "y"], 7, 1).metadata["action_repeat"] == 2
    assert "action_repeat" not in joined({"x": [silent]}, ["x"], 6, 1).metadata

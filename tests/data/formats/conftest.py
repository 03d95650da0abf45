"""Small files, each laid out as the tool writes it that the format comes from."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genpol.data import formats
from genpol.data.dataset import OfflineDataset
from genpol.data.sink import MemorySink
from genpol.errors import DatasetError


def load(path):
    """Return a file as a data set in memory."""
    sink = MemorySink()
    formats.read(path, sink)
    return OfflineDataset(sink.columns(), sink.ends(), sink.metadata)


def refusal(path):
    """Return the line with which a file is refused."""
    with pytest.raises(DatasetError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture(name="load")
def load_fixture():
    return load


@pytest.fixture(name="refusal")
def refusal_fixture():
    return refusal


def steps(num_steps, seed, *, width=3):
    """Return T+1 observations and T actions and rewards."""
    rng = np.random.default_rng(seed)
    return {
        "observation": rng.normal(size=(num_steps + 1, width)).astype(np.float32),
        "action": rng.uniform(-1, 1, (num_steps, 2)).astype(np.float32),
        "reward": rng.normal(size=num_steps).astype(np.float32),
    }


@pytest.fixture(name="steps")
def steps_fixture():
    return steps


@pytest.fixture
def ogbench_arrays():
    """Return the arrays of two trajectories, as OGBench's generators collect them."""
    made = [steps(3, 0), steps(2, 1)]
    final = np.full((1, 2), 0.25, np.float32)  # recorded, and never executed
    return {
        "observations": np.concatenate([each["observation"] for each in made]),
        "actions": np.concatenate([np.concatenate([each["action"], final]) for each in made]),
        "terminals": np.array([0, 0, 0, 1, 0, 0, 1], dtype=bool),
        "qpos": np.random.default_rng(2).normal(size=(7, 4)).astype(np.float32),
        "qvel": np.random.default_rng(3).normal(size=(7, 4)).astype(np.float32),
        "button_states": np.arange(14).reshape(7, 2) % 2,
    }


@pytest.fixture
def ogbench_file(tmp_path, ogbench_arrays):
    path = tmp_path / "cube-single-play-v0.npz"
    np.savez_compressed(path, **ogbench_arrays)
    return path


@pytest.fixture
def d4rl_arrays():
    """Return a flat file: 3 steps to a terminal, 3 to a timeout, 2 that the file's end cuts."""
    made = [steps(3, 0), steps(3, 1), steps(2, 2)]
    return {
        "observations": np.concatenate([each["observation"][:-1] for each in made]),
        "next_observations": np.concatenate([each["observation"][1:] for each in made]),
        "actions": np.concatenate([each["action"] for each in made]),
        "rewards": np.concatenate([each["reward"] for each in made]),
        "terminals": np.array([0, 0, 1, 0, 0, 0, 0, 0], dtype=bool),
        "timeouts": np.array([0, 0, 0, 0, 0, 1, 0, 0], dtype=bool),
        "infos/qpos": np.arange(16.0).reshape(8, 2),
        "infos/goal": np.arange(16.0).reshape(8, 2) + 100,
        "metadata/algorithm": np.bytes_("SAC"),
    }


@pytest.fixture
def d4rl_file(tmp_path):
    """Return a function that writes arrays as D4RL does."""

    def write(arrays, name="hopper_medium-v2.hdf5"):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                if key.startswith("metadata"):
                    file[key] = array
                else:
                    file.create_dataset(key, data=array, compression="gzip")
        return path

    return write


@pytest.fixture
def robomimic_file(tmp_path):
    """Return a path at which ``dataset_states_to_obs.py --done_mode 2`` wrote two demonstrations.

    Names are such that text would sort them the other way around.
    """
    path = tmp_path / "low_dim.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for seed, (demo, num_steps, solved) in enumerate([("demo_2", 3, 1.0), ("demo_10", 2, 0.0)]):
            made = steps(num_steps, seed, width=5)
            group = data.create_group(demo)
            group.create_dataset("actions", data=made["action"].astype(np.float64))
            group.create_dataset("states", data=np.arange(num_steps * 4.0).reshape(-1, 4))
            group.create_dataset("rewards", data=np.r_[np.zeros(num_steps - 1), solved])
            group.create_dataset("dones", data=np.r_[np.zeros(num_steps - 1, int), 1])
            for key, part in (("robot0_eef_pos", slice(2, 5)), ("object", slice(0, 2))):
                values = made["observation"][:, part].astype(np.float64)
                group.create_dataset(f"obs/{key}", data=values[:-1])
                group.create_dataset(f"next_obs/{key}", data=values[1:])
            group.attrs["model_file"] = "<mujoco/>"
            group.attrs["num_samples"] = num_steps
        file["mask/train"] = np.array([b"demo_10"])
        file["mask/valid"] = np.array([b"demo_2"])
        data.attrs["total"] = 5
        env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"reward_shaping": False}}
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
    return path


@pytest.fixture
def minari_folder(tmp_path):
    """Return a function that writes episodes as minari 0.5.4 does."""

    def write(episodes, *, env="Toy-v0", name="toy-v0"):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        with h5py.File(folder / "main_data.hdf5", "a", track_order=True) as file:
            for number, episode in enumerate(episodes):
                group = file.create_group(f"episode_{number}")
                group.attrs["id"] = number
                group.attrs["seed"] = number
                group.attrs["total_steps"] = len(episode["rewards"])
                for key, values in _flatten(episode):
                    shape = (None, *np.shape(values)[1:])
                    group.create_dataset(key, data=values, chunks=True, maxshape=shape)
        metadata = {
            "total_episodes": len(episodes),
            "total_steps": sum(len(episode["rewards"]) for episode in episodes),
            "data_format": "hdf5",
            "jpeg_encoding": True,
            "observation_space": json.dumps({"type": "Box", "low": [-float("inf")]}),
            "env_spec": json.dumps({"id": env, "max_episode_steps": 7, "kwargs": {}}),
            "dataset_id": name,
            "author": ["somebody"],
            "minari_version": "0.5.4",
            "dataset_size": 0.1,
        }
        (folder / "metadata.json").write_text(json.dumps(metadata))
        return tmp_path / name

    return write


def _flatten(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


@pytest.fixture
def minari_episode():
    """Return a function that makes an episode, with the infos of the reset in front."""

    def make(num_steps, seed, *, terminated=False):
        made = steps(num_steps, seed)
        ends = np.arange(num_steps) == num_steps - 1
        return {
            "observations": made["observation"],
            "actions": made["action"],
            "rewards": made["reward"].astype(np.float64),
            "terminations": ends & terminated,
            "truncations": ends & (not terminated),
            "infos": {
                "success": np.r_[False, ends],
                "qpos": np.arange(2.0 * (num_steps + 1)).reshape(-1, 2),
                "goal": np.ones((num_steps + 1, 2)),
            },
        }

    return make


FEATURES = {
    "observation.state": ("float32", [3]),
    "action": ("float32", [2]),
    "next.reward": ("float32", [1]),
    "next.done": ("bool", [1]),
    "next.success": ("bool", [1]),
    "timestamp": ("float32", [1]),
    "frame_index": ("int64", [1]),
    "episode_index": ("int64", [1]),
    "index": ("int64", [1]),
    "task_index": ("int64", [1]),
}


@pytest.fixture
def lerobot_frames():
    """Return the columns of three episodes of 3, 2 and 4 frames; the first and last succeed."""
    lengths = [3, 2, 4]
    made = [steps(length, seed) for seed, length in enumerate(lengths)]
    ends = np.cumsum(lengths) - 1
    num_frames = sum(lengths)
    return {
        "observation.state": np.concatenate([each["observation"][:-1] for each in made]),
        "action": np.concatenate([each["action"] for each in made]),
        "next.reward": np.concatenate([each["reward"] for each in made]),
        "next.done": np.isin(np.arange(num_frames), ends),
        "next.success": np.isin(np.arange(num_frames), ends[[0, 2]]),
        "timestamp": np.concatenate([np.arange(n) / 10 for n in lengths]).astype(np.float32),
        "frame_index": np.concatenate([np.arange(n) for n in lengths]),
        "episode_index": np.repeat(np.arange(3), lengths),
        "index": np.arange(num_frames),
        "task_index": np.zeros(num_frames, np.int64),
    }


@pytest.fixture
def lerobot_folder(tmp_path):
    """Return a function that writes frames as LeRobot 0.4 does, the third episode in a new file."""

    def write(frames, *, lengths=(3, 2, 4), extra=None, split=5, **changes):
        root = tmp_path / "pusht"
        for folder in ("meta/episodes/chunk-000", "data/chunk-000", "videos/observation.image"):
            (root / folder).mkdir(parents=True)
        features = {name: FEATURES[name] for name in frames if name in FEATURES} | (extra or {})
        info = {
            "codebase_version": "v3.0",
            "robot_type": "so101",
            "total_episodes": len(lengths),
            "total_frames": sum(lengths),
            "chunks_size": 1000,
            "fps": 10,
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "features": {
                name: {"dtype": dtype, "shape": shape, "names": None}
                for name, (dtype, shape) in features.items()
            },
        } | changes
        (root / "meta/info.json").write_text(json.dumps(info, indent=4))
        starts = np.cumsum([0, *lengths])
        episodes = {
            "episode_index": np.arange(len(lengths)),
            "tasks": [["push"]] * len(lengths),
            "length": list(lengths),
            "dataset_from_index": starts[:-1],
            "dataset_to_index": starts[1:],
        }
        pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
        for number, rows in enumerate((slice(0, split), slice(split, None))):
            columns = {name: _column(values[rows]) for name, values in frames.items()}
            file = root / f"data/chunk-000/file-{number:03d}.parquet"
            pq.write_table(pa.table(columns), file, compression="snappy", use_dictionary=True)
        return root

    return write


def _column(values):
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.array(values)


@pytest.fixture
def mcap_file(tmp_path):
    """Return a recording of two episodes, as `genpol deploy` writes it, in units of the robot."""
    writer = pytest.importorskip("mcap.writer")
    path = tmp_path / "run.mcap"
    contract = {"env": "Arm", "commands": [[-2.0, 2.0], [0.0, 1.0]], "goal_dim": 0}
    made = writer.Writer(str(path))
    made.start(profile="", library="test")
    made.add_attachment(0, 0, "contract.json", "application/json", json.dumps(contract).encode())
    schema = made.register_schema("tick", "jsonschema", b"{}")
    channel = made.register_channel("/tick", "json", schema)
    for tick in range(7):
        message = {
            "tick": tick,
            "first": tick in (0, 4),
            "accepted": True,
            "observation": [0.1 * tick, 1.0, -1.0],
            "command": [0.5 * tick - 1.5, 0.125 * tick],
        }
        made.add_message(channel, tick, json.dumps(message).encode(), tick)
    made.finish()
    return path

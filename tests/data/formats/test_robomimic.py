"""robomimic's demonstrations: side by side observations, and what `dones` says of the end."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest

from genpol.data import formats


def test_demonstrations_are_read_in_the_order_of_their_numbers(robomimic_file, load):
    data = load(robomimic_file)
    assert formats.detect(robomimic_file) == "robomimic"
    assert (data.ends - data.starts).tolist() == [3, 2]
    assert data.metadata["env"] == "Lift"
    assert data.metadata["splits"] == {"train": [1], "valid": [0]}


def test_observations_stand_in_the_order_of_their_names(robomimic_file, load, steps):
    data = load(robomimic_file)
    assert data.metadata["observation_keys"] == ["object", "robot0_eef_pos"]
    made = steps(3, 0, width=5)
    assert np.array_equal(data.columns["observation"][:4], made["observation"])
    assert np.array_equal(data.columns["action"][:3], made["action"])
    assert data.columns["states"].shape == (7, 4)


def test_only_a_solved_demonstration_terminates(robomimic_file, load):
    data = load(robomimic_file)
    assert np.flatnonzero(data.columns["success"]).tolist() == [2]
    assert np.flatnonzero(data.columns["terminated"]).tolist() == [2]
    assert np.flatnonzero(data.truncated).tolist() == [5]


def test_shaped_rewards_do_not_tell_success(robomimic_file, load):
    with h5py.File(robomimic_file, "a") as file:
        env_args = {"env_name": "Lift", "env_kwargs": {"reward_shaping": True}}
        file["data"].attrs["env_args"] = json.dumps(env_args)
        file["data/demo_2/rewards"][:] = 0.3
    data = load(robomimic_file)
    assert "success" not in data.columns
    assert np.flatnonzero(data.columns["terminated"]).tolist() == [2, 5]


def test_without_next_observations_the_unsolved_loses_its_last_step(robomimic_file, load):
    with h5py.File(robomimic_file, "a") as file:
        for demo in file["data"].values():
            del demo["next_obs"]
    data = load(robomimic_file)
    assert (data.ends - data.starts).tolist() == [3, 1]
    assert np.array_equal(data.columns["observation"][2], data.columns["observation"][3])
    assert data.metadata["dropped_transitions"] == 1


def change(path, key, values):
    with h5py.File(path, "a") as file:
        del file[key]
        if values is not None:
            file[key] = values


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("data/demo_10/actions", np.full((2, 2), 2.0), "data/demo_10/actions row 0: 2 is outside"),
        ("data/demo_10/actions", np.zeros((3, 2)), "data/demo_10/actions: 3 rows, but 2 in obs"),
        ("data/demo_10/actions", None, "data/demo_10/actions: missing"),
        ("data/demo_10/obs", None, "data/demo_10/obs: missing; extract observations"),
        ("data/demo_10/obs/object", np.zeros((3, 2)), "demo_10/obs/robot0_eef_pos: 2 rows, but 3"),
        (
            "data/demo_10/obs/object",
            np.zeros((2, 84, 84, 3), np.uint8),
            "data/demo_10/obs/object: holds images of 84x84x3; only vectors are read",
        ),
        ("data/demo_10/rewards", np.array([0, np.nan]), "data/demo_10/rewards row 1: nan"),
        ("data/demo_10/dones", np.array([0, 7]), "data/demo_10/dones row 1: 7 is neither 0 nor 1"),
        ("data/demo_10/next_obs/object", np.zeros((2, 9)), "data/demo_10/next_obs: differs in"),
        ("data/demo_10/states", None, "data/demo_10/states: is not given for this trajectory"),
        ("data/demo_10/states", np.zeros((2, 5)), "demo_10/states: 5 float64 a row, but 4 float64"),
    ],
)
def test_refusals_name_file_and_demonstration(robomimic_file, refusal, key, values, expected):
    change(robomimic_file, key, values)
    message = refusal(robomimic_file)
    assert message.startswith(f"{robomimic_file}: ")
    assert expected in message


def test_env_args_must_be_json(robomimic_file, refusal):
    with h5py.File(robomimic_file, "a") as file:
        file["data"].attrs["env_args"] = "{"
    assert "data: attribute env_args is not valid JSON" in refusal(robomimic_file)


@pytest.mark.parametrize("key", ["data/demo_10", "data/demo_10/obs/object", "data/demo_10/actions"])
def test_damage_names_the_array(robomimic_file, refusal, key):
    with h5py.File(robomimic_file) as file:
        address = h5py.h5o.get_info(file[key].id).addr
    content = bytearray(robomimic_file.read_bytes())
    content[address] = 77  # the version of its header
    robomimic_file.write_bytes(content)
    assert refusal(robomimic_file).startswith(f"{robomimic_file}: {key}: damaged or cut short (")

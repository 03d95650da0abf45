"""LeRobot's DiffusionPolicy: the same actions as its own, and refusals."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from genpol import foreign
from genpol.errors import CheckpointError, ConfigError
from genpol.foreign import ImportOptions

SAME = {"atol": 1e-5, "rtol": 0.0}
# Of PushT's actions, in pixels.
PIXELS = ImportOptions(action_range=(0.0, 512.0))
RAW = {"normalization_mapping": {"STATE": "IDENTITY", "ENV": "IDENTITY", "ACTION": "IDENTITY"}}


def in_pixels(action):
    return (action + 1) * 256


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"buffers": True},
        {"use_film_scale_modulation": False, "num_inference_steps": 2},
        {"beta_schedule": "linear", "n_obs_steps": 1},
        {"prediction_type": "sample", "n_obs_steps": 3},
        {"down_dims": [8], "kernel_size": 5},
    ],
)
def test_ddpm_acts_as_lerobot_does(layouts, options):
    run = layouts.lerobot(**options)
    policy = layouts.kept(foreign.read("lerobot", run.write(), PIXELS))
    observation, noise = layouts.draws(run)
    number = run.config["num_inference_steps"] or 4
    steps = layouts.scheduler_noise(number, noise.shape, seed=9)
    wanted = run.actions(observation, noise, seed=9)
    assert wanted.std() > 10
    found = in_pixels(layouts.carried_out(policy, observation, noise, steps))
    torch.testing.assert_close(found / 256, wanted / 256, **SAME)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_ddim_acts_as_lerobot_does(layouts, prediction):
    run = layouts.lerobot(
        noise_scheduler_type="DDIM", num_inference_steps=2, prediction_type=prediction, **RAW
    )
    policy = layouts.kept(foreign.read("lerobot", run.write(), ImportOptions()))
    assert policy.statistics is None
    observation, noise = layouts.draws(run)
    wanted = run.actions(observation, noise)
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_the_folder_within_a_checkpoint_can_be_named_itself(layouts):
    run = layouts.lerobot()
    policy = foreign.read("lerobot", run.write() / "pretrained_model", PIXELS)
    assert (policy.action_steps, policy.observation_steps, policy.env) == (4, 2, "unknown")
    assert policy.data["observation"] == "observation.state observation.environment_state"


def test_weights_of_a_compiled_network_are_read(layouts):
    run = layouts.lerobot(**RAW)
    file = run.write() / "pretrained_model" / "model.safetensors"
    tensors = {k.replace("unet.", "unet._orig_mod."): x for k, x in load_file(file).items()}
    save_file(tensors, file)
    foreign.read("lerobot", run.folder, ImportOptions())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "act"}, "type 'act'; only diffusion is read"),
        (
            {"input_features": {"observation.image": {"type": "VISUAL", "shape": [3, 96, 96]}}},
            r"sees images \(observation.image\)",
        ),
        ({"input_features": {"a": {"type": "STATE", "shape": [2]}}}, "observes a; only"),
        ({"input_features": None}, "has no input_features; load it with a LeRobot"),
        ({"output_features": {}}, "has no output_features.action"),
        ({"noise_scheduler_type": "EDM"}, "noise_scheduler_type = EDM"),
        ({"beta_schedule": "linear", "beta_end": 0.1}, "beta_schedule = linear from 0.0001 to 0.1"),
        ({"clip_sample": False}, "samples without a clip at 1"),
        ({"clip_sample_range": 2.0}, "samples without a clip at 1"),
        ({"num_inference_steps": 3}, "3 steps do not divide its 4"),
        ({"n_action_steps": 8}, r"action_steps = 8: must lie in \[1, 7\]"),
        ({"prediction_type": "flow"}, "prediction = 'flow'"),
        ({"down_dims": [8, 32]}, r"weights are not those of the network .*size mismatch"),
        ({"horizon": 9}, "needs a multiple of 2"),
    ],
)
def test_other_models_are_refused(layouts, config, message):
    run = layouts.lerobot()
    run.config |= config
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        foreign.read("lerobot", run.write(), PIXELS)
    assert "\n" not in str(caught.value)
    assert str(run.folder) in str(caught.value)


def test_the_oldest_settings_are_refused(layouts):
    folder = layouts.lerobot(buffers=True).write() / "pretrained_model"
    (folder / "config.json").write_text('{"input_shapes": {"observation.state": [2]}}')
    with pytest.raises(CheckpointError, match="has no input_features; load it with a LeRobot"):
        foreign.read("lerobot", folder, PIXELS)


def test_what_is_missing_is_named(layouts):
    run = layouts.lerobot()
    del run.config["horizon"]
    with pytest.raises(CheckpointError, match=r"config\.json: has no horizon"):
        foreign.read("lerobot", run.write(), PIXELS)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"ACTION": "MEAN_STD"}, "actions are normalised by MEAN_STD, which has no bounds"),
        ({"ACTION": "QUANTILES"}, "no 2 finite numbers for the q01 of action"),
        ({"STATE": "SOMEHOW"}, "observation.state is normalised by SOMEHOW"),
    ],
)
@pytest.mark.parametrize("buffers", [False, True])
def test_other_normalisations_are_refused(layouts, mode, message, buffers):
    run = layouts.lerobot(buffers=buffers)
    run.config["normalization_mapping"] |= mode
    with pytest.raises(CheckpointError, match=message):
        foreign.read("lerobot", run.write(), PIXELS)


def test_a_processor_that_changes_numbers_is_refused(layouts):
    folder = layouts.lerobot().write() / "pretrained_model"
    file = folder / "policy_postprocessor.json"
    record = json.loads(file.read_text())
    record["steps"].append({"registry_name": "absolute_actions_processor"})
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"has a step absolute_actions_processor"):
        foreign.read("lerobot", folder, PIXELS)
    record["steps"] = [{"registry_name": "unnormalizer_processor", "config": {}}]
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="so there are no statistics"):
        foreign.read("lerobot", folder, PIXELS)


def test_statistics_are_read_from_the_folder_alone(layouts, tmp_path):
    folder = layouts.lerobot().write() / "pretrained_model"
    file = folder / "policy_preprocessor.json"
    record = json.loads(file.read_text())
    state = record["steps"][-1]["state_file"]
    (folder / state).rename(tmp_path / "elsewhere.safetensors")
    record["steps"][-1]["state_file"] = "../../elsewhere.safetensors"
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"elsewhere\.safetensors: no such file"):
        foreign.read("lerobot", folder, PIXELS)


def test_an_encoder_of_images_is_refused(layouts):
    file = layouts.lerobot().write() / "pretrained_model" / "model.safetensors"
    save_file(load_file(file) | {"diffusion.rgb_encoder.x": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="encoder of images"):
        foreign.read("lerobot", file.parent, PIXELS)

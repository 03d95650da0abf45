"""robomimic's diffusion policy: the same actions as its own, and refusals."""

from __future__ import annotations

import pytest
import torch

from genpol import foreign
from genpol.errors import CheckpointError, ConfigError
from genpol.foreign import ImportOptions

SAME = {"atol": 1e-5, "rtol": 0.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalized": False},
        {"steps": 2},
        {"prediction": "sample"},
        {"prediction": "v_prediction"},
    ],
)
def test_ddpm_acts_as_robomimic_does(layouts, options):
    file = layouts.robomimic(**options)
    policy = layouts.kept(foreign.read("robomimic", file.write(), ImportOptions()))
    observation, noise = layouts.draws(file)
    steps = layouts.scheduler_noise(file.steps, noise.shape, seed=9)
    wanted = file.actions(observation, noise, seed=9)
    assert wanted.std() > 0.1
    found = layouts.carried_out(policy, observation, noise, steps)
    torch.testing.assert_close(found, wanted, **SAME)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_ddim_acts_as_robomimic_does(layouts, prediction):
    file = layouts.robomimic(sampler="ddim", steps=2, prediction=prediction)
    policy = layouts.kept(foreign.read("robomimic", file.write(), ImportOptions()))
    observation, noise = layouts.draws(file)
    wanted = file.actions(observation, noise)
    found = layouts.carried_out(policy, observation, noise)
    torch.testing.assert_close(found, wanted, **SAME)


def test_a_model_of_ddpm_can_be_sampled_by_ddim(layouts):
    file = layouts.robomimic()
    policy = foreign.read("robomimic", file.write(), ImportOptions(steps=2))
    file.sampler, file.steps = "ddim", 2
    observation, noise = layouts.draws(file)
    wanted = file.actions(observation, noise)
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_what_the_file_says_is_kept(layouts):
    policy = foreign.read("robomimic", layouts.robomimic().write(), ImportOptions())
    assert (policy.env, policy.action_steps, policy.observation_steps) == ("Lift", 3, 2)
    assert policy.control_period_s == pytest.approx(0.05)
    assert policy.data["observation"] == "object robot0_eef_pos"


def test_weights_without_an_average_and_several_data_sets_are_read(layouts):
    file = layouts.robomimic()
    ours = {f"policy.noise_pred_net.{k}": x for k, x in file.weights.items()}
    shapes = {"ac_dim": 2, "all_shapes": file.shapes}
    path = file.write(model={"nets": ours, "ema": None}, shape_metadata=[shapes, shapes])
    policy = foreign.read("robomimic", path, ImportOptions(steps=2))
    file.sampler, file.steps = "ddim", 2
    observation, noise = layouts.draws(file)
    wanted = file.actions(observation, noise)
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_data_that_never_moved_may_have_bounds_beside_the_environments(layouts):
    file = layouts.robomimic()
    file.action_statistics["actions"] = {"offset": [[1.0, 0.0]], "scale": [[1.0, 1.0]]}
    policy = foreign.read("robomimic", file.write(), ImportOptions(steps=2))
    assert (policy.action_low, policy.action_high) == ([0.0, -1.0], [2.0, 1.0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("observation.modalities.obs.rgb", ["agentview_image"], "sees images .*agentview_image"),
        ("observation.modalities.goal.low_dim", ["object"], "is told a goal"),
        ("algo.language_conditioned", True, "language"),
        ("algo.unet.enabled", False, "is no unet"),
        ("algo.unet.n_groups", 4, "n_groups = 4"),
        ("algo.ddpm.beta_schedule", "linear", "only squaredcos_cap_v2 is read"),
        ("algo.ddpm.clip_sample", False, "samples without a clip at 1"),
        ("algo.ddpm.prediction_type", "flow", "prediction = 'flow'"),
        ("algo.horizon.observation_horizon", 3, "sees 10 numbers, but 3 observations"),
        ("algo.horizon.prediction_horizon", 7, "needs a multiple of 2"),
        ("algo.horizon", {}, "has no horizon.observation_horizon"),
        ("observation.modalities.obs.low_dim", ["nothing"], "names nothing"),
        ("train.action_config", {"actions": {"format": "rot_6d"}}, "rotation in six numbers"),
    ],
)
def test_other_models_are_refused(layouts, key, value, message):
    file = layouts.robomimic()
    config = file.config
    *groups, last = key.split(".")
    for name in groups:
        config = config[name]
    config[last] = value
    path = file.write()
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        foreign.read("robomimic", path, ImportOptions())
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"algo_name": "bc"}, "is robomimic's bc; only diffusion_policy is read"),
        ({"algo_name": None}, "is no checkpoint of robomimic"),
        ({"model": {"nets": {"policy.obs_encoder.x": torch.zeros(1)}}}, "encoder of observations"),
        ({"model": {"nets": {"value.x": torch.zeros(1)}}}, "not known: value.x"),
        ({"model": {"nets": {}}}, "is not the conditional U-Net"),
        ({"obs_normalization_stats": None}, "has no obs_normalization_stats"),
        ({"obs_normalization_stats": {"object": {"mean": [1.0]}}}, "not 2 means and deviations"),
        (
            {"action_normalization_stats": {"actions": {"offset": [0.0], "scale": [1.0]}}},
            "1 number",
        ),
        ({"shape_metadata": [{"a": 1}, {"a": 2}]}, "several that differ"),
        ({"config": "{"}, "is no JSON"),
    ],
)
def test_other_files_are_refused(layouts, extra, message):
    path = layouts.robomimic().write(**extra)
    with pytest.raises(CheckpointError, match=message) as caught:
        foreign.read("robomimic", path, ImportOptions())
    assert "\n" not in str(caught.value)

"""DPPO's and ReinFlow's checkpoints: the same actions as theirs, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genpol import foreign
from genpol.errors import CheckpointError, ConfigError
from genpol.foreign import ImportOptions

SAME = {"atol": 1e-5, "rtol": 0.0}
NETWORKS = [
    {"residual": True, "norm": False},
    {"residual": True, "norm": True, "activation": "Mish"},
    {"residual": False, "norm": False, "activation": "GELU"},
    {"residual": False, "norm": True},
]


@pytest.mark.parametrize("network", NETWORKS)
def test_ddpm_acts_as_dppo_does(layouts, network):
    run = layouts.dppo(**network)
    policy = layouts.kept(foreign.read("dppo", run.write(), ImportOptions()))
    observation, noise = layouts.draws(run)
    steps = torch.randn(len(noise), run.levels, *noise.shape[1:])
    wanted = run.actions(observation, noise, steps)
    assert wanted.std() > 0.1
    torch.testing.assert_close(
        layouts.carried_out(policy, observation, noise, steps), wanted, **SAME
    )


def test_ddim_acts_as_dppo_does(layouts):
    run = layouts.dppo(use_ddim=True, ddim_steps=2)
    policy = layouts.kept(foreign.read("dppo", run.write(), ImportOptions()))
    observation, noise = layouts.draws(run)
    wanted = run.actions(observation, noise, steps=2)
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_a_model_of_ddpm_can_be_sampled_by_ddim(layouts):
    run = layouts.dppo()
    policy = foreign.read("dppo", run.write(), ImportOptions(steps=2))
    observation, noise = layouts.draws(run)
    wanted = run.actions(observation, noise, steps=2)
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_a_model_of_the_action_itself_acts_as_dppo_does(layouts):
    run = layouts.dppo(predict_epsilon=False)
    policy = foreign.read("dppo", run.write(), ImportOptions())
    observation, noise = layouts.draws(run)
    steps = torch.randn(len(noise), run.levels, *noise.shape[1:])
    wanted = run.actions(observation, noise, steps)
    found = layouts.carried_out(policy, observation, noise, steps)
    torch.testing.assert_close(found, wanted, **SAME)


@pytest.mark.parametrize("network", NETWORKS[1:3])
@pytest.mark.parametrize("steps", [0, 3, 1])
def test_a_flow_acts_as_reinflow_does(layouts, network, steps):
    run = layouts.reinflow(**network)
    policy = layouts.kept(foreign.read("reinflow", run.write(), ImportOptions(steps=steps)))
    observation, noise = layouts.draws(run)
    wanted = run.actions(observation, noise, steps=steps)
    assert wanted.std() > 0.1
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_weights_without_an_average_are_read(layouts):
    run = layouts.reinflow()
    policy = foreign.read("reinflow", run.write(averaged=False), ImportOptions())
    observation, noise = layouts.draws(run)
    wanted = run.actions(observation, noise)
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_actions_are_those_of_an_environment_with_other_bounds(layouts):
    run = layouts.reinflow()
    run.statistics |= {"action_min": np.array([-4.0, 0.0]), "action_max": np.array([4.0, 3.0])}
    path = run.write()
    policy = foreign.read("reinflow", path, ImportOptions(action_range=(-4.0, 4.0)))
    observation, noise = layouts.draws(run)
    wanted = run.actions(observation, noise) / 4
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)
    with pytest.raises(ConfigError, match=r"lie outside of it; .*action_range=\[LOW,HIGH\]"):
        foreign.read("reinflow", path, ImportOptions())


def test_what_never_moved_in_the_data_is_harmless(layouts):
    run = layouts.reinflow()
    run.statistics["obs_min"][1] = run.statistics["obs_max"][1] = 0.25
    run.statistics["action_max"][0] = run.statistics["action_min"][0]
    policy = layouts.kept(foreign.read("reinflow", run.write(), ImportOptions()))
    observation, noise = layouts.draws(run)
    observation[..., 1] = 0.25
    wanted = run.actions(observation, noise)
    torch.testing.assert_close(layouts.carried_out(policy, observation, noise), wanted, **SAME)


def test_what_the_files_say_is_kept(layouts):
    run = layouts.dppo()
    run.config["act_steps"] = 3
    policy = foreign.read("dppo", run.write(), ImportOptions())
    assert (policy.env, policy.action_steps, policy.observation_steps) == ("hopper-medium-v2", 3, 2)
    assert dict(policy.data) == {"file": "state_7.pt", "format": "dppo", "epochs": 7}
    assert (policy.observation_dim, policy.action_dim) == (6, 2)
    other = ImportOptions(env="Hopper-v5", action_steps=1, control_period_s=0.008)
    policy = foreign.read("dppo", run.write(), other)
    assert (policy.env, policy.action_steps, policy.control_period_s) == ("Hopper-v5", 1, 0.008)


def test_settings_and_statistics_may_lie_elsewhere(layouts, tmp_path):
    run = layouts.dppo()
    path = run.write()
    config = (run.folder / ".hydra" / "config.yaml").rename(tmp_path / "a.yaml")
    with pytest.raises(CheckpointError, match=r"no config\.yaml beside it.*config=FILE"):
        foreign.read("dppo", path, ImportOptions())
    statistics = (run.folder / "normalization.npz").rename(tmp_path / "b.npz")
    with pytest.raises(CheckpointError, match=r"normalization=FILE"):
        foreign.read("dppo", path, ImportOptions(config=config))
    foreign.read("dppo", path, ImportOptions(config=config, normalization=statistics))


def test_values_of_the_environment_variables_are_not_needed(layouts):
    run = layouts.dppo()
    run.config["horizon_steps"] = "${oc.env:NO_SUCH_VARIABLE}"
    with pytest.raises(CheckpointError, match=r"horizon_steps refers to what is not in the file"):
        foreign.read("dppo", run.write(), ImportOptions())


def test_variables_of_the_environment_are_not_read(layouts, monkeypatch):
    monkeypatch.setenv("A_SECRET", "4")
    run = layouts.dppo()
    run.config["horizon_steps"] = "${oc.env:A_SECRET}"
    with pytest.raises(CheckpointError, match=r"horizon_steps refers to what is not in the file"):
        foreign.read("dppo", run.write(), ImportOptions())


@pytest.mark.parametrize("name", ["obs_min", "action_max"])
def test_statistics_that_are_no_numbers_are_refused(layouts, name):
    run = layouts.dppo()
    run.statistics[name][0] = np.nan
    with pytest.raises((CheckpointError, ConfigError), match=r"not all finite|lie outside"):
        foreign.read("dppo", run.write(), ImportOptions())


def test_weights_that_are_no_numbers_are_refused(layouts):
    run = layouts.dppo()
    run.weights["time_embedding.1.bias"][0] = float("inf")
    with pytest.raises(CheckpointError, match="its weights are not all finite"):
        foreign.read("dppo", run.write(), ImportOptions())


def changed(config, key, value):
    *groups, last = key.split(".")
    for name in groups:
        config = config[name]
    config[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.network._target_", "model.flow.mlp_flow.FlowMLP", "format=reinflow"),
        ("model.network._target_", "model.diffusion.unet.Unet1D", "only DiffusionMLP is read"),
        ("model.network._target_", "x.VisionDiffusionMLP", "sees images"),
        ("shape_meta", {"obs": {"rgb": {"shape": [3, 96, 96]}}}, "sees images"),
        ("model.network.cond_mlp_dims", [64], "cond_mlp_dims"),
        ("model.network.activation_type", "Softplus", "activation_type = Softplus"),
        ("model.network.residual_style", False, "residual_style = False, but the weights are"),
        ("model.network.mlp_dims", [16, 16, 16, 16, 16], "weights are not those of the network"),
        ("model.network.mlp_dims", [16, 16], "residual_mlp needs an odd number"),
        ("model.denoised_clip_value", None, "samples without a clip at 1"),
        ("model.denoised_clip_value", 2.0, "samples without a clip at 1"),
        ("obs_dim", 4, "has 3 numbers under obs_min, where 4 are needed"),
        ("horizon_steps", 8, "weights are not those of the network"),
        ("model", {"_target_": "x.DiffusionModel"}, r"has no model\.network\._target_"),
        ("act_steps", 9, r"action_steps = 9: must lie in \[1, 4\]"),
        ("obs_dim", "three", "is not as dppo writes it"),
    ],
)
def test_other_models_are_refused(layouts, key, value, message):
    run = layouts.dppo()
    changed(run.config, key, value)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        foreign.read("dppo", run.write(), ImportOptions())
    assert "\n" not in str(caught.value)
    assert str(run.folder) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.network._target_", "model.diffusion.mlp_diffusion.DiffusionMLP", "format=dppo"),
        ("model._target_", "model.flow.shortcutflow.ShortCutFlow", "only ReFlow is read"),
        ("model.act_max", 2, "only -1 and 1 are supported"),
    ],
)
def test_other_flows_are_refused(layouts, key, value, message):
    run = layouts.reinflow()
    changed(run.config, key, value)
    with pytest.raises(CheckpointError, match=message):
        foreign.read("reinflow", run.write(), ImportOptions())


def test_clipped_epsilon_is_refused(layouts):
    run = layouts.dppo(use_ddim=True, ddim_steps=2, eps_clip_value=1.0)
    with pytest.raises(CheckpointError, match="eps_clip_value"):
        foreign.read("dppo", run.write(), ImportOptions())


def test_steps_that_do_not_divide_the_levels_are_refused(layouts):
    run = layouts.dppo()
    with pytest.raises(ConfigError, match=r"state_7\.pt: 3 steps do not divide its 4"):
        foreign.read("dppo", run.write(), ImportOptions(steps=3))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"actor_ft.mlp_mean.x": torch.zeros(1)}, "finetuned policy"),
        ({"critic.x": torch.zeros(1)}, "weights that are not known: critic.x"),
        ({}, "weights are not those of the network"),
        (None, "has neither 'ema' nor 'model'"),
    ],
)
def test_other_weights_are_refused(layouts, weights, message):
    run = layouts.dppo(residual=False)
    with pytest.raises(CheckpointError, match=message):
        foreign.read("dppo", run.write(extra={"ema": weights}), ImportOptions())

"""Names and settings of the simulator families, without the simulators."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from genpol import envs
from genpol.envs import (
    DMControlSettings,
    GymSettings,
    MetaWorldSettings,
    MjlabSettings,
    MujocoSettings,
    OGBenchSettings,
)
from genpol.envs.mujoco import registry
from genpol.errors import ConfigError


def test_names_are_those_of_the_registry() -> None:
    assert envs.names() == sorted(registry.tasks())


def test_importing_imports_no_simulator() -> None:
    code = (
        "import sys, genpol.envs as envs; envs.names(); envs.settings_classes();"
        "print([m for m in ('torch', 'mujoco', 'gymnasium', 'dm_control') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (MujocoSettings(name="HopperStand"), "HopperStand"),
        (GymSettings(id="Pendulum-v1"), "Pendulum-v1"),
        (GymSettings(id="my_module:Family/Arm-v0"), "Family-Arm-v0"),
        (DMControlSettings(domain="cartpole", task="swingup"), "cartpole-swingup"),
        (OGBenchSettings(name="scene"), "scene-play"),
        (OGBenchSettings(name="cube-double", task=2), "cube-double-play-task2"),
        (OGBenchSettings(goal_conditioned=True), "cube-single-play-goal"),
        (OGBenchSettings(goal_conditioned=True, task=5), "cube-single-play-goal-task5"),
        (MetaWorldSettings(name="peg-insert-side-v3"), "peg-insert-side-v3"),
        (MetaWorldSettings(reward="dense"), "reach-v3-dense"),
        (MjlabSettings(task="Mjlab-Cartpole-Balance"), "Mjlab-Cartpole-Balance"),
    ],
)
def test_labels(settings: envs.Settings, label: str) -> None:
    assert envs.label(settings) == label


def test_every_family_has_settings_with_defaults() -> None:
    classes = envs.settings_classes()
    assert list(classes) == [
        "mujoco",
        "multitask",
        "gym",
        "dm_control",
        "ogbench",
        "metaworld",
        "isaaclab",
        "mjlab",
    ]
    for settings_class in classes.values():
        assert dataclasses.is_dataclass(settings_class())


@pytest.mark.parametrize(
    ("settings_class", "values", "message"),
    [
        (MujocoSettings, {"name": "HoperStand"}, "'HoperStand'.*Did you mean 'HopperStand'"),
        (MujocoSettings, {"num_threads": -1}, r"env\.num_threads = -1: must be >= 0"),
        (MujocoSettings, {"action_repeat": 0}, r"env\.action_repeat = 0: must be >= 1"),
        (GymSettings, {"id": ""}, r"env\.id is empty"),
        (DMControlSettings, {"task": ""}, r"env\.task is empty"),
        (OGBenchSettings, {"name": "puzle-3x3"}, r"env\.name.*Did you mean 'puzzle-3x3'"),
        (OGBenchSettings, {"task": 6}, r"env\.task = 6: must lie in \[0, 5\]"),
        (OGBenchSettings, {"success_timing": "now"}, r"env\.success_timing.*post, pre"),
        (MetaWorldSettings, {"name": "push-v4"}, r"env\.name.*Did you mean 'push-v3'"),
        (MetaWorldSettings, {"reward": "spares"}, r"env\.reward.*Did you mean 'sparse'"),
        (MjlabSettings, {"task": ""}, r"env\.task is empty"),
        (MjlabSettings, {"action_bound": 0.0}, r"env\.action_bound = 0.0: must be > 0"),
    ],
)
def test_wrong_settings_are_refused(settings_class: type, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_class(**values)


def test_no_environments_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_envs = 0"):
        envs.make(MujocoSettings(), num_envs=0, seed=0)

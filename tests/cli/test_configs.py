"""Every YAML that is shipped composes with the real settings of agents and environments."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import genpol.agents as agents
import genpol.envs as envs
from genpol.cli.configuration import compose, to_settings
from genpol.cli.list import config_folder, describe, names
from genpol.envs.settings import METAWORLD_NAMES, OGBENCH_NAMES

# Environments that need more than their name.
ARGUMENTS = {
    "gym": ["env.id=Pendulum-v1"],
    "dm_control": ["env.domain=cartpole", "env.task=swingup"],
    "isaaclab": ["env.task=quadruped"],
    "mjlab": ["env.task=Mjlab-Cartpole-Swingup"],
}
# One of Meta-World's stands for all: composing takes a second, and the files are alike.
COMPOSED = [name for name in names("env") if name not in METAWORLD_NAMES[1:]]


@pytest.mark.parametrize("env", COMPOSED)
def test_environment_composes(env: str) -> None:
    settings = to_settings(compose([f"env={env}", *ARGUMENTS.get(env, [])]))
    assert settings.choices.env == env
    assert env in ARGUMENTS or envs.label(settings.env) == env


@pytest.mark.parametrize("agent", names("agent"))
def test_agent_composes(agent: str) -> None:
    settings = to_settings(compose(["env=HopperStand", f"agent={agent}"]))
    assert settings.choices.agent == agent
    assert isinstance(settings.agent, agents.settings_class(agent))


@pytest.mark.parametrize("recipe", [name for name in names("recipe") if "_" in name])
def test_recipe_composes(recipe: str) -> None:
    agent, _, env = recipe.rpartition("_")
    extra = ARGUMENTS.get(env, [])
    settings = to_settings(compose([f"agent={agent}", f"env={env}", *extra]))
    assert settings.choices.recipe == recipe


# Those that are asked for by name, and the environment and the agents that they are for.
PLANNING = ("mbdpo", "tdmpc2")
NAMED = {
    "world-model-online": ("CheetahRun", PLANNING),
    "world-model-pretraining": ("multitask", PLANNING),
    "world-model-finetuning": ("multitask", PLANNING),
    "sac-replay": ("ReacherEasy", ("sac",)),
    "ppo-locomotion": ("Hopper-v5", ("ppo",)),
    "finetuning-laptop": ("cube-single-play", ("dsrl", "residual", "best_of_n")),
    "ogpo-laptop": ("cube-single-play", ("ogpo",)),
}


@pytest.mark.parametrize("recipe", [name for name in names("recipe") if "_" not in name])
def test_named_recipe_composes(recipe: str) -> None:
    env, its_agents = NAMED[recipe]
    for agent in its_agents:
        arguments = [f"agent={agent}", f"env={env}"]
        assert to_settings(compose(arguments)).choices.recipe == ""
        settings = to_settings(compose([*arguments, f"recipe={recipe}"]))
        assert settings.choices.recipe == recipe


def test_regimes_of_world_models_evaluate_as_often_as_they_should() -> None:
    """Pretraining: 10 episodes per task. Finetuning: 40 000 actions, evaluated every 5 000."""
    tasks = "env.tasks=[WalkerWalk,WalkerRun,ReacherEasy]"
    arguments = ["agent=mbdpo", "env=multitask", tasks]
    before = to_settings(compose([*arguments, "recipe=world-model-pretraining"]))
    assert before.evaluation_episodes == 30
    recipe = "recipe=world-model-finetuning"
    after = to_settings(compose([*arguments, "env.only=WalkerRun", recipe]))
    assert after.evaluation_episodes == after.evaluation_envs(10) == 10
    assert after.total_steps / after.env.action_repeat == 40_000
    assert after.evaluation.interval_steps / after.env.action_repeat == 5_000


def test_every_native_task_has_a_file() -> None:
    assert set(envs.names()) <= set(names("env"))


def test_every_environment_with_a_recipe_for_data_has_a_file() -> None:
    assert {f"{name}-play" for name in OGBENCH_NAMES} <= set(names("env"))


def test_every_task_of_metaworld_has_a_file_with_its_name() -> None:
    for name in METAWORLD_NAMES:
        found = yaml.safe_load((config_folder() / "env" / f"{name}.yaml").read_text())
        assert found == {"defaults": ["metaworld_schema"], "name": name}


def test_every_agent_has_a_file() -> None:
    assert set(agents.names()) == set(names("agent"))


@pytest.mark.parametrize("group", ["agent", "env", "recipe", "experiment"])
def test_every_file_says_what_it_is(group: str) -> None:
    assert not [name for name in names(group) if not describe(group, name)]


def test_configurations_are_values_only() -> None:
    # `_target_` would let a configuration file run any code.
    found = [
        file for file in Path(config_folder()).rglob("*.yaml") if "_target_" in file.read_text()
    ]
    assert not found

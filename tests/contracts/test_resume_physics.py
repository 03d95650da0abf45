"""Resuming is exact on real physics too, with all that the shipped GoRL run switches on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from genpol import agents, envs
from genpol.agent import Specs
from genpol.envs import MujocoSettings
from genpol.training import checkpoint
from genpol.training.loop import Training
from genpol.training.run import Run
from genpol.training.settings import CheckpointSettings, EvaluationSettings, TrainSettings

NUM_ENVS = 8
ENV = MujocoSettings(name="HopperStand", action_repeat=2, train_episode_steps=100, num_threads=1)
# 160 environment steps a batch: three batches of stage 0, three of refinement, then stage 1.
AGENT = {
    "rollout_steps": 10,
    "epochs": 2,
    "minibatches": 2,
    "actor_hidden": [8],
    "critic_hidden": [8],
    "noise_correlation": 0.7,
    "stage_steps": [480],
    "refinement_steps": 480,
    "max_refinements": 1,
    "decoder_hidden": [8],
    "solver_steps": 2,
    "fit_steps": 4,
    "fit_batch_size": 32,
}
TOTAL = 1600
COLLECTING, AFTERWARDS = 800, 1120


def make_env(*, num_envs: int, seed: int, training: bool = False) -> EnvBase:
    env = envs.make(ENV, num_envs=num_envs, seed=seed, training=training)
    if not training:
        env.max_episode_steps = 20  # evaluations, which cost most of the time, are beside the point
    return env


def begin(folder: Path, total_steps: int, run: Run | None = None) -> Training:
    settings = TrainSettings(
        num_envs=NUM_ENVS,
        total_steps=total_steps,
        evaluation=EvaluationSettings(interval_steps=10**9, episodes=1),
        checkpoint=CheckpointSettings(interval_steps=10**9),
        tensorboard=False,
        env=ENV,
        agent=None,
    )
    probe = make_env(num_envs=1, seed=0)
    specs = Specs.from_env(probe, num_envs=NUM_ENVS)
    agent = agents.make("gorl", agents.settings_class("gorl")(**AGENT), specs, seed=0)
    if run is None:
        run = Run.create(folder, "HopperStand", "gorl", 0, {}, ["test"], tensorboard=False)
    return Training(agent, make_env, settings, run)


def flat(value: Any, name: str) -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their paths."""
    if isinstance(value, dict | TensorDictBase):
        parts = dict(value.items()).items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {name: value.clone() if isinstance(value, Tensor) else value}
    return {k: v for key, part in parts for k, v in flat(part, f"{name}.{key}").items()}


def everything(training: Training) -> dict[str, Any]:
    agent, env = training.agent, training._env
    return (
        flat(dict(agent.state_dict()), "weights")
        | flat(agent.training_state(), "agent")
        | flat(env.state_dict_of_simulation(), "env")
        | flat(training._episodes.state(), "episodes")
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = begin(tmp_path_factory.mktemp("straight"), TOTAL)
    training.start()
    return training


def test_the_run_holds_a_refinement_and_whole_episodes(straight: Training) -> None:
    assert straight.agent.stage == 1
    assert any(name.startswith("policy.decoder") for name in straight.agent.state_dict())
    assert straight._episodes.state()["whole"].all()
    assert straight._env.max_episode_steps == 100
    assert straight.env_steps == TOTAL


@pytest.mark.parametrize("cut", [COLLECTING, AFTERWARDS])
def test_stopping_and_resuming_changes_nothing(
    straight: Training, tmp_path: Path, cut: int
) -> None:
    first = begin(tmp_path, cut)
    first.start()
    assert bool(first.agent.training_state()["collected"]) is (cut == COLLECTING)
    torch.manual_seed(12345)  # another process would have another global generator
    second = begin(tmp_path, TOTAL, Run.open(first.run.path, tensorboard=False))
    saved = checkpoint.latest(first.run.checkpoints)
    assert saved is not None
    second.resume(saved)
    second.start()
    expected, resumed = everything(straight), everything(second)
    assert expected.keys() == resumed.keys()
    differing = [
        name
        for name, value in expected.items()
        if not (
            torch.equal(value, resumed[name])
            if isinstance(value, Tensor)
            else value == resumed[name]
        )
    ]
    assert differing == []

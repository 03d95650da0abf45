"""What the training loop logs of the episodes that it runs through."""

from __future__ import annotations

import csv

import pytest
import torch
from torchrl.data import Unbounded

from genpol import agents
from genpol.agent import Specs
from genpol.training.loop import Training
from genpol.training.run import Run
from genpol.training.settings import CheckpointSettings, EvaluationSettings, TrainSettings

ENVS = 4


def make_of_terms(make_env, terms):
    """Return a maker of point masses with a reward of several constant terms, if they train."""

    def make(*, num_envs, seed=0, training=False):
        env = make_env(num_envs=num_envs, seed=seed)
        if training:
            reward = torch.tensor(list(terms.values()))
            env.reward_terms = tuple(terms)
            env.reward_spec = Unbounded((num_envs, len(terms)))
            env._reward = lambda x: reward.expand(len(x), -1).clone()
        return env

    return make


def logged(folder, make_env):
    """Train for 30 steps of every environment, which are three episodes, and return the rows."""
    settings = TrainSettings(
        num_envs=ENVS,
        total_steps=30 * ENVS,
        evaluation=EvaluationSettings(interval_steps=10**9, episodes=2),
        checkpoint=CheckpointSettings(interval_steps=10**9),
        tensorboard=False,
        env=None,
        agent=None,
    )
    options = agents.settings_class("ppo")(rollout_steps=10, minibatches=2, actor_hidden=[8])
    env = make_env(num_envs=1, training=True)
    agent = agents.make("ppo", options, Specs.from_env(env, num_envs=ENVS), seed=0)
    run = Run.create(folder, "toy", "ppo", 0, {}, ["test"], tensorboard=False)
    training = Training(agent, make_env, settings, run)
    training.start()
    training.close()
    with (run.path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_term_of_the_reward_has_a_return_of_its_own(tmp_path, point_mass):
    # Ten steps an episode; each environment's first does not count.
    rows = logged(tmp_path, make_of_terms(point_mass, {"near": 1.0, "effort": -0.25}))
    names = ("train/return", "train/return/near", "train/return/effort")
    assert [rows[0].get(name, "") for name in names] == ["", "", ""]
    for row in rows[1:]:
        assert [float(row[name]) for name in names] == pytest.approx([7.5, 10.0, -2.5])
        assert float(row["train/episodes"]) == ENVS


def test_a_single_reward_has_no_terms(tmp_path, point_mass):
    def make(*, num_envs, seed=0, training=False):
        return point_mass(num_envs=num_envs, seed=seed)

    rows = logged(tmp_path, make)
    assert "train/return" in rows[-1]
    assert not [name for name in rows[-1] if name.startswith("train/return/")]

"""What the tests of agents that take one gradient per rollout share."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs

# Gauss-Hermite quadrature with three points, as draws of equal weight: means of polynomials of
# degree 5 over these are those over N(0, 1), exactly.
NODES = torch.tensor([0.0, 0.0, 0.0, 0.0, math.sqrt(3.0), -math.sqrt(3.0)]).view(6, 1, 1)


@pytest.fixture
def make_agent():
    """Return a maker of agents by name, for six environments unless told otherwise."""

    def make(name, *, num_envs=6, **settings):
        specs = Specs(observation_dim=2, action_dim=1, num_envs=num_envs)
        options = {"rollout_steps": 8, "critic_minibatches": 2} | settings
        return agents.make(name, agents.settings_class(name)(**options), specs, seed=0)

    return make


@pytest.fixture
def make_bandit_agent(make_agent):
    """Return a maker of agents that are a mean and a scale: there is nothing to observe."""

    def make(name, **settings):
        options = {
            "rollout_steps": 1,
            "critic_minibatches": 1,
            "reward_scale": 1.0,
            "normalize_advantage": False,
            "actor_hidden": [],
            "critic_hidden": [],
        }
        return make_agent(name, **(options | settings))

    return make


@pytest.fixture
def bandit_rollout():
    """Return a maker of six one-step episodes with the reward ``-(z - 1)^2`` of the latent z.

    The latents are the nodes, moved to where the agent explores: the rollout is without chance.
    """

    def make(agent):
        batch = TensorDict({"observation": torch.zeros(6, 1, 2)}, [6, 1])
        with set_exploration_type(ExplorationType.RANDOM):
            agent.policy(batch)
            mean, scale = agent.policy.encoder(batch["observation"])
        batch["latent"] = (mean + scale * NODES).detach()
        yes = torch.ones(6, 1, 1, dtype=torch.bool)
        reward = -(batch["latent"] - 1.0).square()
        batch["next"] = after(batch["observation"], reward, done=yes)
        return batch

    return make


@pytest.fixture
def rollout():
    """Return a maker of batches ``[envs, steps]`` of chance transitions that the agent explored."""

    def make(agent, reward, *, done=None, diverged=None, seed=1):
        draw = torch.Generator().manual_seed(seed)
        envs, steps = reward.shape[:2]
        observation = torch.randn(envs, steps + 1, 2, generator=draw)
        batch = TensorDict({"observation": observation[:, :-1]}, [envs, steps])
        with set_exploration_type(ExplorationType.RANDOM):
            agent.policy(batch)
        batch["next"] = after(observation[:, 1:], reward, done=done, diverged=diverged)
        return batch

    return make


def after(observation, reward, *, done=None, diverged=None):
    no = torch.zeros_like(reward, dtype=torch.bool)
    done = no if done is None else done
    return TensorDict(
        {
            "observation": observation,
            "reward": reward,
            "done": done,
            "terminated": done,
            "truncated": no,
            "diverged": no if diverged is None else diverged,
        },
        reward.shape[:2],
    )

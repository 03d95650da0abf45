"""Every surrogate in every agent that takes it: one update, how far it leads, and what it reads."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.on_policy.surrogate_settings import NAMES, BPOSettings
from genpol.on_policy.surrogates import SURROGATES
from genpol.policies.gaussian import gaussian_kl

ENVS, STEPS = 16, 20
SPECS = Specs(observation_dim=1, action_dim=1, num_envs=ENVS)
SMALL = {
    "rollout_steps": STEPS,
    "epochs": 2,
    "minibatches": 4,
    "actor_hidden": [16],
    "critic_hidden": [16],
}
EXTRA = {"fpo": {"solver_steps": 3, "pairs": 2}, "dppo": {"solver_steps": 3}}


def make(name, **settings):
    made = agents.settings_class(name)(**(SMALL | EXTRA.get(name, {}) | settings))
    return agents.make(name, made, SPECS, seed=0)


def collect(agent, env):
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        return env.rollout(STEPS, agent.policy, break_when_any_done=False)


def test_the_settings_name_the_surrogates_there_are():
    assert set(NAMES) == set(SURROGATES)


TAKEN = [
    (agent, surrogate)
    for agent in ("ppo", "bpo", "mdpo", "gorl", "fpo", "dppo")
    for surrogate in SURROGATES
    if (agent, surrogate) != ("fpo", "mdpo")
]


@pytest.mark.parametrize(("name", "surrogate"), TAKEN)
def test_every_agent_takes_an_update_of_every_surrogate(point_mass, name, surrogate):
    agent = make(name, surrogate=surrogate)
    actor = agent.learner.actor_critic.actor
    before = copy.deepcopy(actor.state_dict())
    metrics = agent.update(collect(agent, point_mass(num_envs=ENVS)))
    assert type(agent.learner.surrogate) is SURROGATES[surrogate]
    assert all(torch.as_tensor(value).isfinite() for value in metrics.values())
    assert metrics["skipped_updates"] == 0
    learned = [parameter for parameter, _ in actor.named_parameters()]
    assert any(not torch.equal(before[x], actor.state_dict()[x]) for x in learned)
    assert all(x.isfinite().all() for x in actor.parameters())


def test_a_flow_without_density_has_no_mirror_descent():
    with pytest.raises(ConfigError, match="agent=dppo"):
        make("fpo", surrogate="mdpo")


def divergence_of_one_iteration(surrogate, env):
    """Return the KL of the policy after one iteration from the one that collected."""
    agent = make(
        "ppo", surrogate=surrogate, target_kl=0.0, prior="none", learning_rate=3e-3, epochs=10
    )
    batch = collect(agent, env)
    actor = agent.learner.actor_critic.actor
    old = copy.deepcopy(actor)
    observation = batch["observation"].clone()  # not normalised yet: there were no statistics
    agent.update(batch)
    with torch.no_grad():
        new = actor.at_normalized(observation)
        return gaussian_kl(*new, *old.at_normalized(observation)).mean().item()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_one_iteration_leads_about_as_far_as_ppo(point_mass, surrogate):
    """Acceptance (e), on one fixed rollout; PPO itself goes as far as it usually does."""
    own, ppo = (
        divergence_of_one_iteration(name, point_mass(num_envs=ENVS)) for name in (surrogate, "ppo")
    )
    assert 0.01 < ppo < 0.05
    assert 0.2 * ppo < own < 5 * ppo


# -- BPO's critics -------------------------------------------------------------------------------

RETURNS = (0.7, 0.15)
# A soft target of width 0.2 in scaled reward.
SOFT = {"bpo": BPOSettings(temperature=2.0), "reward_scale": 0.1, "prior": "none"}


def bpo_learner(value, median):
    """Return a learner whose critics give one value and one median, and rows at ratio one."""
    agent = make("bpo", **SOFT)
    critics = agent.learner.actor_critic
    with torch.no_grad():  # their last layers have no weights yet
        critics.critic.linears[-1].bias.fill_(value)
        critics.median_critic.linears[-1].bias.fill_(median)
    rows = TensorDict({"observation": torch.randn(2, 1)}, [2])
    with set_exploration_type(ExplorationType.RANDOM):
        agent.policy(rows)
    return agent.learner, {
        "observation": rows["observation"],
        "latent": rows["latent"],
        "log_prob": rows["latent_log_prob"],
        "advantage": torch.full((2,), torch.nan),  # those of the rollout are not asked for
        "target": torch.tensor(RETURNS)[:, None],
    }


@pytest.mark.parametrize(("value", "median"), [(0.3, 0.1), (0.3, 0.5), (0.0, 0.1)])
def test_bpo_learns_from_the_critics_as_they_are(value, median):
    """Oracle 8: either form of the target, with V and u alive."""
    learner, rows = bpo_learner(value, median)
    loss = learner._step(rows)["loss/policy"].item()
    by_tanh = [1 + 0.2 * math.tanh((x - median) / (2 * 0.2)) for x in RETURNS]
    by_sigmoid = [0.8 + 0.4 / (1 + math.exp(-(x - median) / 0.2)) for x in RETURNS]
    assert by_tanh == pytest.approx(by_sigmoid, abs=1e-12)
    rows_of_loss = [
        abs(x - value) * abs(1 - target) for x, target in zip(RETURNS, by_tanh, strict=True)
    ]
    assert loss == pytest.approx(sum(rows_of_loss) / 2, rel=1e-5)


def test_bpos_loss_reaches_no_critic():
    """Oracle 8: weight and target are constants, though V and u carry gradient."""
    learner, rows = bpo_learner(0.3, 0.1)
    critics = learner.actor_critic
    values = critics.values_at_normalized(rows["observation"])
    assert all(x.requires_grad for x in values)
    learner._actor_loss(rows, *values)[0].backward()
    assert all(x.grad is None for x in critics.critic.parameters())
    assert all(x.grad is None for x in critics.median_critic.parameters())
    assert any(x.grad.abs().max() > 0 for x in critics.actor.parameters())

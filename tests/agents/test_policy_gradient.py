"""What N-PG-IGT and HARPG share: trajectories, one gradient, a critic, and where to explore."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.errors import ConfigError
from genpol.on_policy.policy_gradient import pieces, sums_over_pieces

BOTH = pytest.mark.parametrize("name", ["npg_igt", "harpg"])


def copies(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def reward_of(seed, envs=6, steps=8):
    return torch.randn(envs, steps, 1, generator=torch.Generator().manual_seed(seed))


def unchanged(module, before):
    return all(map(torch.equal, module.parameters(), before))


def test_pieces_begin_with_the_rollout_and_behind_every_end():
    done = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1]]).bool()
    assert pieces(done).tolist() == [[0, 0, 1, 1], [2, 3, 4, 4]]


def test_sums_over_pieces_may_be_empty():
    piece = torch.tensor([0, 0, 2, 2, 2, 3])
    sums = sums_over_pieces(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), piece)
    assert sums.tolist() == [3.0, 0.0, 28.0, 32.0]


@BOTH
def test_gradient_of_the_bandit_is_that_of_the_closed_form(name, make_bandit_agent, bandit_rollout):
    # J = -(mu - 1)^2 - sigma^2 with sigma = softplus(raw) + 1e-3; at first mu = 0 and sigma = 1.
    agent = make_bandit_agent(name)
    agent.update(bandit_rollout(agent))
    weight, bias = agent.estimator.state_dict()["momentum"]
    slope = 1.0 - math.exp(-0.999)  # of softplus where it is 0.999
    assert bias.tolist() == pytest.approx([2.0 * (0.0 - 1.0), 2.0 * slope], abs=1e-5)
    assert not weight.any()  # nothing is observed


@BOTH
def test_every_step_weighs_the_same(name, make_bandit_agent, rollout):
    # Episodes of two and three steps: a mean over episodes would weigh steps by their company.
    agent = make_bandit_agent(name, num_envs=1, rollout_steps=5, gamma=0.0)
    done = torch.tensor([0, 1, 0, 0, 1]).bool().view(1, 5, 1)
    reward = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0]).view(1, 5, 1)
    batch = rollout(agent, reward, done=done)
    batch["observation"].zero_()
    agent.update(batch)
    expected = -(reward * batch["latent"]).mean()  # the score of the mean is z at N(0, 1)
    bias = agent.estimator.state_dict()["momentum"][1]
    assert bias[0].item() == pytest.approx(expected.item(), rel=1e-5)


@BOTH
def test_the_gradient_moves_the_actor_alone(name, make_agent, rollout):
    agent = make_agent(name, critic_learning_rate=1e-12)
    encoder = agent.policy.encoder
    actor, critic = copies(encoder.actor), copies(encoder.critic)
    for seed in range(3):
        agent.update(rollout(agent, reward_of(seed), seed=seed))
    assert not torch.equal(encoder.actor.net.linears[-1].weight, actor[-2])
    for now, before in zip(encoder.critic.parameters(), critic, strict=True):
        torch.testing.assert_close(now.detach(), before, rtol=0, atol=1e-9)
    assert all(parameter.grad is None for parameter in encoder.actor.parameters())
    assert not any(parameter.requires_grad for parameter in encoder.explorer.parameters())


@BOTH
def test_regression_moves_the_critic_alone(name, make_agent, rollout):
    agent = make_agent(name, step_size=1e-12)
    encoder = agent.policy.encoder
    actor, critic = copies(encoder.actor), copies(encoder.critic)
    agent.update(rollout(agent, torch.ones(6, 8, 1)))
    for now, before in zip(encoder.actor.parameters(), actor, strict=True):
        torch.testing.assert_close(now.detach(), before, rtol=0, atol=1e-9)
    assert not torch.equal(encoder.critic.linears[-1].bias, critic[-1])


def test_the_critic_takes_its_epochs_and_minibatches(make_agent, rollout):
    agent = make_agent("npg_igt", critic_epochs=3)
    agent.update(rollout(agent, reward_of(0)))
    assert agent.training_state()["learner"]["critic_optimizer"]["moments"][0]["step"] == 6
    assert agent.gradient_steps == 1


@BOTH
def test_diverged_steps_have_no_say(name, make_agent, rollout):
    # Neither the reward nor the action with which the physics broke down, whatever they are.
    diverged = torch.zeros(6, 8, 1, dtype=torch.bool)
    diverged[2, 5] = diverged[4, 0] = True
    results = []
    for nonsense in (0.0, 1e6, math.nan):
        agent = make_agent(name)
        for seed in range(3):  # of HARPG a gradient, a Hessian, and a gradient
            reward = torch.where(diverged, nonsense, reward_of(seed))
            batch = rollout(agent, reward, done=diverged, diverged=diverged, seed=seed)
            batch["latent"] = torch.where(diverged, nonsense, batch["latent"])
            agent.update(batch)
        results.append(agent.state_dict())
    for other in results[1:]:
        assert all(torch.equal(results[0][key], other[key]) for key in other)


@BOTH
def test_a_rollout_that_diverged_everywhere_is_no_iteration(name, make_agent, rollout):
    agent = make_agent(name)
    agent.update(rollout(agent, reward_of(0)))
    actor, explorer = (
        copies(x) for x in (agent.policy.encoder.actor, agent.policy.encoder.explorer)
    )
    everywhere = torch.ones(6, 8, 1, dtype=torch.bool)
    agent.update(rollout(agent, reward_of(1), diverged=everywhere))
    assert agent.gradient_steps == 1
    assert unchanged(agent.policy.encoder.actor, actor)
    assert unchanged(agent.policy.encoder.explorer, explorer)


@BOTH
def test_without_reward_nothing_moves(name, make_agent, rollout):
    agent = make_agent(name)
    actor = copies(agent.policy.encoder.actor)
    for seed in range(3):
        agent.update(rollout(agent, torch.zeros(6, 8, 1), seed=seed))
    assert unchanged(agent.policy.encoder.actor, actor)


@BOTH
def test_the_unit_of_the_reward_changes_no_step(name, make_agent, rollout):
    def trained(unit):
        agent = make_agent(name, critic_learning_rate=1e-12)
        for seed in range(3):
            agent.update(rollout(agent, unit * reward_of(seed), seed=seed))
        return copies(agent.policy.encoder.actor)

    torch.testing.assert_close(trained(1.0), trained(1000.0), rtol=1e-3, atol=1e-5)


@BOTH
def test_weights_of_another_run_are_explored_from_where_they_are(name, make_agent, rollout):
    trained, fresh = make_agent(name), make_agent(name)
    trained.update(rollout(trained, reward_of(0)))
    fresh.load_state_dict(trained.state_dict())
    fresh.load_training_state(fresh.training_state())  # as the loop does before it collects
    encoder = fresh.policy.encoder
    assert not unchanged(trained.policy.encoder.explorer, copies(trained.policy.encoder.actor))
    assert unchanged(encoder.explorer, copies(encoder.actor))


@BOTH
def test_exploration_and_evaluation_see_the_same_statistics(name, make_agent, rollout):
    agent = make_agent(name, step_size=1e-12)
    draw = torch.Generator().manual_seed(0)
    agent.policy.encoder.actor.net.reset_parameters(draw)
    agent.update(rollout(agent, reward_of(0)))
    observation, means = torch.randn(5, 2, generator=draw), []
    for kind in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(kind):
            means.append(agent.policy.encoder(observation)[0])
    assert means[0].abs().max() > 0.01
    torch.testing.assert_close(*means)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 0.0}, r"agent\.step_size = 0\.0: must be > 0"),
        ({"gradient_weight": 1.5}, r"agent\.gradient_weight = 1\.5: must lie in"),
        ({"gradient_weight": 0.0}, r"agent\.gradient_weight = 0\.0: must be > 0"),
        ({"critic_epochs": 0}, r"agent\.critic_epochs = 0: must be >= 1"),
        ({"critic_minibatches": 0}, r"agent\.critic_minibatches = 0: must be >= 1"),
        ({"gamma": 1.1}, r"agent\.gamma = 1\.1: must lie in"),
        ({"gae_lambda": 1.1}, r"agent\.gae_lambda = 1\.1: must lie in"),
        ({"critic_learning_rate": -1.0}, r"agent\.critic_learning_rate = -1\.0: must be > 0"),
        ({"reward_scale": 0.0}, r"agent\.reward_scale = 0\.0: must be > 0"),
        ({"max_grad_norm": 0.0}, r"agent\.max_grad_norm = 0\.0: must be > 0"),
        ({"nonfinite_patience": 0}, r"agent\.nonfinite_patience = 0: must be >= 1"),
        ({"rollout_steps": 0}, r"agent\.rollout_steps = 0: must be > 0"),
        ({"actor_hidden": [0]}, r"agent\.actor_hidden = \[0\]: widths must be > 0"),
        ({"critic_hidden": [0]}, r"agent\.critic_hidden = \[0\]: widths must be > 0"),
    ],
)
@BOTH
def test_settings_out_of_bounds_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        agents.settings_class(name)(**settings)


def test_what_networks_and_credit_share_is_passed_on():
    settings = agents.settings_class("npg_igt")(
        rollout_steps=3,
        gamma=0.5,
        gae_lambda=0.6,
        reward_weights=[2.0],
        reward_scale=3.0,
        critic_epochs=7,
        critic_minibatches=5,
        critic_learning_rate=0.2,
        max_grad_norm=0.3,
        nonfinite_patience=4,
        actor_hidden=[8],
        critic_hidden=[9],
    )
    shared = settings.shared()
    names = {x.name for x in fields(settings)} & {x.name for x in fields(shared)}
    names -= {"critic_minibatches"}  # there a variant of minibatches
    assert len(names) == 10
    assert all(getattr(settings, name) == getattr(shared, name) for name in names)
    assert (shared.epochs, shared.minibatches) == (7, 5)


def test_too_few_rows_for_the_critic_are_refused(make_agent):
    with pytest.raises(ConfigError, match=r"agent\.critic_minibatches = 16: a rollout has only 6"):
        make_agent("npg_igt", rollout_steps=1, critic_minibatches=16)


@pytest.mark.parametrize(
    "option", ["surrogate", "clip", "epochs", "minibatches", "target_kl", "noise_correlation"]
)
@BOTH
def test_options_without_a_meaning_are_not_offered(name, option):
    assert not hasattr(agents.settings_class(name)(), option)

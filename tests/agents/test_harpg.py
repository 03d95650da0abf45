"""HARPG takes the Hessian from one rollout and the gradient from the next."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol.agents.harpg import Settings
from genpol.errors import ConfigError


def mean_of(agent):
    """Return the mean of the bandit's policy, which is the first bias."""
    return agent.policy.encoder.actor.net.linears[-1].bias[0].item()


def explored_mean(agent):
    """Return the mean with which it explores."""
    with set_exploration_type(ExplorationType.RANDOM):
        return agent.policy.encoder(torch.zeros(1, 2))[0].item()


def hold_scale(agent):
    """Take back what a step changed in the scale, so that the mean alone has moved."""
    previous = agent.estimator.state_dict()["previous"][1]
    with torch.no_grad():
        agent.policy.encoder.actor.net.linears[-1].bias[1] = previous[1]
    agent.load_training_state(agent.training_state())  # explores from there


def test_hessian_of_the_gaussian_bandit_is_minus_two(make_bandit_agent, bandit_rollout):
    # J = -(mu - 1)^2 - 1, and of the loss -J the product with the step (v, 0) is 2 v at any mu.
    agent = make_bandit_agent("harpg")
    agent.update(bandit_rollout(agent))
    hold_scale(agent)
    step = mean_of(agent)
    assert step > 0.1
    agent.update(bandit_rollout(agent))
    correction = agent.training_state()["correction"][1]
    assert correction[0].item() == pytest.approx(2.0 * step, rel=1e-4)


def test_scores_are_summed_over_each_trajectory(make_bandit_agent, bandit_rollout, rollout):
    # The formula written out for episodes of two and of three steps. At N(mu, 1) the score is
    # z - mu, and its derivative is -1.
    agent = make_bandit_agent("harpg", gamma=0.0)
    agent.update(bandit_rollout(agent))
    hold_scale(agent)
    with torch.no_grad():  # a critic that knows nothing leaves the reward as the advantage
        agent.policy.encoder.critic.linears[-1].bias.zero_()
    reward = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0])
    done = torch.tensor([0, 1, 0, 0, 1]).bool().view(1, 5, 1)
    between, step = explored_mean(agent), mean_of(agent)
    batch = rollout(agent, reward.view(1, 5, 1), done=done)
    batch["observation"].zero_()
    agent.update(batch)
    score = batch["latent"].flatten() - between
    expected = 0.0
    for steps in (slice(0, 2), slice(2, 5)):
        gradient = -(reward[steps] * score[steps]).sum()
        expected += reward[steps].sum() + gradient * score[steps].sum()
    correction = agent.training_state()["correction"][1]
    assert correction[0].item() == pytest.approx(expected.item() / 5.0 * step, rel=1e-4)


def test_momentum_is_the_gradient_where_the_policy_stands(make_bandit_agent, bandit_rollout):
    # As long as the scale stays, the gradient of the mean is linear in it, and the Hessian exact.
    agent = make_bandit_agent("harpg")
    for _ in range(4):
        here = 2.0 * (mean_of(agent) - 1.0)
        if agent.gradient_steps > 0:
            momentum = agent.estimator.state_dict()["momentum"][1][0].item()
            agent.update(bandit_rollout(agent))
            carried = momentum + agent.training_state()["correction"][1][0].item()
            assert carried == pytest.approx(here, abs=1e-4)
        agent.update(bandit_rollout(agent))
        assert agent.estimator.state_dict()["momentum"][1][0].item() == pytest.approx(
            here, abs=1e-4
        )
        hold_scale(agent)


@pytest.mark.parametrize(("weight", "left"), [(1.0, 1.0 / 3.0), (0.5, 2.0 / 3.0)])
def test_an_error_in_the_momentum_decays_as_published(
    weight, left, make_bandit_agent, bandit_rollout
):
    agent = make_bandit_agent("harpg", gradient_weight=weight)
    agent.update(bandit_rollout(agent))
    state = agent.training_state()
    state["estimator"]["momentum"][1] = state["estimator"]["momentum"][1] + 1.0
    agent.load_training_state(state)
    here = 2.0 * (mean_of(agent) - 1.0)
    for _ in range(2):
        agent.update(bandit_rollout(agent))
    bias = agent.estimator.state_dict()["momentum"][1]
    assert bias[0].item() == pytest.approx(here + left, abs=1e-4)


def test_explores_in_turns_between_the_last_parameters_and_at_the_latest(
    make_bandit_agent, bandit_rollout
):
    agent = make_bandit_agent("harpg")
    shares = []
    for _ in range(4):
        before = mean_of(agent)
        assert explored_mean(agent) == before
        agent.update(bandit_rollout(agent))
        shares.append((explored_mean(agent) - before) / (mean_of(agent) - before))
        after = mean_of(agent)
        agent.update(bandit_rollout(agent))
        assert mean_of(agent) == after
    assert all(0.0 < share < 1.0 for share in shares)
    assert len({round(share, 3) for share in shares}) == 4


def test_the_point_between_is_drawn_by_the_generator_of_the_agent(
    make_bandit_agent, bandit_rollout
):
    drawn = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        agent = make_bandit_agent("harpg")
        agent.update(bandit_rollout(agent))
        drawn.append(explored_mean(agent))
    assert drawn[0] == drawn[1]


def test_two_rollouts_are_one_iteration_but_for_the_first(make_bandit_agent, bandit_rollout):
    agent = make_bandit_agent("harpg")
    steps = []
    for _ in range(5):
        agent.update(bandit_rollout(agent))
        steps.append(agent.gradient_steps)
    assert steps == [1, 1, 2, 2, 3]


def test_evaluation_is_at_the_parameters(make_bandit_agent, bandit_rollout):
    agent = make_bandit_agent("harpg")
    agent.update(bandit_rollout(agent))
    assert explored_mean(agent) != mean_of(agent)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = agent.policy(TensorDict({"observation": torch.zeros(1, 2)}, [1]))["action"]
    assert action.item() == pytest.approx(math.tanh(mean_of(agent)), rel=1e-6)


@pytest.mark.parametrize(("normalized", "power"), [(True, 1.0), (False, 0.5)])
def test_steps_are_as_published(normalized, power, make_bandit_agent, bandit_rollout):
    agent = make_bandit_agent("harpg", step_size=0.1, normalized=normalized)
    actor = agent.policy.encoder.actor.net
    for iteration in range(3):
        before = torch.cat([x.detach().flatten() for x in actor.parameters()])
        while agent.gradient_steps == iteration:
            agent.update(bandit_rollout(agent))
        after = torch.cat([x.detach().flatten() for x in actor.parameters()])
        momentum = torch.cat([x.flatten() for x in agent.estimator.state_dict()["momentum"]])
        size = 1.0 if normalized else momentum.norm().item()
        expected = 0.1 * (2.0 / (iteration + 2.0)) ** power * size
        assert (after - before).norm().item() == pytest.approx(expected, rel=1e-4)


def test_layers_are_not_normalised_without_normalisation():
    with pytest.raises(ConfigError, match=r"agent\.per_layer = true: HARPG's steps are not"):
        Settings(per_layer=True)
    assert Settings(per_layer=True, normalized=True).per_layer

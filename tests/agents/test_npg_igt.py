"""N-PG-IGT collects ahead and carries the gradient to where the policy stands."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol.agents.npg_igt import Settings
from genpol.errors import ConfigError
from genpol.objectives.gradient_estimators import power_decay


def mean_of(agent):
    """Return the mean of the bandit's policy, which is the first bias."""
    return agent.policy.encoder.actor.net.linears[-1].bias[0].item()


def test_momentum_is_the_gradient_where_the_policy_stands(make_bandit_agent, bandit_rollout):
    # The gradient of the mean is linear in it, so that its transport is exact: the rollouts come
    # from elsewhere, and yet no trace of that is left.
    agent = make_bandit_agent("npg_igt", step_size=0.3)
    for _ in range(8):
        here = 2.0 * (mean_of(agent) - 1.0)
        agent.update(bandit_rollout(agent))
        bias = agent.estimator.state_dict()["momentum"][1]
        assert bias[0].item() == pytest.approx(here, abs=1e-4)


@pytest.mark.parametrize("cap", [0.2, 5.0])
def test_rollouts_are_collected_ahead_and_evaluation_at_the_parameters(
    cap, make_bandit_agent, bandit_rollout
):
    agent = make_bandit_agent("npg_igt", max_look_ahead=cap)
    before = mean_of(agent)
    agent.update(bandit_rollout(agent))
    after = mean_of(agent)
    stretch = min(cap, 1.0 / power_decay(1.0, 0.8)(1) - 1.0)
    rows = TensorDict({"observation": torch.zeros(1, 2)}, [1])
    with set_exploration_type(ExplorationType.RANDOM):
        ahead, _ = agent.policy.encoder(rows["observation"])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = agent.policy(rows)["action"]
    assert ahead.item() == pytest.approx(after + stretch * (after - before), rel=1e-5)
    assert action.item() == pytest.approx(math.tanh(after), rel=1e-6)


def test_steps_have_the_published_length_from_where_the_policy_stands(
    make_bandit_agent, bandit_rollout
):
    agent = make_bandit_agent("npg_igt", step_size=0.2)
    actor = agent.policy.encoder.actor.net
    for iteration in range(4):
        before = torch.cat([x.detach().flatten() for x in actor.parameters()])
        agent.update(bandit_rollout(agent))
        after = torch.cat([x.detach().flatten() for x in actor.parameters()])
        expected = 0.2 * 2.0 / (iteration + 2.0)
        assert (after - before).norm().item() == pytest.approx(expected, rel=1e-4)
    assert mean_of(agent) > 0.1  # up the return


def test_weights_and_biases_may_be_normalised_by_themselves(make_agent, rollout):
    agent = make_agent("npg_igt", per_layer=True, step_size=0.2)
    before = [x.detach().clone() for x in agent.policy.encoder.actor.parameters()]
    agent.update(rollout(agent, torch.randn(6, 8, 1)))
    pairs = zip(agent.policy.encoder.actor.parameters(), before, strict=True)
    lengths = [(new - old).norm().item() for new, old in pairs]
    # The last layer starts at zero, which no gradient passes.
    assert lengths == pytest.approx([0.0] * 4 + [0.2 / 6**0.5] * 2, rel=1e-4)


def test_an_earlier_gradient_weighs_more_the_smaller_the_weight_of_the_new(
    make_bandit_agent, bandit_rollout
):
    agent = make_bandit_agent("npg_igt", gradient_weight=0.5, max_look_ahead=0.0)
    agent.update(bandit_rollout(agent))
    first = agent.estimator.state_dict()["momentum"][1][0].item()
    second = 2.0 * (mean_of(agent) - 1.0)
    agent.update(bandit_rollout(agent))
    weight = 0.5 * (2.0 / 3.0) ** 0.8
    expected = (1.0 - weight) * first + weight * second
    bias = agent.estimator.state_dict()["momentum"][1]
    assert bias[0].item() == pytest.approx(expected, rel=1e-5)


def test_a_negative_cap_is_refused():
    with pytest.raises(ConfigError, match=r"agent\.max_look_ahead = -1\.0: must be >= 0"):
        Settings(max_look_ahead=-1.0)


def test_the_look_ahead_may_be_unbounded():
    assert Settings(max_look_ahead=math.inf).max_look_ahead == math.inf

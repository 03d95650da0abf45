"""Offline data in critic and actor: HNPG (surrogates specification, section 12)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from genpol.errors import ConfigError
from genpol.nn.masked import weighted_mean
from genpol.objectives.actor_critic import soft_bellman_target
from genpol.objectives.hybrid import (
    fresh_advantage,
    hybrid_critic_loss,
    join_rows,
    offline_weight,
    policy_value,
)
from genpol.objectives.surrogates import clamped_log_ratio, ppo_clip, r2vpo

vector = partial(torch.tensor, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)
NOTHING = vector([])
# A policy over three actions, and ten actions that are a perfect sample of it.
POLICY = vector([0.2, 0.3, 0.5])
FRESH = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 2])
SURROGATES = {
    "ppo": partial(ppo_clip, clip_low=0.2, clip_high=0.2),
    "r2vpo": partial(r2vpo, multiplier=0.5, delta=0.0),
}


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# -- critic --------------------------------------------------------------------------------------


def test_critic_weighs_both_errors_alike():
    # (1 + 4) / 2 of the rollout, (9 + 0 + 0) / 3 offline.
    loss, metrics = hybrid_critic_loss(
        vector([1.0, 2.0]), vector([2.0, 0.0]), vector([1.0, 1.0, 1.0]), vector([4.0, 1.0, 1.0])
    )
    assert loss.item() == pytest.approx(2.5 + 3.0)
    found = [metrics[f"loss/{name}"].item() for name in ("on_policy", "offline")]
    assert found == pytest.approx([2.5, 3.0])


def test_returns_and_targets_are_constants():
    value, returns, offline_value, target = (randn(4).requires_grad_() for _ in range(4))
    hybrid_critic_loss(value, returns, offline_value, target)[0].backward()
    assert returns.grad is None
    assert target.grad is None
    assert_close(value.grad, (value - returns).detach() / 2)
    assert_close(offline_value.grad, (offline_value - target).detach() / 2)


def test_critic_without_offline_data_regresses_the_returns():
    value, returns = randn(7).requires_grad_(), randn(7)
    loss, metrics = hybrid_critic_loss(value, returns, NOTHING, NOTHING)
    expected = (returns - value).square().mean()
    assert torch.equal(loss, expected)
    assert torch.equal(gradient(loss, value), gradient(expected, value))
    assert metrics["loss/offline"] == 0


def test_critic_of_weight_zero_sees_no_offline_row():
    value, returns = randn(7).requires_grad_(), randn(7)
    offline = vector([1.0, 2.0]).requires_grad_()
    target = vector([math.nan, 5.0])
    loss, metrics = hybrid_critic_loss(value, returns, offline, target, offline_weight=0.0)
    assert torch.equal(loss, (returns - value).square().mean())
    assert (gradient(loss, offline) == 0).all()
    assert metrics["loss/offline"].isnan()  # yet their error is told


def test_fitted_policy_evaluation_finds_the_values_of_the_policy():
    """On all transitions of a random chain, one fit after the other."""
    states, actions, gamma = 4, 3, 0.8
    following = torch.randint(states, (states, actions))
    reward, terminated = randn(states, actions), torch.rand(states, actions) < 0.2
    table = torch.zeros(states, actions, dtype=torch.float64, requires_grad=True)
    for _ in range(150):
        next_value = policy_value(table.detach()[following][..., FRESH])
        target = soft_bellman_target(reward, terminated, next_value, gamma)
        offline = (table.flatten(), target.flatten())
        loss, _ = hybrid_critic_loss(vector([0.0]), vector([0.0]), *offline)
        # A step of half the number of rows makes the fit exact.
        table = (table - states * actions / 2 * gradient(loss, table)).detach().requires_grad_()
    alive = gamma * (~terminated).double()
    transition = (alive[..., None] * torch.nn.functional.one_hot(following, states)).double()
    transition = torch.einsum("sat,b->satb", transition, POLICY).reshape(states * actions, -1)
    identity = torch.eye(states * actions, dtype=torch.float64)
    expected = torch.linalg.solve(identity - transition, reward.flatten())
    assert_close(table.detach().flatten(), expected)


@pytest.mark.parametrize(
    ("on_policy", "offline", "expected"),
    [
        (2.0, 10.0, 1.0),
        (2.0, 10.1, 0.0),
        (0.0, 0.0, 1.0),
        (2.0, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
    ],
)
def test_offline_data_are_left_out_beyond_five_times_the_loss(on_policy, offline, expected):
    assert offline_weight(vector(on_policy), vector(offline)).item() == expected


def test_the_bound_of_the_switch_can_be_set():
    assert offline_weight(vector(1.0), vector(6.0), maximum_ratio=7.0) == 1
    with pytest.raises(ConfigError, match="maximum_ratio"):
        offline_weight(vector(1.0), vector(6.0), maximum_ratio=0.0)


# -- values and advantages -----------------------------------------------------------------------


def test_fresh_actions_average_to_the_value_of_the_policy():
    table = randn(5, 3)
    assert_close(policy_value(table[:, FRESH]), table @ POLICY)


def test_advantages_at_offline_states_average_to_zero_under_the_policy():
    """With a perfect f, the action values of the policy, they are its advantages."""
    transition, reward = randn(5, 3, 5).softmax(-1), randn(5, 3)
    of_policy = torch.einsum("a,sat->st", POLICY, transition)
    value = torch.linalg.solve(torch.eye(5).double() - 0.9 * of_policy, reward @ POLICY)
    perfect = reward + 0.9 * transition @ value
    fresh = perfect[:, FRESH]
    advantage = fresh_advantage(fresh, fresh.unsqueeze(1))
    assert_close(advantage, (perfect - value[:, None])[:, FRESH])
    assert_close(advantage.mean(-1), torch.zeros(5, dtype=torch.float64))


def test_a_policys_value_passes_gradient_and_an_advantage_does_not():
    fresh = randn(5, 10).requires_grad_()
    assert policy_value(fresh).requires_grad
    assert not fresh_advantage(fresh[:, 0], fresh).requires_grad


# -- actor ---------------------------------------------------------------------------------------


def joined(size=6, offline=4, weight=1.0):
    log_prob, old, advantage = randn(size).requires_grad_(), randn(size), randn(size)
    other, other_advantage = randn(offline).requires_grad_(), randn(offline)
    rows = join_rows(log_prob, old, advantage, other, other_advantage, offline_weight=weight)
    return rows, (log_prob, old, advantage), (other, other_advantage)


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_without_offline_data_the_rollout_alone_decides(surrogate):
    rows, (log_prob, old, advantage), _ = joined(offline=0)
    log_ratio = clamped_log_ratio(log_prob, old)
    assert torch.equal(rows.log_ratio, log_ratio)
    assert torch.equal(rows.log_prob, log_prob)
    assert torch.equal(rows.advantage, advantage)
    found = weighted_mean(surrogate(rows.log_ratio, rows.advantage), rows.weight)
    expected = surrogate(log_ratio, advantage).mean()
    assert_close(gradient(found, log_prob), gradient(expected, log_prob), rtol=0, atol=1e-15)


def test_offline_rows_are_policy_gradients():
    """Their ratio is one, and its gradient the score, however far the policy has moved."""
    rows, _, (log_prob, advantage) = joined()
    assert (rows.log_ratio[6:] == 0).all()
    loss = ppo_clip(rows.log_ratio, rows.advantage, clip_low=0.2, clip_high=0.2)
    found = gradient(weighted_mean(loss, rows.weight), log_prob)
    assert_close(found, -advantage / 10)


def test_switched_off_offline_rows_do_not_count():
    rows, (log_prob, old, advantage), (other, _) = joined(weight=0.0)
    loss = weighted_mean(
        ppo_clip(rows.log_ratio, rows.advantage, clip_low=0.2, clip_high=0.2), rows.weight
    )
    expected = ppo_clip(clamped_log_ratio(log_prob, old), advantage, clip_low=0.2, clip_high=0.2)
    assert_close(loss, expected.mean())
    assert (gradient(loss, other) == 0).all()


def test_advantages_are_constants():
    advantages = randn(2).requires_grad_()
    rows = join_rows(randn(2), randn(2), advantages, randn(2), advantages)
    assert not rows.advantage.requires_grad


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
@pytest.mark.parametrize("collected", [0, 10, 20])
def test_a_natural_step_in_a_table_multiplies_by_the_exponential(surrogate, collected):
    """``pi <- pi exp(eta f)``: the step of NPG, at a state seen in the rollout, offline or both."""
    eta, values = 0.7, vector([1.0, 0.0, -0.5])
    logits = POLICY.log().requires_grad_()
    log_prob = logits.log_softmax(-1)
    advantage = fresh_advantage(values[FRESH], values[FRESH])
    seen = FRESH.repeat(2)[:collected]
    rows = join_rows(
        log_prob[seen],
        POLICY.log()[seen],
        advantage.repeat(2)[:collected],
        log_prob[FRESH],
        advantage,
    )
    loss = weighted_mean(surrogate(rows.log_ratio, rows.advantage), rows.weight)
    fisher = POLICY.diag() - torch.outer(POLICY, POLICY)
    moved = logits - eta * torch.linalg.pinv(fisher, hermitian=True) @ gradient(loss, logits)
    expected = POLICY * (eta * values).exp()
    assert_close(moved.detach().softmax(-1), expected / expected.sum())

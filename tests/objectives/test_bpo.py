"""Bounded policy optimisation (BPO specification, section 9)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from genpol.errors import ConfigError
from genpol.objectives.bpo import (
    bpo,
    bpo_exact_target,
    bpo_target,
    group_bpo_target,
    soft_median_loss,
)
from genpol.objectives.surrogates import (
    ppo_clip,
)
from genpol.policies.gaussian import log_prob

vector = partial(torch.tensor, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
BOX = {"low": 0.8, "high": 1.2}
# A standard normal by quadrature: points and weights.
GRID = torch.linspace(-10, 10, 20001, dtype=torch.float64)
WEIGHTS = torch.exp(-GRID.square() / 2) * 1e-3 / math.sqrt(2 * math.pi)


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


def rows(ratio):
    """Log-ratios that take a gradient."""
    return vector(ratio).log().requires_grad_()


def signed_bpo(log_ratio, advantage):
    target = bpo_target(advantage, temperature=0.0, **BOX)
    return bpo(log_ratio, advantage, target=target)


PROBABILITIES = vector([0.1, 0.2, 0.3, 0.4])
VALUES = vector([1.0, 0.5, 2.0, -1.0])


@pytest.mark.parametrize(
    ("probabilities", "values", "low", "high", "target", "gain"),
    [
        (PROBABILITIES, VALUES, 0.8, 1.2, [1.2, 1, 1.2, 0.8], 0.22),
        (vector([0.6, 0.3, 0.1]), vector([1, 0, -1]), 0.8, 1.2, [1.1333333, 0.8, 0.8], 0.1),
        (PROBABILITIES, VALUES, 0.0, 2.0, [2, 1, 2, 0], 1.1),
    ],
    ids=["oracle 1", "oracle 3: atom", "oracle 4: cross-entropy method"],
)
def test_hard_target_is_the_exact_solution(probabilities, values, low, high, target, gain):
    found = bpo_exact_target(probabilities, values, low=low, high=high)
    assert_close(found, vector(target))
    assert ((found - 1) * probabilities * values).sum().item() == pytest.approx(gain)


def test_tied_actions_share_one_ratio():
    values = vector([1.0, 0.0, 0.0, -1.0])
    target = bpo_exact_target(PROBABILITIES, values, **BOX)
    # 0.4 x 0.2 to give away: 0.1 x 0.2 to the best, from the worst 0.4 x -0.2, the rest to ties.
    assert_close(target, vector([1.2, 1.12, 1.12, 0.8]))


@pytest.mark.parametrize(
    ("temperature", "median", "target", "gain"),
    [
        (0.5, 0.39001, [1.10882, 1.02191, 1.18463, 0.82337], 0.19451),
        (2.0, 0.39702, [1.02992, 1.00515, 1.07612, 0.93286], 0.07603),
        (0.1, None, None, 0.21987),
    ],
)
def test_soft_target_is_the_exact_solution(temperature, median, target, gain):
    """BPO oracle 2."""
    found = bpo_exact_target(PROBABILITIES, VALUES, temperature=temperature, **BOX)
    assert ((found - 1) * PROBABILITIES * VALUES).sum().item() == pytest.approx(gain, abs=1e-5)
    if target is not None:
        assert_close(found, vector(target), atol=1e-5, rtol=0)
        medians = VALUES - temperature * ((found - 0.8) / 0.4).logit()
        assert_close(medians, torch.full_like(VALUES, median), atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1e-2, 0.5, 2.0])
@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.5, 1.1), (0.0, 4.0)])
def test_exact_target_averages_to_one(low, high, temperature):
    probabilities, values = randn(50, 6).softmax(-1), randn(50, 6)
    found = bpo_exact_target(probabilities, values, low=low, high=high, temperature=temperature)
    assert_close((probabilities * found).sum(-1), torch.ones(50, dtype=torch.float64))


def regularised_objective(ratio, low, high, temperature):
    share = (ratio - low) / (high - low)
    entropy = -torch.xlogy(share, share) - torch.xlogy(1 - share, 1 - share)
    return (PROBABILITIES * (ratio * VALUES + temperature * (high - low) * entropy)).sum(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.1, 0.5, 2.0])
@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.5, 1.2)])
def test_no_feasible_ratio_beats_the_exact_target(low, high, temperature):
    best = bpo_exact_target(PROBABILITIES, VALUES, low=low, high=high, temperature=temperature)
    feasible = low + (high - low) * torch.rand(20000, 4, dtype=torch.float64)
    feasible = feasible / (feasible * PROBABILITIES).sum(-1, keepdim=True)
    inside = ((feasible >= low) & (feasible <= high)).all(-1)
    nearby = torch.lerp(best.expand(20000, 4), feasible, 0.02)[inside]
    objective = partial(regularised_objective, low=low, high=high, temperature=temperature)
    assert len(nearby) > 1000
    assert (objective(nearby) <= objective(best) + 1e-12).all()


def test_actions_of_probability_zero_do_no_harm():
    probabilities = vector([0.5, 0.0, 0.5])
    target = bpo_exact_target(probabilities, vector([1.0, 0.0, -1.0]), **BOX)
    assert_close(target[[0, 2]], vector([1.2, 0.8]))
    assert target[1].isfinite()


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.3), (1.0, 1.2), (0.8, 1.0), (-0.1, 1.2)])
@pytest.mark.parametrize("solve", [bpo_target, partial(bpo_exact_target, vector([1.0]))])
def test_a_box_without_one_inside_is_refused(solve, low, high):
    with pytest.raises(ConfigError, match="ratio box"):
        solve(vector([1.0]), low=low, high=high, temperature=0.0)


def test_bpo_is_ppo_plus_a_penalty_on_overshoot():
    """BPO oracle 5."""
    log_ratio, advantage = 0.5 * randn(1000), randn(1000)
    target = 1 + 0.2 * advantage.sign()
    overshoot = (advantage.sign() * (log_ratio.exp() - target)).clamp_min(0)
    expected = (
        ppo_clip(log_ratio, advantage, **CLIP) + target * advantage + advantage.abs() * overshoot
    )
    found = bpo(log_ratio, advantage, target=bpo_target(advantage, temperature=0.0, **BOX))
    assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "centre", "expected"),
    [
        (lambda a: a, 0.0, -1.0),
        (torch.exp, 1.0, -1.672098),  # the median of exp(a)
        (torch.exp, math.exp(0.5), -1.648721),  # its mean: the policy gradient
    ],
)
def test_gradient_in_a_gaussian_mean(value, centre, expected):
    """BPO oracle 6."""
    mean = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    unit = torch.ones(1, dtype=torch.float64)
    log_ratio = log_prob(mean, unit, GRID[:, None]) - log_prob(0 * unit, unit, GRID[:, None])
    values = value(GRID)
    advantage = values - (WEIGHTS * values).sum()
    target = bpo_target(values - centre, temperature=0.0, **BOX)
    loss = WEIGHTS * bpo(log_ratio, advantage, target=target)
    assert gradient(loss, mean).item() == pytest.approx(expected, abs=1e-5)


class Tabular:
    """A random Markov decision process that is solved by linear algebra."""

    def __init__(self, num_states=5, num_actions=3, gamma=0.9):
        self.transition = randn(num_states, num_actions, num_states).mul(2).softmax(-1)
        self.reward = randn(num_states, num_actions)
        self.start = randn(num_states).softmax(-1)
        self.gamma = gamma

    def resolvent(self, policy):
        transition = torch.einsum("sa,sat->st", policy, self.transition)
        identity = torch.eye(len(self.start), dtype=torch.float64)
        return torch.linalg.inv(identity - self.gamma * transition)

    def action_values(self, policy):
        values = self.resolvent(policy) @ (policy * self.reward).sum(-1)
        return self.reward + self.gamma * self.transition @ values

    def visitation(self, policy):
        return self.start @ self.resolvent(policy)

    def performance(self, policy):
        return (self.visitation(policy)[:, None] * policy * self.reward).sum()

    def optimum(self):
        values = torch.zeros_like(self.start)
        for _ in range(500):
            values = (self.reward + self.gamma * self.transition @ values).amax(-1)
        return self.start @ values


def test_exact_update_improves_a_tabular_policy_as_predicted_up_to_the_optimum():
    """BPO oracle 7: the gain is eps times the visited mean absolute deviation from the median."""
    task = Tabular()
    policy = randn(5, 3).softmax(-1)
    errors, gains = [], []
    for _ in range(200):
        values = task.action_values(policy)
        # The median minimises the mean absolute deviation, and is one of the values.
        pairs = (values.unsqueeze(-1) - values.unsqueeze(-2)).abs()
        deviation = (policy.unsqueeze(-1) * pairs).sum(-2).amin(-1)
        new = policy * bpo_exact_target(policy, values, **BOX)
        gains.append((task.performance(new) - task.performance(policy)).item())
        errors.append(gains[-1] - 0.2 * (task.visitation(new) @ deviation).item())
        policy = new
    assert max(map(abs, errors)) < 1e-9
    assert min(gains) > -1e-12
    assert task.performance(policy).item() == pytest.approx(task.optimum().item(), abs=1e-9)


def test_soft_target_has_a_tanh_form():
    """BPO oracle 8."""
    advantage = randn(100).clamp(-2.9, 2.9)  # the logit is clamped beyond 3
    expected = 1 + 0.2 * torch.tanh(advantage / (2 * 0.3))
    assert_close(bpo_target(advantage, temperature=0.3, **BOX), expected, rtol=0, atol=1e-12)


def test_hard_target_is_a_step_with_one_on_ties():
    found = bpo_target(vector([-1e-9, 0.0, 1e-9]), temperature=0.0, low=0.7, high=1.1)
    assert found.tolist() == [0.7, 1.0, 1.1]


def test_soft_target_stays_inside_the_box_at_the_clamp():
    """At a logit of 10, as in the authors' code, not beyond."""
    found = bpo_target(vector([-1e9, 1e9]), temperature=1.0, **BOX)
    assert_close(found, 0.8 + 0.4 * vector([-10.0, 10.0]).sigmoid(), rtol=0, atol=1e-12)


def test_no_gradient_reaches_target_and_weight():
    """BPO oracle 8."""
    log_ratio, advantage, median_advantage = (randn(5).requires_grad_() for _ in range(3))
    target = bpo_target(median_advantage, temperature=1.0, **BOX)
    bpo(log_ratio, advantage, target=target).sum().backward()
    assert advantage.grad is None
    assert median_advantage.grad is None
    assert (log_ratio.grad != 0).all()


def test_rows_between_median_and_mean_are_pushed_against_their_advantage():
    log_ratio = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    advantage = vector([-0.1, 2.0])
    loss = bpo(log_ratio, advantage, target=vector([1.2, 1.2]))
    assert_close(gradient(loss, log_ratio), vector([-0.1, -2.0]))


def test_overshoot_is_pulled_back_to_the_target():
    """BPO oracle 10: where PPO's gradient is zero, BPO's leads down to 1.2."""
    log_ratio, advantage = rows([1.6]), vector([1.0])
    assert gradient(ppo_clip(log_ratio, advantage, **CLIP), log_ratio).item() == 0
    for _ in range(200):
        loss = signed_bpo(log_ratio, advantage)
        log_ratio = (log_ratio - 0.005 * gradient(loss, log_ratio)).detach().requires_grad_()
    assert log_ratio.exp().item() == pytest.approx(1.2, abs=0.01)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(1.21, 2 * 0.01**2 / 0.08), (1.3, 2 * (0.1 - 0.02))]
)
def test_huber_radius_rounds_the_corner(ratio, expected):
    loss = bpo(rows([ratio]), vector([-2.0]), target=vector([1.2]), huber=0.04)
    assert loss.item() == pytest.approx(expected)


def test_weight_offset_adds_to_the_weight():
    loss = bpo(rows([1.5]), vector([-2.0]), target=vector([1.2]), weight_offset=0.5)
    assert loss.item() == pytest.approx(2.5 * 0.3)


@pytest.mark.parametrize(
    ("temperature", "rewards", "expected"),
    [
        (0.0, [1.0, 1, 1, 0], [1.0, 1, 1, 0.7]),
        (0.0, [1.0, 1, 0, 0], [1.4, 1.4, 0.7, 0.7]),
        (1e-4, [1.0, 1, 0, 0], [1.4, 1.4, 0.7, 0.7]),
    ],
)
def test_group_targets(temperature, rewards, expected):
    """BPO oracle 11."""
    _, target = group_bpo_target(vector([rewards]), low=0.7, high=1.4, temperature=temperature)
    assert_close(target, vector([expected]), rtol=0, atol=1e-4)


def test_group_signals_are_standardised_by_the_sample_deviation():
    advantage, target = group_bpo_target(vector([1.0, 2, 6]), temperature=1.0, **BOX)
    deviation = math.sqrt(7) + 1e-6
    assert_close(advantage, vector([-2.0, -1, 3]) / deviation)
    assert_close(target, bpo_target(vector([-1.0, 0, 4]) / deviation, temperature=1.0, **BOX))


def test_a_group_of_one_is_its_own_scale():
    advantage, target = group_bpo_target(vector([[3.0]]), temperature=0.0, **BOX)
    assert_close(advantage, vector([[3.0]]) / (1 + 1e-6))
    assert_close(target, vector([[1.2]]))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_soft_median_loss_is_a_log_cosh(temperature):
    x = randn(100)
    expected = temperature * (2 * (x / (2 * temperature)).cosh()).log()
    assert_close(soft_median_loss(-x, torch.zeros_like(x), temperature=temperature), expected)


@pytest.mark.parametrize(
    ("temperature", "minimum"), [(1.0, 1.60835), (1e-3, 1e-3 * math.log(5)), (1e4, 4.0)]
)
def test_soft_median_of_two_points(temperature, minimum):
    """BPO oracle 9: from the median, 0, to the mean, 4."""
    prediction = vector([minimum]).requires_grad_()
    loss = soft_median_loss(prediction, vector([0.0, 10.0]), temperature=temperature)
    slope = gradient(vector([0.6, 0.4]) * loss, prediction)
    assert slope.item() == pytest.approx(0, abs=1e-6)


def test_soft_median_loss_tends_to_the_pinball_loss():
    x = randn(100)
    found = soft_median_loss(x, torch.zeros_like(x), temperature=1e-4)
    assert_close(found, x.abs() / 2, rtol=0, atol=1e-4)

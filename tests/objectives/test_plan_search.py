"""Search over plans as functions (MBDPO specification, oracles 3 to 6 and 11)."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.errors import ConfigError
from genpol.objectives.plan_search import (
    expected_plan,
    known,
    mppi_weights,
    plan_score,
    refit,
    reverse_step,
    search_schedule,
    search_weights,
    shifted,
    weighted_std,
)

SCHEDULE = search_schedule(20)


def plans(envs=2, number=64, horizon=3, dims=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(envs, number, horizon, dims, generator=draw)


# -- levels --------------------------------------------------------------------------------------


def test_schedule_has_the_published_numbers():
    """Oracle 3."""
    assert SCHEDULE.alpha_bar[0] == pytest.approx(0.9999, abs=1e-8)
    assert SCHEDULE.alpha_bar[1] == pytest.approx(0.99928, abs=1e-5)
    assert SCHEDULE.alpha_bar[19] == pytest.approx(0.903619, abs=1e-6)
    assert SCHEDULE.sigma(1) == pytest.approx(0.0269, abs=1e-4)
    assert SCHEDULE.sigma(19) == pytest.approx(0.3266, abs=1e-4)


def test_the_published_increments_depend_on_the_number_of_levels():
    assert search_schedule(5).sigma(4) == pytest.approx(0.16, abs=0.005)
    assert search_schedule(100).sigma(99) == pytest.approx(0.81, abs=0.01)


@pytest.mark.parametrize("steps", [2, 5, 20, 100])
def test_the_widest_proposal_can_be_held(steps):
    schedule = search_schedule(steps, widest=0.3266)
    assert schedule.sigma(steps - 1) == pytest.approx(0.3266, abs=1e-6)
    widths = [schedule.sigma(level) for level in range(steps)]
    assert widths == sorted(widths)
    if steps == 20:
        assert schedule.alpha == pytest.approx(SCHEDULE.alpha, abs=1e-5)


def test_levels_run_down_and_never_reach_the_cleanest():
    assert SCHEDULE.levels() == list(range(19, 0, -1))
    assert SCHEDULE.levels(4) == [19, 15, 10, 5]
    assert SCHEDULE.levels(1) == [19]
    assert SCHEDULE.levels(50) == SCHEDULE.levels()


def test_one_level_is_no_search():
    with pytest.raises(ConfigError, match="diffusion_steps"):
        search_schedule(1)


# -- weights -------------------------------------------------------------------------------------


def test_standardised_weights_by_hand():
    returns = torch.tensor([[1.0, 2.0, 6.0]])  # mean 3, sample std sqrt(7)
    logits = torch.tensor([[-2.0, -1.0, 3.0]]) / (math.sqrt(7.0) * 0.5)
    torch.testing.assert_close(search_weights(returns, temperature=0.5), logits.softmax(-1))
    best = search_weights(returns, temperature=0.5, elites=2)
    torch.testing.assert_close(best[:, 1:], logits[:, 1:].softmax(-1))
    assert best[0, 0] == 0.0


def test_elites_are_standardised_over_all_candidates():
    """The released code's choice: the rest counts in mean and std."""
    returns = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0]])
    weights = search_weights(returns, temperature=1.0, elites=2)
    ratio = (1.0 / returns.std()).exp()
    torch.testing.assert_close(weights[0, 5] / weights[0, 4], ratio)


@pytest.mark.parametrize("elites", [0, 16])
def test_scale_and_offset_of_returns_change_nothing(elites):
    """Oracle 5."""
    returns, candidates = torch.randn(2, 64), plans()
    found = [
        expected_plan(search_weights(x, temperature=0.5, elites=elites), candidates)
        for x in (returns, 37.0 * returns - 5.0)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_equal_returns_weigh_alike_with_elites_and_without():
    returns = torch.full((1, 8), 3.0) + 1e-6 * torch.randn(1, 8)
    torch.testing.assert_close(
        search_weights(returns, temperature=0.5), torch.full((1, 8), 1 / 8), rtol=0, atol=1e-4
    )
    tied = search_weights(torch.full((1, 8), 3.0), temperature=0.5, elites=2)
    torch.testing.assert_close(tied, torch.full((1, 8), 1 / 8))


def test_what_is_not_finite_counts_as_zero():
    returns = torch.tensor([[1.0, float("nan"), float("inf")]])
    assert known(returns).tolist() == [[1.0, 0.0, 0.0]]


def test_mppi_weights_by_hand():
    returns = torch.tensor([[1.0, 2.0, 4.0]])
    weights = mppi_weights(returns, temperature=0.5, elites=2)
    expected = torch.tensor([[0.0, math.exp(-1.0), 1.0]])
    torch.testing.assert_close(weights, expected / expected.sum())
    doubled = mppi_weights(2 * returns, temperature=0.5, elites=2)
    assert doubled[0, 2] > weights[0, 2]  # raw values: not invariant to their scale


def test_refit_is_the_weighted_mean_and_a_bounded_std():
    candidates = torch.tensor([0.0, 1.0, 3.0]).view(1, 3, 1, 1)
    weights = torch.tensor([[0.25, 0.5, 0.25]])
    mean, std = refit(weights, candidates, least=0.05, greatest=2.0)
    assert mean.item() == pytest.approx(1.25)
    assert std.item() == pytest.approx(math.sqrt(0.25 * 1.25**2 + 0.5 * 0.25**2 + 0.25 * 1.75**2))
    for bounds, expected in (((0.05, 0.1), 0.1), ((1.5, 2.0), 1.5)):
        _, std = refit(weights, candidates, least=bounds[0], greatest=bounds[1])
        assert std.item() == pytest.approx(expected)


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 7, 19])
def test_a_step_leads_to_the_weighted_mean(level):
    """Oracle 4: x_{tau-1} = sqrt(abar_{tau-1}) E[U | x], whatever x was."""
    x, expected = torch.randn(2, 3, 2, dtype=torch.float64), plans().mean(1).double()
    alpha_bar = SCHEDULE.alpha_bar[level]
    aside = (1.0 - alpha_bar + 1e-8) / (1.0 - alpha_bar)  # what guards the score's denominator
    score = aside * plan_score(x, expected, alpha_bar)
    after = reverse_step(x, score, SCHEDULE.alpha[level], alpha_bar)
    wanted = math.sqrt(SCHEDULE.alpha_bar[level - 1]) * expected
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=0.0)


def quadratic(candidates):
    """Return of the linear-quadratic system of oracle 7 from z = 0.3, ``[..., H, 1]``."""
    z, total = torch.full_like(candidates[..., 0, 0], 0.3), 0.0
    for t in range(3):
        u = candidates[..., t, 0]
        total = total - 0.99**t * (z.square() + 0.1 * u.square())
        z = 1.1 * z + 0.5 * u
    return total - 0.99**3 * 1.3740173 * z.square()


def test_gaussian_score_in_closed_form():
    """Oracle 6: the weighted mean of many draws is the posterior mean of a Gaussian target."""
    draw = torch.Generator().manual_seed(0)
    x = torch.tensor([0.2, -0.1, 0.05]).view(1, 3, 1)
    alpha_bar, sigma = SCHEDULE.alpha_bar[19], SCHEDULE.sigma(19)
    half = torch.randn(1, 200_000, 3, 1, generator=draw)
    candidates = (x / math.sqrt(alpha_bar)).unsqueeze(1) + sigma * torch.cat((half, -half), 1)
    returns = quadratic(candidates)
    weights = search_weights(returns, temperature=0.5 / returns.std().item())  # softmax(J / 0.5)
    expected = expected_plan(weights, candidates)
    best = torch.tensor([-0.510024, -0.127486, -0.031866], dtype=torch.float64)
    hessian = -torch.autograd.functional.hessian(lambda plan: quadratic(plan.view(3, 1)), best)
    exact = torch.linalg.solve(
        hessian / 0.5 + torch.eye(3) / sigma**2,
        hessian @ best / 0.5 + x.flatten().double() / math.sqrt(alpha_bar) / sigma**2,
    )
    assert exact.tolist() == pytest.approx([-0.0048, -0.2285, -0.0206], abs=1e-4)
    assert expected.flatten().tolist() == pytest.approx(exact.tolist(), abs=2e-3)
    score = plan_score(x, exact.float().view(1, 3, 1), alpha_bar)
    assert score.flatten().tolist() == pytest.approx([-2.12251, -1.21589, -0.72200], abs=1e-4)


def test_the_energy_anchors_to_behaviour():
    """Oracle 11: weights exp((G + eta ln b) / lambda) are those of a Gibbs distribution."""
    actions = torch.linspace(-1.0, 1.0, 20_001).view(1, -1, 1, 1)
    returns = -2.0 * (actions + 0.5).square() - 0.5 * (actions - 0.3).square() / (2 * 0.2**2)
    returns = returns.flatten(1)
    weights = search_weights(returns, temperature=0.5 / returns.std().item())
    mean = expected_plan(weights, actions)
    assert mean.item() == pytest.approx(0.1061, abs=1e-4)
    assert weighted_std(weights, actions, mean).item() == pytest.approx(0.1741, abs=1e-4)


def test_plans_move_up_by_one():
    plan = torch.arange(6.0).view(1, 3, 2)
    assert shifted(plan).tolist() == [[[2.0, 3.0], [4.0, 5.0], [0.0, 0.0]]]

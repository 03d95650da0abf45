"""The search as a network (MBDPO specification, oracle 17)."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.objectives.plan_search import expected_plan, search_schedule, search_weights
from genpol.world_model import ScorePlanner, Task
from genpol.world_model.amortised import denoise, noisy_plans, searched_means
from genpol.world_model.networks import ScoreNetwork
from genpol.world_model.planning import imagined_return

SCHEDULE = search_schedule(20)
BEST = torch.tensor([-0.510024, -0.127486, -0.031866])
TASK = Task(None, None, torch.tensor(0.99))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noisy_plans_have_their_level_s_power():
    clean, noise = torch.full((4000, 3, 1), 0.5), torch.randn(4000, 3, 1, generator=generator())
    levels = torch.tensor([1, 19]).repeat(2000)
    x, alpha_bar = noisy_plans(clean, levels, noise, SCHEDULE)
    assert alpha_bar[:2].flatten().tolist() == pytest.approx(
        [SCHEDULE.alpha_bar[1], SCHEDULE.alpha_bar[19]]
    )
    for i, level in ((0, 1), (1, 19)):
        power = SCHEDULE.alpha_bar[level]
        assert x[i::2].mean().item() == pytest.approx(0.5 * math.sqrt(power), abs=0.01)
        assert x[i::2].std().item() == pytest.approx(math.sqrt(1 - power), rel=0.05)


def test_searched_means_are_those_of_the_search():
    x, noise = 0.1 * torch.randn(2, 3, 1), torch.randn(32, 3, 1)
    levels = torch.tensor([3, 19])
    alpha_bar = torch.tensor(SCHEDULE.alpha_bar)[levels].view(-1, 1, 1)

    def returns(plans):
        return -(plans - 0.2).square().sum((-2, -1))

    found = searched_means(x, alpha_bar, returns, noise, temperature=0.5, task=TASK)
    for i, level in enumerate(levels.tolist()):
        centre = x[i : i + 1] / math.sqrt(SCHEDULE.alpha_bar[level])
        plans = (centre[:, None] + SCHEDULE.sigma(level) * torch.cat((noise, -noise))).clamp(-1, 1)
        weights = search_weights(returns(plans), temperature=0.5)
        torch.testing.assert_close(found[i : i + 1], expected_plan(weights, plans))


def test_a_candidate_whose_return_is_not_finite_counts_as_zero():
    x, noise = torch.zeros(2, 3, 1), torch.randn(8, 3, 1, generator=generator())
    alpha_bar = torch.full((2, 1, 1), SCHEDULE.alpha_bar[19])

    def found(instead):
        def returns(plans):
            gained = -plans.square().sum((-2, -1))
            gained[:, ::5] = instead
            return gained

        return searched_means(x, alpha_bar, returns, noise, temperature=0.5, task=TASK)

    assert found(math.nan).isfinite().all()
    assert found(math.nan).equal(found(0.0))


def test_denoising_passes_the_levels_from_the_noisiest_down():
    seen = []

    def network(state, x, levels):
        seen.append((int(levels[0]), x.clone()))
        return 0.5 * x

    plan = denoise(network, torch.zeros(1, 1), torch.ones(1, 3, 1), SCHEDULE, 3, TASK)
    assert [level for level, _ in seen] == SCHEDULE.levels(3)
    expected = torch.ones(1, 3, 1)
    for level, x in seen:
        torch.testing.assert_close(x, math.sqrt(SCHEDULE.alpha_bar[level]) * expected)
        expected = 0.5 * x
    assert plan.equal(expected)


def fit(system, rounds):
    """Return a network that has learned to search from z = 0.3."""
    draw, rows = generator(), 256
    network = ScoreNetwork(1, 3, 1, 64, generator=draw)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, rounds)
    state, start = torch.full((rows, 1), 0.3), torch.zeros(rows, 3, 1)
    tails = torch.zeros(rows, 64, 1)
    for index in range(rounds):
        with torch.no_grad():
            if index % 5 == 0:
                own = denoise(network, state, start, SCHEDULE, 4, TASK)
            taken = 2 * torch.rand(rows, 3, 1, generator=draw) - 1
            chosen = torch.rand(rows, 1, 1, generator=draw) < 0.5
            levels = torch.randint(1, 20, (rows,), generator=draw)
            noise = torch.randn(rows, 3, 1, generator=draw)
            x, power = noisy_plans(torch.where(chosen, own, taken), levels, noise, SCHEDULE)
            wanted = searched_means(
                x,
                power,
                lambda plans: imagined_return(system, state, plans, tails, None, TASK),
                torch.randn(32, 3, 1, generator=draw),
                temperature=0.5,
                task=TASK,
            )
        optimizer.zero_grad()
        (network(state, x, levels) - wanted).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network


def test_acting_by_the_network_explores_with_bounded_noise(system):
    system.score = lambda state, x, levels: torch.full_like(x, 0.98)
    system.state = lambda latent, task: latent
    planner = ScorePlanner(system, horizon=3, schedule=SCHEDULE, steps=4, action_noise=0.05)
    draws = planner.draw(400, generator())
    found = planner.plan(torch.zeros(400, 1), torch.zeros(400, 3, 1), draws, TASK)
    assert (found.action == 0.98).all()
    torch.testing.assert_close(found.explored, (0.98 + 0.05 * draws["explore"]).clamp(-1.0, 1.0))
    assert (found.explored == 1.0).any()


@pytest.mark.slow
def test_the_network_alone_finds_the_riccati_plan(system):
    """Oracle 17."""
    system.score = fit(system, 1000)
    system.state = lambda latent, task: latent
    planner = ScorePlanner(system, horizon=3, schedule=SCHEDULE, steps=19, action_noise=0.05)
    start = torch.zeros(1, 3, 1)
    with torch.no_grad():
        found = planner.plan(torch.tensor([[0.3]]), start, planner.draw(1, generator()), TASK)
    torch.testing.assert_close(found.plan.flatten(), BEST, rtol=0, atol=0.05)
    gain = imagined_return(
        system, torch.tensor([[0.3]]), found.plan[:, None], torch.zeros(1, 1, 1), None, TASK
    )
    assert -0.1236616 - 5e-3 < gain.item() <= -0.1236616 + 1e-6

"""Search in a known system (MBDPO specification, oracles 7 to 9 and 16), and in a model."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from genpol.objectives.plan_search import mppi_weights, search_schedule, search_weights
from genpol.world_model import (
    DiffusionPlanner,
    EnergyScale,
    MPPIPlanner,
    PolicyPlanner,
    ScorePlanner,
    WorldModel,
)
from genpol.world_model.planning import imagined_return, policy_plans
from genpol.world_model.search import mppi as mppi_rounds
from genpol.world_model.search import reverse_diffusion, weigh_candidates
from genpol.world_model.settings import ModelSize

BEST = torch.tensor([-0.510024, -0.127486, -0.031866])
SIZE = ModelSize(encoder_dim=16, mlp_dim=16, latent_dim=16, encoder_layers=2, num_critics=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def diffusion(model, *, steps=20, number=512, elites=64, own=0, **options):
    return DiffusionPlanner(
        model,
        horizon=3,
        schedule=search_schedule(steps, **options),
        number=number,
        elites=elites,
        policy_plans=own,
        temperature=0.5,
        action_noise=0.05,
        energy=None,
    )


def mppi(model, *, rounds=6, number=512, own=0, temperature=0.5):
    return MPPIPlanner(
        model,
        horizon=3,
        rounds=rounds,
        number=number,
        elites=64,
        policy_plans=own,
        temperature=temperature,
        least=0.05,
        greatest=2.0,
    )


def score(model, *, number=32, own=0):
    return ScorePlanner(model, horizon=3, schedule=search_schedule(20), steps=4, action_noise=0.05)


def search(planner, system, state, rows=20, seed=0):
    latent = torch.full((rows, 1), state)
    draws = planner.draw(rows, generator(seed))
    return planner.plan(latent, torch.zeros(rows, 3, 1), draws, system.task())


def sampler(returns, noise, weights=search_weights, **options):
    """Return what makes rounds of given returns and noise."""

    def weigh(gained):
        return weights(gained, temperature=0.5, **options)

    def sample(centre, std, index):
        return weigh_candidates(centre, std, noise[index], returns, weigh)

    return sample


def value(system, plan, state):
    """Return what plans earn with the best actions behind them, ``[E]``, in double precision."""
    latent = torch.full((len(plan), 1), state, dtype=torch.float64)
    tails = torch.zeros(len(plan), 1, 1)
    plans = plan.double().unsqueeze(1)
    return imagined_return(system, latent, plans, tails, None, system.task()).squeeze(1)


# -- the linear-quadratic system -----------------------------------------------------------------


def test_the_imagined_return_of_the_best_plan_is_the_value(system):
    """Oracle 7: V* = -P z^2 whatever the horizon."""
    gain = value(system, BEST.view(1, 3, 1), 0.3)
    assert gain.item() == pytest.approx(-0.1236616, abs=1e-6)
    shorter = value(system, BEST[:2].view(1, 2, 1), 0.3)
    assert shorter.item() == pytest.approx(-0.1236616, abs=1e-6)


def test_reverse_diffusion_finds_the_riccati_plan(system):
    """Oracle 7, with the published search."""
    found = search(diffusion(system), system, 0.3)
    plans = found.plan.squeeze(-1)
    torch.testing.assert_close(plans.mean(0), BEST, rtol=0, atol=1e-3)
    assert plans.std(0).max() <= 2e-3
    assert (value(system, found.plan, 0.3) + 0.1236616).abs().mean() < 5e-6
    torch.testing.assert_close(found.action, found.plan[:, 0])


def test_five_levels_end_near_by(system):
    """Oracle 7: the published increments are too narrow for five levels, held ones are not."""
    narrow = search(diffusion(system, steps=5), system, 0.3)
    gap = (value(system, narrow.plan, 0.3) + 0.1236616).abs().mean()
    assert 1e-5 < gap < 1e-4
    assert narrow.plan[:, 0].mean().item() == pytest.approx(-0.501, abs=3e-3)
    held = search(diffusion(system, steps=5, widest=0.3266), system, 0.3)
    assert (value(system, held.plan, 0.3) + 0.1236616).abs().mean() < gap


def test_reverse_diffusion_heeds_the_bounds_of_actions(system):
    """Oracle 8: from z = 1 the best plan is at the bound twice."""
    found = search(diffusion(system), system, 1.0)
    assert found.plan.mean(0).flatten().tolist() == pytest.approx([-1.0, -1.0, -0.271], abs=3e-3)
    assert found.plan.abs().max() <= 1.0
    assert value(system, found.plan, 1.0).mean().item() == pytest.approx(-1.58988, abs=2e-4)


def test_mppi_finds_the_riccati_plan(system):
    """With returns told apart as well as those of episodes are; raw ones are nearly equal here."""
    found = search(mppi(system, rounds=12, temperature=500.0), system, 0.3)
    assert found.plan.mean(0).flatten().tolist() == pytest.approx(BEST.tolist(), abs=2e-2)
    assert (value(system, found.plan, 0.3) + 0.1236616).abs().mean() < 1e-3


def test_rollouts_of_the_best_policy_are_among_the_elites(system):
    latent = torch.tensor([[0.3], [-0.2]])
    rolled = policy_plans(system, latent, torch.zeros(2, 2, 4, 3, 1), system.task())
    assert rolled.shape == (2, 2, 4, 3, 1)
    torch.testing.assert_close(rolled[1, 0, 2].flatten(), BEST, rtol=0, atol=1e-4)
    with_them = search(mppi(system, rounds=1, own=24), system, 0.3)
    without = search(mppi(system, rounds=1), system, 0.3)
    gaps = [(value(system, x.plan, 0.3) + 0.1236616).abs().mean() for x in (with_them, without)]
    assert gaps[0] < gaps[1]


def test_flat_returns_let_plans_drift_as_far_as_chance_goes():
    """Oracle 9: the fixed anneal takes N draws of each width, and nothing else moves the plan."""
    rows, number = 800, 512
    schedule = search_schedule(20)
    noise = torch.randn(19, rows, number, 1, 1, generator=generator())
    sample = sampler(lambda plans: torch.zeros(plans.shape[:2]), noise)
    found = reverse_diffusion(torch.full((rows, 1, 1), 0.3), sample, schedule)
    chance = math.sqrt(sum(schedule.sigma(level) ** 2 for level in range(1, 20)) / number)
    assert chance == pytest.approx(0.038, abs=1e-3)
    assert found.plan.mean().item() == pytest.approx(0.298, abs=5e-3)
    assert found.plan.std().item() == pytest.approx(chance, rel=0.1)


def test_a_search_begins_at_the_plan_that_it_is_given():
    start, noise = torch.tensor([0.4, -0.2, 0.0]).view(1, 3, 1), torch.randn(1, 1, 32, 3, 1)
    sample = sampler(lambda plans: torch.zeros(1, 32), noise)
    found = [
        reverse_diffusion(x, sample, search_schedule(2)).plan
        for x in (start, torch.zeros_like(start))
    ]
    torch.testing.assert_close(found[0] - found[1], start, rtol=0, atol=1e-3)


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["reverse_diffusion", "mppi"])
def test_a_return_that_is_not_finite_counts_as_zero(kind, unknown):
    start, noise = torch.zeros(1, 3, 1), torch.randn(3, 1, 32, 3, 1, generator=generator())

    def found(instead):
        def returns(plans):
            gained = -plans.square().sum((-2, -1))
            gained[:, ::5] = instead
            return gained

        if kind == "mppi":
            sample = sampler(returns, noise, mppi_weights, elites=8)
            return mppi_rounds(start, sample, 3, least=0.05, greatest=2.0)
        return reverse_diffusion(start, sampler(returns, noise, elites=8), search_schedule(4))

    plan = found(unknown).plan
    assert plan.isfinite().all()
    assert plan.equal(found(0.0).plan)
    assert not plan.equal(found(-1.0).plan)


def test_environments_do_not_see_one_another(system):
    planner = diffusion(system, number=64)
    latent, start = torch.tensor([[0.3], [-0.6]]), torch.randn(2, 3, 1).clamp(-1, 1)
    draws = planner.draw(2, generator())
    both = planner.plan(latent, start, draws, system.task())
    for i in range(2):
        own = {
            name: x[:, i : i + 1] if name != "explore" else x[i : i + 1]
            for name, x in draws.items()
        }
        alone = planner.plan(latent[i : i + 1], start[i : i + 1], own, system.task())
        torch.testing.assert_close(alone.plan, both.plan[i : i + 1], rtol=0, atol=1e-5)


def test_exploration_adds_bounded_noise(system):
    found = search(diffusion(system, number=64), system, 1.0, rows=400)
    added = found.explored - found.action
    assert found.explored.abs().max() <= 1.0
    inside = found.action.abs() < 0.8
    assert not inside.all()
    assert (added != 0).any()
    free = search(diffusion(system, number=64), system, 0.3, rows=400)
    assert (free.explored - free.action).std().item() == pytest.approx(0.05, rel=0.15)


# -- a learned model -----------------------------------------------------------------------------


def model(**options):
    options = {"gamma": (0.9,) * max(1, len(options.get("action_dims", ())))} | options
    made = WorldModel(3, 2, SIZE, horizon=3, generator=generator(), **options)
    disturb(made)
    return made


@torch.no_grad()
def disturb(module):
    draw = generator(1)
    for x in module.parameters():
        x.add_(0.3 * torch.randn(x.shape, generator=draw))


def returns_by_hand(made, latent, plan, tail, members, energy=None, *, gamma=0.9, task=None):
    task, total = made.task() if task is None else task, 0.0
    for t in range(3):
        pair = made.pair(latent, plan[t], task)
        total += gamma**t * made.scalar.decode(made.reward(pair))
        if energy is not None:
            total += gamma**t * energy.bonus(made.energy(pair).squeeze(-1))
        latent = made.dynamics(pair)
    action = made.act(latent, tail, task).action
    return total + gamma**3 * made.values(latent, action, task, members=members).mean(0)


def test_the_imagined_return_by_hand():
    made = model(energy=True)
    energy = EnergyScale(0.5, warmup=0)
    observation, plans, tails = (
        torch.randn(2, 3),
        torch.rand(2, 4, 3, 2) * 2 - 1,
        torch.randn(2, 4, 2),
    )
    latent, members = made.encode(observation, made.task()), torch.tensor([2, 0])
    for scale in (None, energy):
        found = imagined_return(made, latent, plans, tails, members, made.task(), scale)
        for e in range(2):
            for n in range(4):
                expected = returns_by_hand(
                    made, latent[e], plans[e, n], tails[e, n], members, scale
                )
                torch.testing.assert_close(found[e, n], expected, rtol=1e-4, atol=1e-4)


def test_every_task_s_return_is_discounted_by_its_own():
    gammas = (0.95, 0.5)
    made = model(action_dims=(2, 1), gamma=gammas)
    told, members = torch.tensor([1, 0, 1]), torch.tensor([0, 1])
    task = made.task(told)
    latent = made.encode(torch.randn(3, 3), task)
    plans, tails = torch.rand(3, 4, 3, 2) * 2 - 1, torch.randn(3, 4, 2)
    found = imagined_return(made, latent, plans, tails, members, task)
    for e, number in enumerate(told.tolist()):
        alone = made.task(told[e : e + 1])
        for n in range(4):
            expected = returns_by_hand(
                made,
                latent[e : e + 1],
                plans[e, n].unsqueeze(1),
                tails[e, n].unsqueeze(0),
                members,
                gamma=gammas[number],
                task=alone,
            )
            torch.testing.assert_close(found[e, n], expected[0], rtol=1e-4, atol=1e-4)


def test_nothing_is_earned_behind_a_predicted_end():
    made = model(episodic=True)
    latent, plans, tails = torch.rand(1, 16), torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2)

    def earned(*ends):
        answers = iter([torch.tensor(ends)[:, None, None]])
        made.termination.forward = lambda _: next(answers)
        return imagined_return(made, latent, plans, tails, None, made.task())

    pair = made.pair(
        made.imagine(latent, plans[:, 0].transpose(0, 1), made.task())[:-1],
        plans[0, 0][:, None],
        made.task(),
    )
    rewards = made.scalar.decode(made.reward(pair)).flatten()
    # The logit at t tells whether z_{t+1} is an end.
    torch.testing.assert_close(earned(1.0, -1.0, -1.0).item(), rewards[0].item())
    torch.testing.assert_close(
        earned(-1.0, 1.0, -1.0).item(), (rewards[0] + 0.9 * rewards[1]).item()
    )
    three = (rewards * torch.tensor([1.0, 0.9, 0.81])).sum().item()
    torch.testing.assert_close(earned(-1.0, -1.0, 1.0).item(), three)
    assert earned(-1.0, -1.0, -1.0).item() != pytest.approx(three)


@pytest.mark.parametrize(
    "make", [diffusion, mppi, score, lambda made, **_: PolicyPlanner(made, horizon=3)]
)
def test_dimensions_that_a_task_does_not_use_stay_zero(make):
    """Oracle 16."""
    made = model(action_dims=(2, 1), score=True)
    task = made.task(torch.tensor([0, 1, 1]))
    planner = make(made, number=32, own=4) if make is not mppi else mppi(made, number=96, own=4)
    seen = []
    own = made.imagine
    made.imagine = lambda latent, actions, told: seen.append(actions) or own(latent, actions, told)
    latent = made.encode(torch.randn(3, 3), task)
    start = torch.rand(3, 3, 2)
    found = planner.plan(latent, start, planner.draw(3, generator()), task)
    for x in (found.plan, found.action, found.explored):
        assert (x[1:, ..., 1] == 0).all()
        assert isinstance(planner, PolicyPlanner) or (x[0, ..., 1] != 0).all()
    candidates = [x.view(3, 3, -1, 2) for x in seen]  # [H, E, N, A]
    assert all((x[:, 1:, :, 1] == 0).all() and (x[:, 0, :, 1] != 0).any() for x in candidates)


def test_mppi_acts_with_an_elite_of_the_last_round():
    made = model()
    planner = mppi(made, number=96, own=8)
    latent = made.encode(torch.randn(5, 3), made.task())
    draws = planner.draw(5, generator())
    rounds = []
    own = made.imagine
    made.imagine = lambda latent, actions, told: (
        rounds.append(actions) or own(latent, actions, told)
    )
    found = planner.plan(latent, torch.zeros(5, 3, 2), draws, made.task())
    first = rounds[-1][0].view(5, 96, 2)
    assert len(rounds) == 6
    assert ((first - found.action[:, None]).abs().sum(-1).min(1).values == 0).all()
    # The policy's rollouts are drawn once and stay among the candidates.
    assert rounds[0][:, :8].equal(rounds[-1][:, :8])
    other = planner.plan(
        latent, torch.zeros(5, 3, 2), draws | {"choice": torch.full((5, 1), 0.999)}, made.task()
    )
    assert other.plan.equal(found.plan)
    assert not other.action.equal(found.action)


def test_reverse_diffusion_rolls_the_policy_out_anew_in_each_round():
    made = model()
    planner = diffusion(made, steps=4, number=32, own=8)
    rounds = []
    own = made.imagine
    made.imagine = lambda latent, actions, told: (
        rounds.append(actions) or own(latent, actions, told)
    )
    planner.plan(torch.rand(1, 16), torch.zeros(1, 3, 2), planner.draw(1, generator()), made.task())
    assert len(rounds) == 3
    assert not rounds[0][:, :8].equal(rounds[1][:, :8])


def test_two_critics_are_drawn_for_each_round():
    planner = diffusion(model(), number=8)
    drawn = planner.draw(1, generator())["critics"]
    assert drawn.shape == (19, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert set(drawn.flatten().tolist()) == {0, 1, 2}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("make", [diffusion, mppi])
def test_a_compiled_round_is_what_it_is_in_eager_mode(make):
    """One round: behind that, what rounding makes of the best K may be another plan."""
    made = model(action_dims=(1, 2), task_dim=4)
    options = {"steps": 2} if make is diffusion else {"rounds": 1}
    planner = make(made, number=96, own=8, **options)
    task, draws = made.task(torch.tensor([0, 1])), planner.draw(2, generator())
    inputs = (torch.rand(2, 16, generator=generator()), torch.zeros(2, 3, 2), draws, task)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot compile here")
        expected = planner.plan(*inputs)
        torch._dynamo.reset()
        planner.compile("agent.compile")
        found = planner.plan(*inputs)
    assert not torch._dynamo.utils.counters["graph_break"]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

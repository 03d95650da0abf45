"""Fisher Decorator: the loss, who hears what, and what it learns where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from genpol import agents
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.objectives.actor_critic import temperature_loss
from genpol.offline import NetworkSettings
from genpol.offline.behaviour import sample_chunks
from genpol.policies.flow import FlowPolicy
from genpol.policies.score import (
    euclidean_metric,
    outer_metric,
    released_score,
    sampled_metric,
)

BATCH, WIDTH, ACTIONS = 6, 3, 2
SPECS = Specs(observation_dim=WIDTH, action_dim=ACTIONS, num_envs=4)
SMALL = {"actor": NetworkSettings(hidden=[16]), "critic": NetworkSettings(hidden=[16])}
SIGMA = torch.tensor([[0.09, 0.05], [0.05, 0.04]])
SLOPE = torch.tensor([1.0, -0.5])


def make(seed=0, **options):
    settings = agents.settings_class("fisher_decorator")(**(SMALL | options))
    return agents.make("fisher_decorator", settings, SPECS, seed=seed)


def windows(horizon=1, rows=BATCH, seed=0):
    draw = torch.Generator().manual_seed(seed)
    after = torch.randn(rows, WIDTH, generator=draw)
    return TensorDict(
        {
            "observation": torch.randn(rows, WIDTH, generator=draw),
            "action": 2 * torch.rand(rows, horizon, ACTIONS, generator=draw) - 1,
            "valid": torch.ones(rows, horizon, dtype=torch.bool),
            "weight": torch.ones(rows),
            "reward": torch.randn(rows, generator=draw),
            "discount": torch.full((rows,), 0.9),
            "next": {"observation": after},
        },
        [rows],
    )


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_loss_is_that_of_its_parts_written_out(horizon):
    agent = make(horizon=horizon, zero_init=False, num_scores=3, initial_multiplier=2.0)
    batch, draws = windows(horizon), None
    draws = agent.draw(BATCH)
    parent = super(type(agent), agent).loss(batch, draws)[0]
    seen = batch["observation"]
    base = sample_chunks(agent.flow, seen, draws["policy"]).detach()
    shift = agent.residual(seen, base)
    samples = sample_chunks(agent.flow, seen, draws["score_base"]).detach()
    time, noise = draws["score_time"], draws["score_noise"]
    x = time.unsqueeze(-1) * samples + (1 - time.unsqueeze(-1)) * noise
    own = x if horizon > 1 else x.squeeze(-2)
    scores = (time.unsqueeze(-1) * agent.flow.score(seen, own, time).view_as(x)).flatten(-2)
    quadratic = (scores * shift.flatten(-2)).sum(-1).square().mean(0)
    quadratic = quadratic + 1e-3 * shift.flatten(-2).square().sum(-1)
    trace = (scores.square().sum(-1).mean(0) + 1e-3 * ACTIONS * horizon).mean()
    value = agent.critic(seen, (base + shift).clamp(-1, 1)).mean()
    expected = parent + 2.0 * quadratic.mean() / trace - value
    found, metrics = agent.loss(batch, draws)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(metrics["fisher/divergence"], quadratic.mean() / 2)
    assert 0.85 <= time.min() <= time.max() <= 0.9


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("metric", ["sampled", "hessian", "point", "released", "euclidean"])
def test_each_part_is_heard_by_its_own_network_only(metric, horizon):
    """Oracle 12: exactly, not roughly."""
    agent = make(metric=metric, horizon=horizon, zero_init=False, budget_unit="trace")
    batch = windows(horizon)
    draws = agent.draw(BATCH)
    total, metrics = agent.loss(batch, draws)
    alone = super(type(agent), agent).loss(batch, draws)[0]
    named = dict(agent.named_parameters())
    trained = {name: x for name, x in named.items() if x.requires_grad}
    by_all, by_parent = (
        dict(
            zip(
                trained,
                torch.autograd.grad(loss, list(trained.values()), allow_unused=True),
                strict=True,
            )
        )
        for loss in (total, alone)
    )
    for name in trained:
        if name.startswith(("flow", "critic")):
            assert torch.equal(by_all[name], by_parent[name]), name
    assert all(by_all[name] is not None for name in trained if name.startswith("residual"))
    assert by_all["log_multiplier"] is None
    penalty = metrics["fisher/penalty"]
    dual = temperature_loss(agent.log_multiplier, penalty, -0.01)
    (slope,) = torch.autograd.grad(dual, agent.log_multiplier)
    torch.testing.assert_close(slope, -(penalty - 0.01))


def test_it_begins_at_the_cloned_policy_and_the_price_falls():
    """Oracle 13."""
    agent, batch = make(), windows()
    noise = agent.plan_noise(BATCH, torch.Generator().manual_seed(1))
    found = agent.plan(batch["observation"], noise)
    assert torch.equal(found, sample_chunks(agent.flow, batch["observation"], noise))
    before = agent.multiplier.item()
    metrics = agent.update(batch)
    assert metrics["fisher/penalty"] == 0.0
    assert agent.multiplier.item() < before


def test_a_metric_of_some_rows_is_that_of_those_rows():
    torch.manual_seed(0)
    few, batch = make(zero_init=False, metric_rows=2), windows()
    draws = few.draw(BATCH)
    assert draws["score_base"].shape == (8, 2, 1, ACTIONS)
    base = sample_chunks(few.flow, batch["observation"], draws["policy"])[:2]
    shift = few.residual(batch["observation"][:2], base).flatten(-2)
    samples = sample_chunks(few.flow, batch["observation"][:2], draws["score_base"]).squeeze(-2)
    metric = sampled_metric(
        few.flow,
        batch["observation"][:2],
        samples,
        shift,
        noise=draws["score_noise"].squeeze(-2),
        time=draws["score_time"],
        damping=1e-3,
    )
    found = few.loss(batch, draws)[1]
    torch.testing.assert_close(found["fisher/divergence"], metric.quadratic.mean() / 2)


@pytest.mark.parametrize("metric", ["hessian", "point", "released", "euclidean"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_every_metric_teaches_the_residual(metric, horizon):
    agent = make(
        metric=metric,
        horizon=horizon,
        zero_init=False,
        budget_unit="trace",
        normalizer="state" if metric == "released" else "global",
    )
    draws = agent.draw(BATCH)
    _, metrics = agent.loss(windows(horizon), draws)
    assert metrics["fisher/penalty"] > 0
    before = [x.clone() for x in agent.residual.parameters()]
    agent.update(windows(horizon))
    changed = [(x != y).any() for x, y in zip(agent.residual.parameters(), before, strict=True)]
    assert all(changed)


def test_the_released_metric_has_the_released_score():
    agent = make(
        metric="released", normalizer="state", budget_unit="trace", zero_init=False, damping=0.0
    )
    batch = windows()
    draws = agent.draw(BATCH)
    seen = batch["observation"]
    base = sample_chunks(agent.flow, seen, draws["policy"])
    shift = agent.residual(seen, base).flatten(-2)
    samples = sample_chunks(agent.flow, seen, draws["score_base"]).squeeze(-2)
    time = draws["score_time"]
    x = time * samples + (1 - time) * draws["score_noise"].squeeze(-2)
    scores = released_score(agent.flow, seen, x, time)
    metric = outer_metric(scores, shift)
    expected = (metric.quadratic / metric.trace).mean()
    torch.testing.assert_close(agent.loss(batch, draws)[1]["fisher/penalty"], expected)


def test_the_trace_is_a_running_mean_that_the_checkpoint_holds():
    agent, batch = make(zero_init=False), windows()
    first = agent.update(batch)["fisher/trace"]
    torch.testing.assert_close(agent.trace, first)
    second = agent.update(batch)["fisher/trace"]
    torch.testing.assert_close(agent.trace, torch.lerp(first, second, 0.01))
    other = make(seed=5)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.trace, agent.trace)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "euclidean"}, "budget_unit=trace"),
        ({"normalizer": "state"}, "budget_unit=trace"),
        ({"metric": "point"}, "budget_unit=trace"),
        ({"metric": "fisher"}, "agent.metric"),
        ({"score_time": [0.9, 0.8]}, "agent.score_time"),
        ({"score_time": [0.9, 1.0]}, "agent.score_time"),
        ({"denoiser": "diffusion"}, "agent.denoiser"),
        ({"budget": 0.0}, "agent.budget"),
        ({"metric_rows": 5000}, "agent.metric_rows"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


# -- what is optimal -----------------------------------------------------------------------------


def exact_scores(sigma):
    """Return scores ``[K, 1, D]`` whose mean outer product is ``sigma^-1``, exactly."""
    factor = torch.linalg.cholesky(torch.linalg.inv(sigma))
    return (len(sigma) ** 0.5 * factor.T).unsqueeze(1)


def descend(objective, start, *, steps=800, rate=1e-3):
    shift = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([shift], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(shift).backward()
        optimizer.step()
    return shift.detach()


def test_the_best_shift_is_the_natural_gradient():
    """Oracle 7: Sigma g / lambda = (0.0325, 0.0150)."""
    scores = exact_scores(SIGMA)
    found = descend(
        lambda shift: outer_metric(scores, shift[None]).quadratic[0] - SLOPE @ shift,
        torch.zeros(2),
    )
    torch.testing.assert_close(found, torch.tensor([0.0325, 0.0150]), rtol=0.02, atol=0.0)
    assert torch.cosine_similarity(found, SIGMA @ SLOPE, dim=0) > 0.999


def test_the_price_settles_where_the_budget_is_spent():
    """Oracle 8, in the released units: lambda = 38.435 and (0.0999, 0.0461), 0.0591 nats."""
    scores, budget = exact_scores(SIGMA), 1e-3
    shift = torch.zeros(2, requires_grad=True)
    log_price = torch.tensor(math.log(10.0), requires_grad=True)
    actor = torch.optim.Adam([shift], lr=5e-4)
    dual = torch.optim.Adam([log_price], lr=5e-3)
    trace = outer_metric(scores, shift[None]).trace.item()
    for _ in range(2500):
        penalty = outer_metric(scores, shift[None]).quadratic[0] / trace
        (log_price.detach().exp() * penalty - SLOPE @ shift).backward()
        temperature_loss(log_price, penalty, -budget).backward()
        for optimizer in (actor, dual):
            optimizer.step()
            optimizer.zero_grad()
    assert penalty.item() == pytest.approx(budget, rel=0.05)
    assert log_price.exp().item() == pytest.approx(38.435, rel=0.05)
    assert shift.tolist() == pytest.approx([0.0999, 0.0461], rel=0.05)
    nats = 0.5 * shift @ torch.linalg.inv(SIGMA) @ shift
    assert nats.item() == pytest.approx(0.0591, rel=0.1)


def test_the_natural_step_beats_the_plain_one_at_equal_divergence():
    """Oracle 9: by sqrt((g' Sigma g)(g' F g)) / (g' g) = 1.809."""
    scores = exact_scores(SIGMA)

    def best(metric):
        return descend(lambda shift: metric(shift).quadratic[0] - SLOPE @ shift, torch.zeros(2))

    def gain_per_root_nat(shift):
        return (SLOPE @ shift / outer_metric(scores, shift[None]).quadratic[0].sqrt()).item()

    natural = best(lambda shift: outer_metric(scores, shift[None]))
    plain = best(lambda shift: euclidean_metric(2.0 * shift[None]))
    ratio = gain_per_root_nat(natural) / gain_per_root_nat(plain)
    assert ratio == pytest.approx(1.809, abs=5e-3)


# -- what is learned -----------------------------------------------------------------------------


class GaussianFlow(FlowPolicy):
    """The exact flow to N(mean, covariance), drawing exactly."""

    def __init__(self, covariance):
        super().__init__(WIDTH, len(covariance), [2])
        self.covariance = covariance
        self.factor = torch.linalg.cholesky(covariance)

    def sample(self, observation, noise, *, num_steps=None):
        return noise @ self.factor.T

    def _flat_velocity(self, observation, flat, time):
        # V = (1 - t)^2 + t^2 Sigma is diagonal in the axes of Sigma.
        values, axes = torch.linalg.eigh(self.covariance)
        along = flat @ axes
        slope = (time * values - (1 - time)) / ((1 - time) ** 2 + time**2 * values)
        return (slope * along) @ axes.T


class Linear(torch.nn.Module):
    """A critic that is ``g a``."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, observation, action, *, frozen=False):
        return (action.flatten(-2) @ self.slope).unsqueeze(0)


class Constant(torch.nn.Module):
    """A residual that is the same everywhere."""

    def __init__(self, width):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(width))

    def forward(self, observation, action):
        return self.shift.expand_as(action)


def on_a_bandit(covariance, slope, **options):
    """Learn a shift of Gaussian behaviour under a linear value; return it and what is spent."""
    return learned_on(covariance, slope, **options)[1:]


def learned_on(covariance, slope, updates=900, **options):
    agent = make(learning_rate=1e-3, multiplier_learning_rate=5e-3, **options)
    agent.flow = GaussianFlow(covariance)
    agent.flow.requires_grad_(False)
    agent.critic, agent.averaged = Linear(slope), Linear(slope)
    agent.residual = Constant(len(covariance))
    agent.begin(plan_steps=1, apart=(agent.log_multiplier,))
    batch = windows(rows=128)
    spent = [agent.update(batch)["fisher/divergence"].item() for _ in range(updates)]
    last = spent[-500:]
    return agent, agent.residual.shift.detach(), sum(last) / len(last)


def turned(*stds, degrees=30.0):
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return turn @ torch.diag(torch.tensor(stds) ** 2) @ turn.T


def nats(shift, covariance):
    return (0.5 * shift @ torch.linalg.inv(covariance) @ shift).item()


def efficiency(shift, covariance, slope):
    """Return the value gained per root of the divergence, over the most that can be."""
    gained = (slope @ shift).item() / (2 * nats(shift, covariance)) ** 0.5
    return gained / (slope @ covariance @ slope).item() ** 0.5


def test_it_learns_the_natural_gradient_and_spends_its_budget():
    """Behaviour of known covariance: cosine with Sigma g, and the budget within 10 %."""
    covariance = turned(0.3, 0.2)
    shift, spent = on_a_bandit(covariance, SLOPE, budget=0.1, score_time=[0.95, 0.95])
    assert spent == pytest.approx(0.1, rel=0.05)
    assert torch.cosine_similarity(shift, covariance @ SLOPE, dim=0) > 0.98
    assert nats(shift, covariance) == pytest.approx(0.1, rel=0.1)


def test_the_multiplier_is_the_one_that_spends_the_budget():
    """Oracle 8: lambda* = 1.5811 and (0.0411, 0.0190) for 0.01 nats; a bit more for the blur."""
    agent, shift, _ = learned_on(
        SIGMA, SLOPE, updates=1500, budget=0.01, score_time=[0.98, 0.98], initial_multiplier=60.0
    )
    # In the loss it stands before delta^T F delta / tr F, not before half the form.
    price = 2.0 * agent.multiplier / agent.trace
    assert price.item() == pytest.approx(1.5811, rel=0.05)
    assert shift.tolist() == pytest.approx([0.0411, 0.0190], rel=0.05)


def test_on_narrow_behaviour_it_gains_most_of_what_a_nat_can_buy():
    """Section 8: standard deviations 0.5 and 0.05, g = (1, -0.2)."""
    covariance, slope = turned(0.5, 0.05), torch.tensor([1.0, -0.2])
    shift, _ = on_a_bandit(covariance, slope, budget=0.05, score_time=[0.9, 0.9])
    assert efficiency(shift, covariance, slope) > 0.85
    # Oracle 10: what the blur of t = 0.9 lets it see.
    blurred = covariance + torch.eye(2) / 81
    assert torch.cosine_similarity(shift, blurred @ slope, dim=0) > 0.995
    assert torch.cosine_similarity(shift, slope, dim=0) < 0.85
    plain, _ = on_a_bandit(covariance, slope, metric="euclidean", budget_unit="trace", budget=1e-3)
    assert efficiency(plain, covariance, slope) == pytest.approx(0.2, abs=0.03)


@pytest.mark.slow
def test_a_learned_flow_knows_its_scores():
    """Oracle 14: standard deviations 0.4 and 0.1 at t = 0.8, after 4000 steps."""
    generator = torch.Generator().manual_seed(0)
    flow = FlowPolicy(1, 2, [128, 128, 128], zero_init=False, generator=generator)
    stds = torch.tensor([0.4, 0.1])
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4000)
    seen = torch.zeros(512, 1)
    for _ in range(4000):
        action, noise = (torch.randn(512, 2, generator=generator) for _ in range(2))
        time = torch.rand(512, 1, generator=generator)
        optimizer.zero_grad()
        flow.bc_loss(seen, action * stds, noise, time)[0].backward()
        optimizer.step()
        schedule.step()
    time = torch.full((4096, 1), 0.8)
    action, noise = (torch.randn(4096, 2, generator=generator) for _ in range(2))
    x = 0.8 * action * stds + 0.2 * noise
    variance = 0.04 + 0.64 * stds.square()
    with torch.no_grad():
        found, exact = flow.score(torch.zeros(4096, 1), x, time), -x / variance
    assert (found - exact).square().mean() < 0.02 * exact.square().mean()
    matrix = found.T @ found / len(found)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(eigenvalues, (1 / variance), rtol=0.2, atol=0.0)

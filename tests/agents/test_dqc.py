"""DQC: each loss and each choice against the paper's equations, written out."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from genpol import agents
from genpol.agent import Specs
from genpol.offline import NetworkSettings
from genpol.policies.guidance import GuidanceSettings

BATCH, WIDTH, ACTIONS = 6, 3, 2
SPECS = Specs(observation_dim=WIDTH, action_dim=ACTIONS, num_envs=4, goal_dim=2)
SMALL = {"actor": NetworkSettings(hidden=[16]), "critic": NetworkSettings(hidden=[16])}
SIZES = {"horizon": 4, "chunk": 2}
KAPPA_B, KAPPA_D = 0.9, 0.7


def make(seed=0, **options):
    settings = agents.settings_class("dqc")(**(SMALL | SIZES | options))
    return agents.make("dqc", settings, SPECS, seed=seed)


def made_to_differ(**options):
    """Return an agent whose networks all give probabilities of their own, far from a half."""
    agent = make(backup_quantile=KAPPA_B, distillation_expectile=KAPPA_D, **options)
    agent.averaged.load_state_dict(make(seed=9, **options).partial.state_dict())
    for net in (agent.critic, agent.partial, agent.averaged, agent.state_value):
        for parameter in net.parameters() if net is not None else ():
            parameter.data.mul_(3.0)
    return agent


def windows(horizon=4, seed=0, **given):
    draw = torch.Generator().manual_seed(seed)
    fields = {
        "observation": torch.randn(BATCH, WIDTH, generator=draw),
        "action": 2 * torch.rand(BATCH, horizon, ACTIONS, generator=draw) - 1,
        "valid": torch.ones(BATCH, horizon, dtype=torch.bool),
        "reward": torch.rand(BATCH, generator=draw),
        "discount": torch.full((BATCH,), 0.9),
        "goal": torch.randn(BATCH, 2, generator=draw),
    }
    after = torch.randn(BATCH, WIDTH, generator=draw)
    return TensorDict(fields | given | {"next": {"observation": after}}, [BATCH])


def loss_of(agent, batch, seed=3):
    agent.generator.manual_seed(seed)
    return agent.loss(batch, agent.draw(len(batch)))


def with_goal(batch, *key):
    return torch.cat((batch[key or "observation"], batch["goal"]), -1)


def probability(logits):
    """Return them in double precision, whose logarithms below do not saturate."""
    return logits.detach().double().sigmoid()


def cross_entropy(p, y):
    return -(y * p.log() + (1 - y) * (1 - p).log())


def target_of(agent, batch):
    """Return y, of the paper's first loss."""
    following = probability(agent.state_value(with_goal(batch, "next", "observation")))
    return (batch["reward"] + batch["discount"] * following).clamp(0, 1)


def heard(agent, loss):
    """Return the names of the networks that a loss has a gradient for."""
    named = [(name, x) for name, x in agent.named_parameters() if x.requires_grad]
    gradients = torch.autograd.grad(loss, [x for _, x in named], allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return {name.split(".")[0] for (name, _), g in pairs if g is not None and (g != 0).any()}


# --- losses ------------------------------------------------------------------------------------


def test_chunk_critics_learn_what_the_window_earned_and_the_state_value_behind_it():
    agent, batch = made_to_differ(), windows()
    p = probability(agent.critic(with_goal(batch), batch["action"]))
    expected = cross_entropy(p, target_of(agent, batch)).mean()
    assert loss_of(agent, batch)[1]["loss/critic"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_partial_critics_learn_the_expectile_of_their_own_chunk_critic():
    agent, batch = made_to_differ(), windows()
    y = probability(agent.critic(with_goal(batch), batch["action"]))
    p = probability(agent.partial(with_goal(batch), batch["action"][:, :2]))
    above = y >= p
    assert above.any()
    assert not above.all()
    expected = (torch.where(above, KAPPA_D, 1 - KAPPA_D) * cross_entropy(p, y)).mean()
    assert loss_of(agent, batch)[1]["loss/distillation"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize("aggregate", ["mean", "min"])
def test_the_state_value_learns_the_quantile_of_averaged_probabilities(aggregate):
    agent, batch = made_to_differ(aggregate=aggregate), windows()
    members = probability(agent.averaged(with_goal(batch), batch["action"][:, :2]))
    q = members.mean(0) if aggregate == "mean" else members.min(0).values
    u = agent.state_value(with_goal(batch)).detach().double()
    above = q >= u.sigmoid()
    assert above.any()
    assert not above.all()
    expected = (torch.where(above, KAPPA_B, 1 - KAPPA_B) * (u - q.logit()).abs()).mean()
    assert loss_of(agent, batch)[1]["loss/value"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("kappa", "expected"), [(0.5, 0.5), (0.7, 0.7), (0.9, 0.9)])
@pytest.mark.parametrize("aggregate", ["mean", "min"])
def test_of_nine_equally_likely_values_the_state_is_worth_the_quantile(aggregate, kappa, expected):
    """As probabilities: the mean of members in logits would be another one."""
    agent = make(horizon=1, chunk=1, backup_quantile=kappa, aggregate=aggregate)
    values = torch.arange(1, 10) / 10

    class Members(torch.nn.Module):
        def forward(self, observation, action):
            p, apart = action[:, 0, 0], torch.tensor([[-0.09], [0.09]])
            return (p + (apart if aggregate == "mean" else apart + 0.09)).logit(eps=1e-6)

    class Value(torch.nn.Module):
        def forward(self, observation):
            return self.u.expand(len(observation))

    agent.averaged, agent.state_value = Members(), Value()
    batch = torch.cat([windows(1), windows(1)])[:9]
    batch["action"] = values.view(9, 1, 1).expand(9, 1, ACTIONS)
    slopes = []
    for apart in (-1e-3, 1e-3):
        agent.state_value.u = torch.tensor(math.log(expected / (1 - expected)) + apart)
        u = agent.state_value.u.requires_grad_()
        slopes.append(torch.autograd.grad(loss_of(agent, batch)[0], u)[0].item())
    assert slopes[0] < -1e-3  # the loss falls towards it from the left
    assert slopes[1] > 1e-3  # and from the right


def test_the_flow_learns_the_first_actions_without_the_goal():
    agent, batch = made_to_differ(), windows()
    agent.generator.manual_seed(3)
    draws = agent.draw(BATCH)
    noise, chunk, time = draws["imitation"], batch["action"][:, :2], draws["time"][..., None]
    between = (1 - time) * noise + time * chunk
    velocity = agent.flow.velocity(batch["observation"], between, draws["time"])
    expected = (velocity - (chunk - noise)).square().mean()
    torch.testing.assert_close(agent.loss(batch, draws)[1]["loss/bc"], expected.detach())


@pytest.mark.parametrize("distil", [True, False])
def test_the_loss_is_the_sum_of_its_terms(distil):
    agent = made_to_differ(distil=distil)
    total, metrics = loss_of(agent, windows())
    terms = ["loss/critic", "loss/value", "loss/bc"] + ["loss/distillation"] * distil
    torch.testing.assert_close(total.detach(), sum(metrics[term] for term in terms))


def test_each_loss_is_heard_by_its_own_network():
    agent, batch = make(), windows()
    assert heard(agent, loss_of(agent, batch)[0]) == {"critic", "partial", "state_value", "flow"}
    observation = with_goal(batch)
    logits = agent.partial(observation, batch["action"][:, :2])
    total, _ = agent._critic_loss(observation, batch["action"], logits, torch.rand(BATCH))
    assert heard(agent, total) == {"critic", "partial"}


def test_a_chunk_critic_does_not_hear_of_what_is_distilled_from_it():
    batch = windows()
    gradients = []
    for kappa in (0.5, 0.9):
        agent = make(distillation_expectile=kappa)
        total, _ = loss_of(agent, batch)
        gradients.append(torch.autograd.grad(total, list(agent.critic.parameters())))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("sizes", [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_without_chunk_critics_the_partial_ones_learn_the_return(sizes):
    """The paper's OS, NS, QC-NS and QC."""
    horizon, chunk = sizes
    agent = made_to_differ(distil=False, horizon=horizon, chunk=chunk)
    assert agent.critic is None
    batch = windows(horizon)
    p = probability(agent.partial(with_goal(batch), batch["action"][:, :chunk]))
    expected = cross_entropy(p, target_of(agent, batch)).mean()
    metrics = loss_of(agent, batch)[1]
    assert metrics["loss/critic"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert "loss/distillation" not in metrics


@pytest.mark.parametrize("aggregate", ["mean", "min"])
@pytest.mark.parametrize(("reward", "target"), [(1.0, 1.0), (-1.0, 0.0), (0.3, None)])
def test_targets_are_probabilities_of_which_the_loss_is_at_least_the_entropy(
    aggregate, reward, target
):
    for seed in range(3):
        agent = make(seed=seed, aggregate=aggregate)
        for parameter in agent.parameters():
            parameter.data.mul_(20.0)
        batch = windows(reward=torch.full((BATCH,), reward))
        total, metrics = loss_of(agent, batch)
        if target is not None:  # of every row, since none can lie beyond it
            assert metrics["value/target"] == target
        y = target_of(agent, batch).clamp(1e-12, 1 - 1e-12)
        assert metrics["loss/critic"] >= cross_entropy(y, y).mean() - 1e-5
        gradients = torch.autograd.grad(total, [x for x in agent.parameters() if x.requires_grad])
        assert all(torch.isfinite(x).all() for x in (*metrics.values(), *gradients))


def test_actions_behind_the_policys_chunk_reach_the_chunk_critics_alone():
    agent, batch = made_to_differ(), windows()
    other = batch.clone()
    other["action"][:, 2:] *= -1
    first, second = (loss_of(agent, rows)[1] for rows in (batch, other))
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert set(first) - same == {"loss/critic", "loss/distillation"}

    class Constant(torch.nn.Module):
        def forward(self, observation, action):
            return torch.ones(2, len(observation))

    agent.critic = Constant()
    totals = [loss_of(agent, rows)[0] for rows in (batch, other)]
    assert torch.equal(*totals)


def test_the_flow_is_not_told_the_goal():
    agent, batch = make(guidance=GuidanceSettings(best_of=1)), windows()
    other = batch.clone()
    other["goal"] = batch["goal"].flip(0)
    losses = [loss_of(agent, rows)[1]["loss/bc"] for rows in (batch, other)]
    assert torch.equal(*losses)
    plans = [
        agent.act(with_goal(rows), torch.Generator().manual_seed(1)) for rows in (batch, other)
    ]
    assert torch.equal(*plans)


# --- acting ------------------------------------------------------------------------------------


def choices(agent, observation, noise):
    """Return candidates ``[N, B, H, A]`` and a chooser of them by scores ``[N, B]``."""
    state = observation[:, :WIDTH]
    candidates = torch.stack([agent.flow.sample(state, draw) for draw in noise]).clamp(-1, 1)
    return candidates, lambda scores: candidates[scores.argmax(0), torch.arange(len(state))]


@pytest.mark.parametrize("aggregate", ["mean", "min"])
def test_the_live_partial_critics_choose_by_their_logits(aggregate):
    agent = made_to_differ(aggregate=aggregate)
    draw = torch.Generator().manual_seed(1)
    observation = torch.randn(16, WIDTH + 2, generator=draw)
    noise = agent.plan_noise(16, draw)
    assert noise.shape == (32, 16, 2, ACTIONS)
    candidates, chosen = choices(agent, observation, noise)

    def scores(critic):
        return torch.stack([critic(observation, chunk) for chunk in candidates], 1)

    logits, lagging = scores(agent.partial), scores(agent.averaged)
    by_kind = {
        "mean": chosen(logits.mean(0)),
        "min": chosen(logits.min(0).values),
        "mean probability": chosen(logits.sigmoid().mean(0)),
        "averaged": chosen(lagging.mean(0) if aggregate == "mean" else lagging.min(0).values),
    }
    found = agent.plan(observation, noise)
    torch.testing.assert_close(found, by_kind.pop(aggregate))
    for rival in by_kind.values():
        assert not torch.allclose(found, rival)


def test_observations_are_raw_in_acting_and_as_the_networks_see_them_in_plans():
    agent = made_to_differ(normalize_observations=True)
    agent.normalizer.update(5 + 3 * torch.randn(500, WIDTH))
    raw = torch.cat((5 + 3 * torch.randn(4, WIDTH), torch.randn(4, 2)), -1)
    seen = torch.cat((agent.normalizer(raw[:, :WIDTH]), raw[:, WIDTH:]), -1)
    draws = [torch.Generator().manual_seed(2) for _ in range(2)]
    planned = agent.plan(seen, agent.plan_noise(4, draws[0]))
    assert torch.equal(agent.act(raw, draws[1]), planned)


@pytest.mark.parametrize("best_of", [1, 3])
def test_more_candidates_keep_those_of_fewer(best_of):
    """Of one, the plan is the flow's own; of nested sets, the score never falls."""
    agent = made_to_differ(guidance=GuidanceSettings(best_of=best_of))
    draw = torch.Generator().manual_seed(1)
    observation, noise = torch.randn(8, WIDTH + 2, generator=draw), agent.plan_noise(8, draw)
    if best_of == 1:
        assert noise.shape == (8, 2, ACTIONS)
        expected = agent.flow.sample(observation[:, :WIDTH], noise).clamp(-1, 1)
        assert torch.equal(agent.plan(observation, noise), expected.detach())
        return
    scores = [agent.value(observation, agent.plan(observation, noise[:n])) for n in (1, 2, 3)]
    assert (scores[1] >= scores[0]).all()
    assert (scores[2] >= scores[1]).all()
    assert (scores[2] > scores[0]).any()


@pytest.mark.parametrize("aggregate", ["mean", "min"])
def test_what_it_expects_is_a_probability_and_no_logit(aggregate):
    agent = make(aggregate=aggregate)
    seen, chunk = torch.randn(5, WIDTH + 2), torch.randn(5, agent.settings.chunk, ACTIONS)
    each = agent.partial(seen, chunk).sigmoid()
    expected = each.mean(0) if aggregate == "mean" else each.amin(0)
    torch.testing.assert_close(agent.expected_return(seen, chunk), expected)

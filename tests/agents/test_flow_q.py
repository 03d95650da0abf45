"""FQL and QC: each loss against the paper's equations, written out, and who is asked what."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from genpol import agents
from genpol.agent import Specs
from genpol.offline import NetworkSettings

BATCH, WIDTH, ACTIONS = 6, 3, 2
SPECS = Specs(observation_dim=WIDTH, action_dim=ACTIONS, num_envs=4)
SMALL = {"actor": NetworkSettings(hidden=[16]), "critic": NetworkSettings(hidden=[16])}


def make(name, seed=0, **options):
    settings = agents.settings_class(name)(**(SMALL | options))
    return agents.make(name, settings, SPECS, seed=seed)


def windows(horizon, seed=0, **given):
    draw = torch.Generator().manual_seed(seed)
    fields = {
        "observation": torch.randn(BATCH, WIDTH, generator=draw),
        "action": 2 * torch.rand(BATCH, horizon, ACTIONS, generator=draw) - 1,
        "valid": torch.ones(BATCH, horizon, dtype=torch.bool),
        "weight": torch.ones(BATCH),
        "reward": torch.randn(BATCH, generator=draw),
        "discount": torch.full((BATCH,), 0.9),
    }
    after = torch.randn(BATCH, WIDTH, generator=draw)
    return TensorDict(fields | given | {"next": {"observation": after}}, [BATCH])


def heard(agent, loss):
    """Return the names of the networks that a loss has a gradient for."""
    named = [(name, x) for name, x in agent.named_parameters() if x.requires_grad]
    gradients = torch.autograd.grad(loss, [x for _, x in named], allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return {name.split(".")[0] for (name, _), g in pairs if g is not None and (g != 0).any()}


def test_each_loss_of_fql_is_heard_by_its_own_network():
    agent, batch = make("fql", alpha=2.0), windows(1)
    observation = batch["observation"]
    noise = agent.draw(BATCH)["policy"]
    assert heard(agent, agent._critic_loss(batch, observation, noise)[0]) == {"critic"}
    assert heard(agent, agent._actor_loss(agent.actor, observation, noise)[0]) == {"actor"}
    total, _ = agent.loss(batch, agent.draw(BATCH))
    assert heard(agent, total) == {"critic", "actor", "flow"}


def test_the_critics_target_is_the_averaged_mean_at_the_policys_action():
    agent = make("fql", gamma=0.9)
    weight = torch.ones(BATCH)
    weight[2] = 0.0
    batch = windows(1, weight=weight)
    agent.averaged.load_state_dict(make("fql", seed=9).critic.state_dict())
    noise = agent.draw(BATCH)["next"]
    chunk = agent.plan(batch["next", "observation"], noise)
    following = agent.averaged(batch["next", "observation"], chunk).mean(0)
    target = batch["reward"] + batch["discount"] * following
    error = (agent.critic(batch["observation"], batch["action"]) - target).square()
    expected = (error * weight).mean()
    found = agent._critic_loss(batch, batch["observation"], noise)[0]
    torch.testing.assert_close(found, expected)


class Likes(torch.nn.Module):
    """Values the first action's first entry, times a sign."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, observation, action):
        return (self.sign * action[..., 0, 0]).unsqueeze(0)


@pytest.mark.parametrize(("name", "horizon"), [("qc", 2), ("qc", 1), ("fql", 1)])
def test_the_live_critic_chooses_and_the_averaged_one_evaluates(name, horizon):
    """In QC; with chunks of one that is best of N (BFN)."""
    agent = make(name, horizon=horizon, policy="best_of", best_of=8)
    batch = windows(horizon)
    agent.critic, agent.averaged = Likes(1.0), Likes(-1.0)
    noise = agent.draw(BATCH)["next"]
    assert noise.shape == (8, BATCH, horizon, ACTIONS)
    after = batch["next", "observation"]
    own = noise if horizon > 1 else noise.squeeze(-2)
    samples = torch.stack([agent.flow.sample(after, draw) for draw in own]).clamp(-1, 1)
    best = samples.view(8, BATCH, -1)[..., 0].max(0).values
    target = (batch["reward"] - batch["discount"] * best).detach()
    expected = (batch["action"][:, 0, 0] - target).square().mean()
    found = agent._critic_loss(batch, batch["observation"], noise)[0]
    torch.testing.assert_close(found, expected)
    chunk = agent.plan(after, noise)
    torch.testing.assert_close(chunk[:, 0, 0], best.detach())


@pytest.mark.parametrize("aggregate", ["mean", "min"])
@pytest.mark.parametrize("name", ["fql", "qc"])
def test_chunks_of_one_have_the_losses_of_fql(name, aggregate):
    """Both agents' against the paper's equations, written out for single actions."""
    agent = make(name, horizon=1, policy="one_step", alpha=3.0, aggregate=aggregate)
    agent.averaged.load_state_dict(make("fql", seed=9).critic.state_dict())
    batch, draws = windows(1), agent.draw(BATCH)
    state, after, action = batch["observation"], batch["next", "observation"], batch["action"][:, 0]
    noise = {name: x.view(BATCH, -1) for name, x in draws.items()}

    def values(critic, observation, chosen):
        return critic.net(torch.cat((observation, chosen), -1)).squeeze(-1)

    def one_step(observation, z):
        return agent.actor.net(torch.cat((observation, z), -1))

    following = values(agent.averaged, after, one_step(after, noise["next"]).clamp(-1, 1))
    following = following.mean(0) if aggregate == "mean" else following.min(0).values
    target = batch["reward"] + batch["discount"] * following
    critic = (values(agent.critic, state, action) - target).square().mean()
    between = (1 - noise["time"]) * noise["imitation"] + noise["time"] * action
    velocity = agent.flow.velocity(state, between, noise["time"])
    cloning = (velocity - (action - noise["imitation"])).square().mean()
    flowed = noise["policy"]
    for step in range(10):
        time = torch.full((BATCH, 1), step / 10)
        flowed = flowed + agent.flow.velocity(state, flowed, time) / 10
    chosen = one_step(state, noise["policy"])
    distance = (chosen - flowed.clamp(-1, 1)).square().mean()
    actor = 3.0 * distance - values(agent.critic, state, chosen.clamp(-1, 1)).mean()
    total, metrics = agent.loss(batch, draws)
    torch.testing.assert_close(total, critic + cloning + actor)
    terms = {"critic": critic, "bc": cloning, "distillation": distance}
    for term, expected in terms.items():
        torch.testing.assert_close(metrics[f"loss/{term}"], expected.detach())


@pytest.mark.parametrize("options", [{"policy": "one_step", "alpha": 3.0}, {"policy": "best_of"}])
def test_fql_and_qc_differ_in_their_defaults_alone(options):
    pair = [make(name, horizon=1, **options) for name in ("fql", "qc")]
    for seed in range(3):
        for agent in pair:
            agent.update(windows(1, seed))
    for a, b in zip(*(agent.parameters() for agent in pair), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("alpha", [30.0, 1e6])
def test_under_a_linear_value_the_policy_leaves_the_flow_by_the_known_distance(alpha):
    """By ``d c / (2 alpha)`` for chunks of d entries: at a large alpha it is the flow itself."""
    agent = make("qc", policy="one_step", alpha=alpha).double()
    slope = torch.linspace(-1, 1, 5 * ACTIONS, dtype=torch.float64).view(5, ACTIONS)

    class Linear(torch.nn.Module):
        def forward(self, observation, action, *, frozen):
            return (slope * action).sum((-2, -1)).expand(2, -1)

    agent.critic = Linear()
    for parameter in agent.flow.parameters():
        parameter.data.mul_(0.3)
    observation, noise = windows(5)["observation"].double(), agent.draw(BATCH)["policy"].double()
    flowed = agent.flow.sample(observation, 0.1 * noise).detach()
    assert flowed.abs().max() < 0.8  # no bound interferes
    best = (flowed + slope.numel() * slope / (2 * alpha)).requires_grad_()
    loss, _ = agent._actor_loss(lambda *_: best, observation, 0.1 * noise)
    (left,) = torch.autograd.grad(loss, best)  # convex, so that there is one place without a slope
    assert left.abs().max() < 1e-9

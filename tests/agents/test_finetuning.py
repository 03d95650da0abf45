"""Agents that finetune a frozen policy: best of N, steering of its noise, and residuals."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict

from genpol import agents
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.offline.settings import NetworkSettings
from genpol.pretrained import PretrainedPolicy

FROZEN = ("best_of_n", "dsrl", "residual")
SMALL = {
    "horizon": 1,
    "solver_steps": 2,
    "batch_size": 64,
    "num_critics": 2,
    "online_warmup_steps": 0,
    "actor": NetworkSettings(hidden=[16], layer_norm="none"),
    "critic": NetworkSettings(hidden=[16]),
}


def make(name, *, observation_dim=1, action_dim=1, **settings):
    specs = Specs(observation_dim=observation_dim, action_dim=action_dim, num_envs=2)
    options = agents.settings_class(name)(**(SMALL | settings))
    agent = agents.make(name, options, specs, seed=0)
    return agent


def still(agent):
    """Make the flow's velocity zero: a chunk is its noise."""
    for parameter in agent.actor.parameters():
        torch.nn.init.zeros_(parameter)
    return agent


class Peak(torch.nn.Module):
    """Critics ``-(a - 0.5)^2`` of single actions."""

    def forward(self, observation, chunk, frozen=False):
        return -(chunk - 0.5).square().sum((-2, -1)).expand(2, *chunk.shape[:-2])


def windows(agent, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows, h = agent.batch_size, agent.settings.horizon
    d, a = agent.specs.observation_dim, agent.specs.action_dim
    return TensorDict(
        {
            "observation": torch.randn(rows, d, generator=draw),
            "action": torch.rand(rows, h, a, generator=draw) * 2 - 1,
            "valid": torch.ones(rows, h, dtype=torch.bool),
            "weight": torch.ones(rows),
            "reward": torch.randn(rows, generator=draw),
            "discount": torch.full((rows,), 0.9),
            "next": TensorDict({"observation": torch.randn(rows, d, generator=draw)}, [rows]),
        },
        [rows],
    )


@pytest.mark.parametrize("name", FROZEN)
def test_the_pretrained_policy_stays_as_it_is(name):
    agent = make(name, horizon=2, action_dim=2)
    before = copy.deepcopy(agent.actor.state_dict())
    critic = copy.deepcopy(agent.critic.state_dict())
    for seed in range(3):
        agent.update(windows(agent, seed))
    assert all(torch.equal(before[k], x) for k, x in agent.actor.state_dict().items())
    assert not all(torch.equal(critic[k], x) for k, x in agent.critic.state_dict().items())


def test_of_n_the_critics_take_their_favourite():
    agent = still(make("best_of_n", best_of=64))
    agent.critic = Peak()
    seen = torch.zeros(100, 1)
    chosen = agent.choose(seen, torch.Generator().manual_seed(0), explore=False)
    assert (chosen - 0.5).abs().mean() < 0.05
    alone = still(make("best_of_n", best_of=1)).choose(
        seen, torch.Generator().manual_seed(0), explore=False
    )
    assert (alone - 0.5).abs().mean() > 0.4


def test_the_target_chooses_with_the_live_critics_and_asks_the_averaged_ones():
    agent = still(make("best_of_n", target_best_of=64))
    agent.critic = Peak()
    found = agent.next_value(torch.zeros(100, 1))
    chunk = torch.full((100, 1, 1), 0.5)
    expected = agent.averaged(torch.zeros(100, 1), chunk).mean(0)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.1)


def test_steering_finds_the_noise_that_leads_to_the_peak():
    agent = still(make("dsrl", bound=2.0, learning_rate=3e-3, critic_learning_rate=3e-3))
    agent.critic = Peak()
    batch = agent.windows(windows(agent))
    batch["observation"] = torch.zeros(64, 1)
    for _ in range(400):
        agent.update_policy(batch, {})
    latent = agent._latent(agent.steering.policy.mode(torch.zeros(1, 1)))
    assert float(latent) == pytest.approx(0.5, abs=0.15)


def test_latent_noise_stays_within_its_bound():
    agent = make("dsrl", bound=0.3, online_warmup_steps=100)
    heard = []
    agent.steer = lambda observation, latent: heard.append(latent) or latent
    for warming_up in (True, False):
        agent._env_steps = 0 if warming_up else 1000
        agent.choose(torch.randn(500, 1), torch.Generator().manual_seed(0), explore=True)
        assert agent.warming_up == warming_up
        assert 0.2 < heard[-1].abs().max() <= 0.3


def test_a_residual_goes_as_far_as_it_may():
    agent = still(make("residual", scale=0.2, learning_rate=1e-2, progress_steps=0))
    agent.critic = Peak()
    agent.correction.log_temperature.data.fill_(-20.0)
    agent.actor.sample = lambda observation, noise: torch.zeros_like(noise)
    batch = agent.windows(windows(agent))
    batch["observation"] = torch.zeros(64, 1)
    for _ in range(300):
        agent.update_policy(batch, {})
    chunk = agent.choose(torch.zeros(1, 1), torch.Generator(), explore=False)
    assert float(chunk) == pytest.approx(0.2, abs=0.03)


def test_corrections_become_the_rule_gradually():
    agent = still(make("residual", progress_steps=100, scale=0.5))
    agent.actor.sample = lambda observation, noise: torch.zeros_like(noise)
    shares = {}
    for step in (0, 50, 200):
        agent._env_steps = step
        chunk = agent.choose(torch.zeros(2000, 1), torch.Generator().manual_seed(0), explore=True)
        shares[step] = float((chunk != 0).float().mean())
    assert shares == {0: 0.0, 50: pytest.approx(0.5, abs=0.05), 200: 1.0}


def test_a_soft_target_pays_for_entropy():
    agent = still(make("residual", progress_steps=0))
    agent.averaged = Peak()
    torch.manual_seed(0)
    with_entropy = agent.next_value(torch.zeros(4000, 1)).mean()
    agent.correction.log_temperature.data.fill_(-50.0)
    without = agent.next_value(torch.zeros(4000, 1)).mean()
    drawn = agent.correction.draw(torch.zeros(4000, 2), agent.generator)
    expected = 0.1 * float(drawn.log_prob.sum(-1).mean())
    assert float(without - with_entropy) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", [*FROZEN, "ogpo"])
def test_a_policy_can_be_given_and_taken(name):
    settings = {"horizon": 2, "normalize_observations": True}
    settings |= {"preset": "ogpo", "policy_batch_size": 8} if name == "ogpo" else {}
    giver, taker = (make(name, observation_dim=3, action_dim=2, **settings) for _ in range(2))
    giver.normalizer.update(torch.randn(50, 3) * 2 + 1)
    for parameter in giver.behaviour.parameters():
        parameter.data.add_(0.01)
    weights, statistics = giver.give_policy()
    policy = PretrainedPolicy(
        model={},
        weights=weights,
        statistics=statistics,
        observation_dim=3,
        action_dim=2,
        action_steps=2,
        env="toy",
        action_repeat=1,
        control_period_s=0.02,
    )
    taker.load_policy(policy)
    taker.check_ready()
    seen, noise = torch.randn(5, 3), torch.randn(5, 2, 2)
    ours = taker.actor.sample(taker.encode(seen), noise)
    theirs = giver.behaviour.sample(giver.encode(seen), noise)
    torch.testing.assert_close(ours, theirs)
    policy.check(taker.specs, 0.02, "toy")
    with pytest.raises(ConfigError, match=r"control period in s of 0.02 \(the environment: 0.05\)"):
        policy.check(taker.specs, 0.05, "toy")


def test_a_policy_of_another_shape_is_refused():
    giver, taker = make("best_of_n", horizon=2), make("best_of_n", horizon=3)
    weights, _ = giver.give_policy()
    from genpol.pretrained import load_model

    with pytest.raises(ConfigError, match="do not fit the model"):
        load_model(taker.actor, weights)

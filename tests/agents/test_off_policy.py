"""SAC and off-policy MDPO as agents (MDPO specification, section 9)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.off_policy import SoftActorCritic

SPECS = Specs(observation_dim=3, action_dim=2, num_envs=1)
SMALL = {"actor_hidden": [16], "critic_hidden": [16], "warmup_steps": 0}


def make(name: str = "sac", seed: int = 0, **settings) -> SoftActorCritic:
    made = agents.make(name, agents.settings_class(name)(**(SMALL | settings)), SPECS, seed=seed)
    assert isinstance(made, SoftActorCritic)
    return made


def transitions(size: int = 32, seed: int = 0) -> TensorDict:
    draw = torch.Generator().manual_seed(seed)
    return TensorDict(
        {
            "observation": torch.randn(size, 3, generator=draw),
            "action": 2 * torch.rand(size, 2, generator=draw) - 1,
            "next": {
                "observation": torch.randn(size, 3, generator=draw),
                "reward": torch.randn(size, 1, generator=draw),
                "terminated": torch.rand(size, 1, generator=draw) < 0.2,
            },
        },
        [size],
    )


def steps(number: int) -> TensorDict:
    return TensorDict({"observation": torch.zeros(1, number, 3)}, [1, number])


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in module.parameters()]


def test_equal_coefficients_make_mdpo_sac():
    """Oracle 6, for whole updates."""
    fixed = {"temperature": 0.3, "learn_temperature": False}
    sac, mdpo = make("sac", **fixed), make("mdpo_off_policy", **fixed, kl_coefficient=0.3)
    for agent in (sac, mdpo):
        agent.observe(steps(1))
        for seed in range(5):
            agent.update(transitions(seed=seed))
    for a, b in zip(sac.parameters(), mdpo.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_large_coefficient_holds_the_policy():
    free, held = (
        make("mdpo_off_policy", kl_coefficient=c, reference_period=10**6, learning_rate=1e-2)
        for c in (0.2, 100.0)
    )
    for agent in (free, held):
        agent.observe(steps(1))
        for seed in range(30):
            metrics = agent.update(transitions(seed=seed))
        agent.last_kl = float(metrics["policy/reference_kl"])
    assert held.last_kl < 0.1 * free.last_kl


def test_the_reference_is_refreshed_every_period():
    """Oracle 11: period 3, equal to the live actor right after steps 0, 3 and 6."""
    agent = make("mdpo_off_policy", reference_period=3)
    for step in range(1, 8):
        before = weights(agent.reference)
        agent.observe(steps(1))
        refreshed = step in (1, 3, 6)
        same_as_live = all(map(torch.equal, weights(agent.reference), weights(agent.actor)))
        unchanged = all(map(torch.equal, weights(agent.reference), before))
        assert same_as_live == refreshed
        assert refreshed or unchanged
        agent.update(transitions(seed=step))


def test_the_value_network_learns_value_plus_entropy():
    """Oracle 9: with constant critics Q = 3, V tends to 3 + lambda H(pi)."""
    agent = make(
        "mdpo_off_policy",
        critic="v",
        critic_learning_rate=3e-2,
        temperature=0.5,
        learning_rate=1e-9,
    )
    assert agent.values is not None
    batch = transitions(256)
    batch["observation"].zero_()
    with torch.no_grad():
        for parameter in agent.critics.parameters():
            parameter.zero_()
        agent.critics.biases[-1].fill_(3.0)
    frozen = copy.deepcopy(agent.critics.state_dict())
    recent = []
    for step in range(600):
        agent.critics.load_state_dict(frozen)
        metrics = agent.update(batch)
        if step >= 300:
            value = agent.values(torch.zeros(1, 3)).squeeze().detach()
            recent.append(torch.stack((value, 3.0 + 0.5 * metrics["policy/entropy"])))
    value, expected = torch.stack(recent).mean(0)
    torch.testing.assert_close(value, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("critic", ["q", "v"])
def test_one_update_moves_what_it_should(critic):
    agent = make("sac", critic=critic)
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    agent.update(transitions())
    moved = {name for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    parts = {name.split(".")[0] for name in moved}
    live = {"policy", "critics", "averaged", "log_temperature"}
    assert parts == live | ({"values"} if critic == "v" else set())


def test_critic_loss_reaches_neither_actor_nor_average():
    agents_by_reward = []
    for factor in (1.0, 100.0):
        agent, batch = make("sac"), transitions()
        batch["next", "reward"] *= factor
        agent.update(batch)
        agents_by_reward.append(agent)
    a, b = agents_by_reward
    assert all(map(torch.equal, a.actor.parameters(), b.actor.parameters()))
    assert not all(map(torch.equal, a.critics.parameters(), b.critics.parameters()))
    assert not any(x.requires_grad for x in a.averaged.parameters())
    assert all(x.requires_grad for x in a.critics.parameters())


def test_the_average_moves_by_its_share():
    agent = make("sac", polyak=0.25)
    before = weights(agent.averaged)
    agent.update(transitions())
    for old, now, live in zip(before, weights(agent.averaged), weights(agent.critics), strict=True):
        torch.testing.assert_close(now, old + 0.25 * (live - old))


def test_warmup_is_uniform_and_without_updates():
    agent = make("sac", warmup_steps=10, updates_per_step=0.5)
    observation = TensorDict({"observation": torch.randn(4000, 3)}, [4000])
    with set_exploration_type(ExplorationType.RANDOM):
        action = agent.policy(observation)["action"]
    assert action.square().mean() == pytest.approx(1 / 3, abs=0.02)
    assert agent.observe(steps(10)) == 0
    assert agent.policy.warming_up
    assert [agent.observe(steps(1)) for _ in range(4)] == [0, 1, 0, 1]
    assert not agent.policy.warming_up


def test_evaluation_takes_the_mode():
    agent = make("sac", warmup_steps=10)
    observation = torch.randn(4, 3)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = agent.policy(TensorDict({"observation": observation}, [4]))["action"]
    torch.testing.assert_close(action, agent.actor.mode(observation))


def test_a_coefficient_below_the_temperature_is_refused():
    with pytest.raises(ConfigError, match=r"agent.kl_coefficient = 0.1: must be at least"):
        make("mdpo_off_policy", kl_coefficient=0.1)


def test_the_coefficient_keeps_its_ratio_to_a_learned_temperature():
    agent = make("mdpo_off_policy", learn_temperature=True, temperature=0.2, kl_coefficient=0.5)
    with torch.no_grad():
        agent.log_temperature.fill_(math.log(0.02))
    torch.testing.assert_close(agent.kl_coefficient, torch.tensor(0.05))


def test_the_coefficient_stays_where_the_temperature_does():
    agent = make("mdpo_off_policy", temperature=0.0, kl_coefficient=0.5)
    assert agent.kl_coefficient == 0.5


def test_with_a_small_gain_the_actor_begins_in_the_middle():
    far = 50.0 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert make("mdpo_off_policy").actor.mode(far).abs().mean() > 0.8
    assert make("mdpo_off_policy", actor_gain=1e-3).actor.mode(far).abs().max() < 0.3

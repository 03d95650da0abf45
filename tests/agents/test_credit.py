"""Advantages of groups, of several rewards and of episode returns; PIPO and CAPO in the learner."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.agents.bpo import Settings as BPOAgentSettings
from genpol.agents.ppo import Settings
from genpol.errors import ConfigError
from genpol.objectives.advantages import dvao, gae, gdpo
from genpol.on_policy.credit import Credit
from genpol.on_policy.masks import CAPOSettings
from genpol.on_policy.pipo import PIPO, PIPOSettings
from genpol.on_policy.settings import RiskSettings
from genpol.on_policy.surrogate_settings import BPOSettings

ENVS, STEPS = 4, 6
GROUPS = Specs(observation_dim=3, action_dim=2, num_envs=ENVS, group_size=4, group_steps=STEPS)


def batch(reward, done=None, diverged=None):
    """Return a rollout with the given rewards ``[num_envs, time, R]``."""
    no = torch.zeros(*reward.shape[:2], 1, dtype=torch.bool)
    done = no if done is None else done.unsqueeze(-1)
    after = {
        "reward": reward,
        "done": done,
        "terminated": done.clone(),
        "diverged": no.clone() if diverged is None else diverged.unsqueeze(-1),
    }
    return TensorDict({"next": TensorDict(after, reward.shape[:2])}, reward.shape[:2])


def worth(settings, specs, rollout, value=None):
    value = torch.zeros(*rollout.shape, 1) if value is None else value
    return Credit(settings, specs)(rollout, value, torch.zeros_like(value))


# --- groups ------------------------------------------------------------------------------------


def group_settings(**more):
    return BPOAgentSettings(
        advantage="group", rollout_steps=STEPS, gamma=1.0, reward_scale=1.0, minibatches=2, **more
    )


def test_group_bpo_moves_towards_the_released_targets():
    # Returns (1, 1, 1, 0) and (1, 1, 0, 0): oracle 11 of the paper's released code.
    from genpol.objectives.bpo import bpo_target

    for returns, expected in [
        ((1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.7)),
        ((1.0, 1.0, 0.0, 0.0), (1.3, 1.3, 0.7, 0.7)),
    ]:
        reward = torch.zeros(ENVS, STEPS, 1)
        reward[:, -1, 0] = torch.tensor(returns)
        found = worth(group_settings(), GROUPS, batch(reward))
        target = bpo_target(found.centred, low=0.7, high=1.3, temperature=1e-4)
        torch.testing.assert_close(target[:, 0], torch.tensor(expected), atol=1e-4, rtol=0)
        assert torch.equal(target[:, 0], target[:, -1])


def test_a_groups_return_ends_with_the_first_episode():
    reward = torch.zeros(ENVS, STEPS, 1)
    reward[0, 2] = 1.0
    reward[1, 4] = 100.0  # behind the end
    done = torch.zeros(ENVS, STEPS, dtype=torch.bool)
    done[1, 3] = True
    found = worth(group_settings(), GROUPS, batch(reward, done))
    returns = torch.tensor([1.0, 0.0, 0.0, 0.0])
    expected = (returns - returns.mean()) / (returns.std() + 1e-6)
    torch.testing.assert_close(found.advantage[:, 0], expected)
    assert found.valid[1].tolist() == [True] * 4 + [False] * 2


def test_a_diverged_member_says_nothing_of_its_group():
    reward = torch.zeros(ENVS, STEPS, 1)
    reward[0, 0], reward[3, 0] = 1.0, 1e6
    diverged = torch.zeros(ENVS, STEPS, dtype=torch.bool)
    diverged[3, 1] = True
    found = worth(group_settings(), GROUPS, batch(reward, diverged.clone(), diverged))
    assert not found.valid[3].any()
    assert found.advantage[:3, 0].sum().abs() < 1e-5
    assert found.advantage[0, 0] == found.advantage.max()


def test_groups_need_an_environment_that_forms_them():
    lonely = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
    with pytest.raises(ConfigError, match=f"env.group_steps={STEPS}"):
        Credit(group_settings(), lonely)


def test_group_bpo_learns_without_a_critic():
    settings = group_settings(bpo=BPOSettings(temperature=1e-4), learning_rate=1e-2)
    agent = agents.make("bpo", settings, GROUPS, seed=0)
    observation = torch.zeros(ENVS, STEPS, 3)
    critic = [p.clone() for p in agent.learner.actor_critic.critic.parameters()]
    for _ in range(60):
        rollout = TensorDict({"observation": observation}, [ENVS, STEPS])
        with set_exploration_type(ExplorationType.RANDOM):
            agent.policy(rollout)
        reward = -(rollout["action"] - 0.5).square().sum(-1, keepdim=True)
        rollout["next"] = batch(reward)["next"]
        rollout["next", "observation"] = observation
        agent.update(rollout)
    mean, _ = agent.policy.encoder(torch.zeros(1, 3))
    assert torch.tanh(mean).sub(0.5).abs().max() < 0.2
    after = agent.learner.actor_critic.critic.parameters()
    assert all(torch.equal(x, y) for x, y in zip(critic, after, strict=True))


# --- several rewards ---------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["gdpo", "dvao"])
def test_terms_have_advantages_of_their_own(combine):
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS, num_rewards=2)
    settings = Settings(combine=combine, reward_weights=[1.0, 3.0], reward_scale=1.0)
    reward, value = torch.randn(ENVS, STEPS, 2), torch.randn(ENVS, STEPS, 2)
    rollout = batch(reward)
    found = worth(settings, specs, rollout, value)
    no = torch.zeros(ENVS, STEPS, dtype=torch.bool)
    streams = torch.stack(
        [
            gae(reward[..., k], value[..., k], torch.zeros(ENVS, STEPS), no, no, 0.99, 0.95)[0]
            for k in range(2)
        ]
    ).flatten(1)
    combined = {"gdpo": gdpo, "dvao": dvao}[combine](streams, [1.0, 3.0])
    torch.testing.assert_close(found.advantage.flatten(), combined)
    assert found.target.shape == (ENVS, STEPS, 2)


@pytest.mark.parametrize("combine", ["gdpo", "dvao"])
def test_a_diverged_step_has_no_say_in_the_scale_of_terms(combine):
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(ENVS, STEPS, 2, generator=draw)
    settings = Settings(rollout_steps=STEPS, combine=combine, gamma=0.0)
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS, num_rewards=2)
    zeros = torch.zeros(ENVS, STEPS, 2)
    diverged = torch.zeros(ENVS, STEPS, dtype=torch.bool)
    diverged[:2] = True
    found = worth(settings, specs, batch(rewards, diverged=diverged), zeros)
    half = Specs(observation_dim=3, action_dim=2, num_envs=2, num_rewards=2)
    expected = worth(settings, half, batch(rewards[2:]), zeros[2:])
    torch.testing.assert_close(found.advantage[2:], expected.advantage)


def test_one_term_is_normalised_however_terms_are_combined():
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
    for combine in ("sum", "dvao"):
        settings = Settings(rollout_steps=STEPS, minibatches=1, combine=combine)
        assert agents.make("ppo", settings, specs, seed=0).learner._normalizes


def test_a_sum_of_terms_is_learned_from_as_one_reward():
    two = Specs(observation_dim=3, action_dim=2, num_envs=ENVS, num_rewards=2)
    one = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
    reward = torch.randn(ENVS, STEPS, 2)
    apart = worth(Settings(reward_weights=[1.0, 3.0]), two, batch(reward))
    summed = worth(Settings(), one, batch(reward[..., :1] + 3 * reward[..., 1:]))
    torch.testing.assert_close(apart.advantage, summed.advantage)


def test_weights_must_fit_the_terms():
    with pytest.raises(ConfigError, match="reward_weights = "):
        Credit(
            Settings(reward_weights=[1.0, 1.0]),
            Specs(observation_dim=3, action_dim=2, num_envs=ENVS),
        )


# --- risk --------------------------------------------------------------------------------------


def test_risk_weighs_the_tail_of_episodes_and_is_centred():
    specs = Specs(observation_dim=3, action_dim=2, num_envs=6)
    credit = Credit(Settings(risk=RiskSettings(coefficient=1.0)), specs)
    done = torch.ones(6, 2, dtype=torch.bool)
    reward = torch.arange(6.0)[:, None, None].expand(6, 2, 1)
    value = torch.zeros(6, 2, 1)
    first = credit(batch(reward.clone(), done), value, value)
    returns = torch.arange(6.0)  # the first episode of each environment does not count
    low, high = returns.quantile(0.2), returns.quantile(0.8)
    middle = (returns.clamp(low, high) - high) / 0.6
    measure = (1.5 * -(low - returns).clamp_min(0) / 0.2 + middle) / 2.5
    expected = (measure - measure.mean()) / returns.std(correction=0)
    assert first.risk[:, 0].abs().max() == 0
    torch.testing.assert_close(first.risk[:, 1], expected)


# --- PIPO --------------------------------------------------------------------------------------


def test_pipo_compares_with_the_rollouts_of_late():
    pipo = PIPO(PIPOSettings(enabled=True, window=4, min_episodes=1, gate=0.0, maximum=10.0))
    for mean in (0.5, 0.6, 0.4, 0.5):
        assert pipo.judge(torch.tensor([mean], dtype=torch.float64)) == 0
    better = pipo.judge(torch.tensor([0.62], dtype=torch.float64))
    assert float(better) == pytest.approx(1.69706, abs=1e-4)


def test_pipo_ignores_rollouts_with_too_few_episodes():
    pipo = PIPO(PIPOSettings(enabled=True, window=2, min_episodes=3))
    for _ in range(5):
        assert pipo.judge(torch.tensor([1.0, 2.0])) == 0
    assert pipo.state()["history"] == []


def learning_rollout(agent, reward_of):
    observation = torch.randn(ENVS, STEPS, 3)
    rollout = TensorDict({"observation": observation}, [ENVS, STEPS])
    with set_exploration_type(ExplorationType.RANDOM):
        agent.policy(rollout)
    done = torch.ones(ENVS, STEPS, dtype=torch.bool)
    rollout["next"] = batch(reward_of(rollout["action"]), done)["next"]
    rollout["next", "observation"] = observation
    return rollout


@pytest.mark.parametrize(("multiplier", "direction"), [(1.0, 1), (-1.0, -1)])
def test_pipo_repeats_or_undoes_the_update_before(multiplier, direction):
    settings = Settings(
        rollout_steps=STEPS,
        minibatches=1,
        epochs=1,
        prior="none",
        pipo=PIPOSettings(enabled=True, window=2, min_episodes=1),
    )
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
    agent = agents.make("ppo", settings, specs, seed=0)
    learner = agent.learner
    agent.update(learning_rollout(agent, lambda action: action[..., :1]))
    rows = dict(learner._pipo.previous)

    def gain():
        log_prob = learner._likelihood.evaluate(rows).log_prob.detach()
        return float(((rows["advantage"] - rows["advantage"].mean()) * log_prob).mean())

    before = gain()
    learner._pipo.judge = lambda returns: torch.tensor(multiplier)
    learner._correct_previous(learner._pipo, rows, torch.empty(0))
    assert (gain() - before) * direction > 1e-6


def test_pipo_has_nothing_to_correct_in_a_rollout_that_diverged_everywhere():
    settings = Settings(
        rollout_steps=STEPS, minibatches=1, pipo=PIPOSettings(enabled=True, min_episodes=1)
    )
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
    agent = agents.make("ppo", settings, specs, seed=0)
    agent.learner._pipo.judge = lambda returns: torch.tensor(1.0)
    for diverged in (True, False):
        rollout = learning_rollout(agent, lambda action: action[..., :1])
        rollout["next", "diverged"].fill_(diverged)
        agent.update(rollout)


def test_pipo_and_risk_weigh_the_terms_of_the_reward():
    settings = Settings(
        rollout_steps=STEPS,
        combine="gdpo",
        reward_weights=[1.0, 0.0],
        pipo=PIPOSettings(enabled=True, min_episodes=1),
    )
    reward = torch.tensor([1.0, 100.0]).expand(ENVS, STEPS, 2)
    every_second = (torch.arange(STEPS) % 2 == 1).expand(ENVS, STEPS)
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS, num_rewards=2)
    found = worth(settings, specs, batch(reward, every_second), torch.zeros(ENVS, STEPS, 2))
    assert found.returns.tolist() == [2.0] * 2 * ENVS  # the first episode of each does not count


def test_pipo_scales_what_it_repeats_within_groups():
    rewards = torch.zeros(ENVS, STEPS, 1)
    rewards[:, 0, 0] = torch.tensor([0.0, 0.0, 0.0, 4.0])
    found = worth(group_settings(), GROUPS, batch(rewards))
    expected = torch.tensor([-1.0, -1.0, -1.0, 3.0]) / 1.5  # A / mean |A|
    torch.testing.assert_close(found.feedback, expected[:, None].expand(ENVS, STEPS))


# --- CAPO --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bound", "masked"), [(1e-12, 1.0), (1e6, 0.0)])
def test_capo_leaves_out_rows_that_would_go_too_far(bound, masked):
    settings = Settings(
        rollout_steps=STEPS,
        minibatches=1,
        epochs=2,
        prior="none",
        capo=CAPOSettings(enabled=True, max_kl=bound),
    )
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
    agent = agents.make("ppo", settings, specs, seed=0)

    def first(action):
        return action[..., :1]

    agent.update(learning_rollout(agent, first))  # before it Adam has no moments to plan with
    metrics = agent.update(learning_rollout(agent, first))
    assert float(metrics["policy/masked"]) == pytest.approx(masked)


def test_capo_needs_a_network_that_gives_the_scale():
    with pytest.raises(ConfigError, match=r"set agent\.state_dependent_scale=true"):
        Settings(capo=CAPOSettings(enabled=True), state_dependent_scale=False)


def test_capo_takes_its_bound_from_the_first_rollouts():
    settings = Settings(
        rollout_steps=STEPS,
        minibatches=1,
        prior="none",
        capo=CAPOSettings(enabled=True, calibration_rollouts=2),
    )
    specs = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
    agent = agents.make("ppo", settings, specs, seed=0)
    for _ in range(2):
        assert agent.learner.state()["likelihood"]["bound"] == 0.0
        agent.update(learning_rollout(agent, lambda action: action[..., :1]))
    assert agent.learner.state()["likelihood"]["bound"] > 0.0

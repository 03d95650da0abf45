"""Every option of the on-policy learner has the effect that its help states."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.agents.ppo import Settings
from genpol.on_policy import DecodedPolicy, Encoder, gaussian_learner
from genpol.policies.latent import IdentityDecoder

ENVS, STEPS = 4, 6
# Where episodes end: nowhere, terminated, truncated, and both kinds one after the other.
TERMINATED = [(1, 2), (3, 0)]
TRUNCATED = [(2, 3), (3, 1), (3, 4)]

SPECS = Specs(observation_dim=3, action_dim=2, num_envs=8)


def learner_of(encoder, settings, generator):
    return gaussian_learner(encoder, settings, specs=SPECS, generator=generator)


def make_learner(settings, *, init="fresh"):
    generator = torch.Generator().manual_seed(0)
    encoder = Encoder(3, 2, settings, generator=generator, init=init)
    # A critic that starts at zero would hide whose value an advantage takes.
    encoder.critic.linears[-1].weight.data.normal_(generator=generator)
    policy = DecodedPolicy(encoder, IdentityDecoder(), generator=generator)
    return learner_of(encoder, settings, generator), policy


def rollout(policy, *, ends=True):
    """Return a batch whose true next observation differs from the next row where episodes end."""
    draw = torch.Generator().manual_seed(1)
    observation = torch.randn(ENVS, STEPS, 3, generator=draw)
    batch = TensorDict({"observation": observation}, [ENVS, STEPS])
    with set_exploration_type(ExplorationType.RANDOM):
        policy(batch)
    flags = torch.zeros(2, ENVS, STEPS, 1, dtype=torch.bool)
    if ends:
        for flag, places in zip(flags, (TERMINATED, TRUNCATED), strict=True):
            for place in places:
                flag[place] = True
    done = flags.any(0)
    last = torch.randn(ENVS, STEPS, 3, generator=draw)
    following = torch.cat([observation[:, 1:], last[:, -1:]], dim=1)
    after = {
        "observation": torch.where(done, last, following),
        "reward": torch.randn(ENVS, STEPS, 1, generator=draw),
        "done": done,
        "terminated": flags[0],
        "truncated": flags[1],
        "diverged": torch.zeros_like(done),
    }
    batch["next"] = TensorDict(after, [ENVS, STEPS])
    return batch


def prepared(settings):
    """Return a rollout, values of its observations and true next ones, and the learner's rows."""
    learner, policy = make_learner(settings)
    policy.encoder.normalizer.update(5 * torch.randn(50, 3, generator=learner._generator) + 1)
    batch = rollout(policy)
    with torch.no_grad():
        values = policy.encoder.value(batch["observation"]).squeeze(-1).double()
        next_values = policy.encoder.value(batch["next", "observation"]).squeeze(-1).double()
    rows, _, _ = learner._prepare(batch)
    return batch, values, next_values, {name: x.view(ENVS, STEPS, -1) for name, x in rows.items()}


def lambda_advantage(settings, batch, values, next_values, env, step):
    """Mix the advantages of all n-step returns from one step on; a definition, no recursion."""
    steps_left = next(
        (n + 1 for n in range(STEPS - step) if batch["next", "done"][env, step + n]), STEPS - step
    )
    total, n_step_return, gamma, lam = 0.0, 0.0, settings.gamma, settings.gae_lambda
    for n in range(steps_left):
        at = (env, step + n)
        n_step_return += gamma**n * settings.reward_scale * batch["next", "reward"][at].item()
        alive = not batch["next", "terminated"][at]
        bootstrap = gamma ** (n + 1) * next_values[at].item() * alive
        weight = lam**n * (1 - lam) if n < steps_left - 1 else lam**n
        total += weight * (n_step_return + bootstrap - values[env, step].item())
    return total


def test_advantages_bootstrap_from_the_true_last_observation():
    settings = Settings(gamma=0.9, gae_lambda=0.7)
    batch, values, next_values, rows = prepared(settings)
    expected = torch.tensor(
        [
            [lambda_advantage(settings, batch, values, next_values, i, t) for t in range(STEPS)]
            for i in range(ENVS)
        ]
    )
    torch.testing.assert_close(rows["advantage"].squeeze(-1), expected, atol=1e-5, rtol=1e-5)
    target = expected + values.float()
    torch.testing.assert_close(rows["target"].squeeze(-1), target, atol=1e-5, rtol=1e-5)


def test_brax_advantages_drop_truncated_steps_and_the_first_lambda():
    settings = Settings(gamma=0.9, gae_lambda=0.7, advantage="brax")
    batch, values, next_values, rows = prepared(settings)
    expected, target = torch.zeros(ENVS, STEPS), torch.zeros(ENVS, STEPS)
    for env in range(ENVS):
        error, following = 0.0, next_values[env, -1].item()  # e_U = 0 and vs_U = V_U
        for step in reversed(range(STEPS)):
            at = (env, step)
            keep = 1.0 - batch["next", "truncated"][at].item()
            gamma = settings.gamma * (1 - batch["next", "terminated"][at].item())
            reward = settings.reward_scale * batch["next", "reward"][at].item()
            value, next_value = values[at].item(), next_values[at].item()
            expected[at] = keep * (reward + gamma * following - value)
            delta = keep * (reward + gamma * next_value - value)
            error = delta + gamma * settings.gae_lambda * keep * error
            following = target[at] = value + error
    torch.testing.assert_close(rows["advantage"].squeeze(-1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows["target"].squeeze(-1), target, atol=1e-5, rtol=1e-5)


def test_rewards_reach_the_critic_scaled():
    # Without discount and decay, and with a critic of zeros, targets are sums of scaled rewards.
    settings = Settings(gamma=1.0, gae_lambda=1.0, reward_scale=0.25)
    learner, policy = make_learner(settings)
    policy.encoder.critic.linears[-1].weight.data.zero_()
    batch = rollout(policy, ends=False)
    rows, _, _ = learner._prepare(batch)
    expected = 0.25 * batch["next", "reward"].squeeze(-1).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(rows["target"].view(ENVS, STEPS), expected)


def test_the_logged_value_is_in_units_of_the_reward():
    settings = Settings(reward_scale=0.25)
    learner, policy = make_learner(settings)
    batch = rollout(policy)
    scaled = policy.encoder.value(batch["observation"]).squeeze(-1).mean().item()
    assert learner._prepare(batch)[2]["value/mean"].item() == pytest.approx(scaled / 0.25)


@pytest.mark.parametrize(("normalizer", "shrinks"), [("exact", False), ("released", True)])
def test_the_released_merge_of_statistics_shrinks_their_deviation(normalizer, shrinks):
    learner, policy = make_learner(Settings(normalizer=normalizer, epochs=1, minibatches=1))
    batch = rollout(policy)
    for _ in range(4):
        learner.update(batch.clone())
    ratio = policy.encoder.normalizer.std / batch["observation"].view(-1, 3).std(0, correction=0)
    assert ratio.tolist() == pytest.approx([0.5 if shrinks else 1.0] * 3, rel=1e-3)


def gradient_without_advantage(settings, *, mean=0.0, rows=8):
    """Return the actor's parameters, with the loss's gradient where all advantages are zero.

    At ratio one the surrogate has no gradient then: what is left is that of entropy and prior.
    """
    learner, policy = make_learner(settings)
    last = policy.encoder.actor.net.linears[-1]
    last.bias.data[:2] += mean
    observation = torch.randn(rows, 3, generator=torch.Generator().manual_seed(2))
    batch = TensorDict({"observation": observation}, [rows])
    with set_exploration_type(ExplorationType.RANDOM):
        policy(batch)
    actor = copy.deepcopy(policy.encoder.actor)
    zero = torch.zeros(rows)
    learner._step(
        {
            "observation": observation,
            "latent": batch["latent"],
            "log_prob": batch["latent_log_prob"],
            "advantage": zero,
            "target": zero[:, None],
        }
    )
    with torch.no_grad():
        return last.bias.grad, *actor.at_normalized(observation)


UNCLIPPED = {"max_grad_norm": 1e6, "minibatches": 1}


@pytest.mark.parametrize(
    ("settings", "coefficient"),
    [({}, 1e-2), ({"prior_coefficient": 0.3}, 0.3)],
    ids=["default", "given"],
)
def test_the_prior_pulls_the_actor_towards_the_standard_normal(settings, coefficient):
    # Of KL = sum (mu^2 + sigma^2 - 1) / 2 - log sigma; sigma = softplus(raw) + 1e-3.
    gradient, mean, scale = gradient_without_advantage(Settings(**UNCLIPPED, **settings), mean=0.5)
    slope = 1 - torch.exp(-(scale - 1e-3))
    expected = torch.cat([mean.mean(0), ((scale - 1 / scale) * slope).mean(0)])
    torch.testing.assert_close(gradient, coefficient * expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("gain", [1.0, 3.0])
def test_squashed_entropy_pulls_the_mean_out_of_saturation(gain):
    # d/dmu of -c E log(1 - tanh(g x)^2) is 2 c g E tanh(g x), x ~ N(mu, sigma^2); the Gaussian's
    # own entropy does not depend on mu.
    settings = Settings(
        **UNCLIPPED,
        entropy_coefficient=0.1,
        squashed_entropy=True,
        action_gain=gain,
        prior="none",
        actor_hidden=[8],
    )
    gradient, mean, scale = gradient_without_advantage(settings, mean=1.0, rows=20_000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    squashed = torch.tanh(gain * (mean[..., None] + scale[..., None] * nodes)) @ weights
    expected = 2 * 0.1 * gain * squashed.mean(0)
    assert expected.min() > 0.05
    torch.testing.assert_close(gradient[:2].double(), expected, atol=0, rtol=0.03)


def test_plain_entropy_leaves_the_mean_alone():
    settings = Settings(**UNCLIPPED, entropy_coefficient=0.1, prior="none")
    gradient, _, scale = gradient_without_advantage(settings, mean=1.0)
    assert gradient[:2].abs().max() < 1e-7
    slope = 1 - torch.exp(-(scale - 1e-3))
    torch.testing.assert_close(gradient[2:], -0.1 * (slope / scale).mean(0), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("name", ["ppo", "gorl"])
def test_action_gain_widens_the_action_before_the_squash(name):
    agent = agents.make(name, agents.settings_class(name)(action_gain=3.0), SPECS, seed=0)
    out = agent.policy(TensorDict({"observation": torch.randn(5, 3)}, [5]))
    torch.testing.assert_close(out["action"], torch.tanh(3.0 * out["latent"]))

"""PPO on latents: ratios, gradients and equilibria (GoRL specification, section 9)."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.agents.gorl import Settings as GoRLSettings
from genpol.agents.ppo import Settings as PPOSettings
from genpol.errors import ConfigError
from genpol.objectives.surrogates import ppo_clip
from genpol.on_policy import DecodedPolicy, Encoder, gaussian_learner
from genpol.on_policy.surrogate_settings import BPOSettings, MDPOSettings
from genpol.on_policy.surrogates import SURROGATES
from genpol.policies.gaussian import gaussian_kl, log_prob
from genpol.policies.latent import IdentityDecoder

SPECS = Specs(observation_dim=3, action_dim=2, num_envs=8)


def learner_of(encoder, settings, generator):
    return gaussian_learner(encoder, settings, specs=SPECS, generator=generator)


def make_policy(settings=None, *, init="fresh", decoder=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(3, 2, settings or PPOSettings(), generator=generator, init=init)
    return DecodedPolicy(encoder, decoder or IdentityDecoder(), generator=generator), generator


def rollout(policy, *, envs=8, steps=6, seed=1, reward=None, diverged=None):
    """Return a batch ``[envs, steps]`` of made-up transitions with the policy's own latents."""
    draw = torch.Generator().manual_seed(seed)
    observation = torch.randn(envs, steps + 1, 3, generator=draw)
    batch = TensorDict({"observation": observation[:, :-1]}, [envs, steps])
    with set_exploration_type(ExplorationType.RANDOM):
        policy(batch)
    if reward is None:
        reward = torch.randn(envs, steps, 1, generator=draw)
    flag = torch.zeros(envs, steps, 1, dtype=torch.bool)
    batch["next"] = TensorDict(
        {
            "observation": observation[:, 1:],
            "reward": reward,
            "done": flag,
            "terminated": flag,
            "truncated": flag,
            "diverged": flag if diverged is None else diverged,
        },
        [envs, steps],
    )
    return batch


def test_first_ratio_is_one_even_after_statistics_changed():
    # One minibatch of one pass sees the weights that acted; clipping and divergence must be nil.
    policy, generator = make_policy()
    settings = PPOSettings(epochs=1, minibatches=1)
    learner = learner_of(policy.encoder, settings, generator)
    learner.update(rollout(policy))
    metrics = learner.update(rollout(policy, seed=2))
    assert metrics["policy/approx_kl"].abs() < 1e-6
    assert metrics["policy/clip_fraction"] == 0
    assert (metrics["policy/ratio_max"] - 1).abs() < 1e-5


def test_ratio_leaves_one_after_a_step():
    policy, generator = make_policy()
    settings = PPOSettings(epochs=4, minibatches=2, learning_rate=1e-2)
    metrics = learner_of(policy.encoder, settings, generator).update(rollout(policy))
    assert metrics["policy/approx_kl"] > 1e-5


def test_log_prob_does_not_depend_on_the_decoder():
    class Affine(nn.Module):
        def sample(self, observation, noise):
            return 3.0 * noise - 1.0

    plain, _ = make_policy()
    mapped, _ = make_policy(decoder=Affine())
    observation = TensorDict({"observation": torch.randn(5, 3)}, [5])
    with set_exploration_type(ExplorationType.RANDOM):
        a, b = plain(observation.clone()), mapped(observation.clone())
    assert torch.equal(a["latent"], b["latent"])
    assert torch.equal(a["latent_log_prob"], b["latent_log_prob"])
    assert torch.allclose(b["action"], torch.tanh(3.0 * a["latent"] - 1.0))


def test_deterministic_action_is_the_decoded_mean():
    policy, _ = make_policy()
    observation = TensorDict({"observation": torch.randn(5, 3)}, [5])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        out = policy(observation)
    mean, _ = policy.encoder(out["observation"])
    assert torch.equal(out["action"], torch.tanh(mean))


def test_no_gradient_reaches_the_decoder():
    decoder = agents.make("gorl", GoRLSettings(), SPECS, seed=0).make_decoder()
    policy, generator = make_policy(decoder=decoder)
    before = copy.deepcopy(decoder.state_dict())
    learner_of(policy.encoder, PPOSettings(), generator).update(rollout(policy))
    after = decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_score_function_gradient_matches_the_closed_form():
    # r = -(w z - 1)^2 with a frozen linear decoder: dJ/dmu = -2 w (w mu - 1).
    w, mu, sigma = 0.7, 0.3, 0.5
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, generator=generator, dtype=torch.float64)
    z = mu + sigma * noise
    advantage = -((w * z - 1) ** 2) + (w * mu - 1) ** 2
    estimate = (advantage * noise / sigma).mean()
    mean = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
    scale = torch.full((len(z), 1), sigma, dtype=torch.float64)
    new = log_prob(mean.expand(len(z), 1), scale, z[:, None])
    loss = ppo_clip(new - new.detach(), advantage, clip_low=0.2, clip_high=0.2)
    loss.mean().backward()
    expected = -2 * w * (w * mu - 1)
    assert -mean.grad.item() == pytest.approx(estimate.item(), rel=1e-9)
    assert -mean.grad.item() == pytest.approx(expected, abs=0.01)


def test_ridge_and_entropy_settle_at_the_predicted_scale():
    # sigma^2 = c_H d_z / (2 lambda_z): 4.47 for d_z = 4, c_H = 0.01, lambda_z = 1e-3.
    generator = torch.Generator().manual_seed(0)
    settings = PPOSettings(
        entropy_coefficient=0.01,
        prior="ridge",
        prior_coefficient=1e-3,
        epochs=1,
        minibatches=1,
        learning_rate=0.05,
        target_kl=0.0,
        actor_hidden=[8],
    )
    encoder = Encoder(3, 4, settings, generator=generator, init="gaussian")
    policy = DecodedPolicy(encoder, IdentityDecoder(), generator=generator)
    learner = learner_of(encoder, settings, generator)
    observation = torch.randn(64, 3, generator=generator)
    for _ in range(500):
        mean, scale = encoder(observation)
        rows = TensorDict({"observation": observation}, [64])
        policy(rows)
        zero = torch.zeros(64)
        learner._step(
            {
                "observation": observation,
                "latent": rows["latent"],
                "log_prob": rows["latent_log_prob"],
                "advantage": zero,
                "target": zero[:, None],
            }
        )
    assert scale.mean().item() == pytest.approx(4.472, abs=0.05)
    assert mean.abs().max() < 0.05


def test_diverged_transitions_teach_nothing():
    # Whatever reward stands in a diverged row, the update is the same.
    diverged = torch.zeros(8, 6, 1, dtype=torch.bool)
    diverged[2, 5] = True
    settings = PPOSettings(epochs=2, minibatches=2, gae_lambda=0.0)
    results = []
    for value in (0.0, 1e6):
        policy, generator = make_policy()
        learner = learner_of(policy.encoder, settings, generator)
        reward = torch.ones(8, 6, 1)
        reward[2, 5] = value
        learner.update(rollout(policy, reward=reward, diverged=diverged))
        results.append(policy.encoder.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("advantage", ["gae", "brax"])
@pytest.mark.parametrize("prior", ["ridge", "kl", "none"])
def test_every_option_gives_finite_updates(advantage, prior):
    settings = PPOSettings(
        advantage=advantage, prior=prior, entropy_coefficient=0.01, squashed_entropy=True
    )
    policy, generator = make_policy(settings)
    metrics = learner_of(policy.encoder, settings, generator).update(rollout(policy))
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in metrics.values())


def test_step_size_follows_the_divergence():
    policy, generator = make_policy()
    settings = PPOSettings(target_kl=0.5, epochs=1, minibatches=1)
    learner = learner_of(policy.encoder, settings, generator)
    metrics = learner.update(rollout(policy))  # one step from ratio one: far below the target
    assert metrics["policy/learning_rate"] == pytest.approx(1.5e-3)


def test_without_reward_exploration_stays_as_it_is():
    # Adam knows no scale: the prior's gradient alone would shrink sigma within a few updates.
    settings = PPOSettings(prior="ridge", prior_coefficient=2e-3, minibatches=2)
    policy, generator = make_policy(settings, init="gaussian")
    learner = learner_of(policy.encoder, settings, generator)
    for seed in range(10):
        metrics = learner.update(rollout(policy, seed=seed, reward=torch.zeros(8, 6, 1)))
    _, scale = policy.encoder(torch.randn(20, 3))
    assert torch.allclose(scale, torch.ones_like(scale), atol=1e-4)
    assert metrics["policy/learning_rate"] == pytest.approx(settings.learning_rate)


def test_too_few_rows_for_the_minibatches_are_refused():
    with pytest.raises(ConfigError, match=r"agent\.minibatches = 16: a rollout has only 8 rows"):
        agents.make("ppo", PPOSettings(rollout_steps=1), SPECS, seed=0)


def test_a_rollout_that_diverged_everywhere_changes_no_weight():
    policy, generator = make_policy()
    learner = learner_of(policy.encoder, PPOSettings(), generator)
    before = copy.deepcopy(list(policy.encoder.parameters()))
    everywhere = torch.ones(8, 6, 1, dtype=torch.bool)
    learner.update(rollout(policy, diverged=everywhere))
    pairs = zip(before, policy.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_correlated_noise_keeps_its_marginal():
    generator = torch.Generator().manual_seed(0)
    encoder = Encoder(3, 2, PPOSettings(), generator=generator, init="gaussian")
    policy = DecodedPolicy(encoder, IdentityDecoder(), generator=generator, noise_correlation=0.7)
    observation = TensorDict({"observation": torch.zeros(4000, 3)}, [4000])
    with set_exploration_type(ExplorationType.RANDOM):
        draws = torch.stack([policy(observation)["latent"].clone() for _ in range(6)])
    flat = draws.flatten(1)
    assert flat[-1].std().item() == pytest.approx(1.0, abs=0.02)
    correlations = [torch.corrcoef(flat[[-1 - lag, -1]])[0, 1].item() for lag in (1, 2)]
    assert correlations == pytest.approx([0.7, 0.49], abs=0.03)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_starts_at_ratio_one_and_moves(surrogate):
    settings = PPOSettings(surrogate=surrogate, minibatches=2, target_kl=0.0)
    policy, generator = make_policy(settings)
    learner = learner_of(policy.encoder, settings, generator)
    still = PPOSettings(surrogate=surrogate, epochs=1, minibatches=1, target_kl=0.0)
    first = learner_of(copy.deepcopy(policy.encoder), still, generator)
    assert first.update(rollout(policy))["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    before = [x.clone() for x in policy.encoder.actor.parameters()]
    metrics = learner.update(rollout(policy))
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert not all(map(torch.equal, before, policy.encoder.actor.parameters()))


@pytest.mark.parametrize("surrogate", ["r2vpo", "ppo_ewma"])
def test_what_a_surrogate_remembers_is_saved(surrogate):
    settings = PPOSettings(surrogate=surrogate, minibatches=2, learning_rate=1e-2)
    policy, generator = make_policy(settings)
    learner = learner_of(policy.encoder, settings, generator)
    learner.update(rollout(policy))
    fresh = learner_of(copy.deepcopy(policy.encoder), settings, generator)
    assert not same(fresh.surrogate.state(), learner.surrogate.state())
    fresh.load_state(learner.state())
    assert same(fresh.surrogate.state(), learner.surrogate.state())


def same(a, b):
    if isinstance(a, dict):
        return all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b)


def test_gaussian_divergence_is_new_against_old():
    draw = torch.Generator().manual_seed(0)
    mean, old_mean = torch.randn(2, 7, 3, generator=draw)
    scale, old_scale = torch.rand(2, 7, 3, generator=draw) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, scale), torch.distributions.Normal(old_mean, old_scale)
    ).sum(-1)
    torch.testing.assert_close(gaussian_kl(mean, scale, old_mean, old_scale), expected)


def mirror_learner(**settings):
    options = PPOSettings(
        surrogate="mdpo", minibatches=1, prior="none", target_kl=0.0, learning_rate=1e-3, **settings
    )
    policy, generator = make_policy(options)
    return policy, learner_of(policy.encoder, options, generator)


@pytest.mark.parametrize(("step_size", "bound"), [(1.0, (0.05, 10.0)), (0.02, (0.0, 0.02))])
def test_the_divergence_of_mirror_descent_holds_the_policy_back(step_size, bound):
    policy, learner = mirror_learner(
        epochs=100, mdpo=MDPOSettings(schedule_steps=48, floor=step_size)
    )
    learner.surrogate.step_size = step_size
    rows = kept(learner, policy)
    learner._optimise(rows)
    mean, scale = policy.encoder.actor.at_normalized(rows["observation"])
    divergence = gaussian_kl(mean, scale, rows["mean"], rows["scale"]).mean().item()
    assert bound[0] < divergence < bound[1]


def test_the_first_step_of_mirror_descent_is_the_policy_gradient():
    policy, learner = mirror_learner(epochs=1)
    rows = kept(learner, policy)
    evaluation = learner._likelihood.evaluate(rows)
    parameters = list(policy.encoder.actor.parameters())
    gradients = torch.autograd.grad(evaluation.divergence().mean(), parameters)
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-6


def kept(learner, policy):
    return learner._prepare(rollout(policy, seed=5))[0]


def test_the_mirror_step_size_falls_along_the_budget():
    policy, learner = mirror_learner(epochs=1, mdpo=MDPOSettings(schedule_steps=4 * 48, floor=0.3))
    sizes = [float(learner.update(rollout(policy))["policy/step_size"]) for _ in range(6)]
    assert sizes == pytest.approx([1.0, 0.75, 0.5, 0.3, 0.3, 0.3])


def test_the_critic_may_take_more_steps_than_the_actor():
    policy, generator = make_policy()
    settings = PPOSettings(epochs=3, minibatches=1, critic_minibatches=4)
    learner = learner_of(policy.encoder, settings, generator)
    learner.update(rollout(policy))
    state = learner.state()
    assert state["actor_optimizer"]["moments"][0]["step"] == 3
    assert state["critic_optimizer"]["moments"][0]["step"] == 12


def test_critic_minibatches_must_be_a_multiple():
    with pytest.raises(ConfigError, match=r"agent\.critic_minibatches = 5: must be a multiple"):
        PPOSettings(minibatches=2, critic_minibatches=5)


def test_the_median_critic_tends_to_the_median_and_the_other_to_the_mean():
    settings = PPOSettings(
        surrogate="bpo",
        bpo=BPOSettings(median_temperature=0.05),
        critic_learning_rate=1e-2,
        critic_hidden=[8],
        epochs=100,
        minibatches=1,
    )
    policy, generator = make_policy(settings)
    learner = learner_of(policy.encoder, settings, generator)
    # Two states, so that a row must find its own target: (0, 0, 0, 1, 4), and that from above.
    target = torch.tensor([0.0, 0.0, 0.0, 1.0, 4.0, 4.0, 4.0, 4.0, 3.0, 0.0]).repeat(10)[:, None]
    observation = torch.tensor([-1.0] * 5 + [1.0] * 5).repeat(10)[:, None].expand(100, 3)
    rows = TensorDict({"observation": observation}, [100])
    policy(rows)
    for _ in range(6):
        learner._optimise(
            {
                "observation": observation,
                "latent": rows["latent"],
                "log_prob": rows["latent_log_prob"],
                "advantage": torch.zeros(100),
                "target": target,
            }
        )
    value, median = policy.encoder.values_at_normalized(observation[[0, 5]])
    assert value.flatten().tolist() == pytest.approx([1.0, 3.0], abs=0.05)
    assert median.tolist() == pytest.approx([0.0, 4.0], abs=0.1)

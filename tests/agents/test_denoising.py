"""FPO and DPPO: ratios, losses and chains against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.agents.dppo import Settings as DPPOSettings
from genpol.agents.dppo import make_likelihood
from genpol.agents.fpo import FlowMatchingLikelihood
from genpol.agents.fpo import Settings as FPOSettings
from genpol.errors import ConfigError
from genpol.on_policy.chain_likelihood import clip_schedule

ENVS, STEPS = 8, 6
SPECS = Specs(observation_dim=3, action_dim=2, num_envs=ENVS)
SMALL = {"rollout_steps": STEPS, "minibatches": 2, "actor_hidden": [16], "critic_hidden": [16]}


def make(name, **settings):
    agent = agents.make(name, agents.settings_class(name)(**(SMALL | settings)), SPECS, seed=0)
    last = agent.learner.actor_critic.actor
    net = last.net if hasattr(last, "net") else last.denoiser
    net.mlp.linears[-1].weight.data.normal_(generator=agent.generator)  # it starts at zero
    return agent


def rollout(agent, seed=1):
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(ENVS, STEPS, 3, generator=generator)
    batch = TensorDict({"observation": observation}, [ENVS, STEPS])
    with set_exploration_type(ExplorationType.RANDOM):
        agent.policy(batch)
    flag = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
    after = {name: flag.clone() for name in ("done", "terminated", "truncated", "diverged")}
    after["reward"] = batch["action"].sum(-1, keepdim=True)
    after["observation"] = torch.randn(ENVS, STEPS, 3, generator=generator)
    return batch.set("next", TensorDict(after, [ENVS, STEPS]))


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.learner.actor_critic.actor.parameters()])


AGENTS = [
    ("fpo", {}),
    ("fpo", {"ratio": "pair", "loss": "velocity"}),
    ("dppo", {}),
    ("dppo", {"ratio": "path", "surrogate": "bpo"}),
    ("dppo", {"denoiser": "diffusion", "sigma": 0.1, "surrogate": "mdpo"}),
    ("dppo", {"surrogate": "r2vpo", "clip_base": 0.01, "denoising_discount": 0.9}),
    ("dppo", {"surrogate": "ppo_ewma", "per_dimension": True}),
]


@pytest.mark.parametrize(("name", "extra"), AGENTS)
def test_ratios_start_at_one_and_the_policy_moves(name, extra):
    agent = make(name, epochs=1, minibatches=1, **extra)
    before = weights(agent)
    metrics = agent.update(rollout(agent))
    assert abs(float(metrics["policy/approx_kl"])) < 1e-5
    assert abs(float(metrics["policy/ratio_max"]) - 1.0) < 1e-3
    assert not torch.equal(before, weights(agent))
    assert all(torch.isfinite(torch.as_tensor(x)).all() for x in metrics.values())


@pytest.mark.parametrize(("name", "extra"), AGENTS[:3])
def test_without_exploration_the_action_is_repeatable(name, extra):
    agent = make(name, **extra)
    observation = TensorDict({"observation": torch.ones(4, 3)}, [4])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        first = agent.policy(observation.clone())["action"]
        again = agent.policy(observation.clone())["action"]
    assert torch.equal(first, again)
    with set_exploration_type(ExplorationType.RANDOM):
        assert not torch.equal(first, agent.policy(observation.clone())["action"])


# --- FPO ---------------------------------------------------------------------------------------


def flow_rows(time):
    agent = make("fpo")
    actor = agent.learner.actor_critic.actor
    rows = {
        "observation_raw": torch.randn(5, 3),
        "decoded": torch.randn(5, 2),
        "noise": torch.randn(5, 1, 2),
        "time": torch.full((5, 1, 1), time),
    }
    return actor, rows, FlowMatchingLikelihood(actor, FPOSettings(pairs=1), agent.generator)


def test_the_loss_is_that_of_the_authors_in_their_own_time():
    actor, rows, likelihood = flow_rows(0.3)
    # Their x_t = t eps + (1 - t) a and v = eps - a: time and velocity run the other way.
    t, eps, action = 0.7, rows["noise"][:, 0], rows["decoded"]
    x = t * eps + (1 - t) * action
    velocity = -actor.velocity(rows["observation_raw"], x, torch.full((5, 1), 1 - t))
    expected = (eps - (x + (1 - t) * velocity)).square().mean(-1)
    torch.testing.assert_close(-likelihood.log_prob(actor, rows), expected)


def test_pure_noise_teaches_nothing():
    actor, rows, likelihood = flow_rows(0.0)
    loss = likelihood.log_prob(actor, rows).sum()
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in actor.parameters())


def test_a_worse_loss_is_a_smaller_ratio():
    agent = make("fpo")
    actor = agent.learner.actor_critic.actor
    likelihood = FlowMatchingLikelihood(actor, agent.settings, agent.generator)
    batch = rollout(agent)
    kept = likelihood.keep(batch, batch["observation"])
    actor.net.mlp.linears[-1].bias.data += 10.0
    assert (likelihood.log_prob(actor, kept) < kept["log_prob"]).all()


def test_pairs_are_kept_for_the_whole_update():
    agent = make("fpo")
    likelihood = FlowMatchingLikelihood(
        agent.learner.actor_critic.actor, agent.settings, agent.generator
    )
    batch = rollout(agent)
    kept = likelihood.keep(batch, batch["observation"])
    again = likelihood.log_prob(agent.learner.actor_critic.actor, kept)
    assert torch.equal(kept["log_prob"], again)
    times = kept["time"].unique()
    torch.testing.assert_close(times, torch.arange(10) / 10)  # where the solver evaluates


def test_a_flow_has_no_divergence_for_mirror_descent():
    with pytest.raises(ConfigError, match="agent=dppo"):
        FPOSettings(surrogate="mdpo")


# --- DPPO --------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoiser", ["flow", "diffusion"])
def test_the_noise_of_each_step_can_be_read_off_the_chain(denoiser):
    agent = make("dppo", denoiser=denoiser, sigma=0.1)
    drawn = []
    chain = agent.policy._chain
    draw = chain.draw
    chain.draw = lambda *args, **options: drawn.append(draw(*args, **options)) or drawn[-1]
    batch = rollout(agent)
    mean, std = transitions(agent, batch)
    recovered = (batch["chain"][..., 1:, :] - mean) / std
    start, steps = drawn[-1]
    torch.testing.assert_close(recovered, steps, atol=1e-4, rtol=1e-4)
    assert torch.equal(batch["chain"][..., 0, :], start)
    assert std.min() >= 0.1 - 1e-6


def transitions(agent, batch):
    actor = agent.learner.actor_critic.actor
    return agent.policy._chain.transitions(actor, batch["observation"], batch["chain"])


def densities(agent, batch, **settings):
    actor = agent.learner.actor_critic.actor
    options = DPPOSettings(**(SMALL | settings))
    likelihood = make_likelihood(actor, agent.policy._chain, options)
    return likelihood.keep(batch, batch["observation"])["log_prob"]


def test_the_ratio_of_a_path_is_the_product_of_those_of_its_steps():
    agent = make("dppo")
    batch = rollout(agent)
    steps, path = densities(agent, batch), densities(agent, batch, ratio="path")
    assert steps.shape == (ENVS, STEPS, 10)
    torch.testing.assert_close(path, steps.sum(-1))


def test_the_density_of_a_step_is_that_of_its_noise():
    agent = make("dppo")
    batch = rollout(agent)
    mean, _ = transitions(agent, batch)
    noise = (batch["chain"][..., 1:, :] - mean) / 0.05
    expected = -0.5 * noise.square().sum(-1) - 2 * (math.log(0.05) + 0.5 * math.log(2 * math.pi))
    torch.testing.assert_close(densities(agent, batch), expected)


def test_the_divergence_of_two_chains_is_that_of_their_means():
    agent = make("dppo", surrogate="mdpo", ratio="path")
    batch = rollout(agent)
    actor = agent.learner.actor_critic.actor
    likelihood = make_likelihood(actor, agent.policy._chain, agent.settings)
    rows = likelihood.keep(batch, batch["observation"])
    assert likelihood.evaluate(rows).divergence().abs().max() < 1e-6
    rows["mean"] = rows["mean"] + 0.05  # one standard deviation, 10 steps, 2 dimensions
    torch.testing.assert_close(
        likelihood.evaluate(rows).divergence(), torch.full((ENVS, STEPS), 10.0), atol=1e-3, rtol=0
    )


def test_the_noisiest_step_is_clipped_the_most():
    clip = clip_schedule(5, 0.01, 0.1)
    assert clip[0] == pytest.approx(0.01)
    assert clip[-1] == pytest.approx(0.1)
    middle = 0.01 + 0.09 * (math.exp(1.5) - 1) / (math.exp(3.0) - 1)
    assert clip[2] == pytest.approx(middle)


def test_a_step_counts_less_the_farther_it_is_from_the_action():
    agent = make("dppo", denoising_discount=0.5, solver_steps=3)
    actor = agent.learner.actor_critic.actor
    likelihood = make_likelihood(actor, agent.policy._chain, agent.settings)
    batch = rollout(agent)
    rows = likelihood.keep(batch, batch["observation"])
    assert likelihood.evaluate(rows).step_weight.tolist() == [0.25, 0.5, 1.0]

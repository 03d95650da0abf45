"""ReinFlow: the chain of a noisy flow, its likelihood, and what it begins from."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.offline.settings import NetworkSettings
from genpol.policies.chain import Chain, ChainSettings
from genpol.policies.flow import FlowPolicy
from genpol.policies.noisy_flow import NoisyFlow
from genpol.pretrained import PretrainedPolicy

ENVS, STEPS, HORIZON = 4, 8, 2
SMALL = {
    "rollout_steps": STEPS,
    "epochs": 1,
    "minibatches": 2,
    "solver_steps": 3,
    "critic_hidden": [8],
    "horizon": HORIZON,
    "actor": NetworkSettings(hidden=[16], layer_norm="none"),
}


def make(name="reinflow", **settings):
    specs = Specs(observation_dim=3, action_dim=2 * HORIZON, num_envs=ENVS)
    options = agents.settings_class(name)(**(SMALL | settings))
    return agents.make(name, options, specs, seed=0)


def rollout(agent, seed=1):
    draw = torch.Generator().manual_seed(seed)
    batch = TensorDict({"observation": torch.randn(ENVS, STEPS, 3, generator=draw)}, [ENVS, STEPS])
    with set_exploration_type(ExplorationType.RANDOM):
        agent.policy(batch)
    no = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
    batch["next"] = TensorDict(
        {
            "observation": torch.randn(ENVS, STEPS, 3, generator=draw),
            "reward": torch.randn(ENVS, STEPS, 1, generator=draw),
            **{name: no for name in ("done", "terminated", "truncated", "diverged")},
        },
        [ENVS, STEPS],
    )
    return batch


def noisy(sigma_min=0.05, sigma_max=0.2):
    generator = torch.Generator().manual_seed(0)
    flow = FlowPolicy(
        3, 2, [16], horizon=HORIZON, num_steps=4, zero_init=False, generator=generator
    )
    model = NoisyFlow(
        flow, 3, [8], sigma_min=sigma_min, sigma_max=sigma_max, generator=generator
    ).double()
    torch.nn.init.normal_(model.noise_net.linears[-1].weight, generator=generator)
    return model


def test_the_noise_drawn_can_be_read_off_a_chain():
    model = noisy()
    chain = Chain(model, ChainSettings())
    draw = torch.Generator().manual_seed(1)
    noise, steps = (x.double() for x in chain.draw((5, 6), draw))
    seen = torch.randn(6, 3, generator=draw).double()
    states = chain.sample(model, seen, noise, steps)
    mean, std = chain.transitions(model, seen, states)
    recovered = (states.flatten(-2)[..., 1:, :] - mean) / std
    torch.testing.assert_close(recovered, steps.flatten(-2))
    density = torch.distributions.Normal(mean, std).log_prob(states.flatten(-2)[..., 1:, :])
    expected = density.sum((-2, -1))
    torch.testing.assert_close(chain.log_prob(model, seen, states), expected)


def test_standard_deviations_keep_within_their_bounds_and_depend_on_the_state():
    std = noisy().std(3 * torch.randn(200, 3).double())
    assert 0.05 - 1e-9 <= std.min() < std.max() <= 0.2 + 1e-9
    assert std.std(0).min() > 0


def test_without_noise_the_chain_is_the_flow():
    model = noisy(1e-12, 1e-12)
    seen, noise = torch.randn(4, 3).double(), torch.randn(4, HORIZON, 2).double()
    states = model.chain(seen, noise, torch.randn(4, 4, HORIZON, 2).double())
    torch.testing.assert_close(states[:, -1], model.sample(seen, noise), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["reinflow", "dppo"])
def test_the_first_ratio_is_one_and_an_update_changes_flow_and_noise(name):
    agent = make(name)
    batch = rollout(agent)
    likelihood = agent.learner._likelihood
    kept = likelihood.keep(batch, batch["observation"])
    torch.testing.assert_close(likelihood.evaluate(kept).log_prob, kept["log_prob"])
    assert likelihood.evaluate(kept).divergence().abs().max() < 1e-5
    before = {name: x.clone() for name, x in agent.state_dict().items()}
    agent.update(batch)
    moved = {name for name, x in agent.state_dict().items() if not torch.equal(x, before[name])}
    assert any("mlp" in name for name in moved)
    assert name == "dppo" or any("noise_net" in name for name in moved)
    assert not any("normalizer" in name for name in moved)


def test_the_ratio_of_the_whole_chain_is_tempered():
    agent = make()
    likelihood, batch = agent.learner._likelihood, rollout(make())
    rows = likelihood.keep(batch, batch["observation"])
    plain = make(normalize_ratio=False).learner._likelihood.keep(batch, batch["observation"])
    torch.testing.assert_close(rows["log_prob"], plain["log_prob"] / ((3 + 1) * 2 * HORIZON))
    rows["log_prob"] = rows["log_prob"] - 5.0
    found = likelihood.evaluate(rows).log_prob - rows["log_prob"]
    torch.testing.assert_close(found, torch.ones(ENVS, STEPS))


def test_entropy_is_rewarded_and_distance_to_the_origin_is_paid_for():
    batch = rollout(make())
    agent = make(entropy_coefficient=0.5, sigma_min=0.1, sigma_max=0.1)
    likelihood = agent.learner._likelihood
    rows = likelihood.keep(batch, batch["observation"])
    assert float(likelihood.evaluate(rows).regulariser) == pytest.approx(-0.5 * math.log(0.1))
    agent = make(wasserstein_coefficient=2.0)
    likelihood = agent.learner._likelihood
    assert float(likelihood.evaluate(rows).regulariser) == 0.0
    bias = agent.behaviour.net.mlp.linears[-1].bias
    bias.data.add_(0.1)  # over the whole time, and through the network's other steps
    seen, start = rows["observation_raw"], rows["chain"][..., 0, :, :]
    apart = agent.behaviour.sample(seen, start) - likelihood.origin.sample(seen, start)
    found = likelihood.evaluate(rows).regulariser
    torch.testing.assert_close(found, 2.0 * apart.square().mean())


@pytest.mark.parametrize("name", ["reinflow", "dppo"])
def test_it_begins_from_a_policy_and_acts_like_it(name):
    agent = make(name)
    weights = {k: x + 0.01 if x.is_floating_point() else x for k, x in _weights(agent).items()}
    statistics = {"mean": torch.ones(3).double(), "std": 2 * torch.ones(3).double()}
    policy = PretrainedPolicy(
        model={},
        weights=weights,
        statistics=statistics,
        observation_dim=3,
        action_dim=2,
        action_steps=HORIZON,
        env="toy",
        action_repeat=1,
        control_period_s=0.02,
    )
    agent.load_policy(policy)
    seen = torch.randn(5, 3)
    torch.testing.assert_close(agent.observation_normalizer(seen), (seen - 1) / 2)
    agent.policy.start(3)
    batch = TensorDict({"observation": seen}, [5])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = agent.policy(batch)["action"]
    noise, _ = agent.policy._chain.draw((5,), torch.Generator().manual_seed(3))
    expected = agent.behaviour.sample(seen, noise).flatten(-2).clamp(-1, 1)
    torch.testing.assert_close(action, expected)
    if name == "reinflow":
        origin = agent.learner._likelihood.origin.state_dict()
        assert all(torch.equal(origin[k], x) for k, x in agent.behaviour.state_dict().items())


def test_the_origin_is_that_from_which_a_run_begins():
    def origin(agent):
        return agent.learner._likelihood.origin.state_dict()

    one, other = make(), make()
    with torch.no_grad():
        for parameter in one.behaviour.parameters():
            parameter.add_(1.0)
    kept = {k: x.clone() for k, x in origin(one).items()}
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(origin(other)[k], x) for k, x in _weights(one).items())
    other.load_training_state(one.training_state())  # as a run does that goes on
    assert all(torch.equal(origin(other)[k], x) for k, x in kept.items())


def _weights(agent):
    return {k: x.clone() for k, x in agent.behaviour.state_dict().items()}


def test_diffusion_models_are_refused():
    with pytest.raises(ConfigError, match="use dppo"):
        make(denoiser="diffusion")

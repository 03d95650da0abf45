"""One update of a soft actor-critic: hand-computed, and against torchrl's own SAC loss."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import SACLoss, ValueEstimators

from genpol import agents
from genpol.agent import Specs
from genpol.data.replay import Replay
from genpol.policies.squashed import SquashedSample

OBSERVATION, ACTION = 3, 2
SPECS = Specs(observation_dim=OBSERVATION, action_dim=ACTION, num_envs=1)
SMALL = {"actor_hidden": [16], "critic_hidden": [16]}
REPLAY = SMALL | {"warmup_steps": 0}
# Weights then stay as they are through an update, whose parts come one after the other.
STILL = {
    "learning_rate": 1e-12,
    "critic_learning_rate": 1e-12,
    "temperature_learning_rate": 1e-12,
    "max_grad_norm": 1e9,
}


def make(name="mdpo_off_policy", *, specs=SPECS, **settings):
    small = SMALL if name == "mdpo" else REPLAY
    return agents.make(name, agents.settings_class(name)(**(small | settings)), specs, seed=0)


def transitions(reward, terminated, truncated=None):
    draw = torch.Generator().manual_seed(1)
    rows = len(reward)
    terminated = torch.tensor(terminated)[:, None]
    truncated = torch.zeros_like(terminated) if truncated is None else truncated
    after = {
        "observation": torch.randn(rows, OBSERVATION, generator=draw),
        "reward": torch.tensor(reward)[:, None],
        "terminated": terminated,
        "truncated": truncated,
        "done": terminated | truncated,
    }
    here = {
        "observation": torch.randn(rows, OBSERVATION, generator=draw),
        "action": 2 * torch.rand(rows, ACTION, generator=draw) - 1,
    }
    return TensorDict(here | {"next": after}, [rows])


def make_constant(critics, *values):
    """Let each member of an ensemble give one value everywhere."""
    with torch.no_grad():
        for parameter in critics.parameters():
            parameter.zero_()
        critics.biases[-1].copy_(torch.tensor(values).view(-1, 1, 1))


def prescribe(agent, *, density, old_density=1.0):
    """Let the actor draw zeros of a given density per dimension, another under the reference."""

    def draw(observation, noise):
        nothing = 0 * agent.actor(observation)[0]
        scale = nothing + scale_of(density)
        return SquashedSample(nothing, nothing, nothing + math.log(density), nothing, scale)

    def old_gaussian(observation):
        nothing = torch.zeros(len(observation), ACTION)
        return nothing, nothing + scale_of(old_density)

    agent.actor.draw = draw
    agent.reference.forward = old_gaussian


def scale_of(density):
    """Return the deviation of a Gaussian with this density in its middle."""
    return 1.0 / (density * math.sqrt(2.0 * math.pi))


def constant_agent(name="mdpo_off_policy", *, density=1.0, old_density=1.0, **settings):
    """Return an agent whose critics are 3 and 5, their averages 1 and 2."""
    agent = make(name, **settings)
    make_constant(agent.critics, 3.0, 5.0)
    if agent.values is None:
        make_constant(agent.averaged, 1.0, 2.0)
    else:
        make_constant(agent.values, 7.0)
        make_constant(agent.averaged, 4.0)
    prescribe(agent, density=density, old_density=old_density)
    return agent


def critic_loss(*targets):
    """Return half the squared errors of critics 3 and 5, summed, averaged over targets."""
    rows = [0.5 * (3.0 - target) ** 2 + 0.5 * (5.0 - target) ** 2 for target in targets]
    return sum(rows) / len(rows)


# -- hand-computed -------------------------------------------------------------------------------

FIXED = {"learn_temperature": False, "gamma": 0.9}


def test_the_target_takes_the_least_of_the_averaged_critics():
    # 2 + 0.9 x 1; with their greatest 3.8, with live critics 4.7.
    agent = constant_agent(**FIXED, temperature=0.0)
    metrics = agent.update(transitions([2.0], [False]))
    assert metrics["loss/critic"].item() == pytest.approx(critic_loss(2.9))


def test_the_target_stops_at_true_ends_alone():
    agent = constant_agent(**FIXED, temperature=0.0)
    batch = transitions([2.0, 2.0, 2.0], [False, True, False])
    batch["next", "truncated"][2] = batch["next", "done"][2] = True
    metrics = agent.update(batch)
    assert metrics["loss/critic"].item() == pytest.approx(critic_loss(2.9, 2.0, 2.9))


def test_the_target_has_the_entropy_of_the_next_action():
    # Two dimensions of density 3: 2 + 0.9 (1 - 0.25 x 2 log 3).
    agent = constant_agent(**FIXED, temperature=0.25, density=3.0)
    metrics = agent.update(transitions([2.0], [False]))
    expected = 2.0 + 0.9 * (1.0 - 0.25 * 2 * math.log(3.0))
    assert metrics["loss/critic"].item() == pytest.approx(critic_loss(expected))


def test_the_target_has_the_entropy_of_its_index():
    # Of index 2 it is the density less one: 2 + 0.9 (1 - 0.25 x 2 x 2).
    agent = constant_agent(**FIXED, temperature=0.25, density=3.0, tsallis_index=2.0)
    metrics = agent.update(transitions([2.0], [False]))
    assert metrics["loss/critic"].item() == pytest.approx(critic_loss(2.0))


def test_rewards_reach_the_target_scaled():
    agent = constant_agent(**FIXED, temperature=0.0, reward_scale=10.0)
    metrics = agent.update(transitions([2.0], [False]))
    assert metrics["loss/critic"].item() == pytest.approx(critic_loss(20.9))


@pytest.mark.parametrize(
    ("index", "entropy", "divergence"),
    [(1.0, 2 * math.log(3.0), 2 * math.log(2.0)), (2.0, 2 * 2.0, 2 * 2 * 1.0)],
)
def test_the_actor_weighs_entropy_divergence_and_the_least_value(index, entropy, divergence):
    # c log_q pi + q (lambda - c) log_q pi_old - min Q, in two dimensions.
    agent = constant_agent(
        **FIXED,
        temperature=0.25,
        kl_coefficient=0.75,
        tsallis_index=index,
        divergence="sampled",
        density=3.0,
        old_density=2.0,
    )
    metrics = agent.update(transitions([2.0], [False]))
    expected = 0.75 * entropy + (0.25 - 0.75) * divergence - 3.0
    assert metrics["loss/policy"].item() == pytest.approx(expected)


def test_the_divergence_to_the_old_policy_is_that_of_gaussians():
    # lambda log pi + (c - lambda) KL - min Q; scales are to each other as 2 to 3.
    agent = constant_agent(
        **FIXED, temperature=0.25, kl_coefficient=0.75, density=3.0, old_density=2.0
    )
    metrics = agent.update(transitions([2.0], [False]))
    divergence = 2 * (math.log(3 / 2) + (2 / 3) ** 2 / 2 - 0.5)
    assert metrics["policy/reference_kl"].item() == pytest.approx(divergence)
    expected = 0.25 * 2 * math.log(3.0) + 0.5 * divergence - 3.0
    assert metrics["loss/policy"].item() == pytest.approx(expected)


def test_with_a_value_network_the_actor_follows_the_first_critic():
    agent = constant_agent(**FIXED, critic="v", temperature=0.0)
    make_constant(agent.critics, 5.0, 3.0)
    metrics = agent.update(transitions([2.0], [False]))
    assert metrics["loss/policy"].item() == pytest.approx(-5.0)


def test_with_a_value_network_critics_regress_its_average():
    agent = constant_agent(**FIXED, critic="v", temperature=0.0)
    metrics = agent.update(transitions([2.0, 2.0], [False, True]))
    assert metrics["loss/critic"].item() == pytest.approx(critic_loss(2.0 + 0.9 * 4.0, 2.0))


@pytest.mark.parametrize(("index", "entropy"), [(1.0, 2 * math.log(3.0)), (2.0, 2 * 2.0)])
def test_a_value_network_regresses_the_least_live_critic_and_entropy(index, entropy):
    agent = constant_agent(**FIXED, critic="v", temperature=0.25, density=3.0, tsallis_index=index)
    metrics = agent.update(transitions([2.0], [False]))
    expected = 0.5 * (7.0 - (3.0 - 0.25 * entropy)) ** 2
    assert metrics["loss/value"].item() == pytest.approx(expected)


@pytest.mark.parametrize(("entropy", "direction"), [(-1.9, -1), (-2.0, 0), (-2.1, 1)])
def test_the_temperature_holds_the_entropy_at_its_target(entropy, direction):
    # Minus one nat for each of two dimensions: above it the temperature falls, below it rises.
    agent = constant_agent(
        "sac",
        temperature=0.5,
        temperature_learning_rate=1e-2,
        entropy_per_dimension=-1.0,
        density=math.exp(-entropy / 2),
    )
    agent.update(transitions([2.0], [False]))
    moved = agent.log_temperature.item() - math.log(0.5)
    assert moved == pytest.approx(1e-2 * direction, abs=1e-4)


# -- the end of an episode, from the data to the value -------------------------------------------


@pytest.mark.parametrize(("end", "value"), [("truncated", 2.0), ("terminated", 1.0)])
@pytest.mark.parametrize("name", ["mdpo", "mdpo_off_policy"])
def test_a_time_limit_bootstraps_and_a_true_end_does_not(name, end, value):
    """Oracle 10: on a chain of one step, reward 1 and discount 1/2, to 1 + 1/2 + 1/4 + ... or 1."""
    envs, time = 8, 4
    specs = Specs(observation_dim=1, action_dim=1, num_envs=envs)
    own = {
        "mdpo": {"rollout_steps": time, "critic_minibatches": 4},
        "mdpo_off_policy": {"temperature": 0.0, "polyak": 0.5, "updates_per_step": 0.25},
    }[name]
    agent = make(
        name,
        specs=specs,
        gamma=0.5,
        reward_scale=1.0,
        critic_learning_rate=3e-2,
        **own,
    )
    replay = Replay(10_000, seed=0)
    for _ in range(15):
        rollout = TensorDict({"observation": torch.zeros(envs, time, 1)}, [envs, time])
        with set_exploration_type(ExplorationType.RANDOM):
            agent.policy(rollout)
        flag = torch.zeros(envs, time, 1, dtype=torch.bool)
        rollout["next"] = TensorDict(
            {
                "observation": torch.zeros(envs, time, 1),
                "reward": torch.ones(envs, time, 1),
                "terminated": flag,
                "truncated": flag.clone(),
                "done": ~flag,
                "diverged": flag.clone(),
            },
            [envs, time],
        )
        rollout["next", end] = ~flag
        if name == "mdpo":
            agent.update(rollout)
            continue
        replay.extend(rollout)
        for _ in range(agent.observe(rollout)):
            agent.update(replay.sample(32))
    observation = torch.zeros(1, 1)
    if name == "mdpo":
        found = agent.policy.encoder.value(observation)
    else:
        found = agent.critics(torch.cat((observation, torch.zeros(1, 1)), -1))
    assert found.flatten().tolist() == pytest.approx([value] * found.numel(), abs=0.05)


# -- against torchrl -----------------------------------------------------------------------------


class ActionValue(nn.Module):
    """One member of our ensemble, for torchrl to stack."""

    def __init__(self, critics):
        super().__init__()
        self.weights = nn.ParameterList(x[0].detach().clone() for x in critics.weights)
        self.biases = nn.ParameterList(x[0].detach().clone() for x in critics.biases)

    def forward(self, observation, action):
        hidden = torch.cat((observation, action), -1) @ self.weights[0] + self.biases[0]
        return torch.relu(hidden) @ self.weights[1] + self.biases[1]


def torchrl_sac(agent):
    """Return torchrl's loss with the agent's weights, averages, temperature and discount."""
    moments = ["loc", "scale"]
    actor = ProbabilisticActor(
        TensorDictModule(agent.actor, in_keys=["observation"], out_keys=moments),
        in_keys=moments,
        distribution_class=TanhNormal,
    )
    critic = TensorDictModule(
        ActionValue(agent.critics),
        in_keys=["observation", "action"],
        out_keys=["state_action_value"],
    )
    loss = SACLoss(
        actor,
        critic,
        loss_function="l2",
        alpha_init=agent.settings.temperature,
        target_entropy=-float(ACTION),
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=agent.settings.gamma)
    theirs = dict(loss.named_parameters()) | dict(loss.named_buffers())
    for prefix, ours in (("", agent.critics), ("target_", agent.averaged)):
        for name, x in ours.named_parameters():
            theirs[f"{prefix}qvalue_network_params.module.{name}"].data.copy_(x)
    return loss


@pytest.fixture(scope="module")
def both():
    """Return our metrics and agent after one update, and torchrl's losses and module."""
    agent = make("sac", temperature=0.3, gamma=0.9, **STILL)
    with torch.no_grad():
        for parameter in agent.averaged.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=agent.generator))
    batch = transitions([0.5, -1.0, 2.0, 0.0] * 4, [False, False, True, False] * 4)
    same = torch.Generator()
    same.set_state(agent.generator.get_state())
    now, following = (torch.empty(16, ACTION).normal_(generator=same) for _ in range(2))
    # torchrl's critic comes first, and with it the next action.
    noises = [following, now]
    module = torchrl_sac(agent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.distributions.normal, "_standard_normal", lambda *_, **__: noises.pop(0)
        )
        losses = module(batch.clone())
    metrics = agent.update(batch)
    (losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]).backward()
    return agent, metrics, module, losses


def test_the_critics_loss_is_half_that_of_torchrl(both):
    _, metrics, _, losses = both
    torch.testing.assert_close(metrics["loss/critic"], 0.5 * losses["loss_qvalue"].detach())


def test_the_actors_loss_is_that_of_torchrl(both):
    _, metrics, _, losses = both
    torch.testing.assert_close(metrics["loss/policy"], losses["loss_actor"].detach())


def gradients(module, prefix):
    named = {name: x.grad for name, x in module.named_parameters() if name.startswith(prefix)}
    assert named
    return {name.removeprefix(prefix): x for name, x in named.items()}


def test_the_critics_gradient_is_half_that_of_torchrl(both):
    agent, _, module, _ = both
    theirs = gradients(module, "qvalue_network_params.module.")
    expected = {name: 0.5 * x for name, x in theirs.items()}
    torch.testing.assert_close(gradients(agent.critics, ""), expected)


def test_the_actors_gradient_is_that_of_torchrl(both):
    agent, _, module, _ = both
    theirs = gradients(module, "actor_network_params.module.0.module.")
    torch.testing.assert_close(gradients(agent.actor, ""), theirs, atol=1e-5, rtol=1e-4)


def test_the_temperatures_gradient_is_that_of_torchrl(both):
    agent, _, module, _ = both
    torch.testing.assert_close(agent.log_temperature.grad, module.log_alpha.grad)

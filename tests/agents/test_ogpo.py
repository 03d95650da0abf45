"""Off-policy generative policy optimisation, against the closed forms of its specification."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.agents.ogpo import OGPO, PRESETS, Settings
from genpol.errors import ConfigError
from genpol.offline.settings import NetworkSettings
from genpol.policies.chain import Chain, ChainSettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy

SMALL = {
    "horizon": 2,
    "solver_steps": 3,
    "batch_size": 8,
    "policy_batch_size": 8,
    "group_size": 4,
    "success_batch_size": 4,
    "num_critics": 3,
    "online_warmup_steps": 10,
    "warmup_updates": 0,
    "actor": NetworkSettings(hidden=[16], layer_norm="none"),
    "critic": NetworkSettings(hidden=[16]),
}


def make(*, observation_dim=3, action_dim=2, tells_success=True, **settings) -> OGPO:
    specs = Specs(
        observation_dim=observation_dim,
        action_dim=action_dim,
        num_envs=2,
        tells_success=tells_success,
    )
    return agents.make("ogpo", Settings(**(SMALL | settings)), specs, seed=0)


def windows(agent, *, wins=0, seed=0, action=None, terminated=False):
    """Return windows of chance, the last ``wins`` of them of successful episodes."""
    draw = torch.Generator().manual_seed(seed)
    rows = agent.batch_size + wins
    h, a, d = agent.settings.horizon, agent.specs.action_dim, agent.specs.observation_dim
    chance = torch.rand(rows, h, a, generator=draw) * 2 - 1
    return TensorDict(
        {
            "observation": torch.randn(rows, d, generator=draw),
            "action": chance if action is None else action.expand(rows, h, a),
            "valid": torch.ones(rows, h, dtype=torch.bool),
            "weight": torch.ones(rows),
            "reward": torch.randn(rows, generator=draw),
            "discount": torch.full((rows,), 0.0 if terminated else agent.settings.gamma**h),
            "successful": torch.arange(rows) >= agent.batch_size,
            "next": TensorDict({"observation": torch.randn(rows, d, generator=draw)}, [rows]),
        },
        [rows],
    )


class Valued(torch.nn.Module):
    """Critics ``[M, ..., B]`` of a given function of chunks ``[..., B, H, A]``."""

    def __init__(self, value, members=1, noise=0.0):
        super().__init__()
        self.value, self.members, self.noise = value, members, noise

    def forward(self, observation, chunk, frozen=False):
        value = self.value(chunk)
        heads = value.expand(self.members, *value.shape)
        return heads + self.noise * torch.randn(heads.shape)


class Fixed(torch.nn.Module):
    """Critics that always say the same."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, observation, chunk, frozen=False):
        return self.values


# --- the chain -----------------------------------------------------------------------------------


def policies(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    options = {"horizon": 2, "zero_init": False, "generator": generator}
    if kind == "flow":
        return FlowPolicy(3, 2, [16], num_steps=4, **options)
    from genpol.policies.schedules import diffusers_schedule

    schedule = diffusers_schedule(num_levels=4, num_steps=4)
    return DiffusionPolicy(3, 2, [16], schedule=schedule, clip=1.0, **options)


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
@pytest.mark.parametrize("schedule", ["tapered", "constant"])
@pytest.mark.parametrize("last", [0, 2])
def test_a_chain_scored_by_what_made_it_has_the_ratio_one(kind, schedule, last):
    # O3, with observations so large that actions saturate: the raw end is what is scored.
    policy = policies(kind).double()
    settings = ChainSettings(sigma=0.1, schedule=schedule)
    chain = Chain(policy, settings)
    generator = torch.Generator().manual_seed(0)
    observation = 30 * torch.randn(5, 3, generator=generator).double()
    noise, steps = (x.double() for x in chain.draw((4, 5), generator))
    states = chain.sample(policy, observation, noise, steps)
    assert (states[..., -1, :, :].abs() > 1).any()
    again = chain.log_prob(copy.deepcopy(policy), observation, states, last_steps=last)
    torch.testing.assert_close(
        again, chain.log_prob(policy, observation, states, last_steps=last), atol=1e-10, rtol=0
    )
    mean, std = chain.transitions(policy, observation, states)
    drawn = (states.flatten(-2)[..., 1:, :] - mean) / std
    counted = -last if last else 0
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(steps.flatten(-2)) - std.log()
    torch.testing.assert_close(drawn, steps.flatten(-2), atol=1e-6, rtol=0)
    torch.testing.assert_close(again, expected[..., counted:, :].sum((-2, -1)))


def test_sampling_and_scoring_agree_in_single_precision():
    agent = make()
    seen = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    noise = agent.chain.draw((4, 8), agent.generator)
    states, old, *_ = agent.sample_group(seen, *noise)
    assert (agent.log_prob(agent.actor, seen, states) - old).abs().max() < 1e-5


# --- the policy's gradient -----------------------------------------------------------------------


@pytest.mark.parametrize(("group", "expected"), [(2, 0.2), (4, 0.3), (8, 0.35), (32, 0.3875)])
def test_the_gradient_on_a_bandit_has_the_groups_share(group, expected):
    # O5: ((G - 1) / G) (1 / w) 2 (c - mu), with mu = 0, c = 0.4 and w = (K + 1) D = 2.
    agent = make(
        observation_dim=1,
        action_dim=1,
        horizon=1,
        solver_steps=1,
        sigma=0.3,
        noise_clip=9.0,
        mean_clip=0.0,
        correction="none",
        preset="ogpo",
        group_size=group,
        batch_size=160_000 // group,
        policy_batch_size=1,
    )
    _still(agent)
    agent.averaged = Valued(lambda chunk: -(chunk - 0.4).square().sum((-2, -1)))
    rows = 160_000 // group
    seen = torch.zeros(rows, 1)
    noise, steps = agent.chain.draw((group, rows), agent.generator)
    # From a noise of zero, the single step's mean is the velocity, which is the bias: mu = 0.
    states = agent.chain.sample(agent.average, seen, torch.zeros_like(noise), steps)
    old = agent.log_prob(agent.average, seen, states)
    end = states[..., -1, :].unsqueeze(-2)
    from genpol.objectives.critic_groups import group_advantage

    advantage = group_advantage(agent.averaged(seen, end).transpose(0, 1), how="mean")
    loss, _ = agent.policy_loss(seen, states, old, advantage, None, {})
    bias = agent.actor.net.mlp.linears[-1].bias
    (slope,) = torch.autograd.grad(-loss, bias)
    assert float(slope) == pytest.approx(expected, rel=0.03)


def _still(agent):
    """Make the velocity zero everywhere."""
    for model in (agent.actor, agent.average):
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)


def bandit(updates, *, heads=1, noise=0.0, advantage="mean", **options):
    """Return the agent after updates on ``Q = -(a - 0.5)^2``, one action, four steps."""
    agent = make(
        observation_dim=1,
        action_dim=1,
        horizon=1,
        solver_steps=4,
        sigma=0.2,
        correction="none",
        mean_clip=0.0,
        preset="ogpo",
        advantage=advantage,
        group_size=32,
        batch_size=64,
        policy_batch_size=64,
        policy_polyak=0.05,
        learning_rate=3e-2,
        final_learning_rate=3e-3,
        decay_updates=updates,
        actor=NetworkSettings(hidden=[8], layer_norm="none"),
        **({"clip": 0.2} | options),
    )
    agent.averaged = Valued(lambda chunk: -(chunk - 0.5).square().sum((-2, -1)), heads, noise)
    torch.manual_seed(0)
    seen = {"observation": torch.zeros(64, 1)}
    none = {"observation": torch.zeros(0, 1)}
    for _ in range(updates):
        agent.update_policy(seen, none)
    return agent


def moments(agent, rows=20_000):
    noise, steps = agent.chain.draw((rows,), torch.Generator().manual_seed(1))
    seen = torch.zeros(rows, 1)
    with torch.no_grad():
        end = agent.chain.sample(agent.average, seen, noise, steps)[..., -1, 0]
        solved = agent.average.sample(seen, noise)[..., 0]
    return end, solved


def test_a_bandit_is_soon_solved():
    end, _ = moments(bandit(300))
    assert end.mean() == pytest.approx(0.5, abs=0.05)
    assert -(end - 0.5).square().mean() > -0.03


@pytest.mark.slow
def test_a_bandit_is_solved_up_to_the_noise_of_the_last_step():
    # O6: the variance that is left is sigma^2 / K, which no drift can take away.
    end, solved = moments(bandit(4000))
    assert end.mean() == pytest.approx(0.5, abs=0.005)
    assert end.var() == pytest.approx(0.01, abs=0.0006)
    assert solved.var() < 3e-4


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "least"), [(0.0, -0.0105), (0.02, -0.0108)])
def test_a_conservative_advantage_solves_it_too(noise, least):
    # O7, last part.
    end, _ = moments(bandit(4000, heads=10, noise=noise, advantage="conservative"))
    assert -(end - 0.5).square().mean() > least


@pytest.mark.slow
def test_a_tight_clip_and_a_slow_average_are_a_speed_limit():
    # O6: with clip 0.01 and share 0.005 it is far from done; that is no fault.
    end, _ = moments(bandit(1000, clip=0.01, policy_polyak=0.005))
    assert -(end - 0.5).square().mean() < -0.2


def test_the_clip_stops_what_went_too_far_and_nothing_else():
    # O10: by the sign of the advantage and the side of the ratio.
    agent = make(clip=0.1)
    seen = torch.zeros(1, 3)
    noise = agent.chain.draw((1, 1), agent.generator)
    states, old, *_ = agent.sample_group(seen, *noise)
    moves = {}
    for shift in (0.2, -0.2):
        for advantage in (1.0, -1.0):
            loss, _ = agent.policy_loss(
                seen, states, old - shift, torch.full((1, 1), advantage), None, {}
            )
            slopes = torch.autograd.grad(loss, list(agent.actor.parameters()), allow_unused=True)
            total = sum(float(x.abs().sum()) for x in slopes if x is not None)
            moves[shift > 0, advantage > 0] = total > 0
    assert moves == {
        (True, True): False,
        (False, True): True,
        (True, False): True,
        (False, False): False,
    }


def test_the_policy_hears_nothing_of_what_all_actions_share():
    # O11: Q + f(s) gives the same loss, and no gradient reaches critics.
    agent = make(preset="ogpo")
    batch = agent.windows(windows(agent))
    seen = agent.encode(batch["observation"])
    noise = agent.chain.draw((4, 8), agent.generator)
    agent.averaged = Valued(lambda chunk: chunk.sum((-2, -1)))
    *_, advantage, _ = agent.sample_group(seen, *noise)
    shift = torch.randn(8)
    agent.averaged = Valued(lambda chunk: chunk.sum((-2, -1)) + shift)
    *_, shifted, _ = agent.sample_group(seen, *noise)
    assert advantage.abs().max() > 0.1
    torch.testing.assert_close(advantage, shifted, atol=1e-5, rtol=1e-4)


def test_the_policy_s_step_leaves_the_critics_alone():
    agent = make()
    before = copy.deepcopy(agent.critic.state_dict())
    agent.update_policy(agent.windows(windows(agent)), {"observation": torch.zeros(0, 3)})
    assert all(torch.equal(before[name], x) for name, x in agent.critic.state_dict().items())
    assert all(p.grad is None for p in agent.critic.parameters())


def test_two_equal_peaks_raise_the_value_of_the_nearer_one():
    # O13: the value rises; that both modes stay is not promised.
    agent = make(
        observation_dim=1,
        action_dim=1,
        horizon=1,
        preset="ogpo",
        group_size=32,
        batch_size=64,
        policy_batch_size=64,
        clip=0.2,
        policy_polyak=0.05,
        learning_rate=1e-2,
    )
    agent.averaged = Valued(lambda chunk: -(chunk.abs() - 0.5).square().sum((-2, -1)))
    seen, none = {"observation": torch.zeros(64, 1)}, {"observation": torch.zeros(0, 1)}
    before, _ = moments(agent, 2000)
    for _ in range(200):
        agent.update_policy(seen, none)
    after, _ = moments(agent, 2000)
    value = [-(x.clamp(-1, 1).abs() - 0.5).square().mean() for x in (before, after)]
    assert value[1] > value[0] + 0.02


# --- critics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 4, 8])
def test_minus_one_forever_is_worth_minus_a_hundred(horizon):
    # O8: the fixed point does not depend on the chunk's length.
    agent = make(horizon=horizon, gamma=0.99, polyak=1.0)
    reward = -sum(0.99**k for k in range(horizon))
    fixed = reward / (1 - 0.99**horizon)
    assert fixed == pytest.approx(-100.0)
    agent.averaged = Valued(lambda chunk: torch.full(chunk.shape[:-2], -100.0), 3)
    agent.critic = Valued(lambda chunk: torch.full(chunk.shape[:-2], -100.0), 3)
    batch = agent.windows(windows(agent))
    batch["reward"] = torch.full((8,), reward)
    following = agent.next_value(batch["next", "observation"])
    loss, _ = agent.critic_loss(batch, following)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_cut_windows_teach_only_if_asked_to():
    batches = {}
    for partial in (False, True):
        agent = make(partial_windows=partial)
        batch = agent.windows(windows(agent))
        batch["valid"][:, 1] = False
        batch["weight"] = torch.zeros(8)
        loss, _ = agent.critic_loss(batch, torch.zeros(8))
        batch["action"][:, 1] = 7.0  # what lies behind the episode's end
        again, _ = agent.critic_loss(batch, torch.zeros(8))
        batches[partial] = float(loss)
        assert float(loss) == float(again)
    assert batches[False] == 0.0 < batches[True]


def test_windows_that_begin_broken_teach_nothing():
    agent = make(partial_windows=True)
    batch = agent.windows(windows(agent))
    batch["valid"][:] = False
    assert float(agent.critic_loss(batch, torch.full((8,), -50.0))[0]) == 0.0


def test_a_group_has_at_least_two_chains():
    with pytest.raises(ConfigError, match="group_size = 1: must be >= 2"):
        make(group_size=1)


def test_targets_combine_samples_and_heads_as_the_settings_say():
    agent = make(target="min", target_samples=4, target_sample_mean="median")
    values = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(3))
    agent.averaged = Fixed(values)
    found = agent.next_value(torch.zeros(8, 3))
    expected = values.sort(1).values[:, 1:3].mean(1).amin(0)
    torch.testing.assert_close(found, expected)


# --- imitation of successes ----------------------------------------------------------------------


def test_without_successes_nothing_is_imitated():
    # O12.
    weights = []
    for bc_weight in (0.0, 1.0):
        agent = make(bc_weight=bc_weight, best_of=1)
        for seed in range(3):
            agent.update(windows(agent, seed=seed))
        weights.append(agent.actor.state_dict())
    assert all(torch.equal(weights[0][name], x) for name, x in weights[1].items())


def test_successes_are_imitated():
    agent = make(learning_rate=1e-2, final_learning_rate=1e-2, policy_polyak=1.0, group_size=2)
    agent.averaged = Valued(lambda chunk: chunk.new_zeros(chunk.shape[:-2]), 3)
    wanted = torch.full((1, 2, 2), 0.5)
    for seed in range(150):
        batch = agent.windows(windows(agent, wins=4, seed=seed, action=wanted))
        agent.update_policy(
            {k: x[:8] for k, x in batch.items()}, {k: x[8:] for k, x in batch.items()}
        )
    chunks = agent.propose(torch.zeros(64, 3), 1, agent.generator, explore=False)[0]
    assert (chunks - 0.5).abs().mean() < 0.15


def test_only_the_released_code_imitates_whatever_there_is():
    none = {"observation": torch.zeros(0, 3), "reward": torch.zeros(0)}
    for preset in PRESETS:
        agent = make(preset=preset)
        metrics = agent.update_policy(agent.windows(windows(agent)), none)
        assert ("loss/bc" in metrics) == (preset == "reproduce")


# --- acting --------------------------------------------------------------------------------------


def test_the_critics_choose_among_candidates():
    agent = make(best_of=16)
    agent.averaged = Valued(lambda chunk: chunk.sum((-2, -1)), 3)
    seen = torch.zeros(32, 3)
    for explore in (True, False):
        one = agent.propose(seen, 1, torch.Generator().manual_seed(0), explore=explore)[0]
        best = agent.choose(seen, torch.Generator().manual_seed(0), explore=explore)
        assert best.shape == (32, 2, 2)
        assert best.sum((-2, -1)).mean() > one.sum((-2, -1)).mean() + 0.3


def test_evaluation_solves_the_flow_and_exploration_adds_noise():
    agent = make(best_of=1, sigma=0.3)
    batch = TensorDict({"observation": torch.zeros(2, 3)}, [2])
    batch["is_init"] = torch.ones(2, 1, dtype=torch.bool)
    chunks = {}
    for kind in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM):
        agent.policy.start(5)
        with set_exploration_type(kind):
            chunks[kind] = agent.policy(batch.clone())["action"]
    noise, _ = agent.chain.draw((1, 2), torch.Generator().manual_seed(5))
    solved = agent.average.sample(torch.zeros(2, 3), noise)[0].clamp(-1, 1)[:, 0]
    torch.testing.assert_close(chunks[ExplorationType.DETERMINISTIC], solved)
    assert not torch.allclose(chunks[ExplorationType.RANDOM], solved)


# --- settings ------------------------------------------------------------------------------------


def test_presets_are_what_the_paper_compares():
    plain = Settings(preset="ogpo").variant
    assert (plain.advantage, plain.bc_weight, plain.best_of) == ("mean", 0.0, 1)
    default = Settings().variant
    assert (default.advantage, default.bc_weight, default.best_of) == ("conservative", 1.0, 8)
    assert Settings(preset="ogpo_plus").variant.advantage == "mean"
    released = make(preset="reproduce")
    assert released.chain._options["correction"] == "official"
    assert released._optimizers["critic"].learning_rate == released.settings.learning_rate
    assert Settings(best_of=3).variant.best_of == 3


def test_the_step_size_rises_and_falls():
    agent = make(learning_rate=1.0, final_learning_rate=0.5, warmup_updates=10, decay_updates=100)
    assert agent.learning_rate(0) == pytest.approx(0.1)
    assert agent.learning_rate(10) == 1.0
    assert agent.learning_rate(60) == pytest.approx(0.75)
    assert agent.learning_rate(1000) == 0.5


def test_an_environment_that_tells_no_success_is_refused_where_it_matters():
    with pytest.raises(ConfigError, match="does not tell success"):
        make(tells_success=False)
    assert make(tells_success=False, preset="ogpo").successes == 0


def test_it_needs_a_policy_to_begin_from():
    with pytest.raises(ConfigError, match="init="):
        make().check_ready()


@pytest.mark.parametrize(
    ("name", "value"),
    [("preset", "best"), ("advantage", "sum"), ("last_steps", 9), ("policy_batch_size", 9)],
)
def test_settings_out_of_bounds_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"agent.{name}"):
        make(**{name: value})

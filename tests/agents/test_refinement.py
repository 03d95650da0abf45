"""GoRL's refinement: what the decoder learns from, which weights stay, what the encoder keeps."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.agents.gorl import Settings, fit_decoder
from genpol.policies.latent import GaussianDecoder

SMALL = {
    "rollout_steps": 10,
    "epochs": 2,
    "minibatches": 2,
    "actor_hidden": [16],
    "critic_hidden": [16],
    "decoder_hidden": [32],
    "fit_batch_size": 256,
    "fit_steps": 20,
    "refinement_steps": 1,
    "max_refinements": 1,
    "target_kl": 0.0,
}
ENVS = 20


def make(**settings):
    """Return an agent whose refinement takes one rollout, and by default is the first update."""
    specs = Specs(observation_dim=1, action_dim=1, num_envs=ENVS)
    return agents.make("gorl", Settings(**(SMALL | {"stage_steps": [1]} | settings)), specs, seed=0)


def play(agent, observation, reward=torch.zeros_like, *, diverged=None):
    """Return one-step episodes ``[num_envs, time]`` of the stochastic policy."""
    batch = TensorDict({"observation": observation}, observation.shape[:2])
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        agent.policy(batch)
    yes = torch.ones(*observation.shape[:2], 1, dtype=torch.bool)
    after = {
        "observation": observation,
        "reward": reward(batch["action"]),
        "done": yes,
        "terminated": yes,
        "truncated": ~yes,
        "diverged": ~yes if diverged is None else diverged,
    }
    batch["next"] = TensorDict(after, batch.shape)
    return batch


def states(seed, *, envs=ENVS, steps=10, centre=0.0):
    draw = torch.Generator().manual_seed(seed)
    return centre + torch.randn(envs, steps, 1, generator=draw)


def test_the_decoder_learns_actions_and_not_latents():
    # Latents have deviation 1, the actions behind a gain of 0.3 have 0.3.
    agent = make(decoder="gaussian", action_gain=0.3, fit_steps=200, fit_learning_rate=3e-2)
    agent.update(play(agent, torch.zeros(ENVS, 50, 1)))
    _, scale = agent.policy.decoder(torch.zeros(1, 1))
    assert scale.item() == pytest.approx(0.3, abs=0.03)


class Recorder(GaussianDecoder):
    """Remembers which observations it was trained and validated on."""

    def __init__(self):
        super().__init__(1, 1, [4], generator=torch.Generator().manual_seed(0))
        self.seen = {True: set(), False: set()}

    def bc_loss(self, observation, action, noise=None, time=None, *, weight=None):
        self.seen[torch.is_grad_enabled()] |= set(observation.flatten().tolist())
        return super().bc_loss(observation, action, noise, time, weight=weight)


def numbered(envs):
    """Return refinement data ``[envs, 10]`` whose observations are the rows' numbers."""
    observation = torch.arange(envs * 10.0).view(envs, 10, 1)
    zero = torch.zeros_like(observation)
    data = {"observation": observation, "decoded": zero, "latent": zero, "diverged": zero.bool()}
    return TensorDict(data, [envs, 10])


def recorded(envs):
    decoder = Recorder()
    fit_decoder(decoder, numbered(envs), Settings(**SMALL), torch.Generator().manual_seed(0))
    return decoder


@pytest.mark.parametrize("envs", [5, 20])
def test_no_row_is_both_trained_and_validated_on(envs):
    seen = recorded(envs).seen
    assert not seen[True] & seen[False]
    assert seen[True] | seen[False] == set(range(envs * 10))


def test_whole_environments_are_held_out():
    held_out = recorded(20).seen[False]
    assert len(held_out) == 20
    assert len({number // 10 for number in held_out}) == 2


def test_of_few_environments_the_last_tenth_of_time_is_held_out():
    assert recorded(5).seen[False] == {9, 19, 29, 39, 49}


def test_decoder_statistics_are_those_of_the_training_rows():
    decoder = recorded(5)
    rows = torch.tensor(sorted(decoder.seen[True]), dtype=torch.float64)
    assert decoder.normalizer.mean.item() == pytest.approx(rows.mean().item())
    assert decoder.normalizer.std.item() == pytest.approx(rows.std(correction=0).item())


class Scripted(GaussianDecoder):
    """Has given validation losses, and remembers its weights at each of them."""

    def __init__(self, losses):
        super().__init__(1, 1, [4], generator=torch.Generator().manual_seed(0))
        self.losses = losses
        self.weights = []

    def bc_loss(self, observation, action, noise=None, time=None, *, weight=None):
        if torch.is_grad_enabled():
            return super().bc_loss(observation, action, noise, time, weight=weight)
        self.weights.append({name: x.clone() for name, x in self.state_dict().items()})
        return torch.tensor(self.losses[len(self.weights) - 1]), {}


def test_the_weights_of_the_best_validation_loss_stay():
    decoder = Scripted([3.0, 1.0, math.nan, 2.0])
    settings = Settings(**(SMALL | {"fit_steps": 4}))
    metrics = fit_decoder(decoder, numbered(20), settings, torch.Generator().manual_seed(0))
    final = decoder.state_dict()
    same = [all(torch.equal(w[name], final[name]) for name in final) for w in decoder.weights]
    assert same == [False, True, False, False]
    assert metrics["decoder/validation_loss"].item() == 1.0


@pytest.mark.parametrize(
    ("restart", "kept"),
    [("gaussian", False), ("fresh", False), ("gaussian_warm_value", True), ("warm_start", True)],
)
def test_where_observation_statistics_come_from_after_a_refinement(restart, kept):
    agent = make(restart=restart, stage_steps=[ENVS * 10])
    before, after = states(1, centre=4.0), states(2, centre=-4.0)
    agent.update(play(agent, before))
    agent.update(play(agent, after))
    assert agent.stage == 1
    expected = before if kept else after
    statistics = agent.policy.encoder.normalizer
    assert statistics.count == ENVS * 10
    assert statistics.mean.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert statistics.std.item() == pytest.approx(expected.std(correction=0).item(), rel=1e-5)


def test_diverged_rows_are_not_in_the_restarted_statistics():
    agent = make()
    observation = states(1)
    observation[3, 4] = 1e6
    diverged = torch.zeros(ENVS, 10, 1, dtype=torch.bool)
    diverged[3, 4] = True
    agent.update(play(agent, observation, diverged=diverged))
    assert agent.policy.encoder.normalizer.count == ENVS * 10 - 1
    assert agent.policy.encoder.normalizer.mean.abs() < 1


FIT = {"decoder_hidden": [32, 32], "fit_batch_size": 256, "fit_learning_rate": 5e-3}
REACH = math.atanh(0.8)


def act(policy, observation):
    """Return the stochastic policy's actions ``[...]`` at observations ``[..., 1]``."""
    batch = TensorDict({"observation": observation}, observation.shape[:-1])
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        return policy(batch)["action"].squeeze(-1)


def energy_distance(a, b):
    """Return ``2 E|a - b| - E|a - a'| - E|b - b'|`` of samples ``[n]``."""

    def gap(x, y):
        return (x[:, None] - y).abs().mean()

    return (2 * gap(a, b) - gap(a, a) - gap(b, b)).item()


def nearness(action, goal):
    """Return a reward between 0 and 1."""
    return torch.exp(-((action - goal) ** 2) / 0.2)


@pytest.mark.parametrize("decoder", ["flow", "diffusion"])
def test_behaviour_is_continuous_across_a_boundary(decoder):
    # Oracle 18. The goal is 0.5 at positive states and -0.5 at negative ones.
    stage = 30 * ENVS * 20
    agent = make(
        decoder=decoder,
        stage_steps=[stage],
        learning_rate=2e-2,
        reward_scale=1.0,
        fit_steps=500,
        **FIT,
    )
    observation = states(3, steps=20).sign()
    goal = 0.5 * observation
    for _ in range(30):
        agent.update(play(agent, observation, lambda action: nearness(action, goal)))
    shown = torch.tensor([[-1.0], [1.0]]).expand(600, 2, 1)
    goals = 0.5 * shown.squeeze(-1)
    old = act(agent.policy, shown)
    prior = torch.tanh(torch.randn(old.shape, generator=agent.generator))
    agent.update(play(agent, observation.repeat(1, 10, 1)))
    assert agent.stage == 1
    new = act(agent.policy, shown)
    returns = [nearness(actions, goals).mean() for actions in (prior, old, new)]
    assert returns[0] < 0.75 * returns[1]  # there is something to lose
    assert returns[2] == pytest.approx(returns[1].item(), rel=0.1)
    for state in (0, 1):
        lost = energy_distance(old[:, state], prior[:, state])
        assert energy_distance(old[:, state], new[:, state]) < 0.1 * lost


class Mixture(nn.Module):
    """An encoder whose mean jumps between two optima faster in the state than a decoder can."""

    def forward(self, observation):
        mean = REACH * torch.sign(torch.sin(1000.0 * observation))
        return mean, torch.full_like(mean, 0.1)


def refined_on_a_mixture(decoder, **settings):
    """Return the actions ``[n]`` at one state behind a decoder refined on :class:`Mixture`."""
    agent = make(decoder=decoder, **(FIT | settings))
    encoder, agent.policy.encoder = agent.policy.encoder, Mixture()
    batch = play(agent, states(4, steps=200))
    agent.policy.encoder = encoder
    agent.update(batch)
    assert agent.stage == 1
    return act(agent.policy, torch.full((4000, 1), 0.3))


def rewarded(actions):
    """Return the share of actions that earn reward: 1 near +0.8 and near -0.8, 0 between."""
    return ((actions.abs() - 0.8).abs() < 0.15).float().mean().item()


@pytest.mark.parametrize("decoder", ["flow", "diffusion"])
def test_generative_decoders_become_bimodal_where_the_encoder_visits_both_optima(decoder):
    actions = refined_on_a_mixture(decoder, fit_steps=500)  # oracle 20
    assert (actions > 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert rewarded(actions) > 0.7
    assert (actions.abs() < 0.4).float().mean() < 0.15


def test_a_gaussian_decoder_stays_unimodal_where_the_encoder_visits_both_optima():
    actions = refined_on_a_mixture("gaussian", fit_steps=300)  # oracle 20
    before_squash = torch.atanh(actions.double().clamp(-0.99999, 0.99999))
    assert before_squash.std().item() == pytest.approx(REACH, abs=0.05)
    middle = (before_squash.abs() < 0.5 * REACH).double().mean().item()
    assert middle == pytest.approx(math.erf(0.5 / math.sqrt(2)), abs=0.1)  # as much as a Gaussian
    assert rewarded(actions) < 0.4


@pytest.fixture
def paper_updates(monkeypatch):
    """Replace the PPO update by a note of the steps it learned from."""
    noted = []

    def note(learner, batch):
        noted.append(batch.numel())
        return {}

    monkeypatch.setattr("genpol.on_policy.OnPolicyLearner.update", note)
    return noted


def test_the_papers_budget_gives_the_papers_number_of_updates(paper_updates):
    # Oracle 19: 2048 environments, 480 steps an update, stages of 60M, 60M, 30M and 30M.
    specs = Specs(observation_dim=1, action_dim=1, num_envs=2048)
    settings = Settings(
        decoder="identity",  # nothing to fit: this is about counting
        rollout_steps=480,
        stage_steps=[60_000_000, 60_000_000, 30_000_000, 30_000_000],
        refinement_steps=512 * 1000,
        max_refinements=4,
    )
    agent = agents.make("gorl", settings, specs, seed=0)
    zero = torch.zeros(1, 1, 1).expand(2048, 480, 1)
    data = {"observation": zero, "latent": zero, "decoded": zero}
    batch = TensorDict(data | {"next": {"diverged": zero.bool()}}, [2048, 480])
    updates, collections = [0] * 4, [0] * 4
    while agent.stage < 4:
        stage, learned = agent.stage, len(paper_updates)
        agent.update(batch)
        if len(paper_updates) > learned:
            updates[stage] += 1
        else:
            collections[stage] += 1
    assert updates == [61, 61, 30, 30]
    assert sum(paper_updates) == 178_913_280
    assert collections == [1, 1, 1, 1]

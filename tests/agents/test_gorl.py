"""GoRL's stage machine, refinement and restarts (GoRL specification, section 9)."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents, configs
from genpol.agent import Specs
from genpol.agents.gorl import Settings, _rows, fit_decoder
from genpol.agents.ppo import Settings as PPOSettings
from genpol.errors import ConfigError, NonFiniteError
from genpol.policies.flow import FlowPolicy
from genpol.policies.latent import GaussianDecoder, IdentityDecoder
from genpol.training.evaluation import evaluate

SPECS = Specs(observation_dim=1, action_dim=1, num_envs=32)
SMALL = {
    "rollout_steps": 8,
    "epochs": 2,
    "minibatches": 2,
    "actor_hidden": [16],
    "critic_hidden": [16],
    "decoder_hidden": [32, 32],
    "fit_batch_size": 256,
    "fit_steps": 20,
}


def make(seed=0, specs=SPECS, **settings):
    return agents.make("gorl", Settings(**(SMALL | settings)), specs, seed=seed)


def collect(agent, env, steps):
    """Return a rollout ``[num_envs, steps]`` of the agent's stochastic policy."""
    with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        return env.rollout(steps, agent.policy, break_when_any_done=False)


def train(agent, env, updates):
    stages = []
    for _ in range(updates):
        metrics = agent.update(collect(agent, env, agent.settings.rollout_steps))
        stages.append(int(metrics["stage"]))
    return stages


def test_identity_decoder_is_gaussian_ppo_bit_for_bit(point_mass):
    shared = {name: SMALL[name] for name in SMALL if not name.startswith(("decoder", "fit"))}
    specs = Specs(observation_dim=1, action_dim=1, num_envs=16)
    ppo = agents.make("ppo", PPOSettings(**shared), specs, seed=3)
    gorl = make(seed=3, specs=specs, decoder="identity", max_refinements=0)
    for agent in (ppo, gorl):
        env = point_mass(num_envs=16, seed=5)
        for _ in range(3):
            agent.update(collect(agent, env, 8))
    pairs = zip(ppo.policy.encoder.parameters(), gorl.policy.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


ENTROPY, PRIOR, SCALE = 0.01, 1e-2, 0.1


class Reference:
    """Gaussian PPO that bounds its actions by tanh, written out from the specification alone."""

    def __init__(self, agent):
        encoder = agent.policy.encoder
        self.actor = [p.detach().clone().requires_grad_() for p in encoder.actor.parameters()]
        self.critic = [p.detach().clone().requires_grad_() for p in encoder.critic.parameters()]
        self.mean, self.std = encoder.normalizer.mean.clone(), encoder.normalizer.std.clone()
        self.noise = agent.generator.clone_state()

    def network(self, parameters, observation):
        x = ((observation.double() - self.mean) / self.std).clamp(-10, 10).float()
        for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
            hidden = x @ weight.T + bias
            x = hidden * torch.sigmoid(hidden)
        return x @ parameters[-2].T + parameters[-1]

    def policy(self, observation):
        mean, raw = self.network(self.actor, observation).chunk(2, dim=-1)
        return torch.distributions.Normal(mean, torch.logaddexp(raw, torch.zeros(())) + 1e-3)

    @torch.no_grad()
    def play(self, env, steps):
        """Return observations, latents, rewards, true next observations and ends ``[N, T]``."""
        state, rows = env.reset(), []
        for _ in range(steps):
            policy = self.policy(state["observation"])
            draw = torch.empty_like(policy.mean).normal_(generator=self.noise)
            latent = policy.mean + policy.stddev * draw
            now, after = env.step_and_maybe_reset(state.clone().set("action", latent.tanh()))
            end = now["next", "done"]
            following = now["next", "observation"]
            reward = now["next", "reward"]
            rows.append((state["observation"], latent, reward, following, end))
            state = after
        return [torch.stack(column, dim=1) for column in zip(*rows, strict=True)]

    def losses(self, observation, latent, reward, following, end, *, gamma=0.99, lam=0.95):
        """Return the losses of actor and critic at ratio one; every end is a time limit."""
        with torch.no_grad():
            value = self.network(self.critic, observation)
            delta = SCALE * reward + gamma * self.network(self.critic, following) - value
            advantage = torch.zeros_like(delta)
            for step in reversed(range(delta.shape[1])):
                later = advantage[:, step + 1] if step + 1 < delta.shape[1] else 0.0
                advantage[:, step] = delta[:, step] + gamma * lam * later * ~end[:, step]
            target = advantage + value
            advantage = (advantage - advantage.mean()) / (advantage.var(correction=0).sqrt() + 1e-8)
        policy = self.policy(observation)
        log_prob = policy.log_prob(latent)
        ratio = (log_prob - log_prob.detach()).exp()
        normal = torch.distributions.Normal(0.0, 1.0)
        actor = (
            -(ratio * advantage).mean()
            - ENTROPY * policy.entropy().mean()
            + PRIOR * torch.distributions.kl_divergence(policy, normal).mean()
        )
        return actor, (target - self.network(self.critic, observation)).square().mean()


@pytest.fixture
def first_minibatch(point_mass):
    """Return agent and reference with their rollouts, the agent's metrics before any step."""
    specs = Specs(observation_dim=1, action_dim=1, num_envs=16)
    options = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e6, "encoder_init": "fresh"}
    agent = make(specs=specs, entropy_coefficient=ENTROPY, **options)
    # Deviations near zero would magnify rounding errors.
    agent.policy.encoder.actor.net.linears[-1].weight.data.mul_(0.3)
    agent.update(collect(agent, point_mass(num_envs=16, seed=4), 25))  # moves critic and statistics
    reference = Reference(agent)
    batch = collect(agent, point_mass(num_envs=16, seed=5), 25)
    rows = reference.play(point_mass(num_envs=16, seed=5), 25)
    return agent, reference, batch, rows, agent.update(batch)


def test_stage_0_acts_as_gaussian_ppo_behind_a_tanh(first_minibatch):
    _, reference, batch, rows, _ = first_minibatch  # oracle 1
    after = batch["next"]
    names = ("observation", "latent", "reward", "following", "end")
    ours = (batch["observation"], batch["latent"], after["reward"], after["observation"])
    for name, mine, other in zip(names, (*ours, after["done"]), rows, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-6, msg=name)
    log_prob = reference.policy(rows[0]).log_prob(rows[1]).sum(-1)
    torch.testing.assert_close(batch["latent_log_prob"], log_prob, atol=1e-5, rtol=1e-6)


def test_stage_0_has_the_losses_and_gradients_of_gaussian_ppo(first_minibatch):
    agent, reference, _, rows, metrics = first_minibatch  # oracle 1
    actor, critic = reference.losses(*rows)
    assert metrics["loss/policy"].item() == pytest.approx(actor.item(), abs=1e-6)
    assert metrics["loss/value"].item() == pytest.approx(critic.item(), abs=1e-6)
    (actor + critic).backward()
    encoder = agent.policy.encoder
    ours = [*encoder.actor.parameters(), *encoder.critic.parameters()]
    for mine, other in zip(ours, [*reference.actor, *reference.critic], strict=True):
        assert other.grad.abs().max() > 1e-4
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-6, rtol=1e-5)


def test_stages_follow_the_budget(bandit):
    # 256 actions per update, each held for 2 environment steps: 512 steps.
    specs = Specs(observation_dim=1, action_dim=1, num_envs=32, action_repeat=2)
    agent = make(specs=specs, stage_steps=[1024, 512], refinement_steps=1024, max_refinements=2)
    stages = train(agent, bandit(torch.zeros_like, num_envs=32), 9)
    # Two updates, two batches of data, one update, two batches, and then the last stage for good.
    assert stages == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert agent.gradient_steps == (2 + 1 + 2) * 4 + 2 * 20


def test_decoder_is_frozen_during_a_stage(bandit):
    agent = make(stage_steps=[256], refinement_steps=256, max_refinements=1)
    env = bandit(torch.zeros_like, num_envs=32)
    train(agent, env, 2)
    assert isinstance(agent.policy.decoder, FlowPolicy)
    before = copy.deepcopy(agent.policy.decoder.state_dict())
    train(agent, env, 3)
    after = agent.policy.decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in agent.policy.decoder.parameters())


@pytest.mark.parametrize(
    ("restart", "gaussian", "critic_kept"),
    [
        ("gaussian", True, False),
        ("gaussian_warm_value", True, True),
        ("fresh", False, False),
        ("warm_start", False, True),
    ],
)
def test_restarts(bandit, restart, gaussian, critic_kept):
    agent = make(stage_steps=[256], refinement_steps=256, restart=restart)
    env = bandit(lambda x: x, num_envs=32)
    train(agent, env, 1)
    critic = copy.deepcopy(agent.policy.encoder.critic.state_dict())
    train(agent, env, 1)
    mean, scale = agent.policy.encoder(torch.randn(50, 1))
    exactly = bool((mean.abs() < 1e-5).all() and ((scale - 1).abs() < 1e-5).all())
    assert exactly == gaussian
    now = agent.policy.encoder.critic.state_dict()
    assert all(torch.equal(critic[name], now[name]) for name in critic) == critic_kept


def dataset(actions, latents=None):
    """Return refinement data ``[envs, time]`` with constant observations."""
    data = {"observation": torch.zeros(*actions.shape[:2], 1), "decoded": actions}
    data["latent"] = torch.randn_like(actions) if latents is None else latents
    data["diverged"] = torch.zeros(*actions.shape[:2], 1, dtype=torch.bool)
    return TensorDict(data, actions.shape[:2])


def fit(decoder, data, **settings):
    generator = torch.Generator().manual_seed(0)
    fit_decoder(decoder, data, Settings(**(SMALL | settings)), generator)
    return decoder


def fitted_to_two_atoms(**settings):
    """Return a flow decoder fitted to the atoms -1 and 1 of equal mass."""
    generator = torch.Generator().manual_seed(1)
    actions = torch.tensor([-1.0, 1.0]).repeat(40, 50).unsqueeze(-1)
    decoder = FlowPolicy(1, 1, [32, 32], generator=generator)
    fit(decoder, dataset(actions), fit_batch_size=2048, fit_learning_rate=1e-2, **settings)
    return decoder.requires_grad_(False)


def drawn(decoder):
    """Return 20,000 actions of a decoder."""
    noise = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1))
    return decoder.sample(torch.zeros(20_000, 1), noise)


@pytest.fixture(scope="module")
def two_atoms():
    """Return such a decoder after a short fit."""
    return fitted_to_two_atoms(fit_steps=500)


def test_flow_fitted_to_two_atoms_keeps_both_modes(two_atoms):
    # Between seeds, the share varies by 0.012 after so short a fit.
    sample = drawn(two_atoms)
    assert (sample > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert (sample.abs() - 1).abs().median() < 0.1
    assert (sample.abs() < 0.5).float().mean() < 0.1


@pytest.mark.slow
def test_flow_fitted_to_two_atoms_halves_their_mass():
    sample = drawn(fitted_to_two_atoms(fit_steps=3000))  # oracle 14
    assert (sample > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("mode", [-1.0, 1.0])
def test_ppo_moves_the_latent_mean_across_zero_to_the_rewarded_mode(bandit, two_atoms, mode):
    # Oracle 14; it starts on the side of the other mode.
    agent = make(learning_rate=2e-2, target_kl=0.0, reward_scale=1.0)
    agent.policy.decoder = two_atoms
    agent.policy.encoder.actor.net.linears[-1].bias.data[0] = -mode
    train(agent, bandit(lambda action: (mode * action > 0).float(), num_envs=32), 20)
    mean, _ = agent.policy.encoder(torch.zeros(1, 1))
    assert mode * mean.item() > 0.5


def test_gaussian_decoder_fitted_to_two_atoms_is_unimodal_between_them():
    generator = torch.Generator().manual_seed(0)
    actions = torch.randint(0, 2, (40, 100, 1), generator=generator) * 2.0 - 1.0
    decoder = GaussianDecoder(1, 1, [32], generator=generator)
    fit(decoder, dataset(actions), fit_steps=1000, fit_batch_size=512)
    mean, scale = decoder(torch.zeros(1, 1))
    assert mean.item() == pytest.approx(0.0, abs=0.1)
    assert scale.item() == pytest.approx(1.0, abs=0.05)


def test_fit_does_not_depend_on_the_latents_unless_coupled():
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(20, 10, 1, generator=generator)
    results = {}
    for coupled in (False, True):
        weights = []
        for seed in (1, 2):
            latents = torch.randn(20, 10, 1, generator=torch.Generator().manual_seed(seed))
            decoder = FlowPolicy(1, 1, [8], generator=torch.Generator().manual_seed(0))
            fit(decoder, dataset(actions, latents), coupled=coupled)
            weights.append(decoder.state_dict())
        results[coupled] = all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert results == {False: True, True: False}


def test_targets_are_clipped_before_the_squash():
    data = dataset(torch.tensor([[[50.0], [-4.0], [0.5]]]))
    assert _rows(data, Settings(target_clip=3.0))["decoded"].flatten().tolist() == [3.0, -3.0, 0.5]
    assert _rows(data, Settings(target_clip=0.0))["decoded"].flatten().tolist() == [50, -4, 0.5]


def test_diverged_rows_are_no_targets():
    data = dataset(torch.tensor([[[0.5], [2.0]], [[-0.5], [1.0]]]))
    data["diverged"][0, 1] = True
    assert _rows(data, Settings())["decoded"].flatten().tolist() == [0.5, -0.5, 1.0]


def test_decoder_that_never_was_finite_is_not_installed():
    data = dataset(torch.full((20, 10, 1), float("nan")))
    decoder = FlowPolicy(1, 1, [8], generator=torch.Generator().manual_seed(0))
    with pytest.raises(NonFiniteError, match="decoder"):
        fit(decoder, data)


@pytest.mark.parametrize("num_envs", [1, 9, 10])
def test_refinement_works_with_few_environments(bandit, num_envs):
    specs = Specs(observation_dim=1, action_dim=1, num_envs=num_envs)
    agent = make(specs=specs, stage_steps=[16], refinement_steps=16, max_refinements=1)
    train(agent, bandit(lambda x: x, num_envs=num_envs), 5)
    assert agent.stage == 1


def test_recipes_give_ppo_what_they_give_gorl():
    # Otherwise the comparison would measure the tuning.
    folder = Path(configs.__file__).parent / "recipe"
    recipes = {path.stem: OmegaConf.load(path) for path in folder.glob("*.yaml")}
    shared = {field.name for field in fields(PPOSettings)}
    for name, recipe in recipes.items():
        if name.startswith("gorl_"):
            ppo = recipes[name.replace("gorl_", "ppo_")]
            common = {key: value for key, value in recipe.agent.items() if key in shared}
            assert common == dict(ppo.agent)
            assert {k: v for k, v in recipe.items() if k != "agent"} == {
                k: v for k, v in ppo.items() if k != "agent"
            }


def test_settings_refuse_an_unknown_decoder_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"agent\.decoder = 'flwo'.*'flow'"):
        Settings(decoder="flwo")
    with pytest.raises(ConfigError, match=r"agent\.stage_steps = \[\]"):
        Settings(stage_steps=[])


@pytest.mark.parametrize("decoder", ["flow", "diffusion", "gaussian", "identity"])
def test_weights_of_any_stage_load_into_a_new_agent(bandit, decoder):
    agent = make(stage_steps=[256], refinement_steps=256, decoder=decoder)
    env = bandit(lambda x: x, num_envs=32)
    train(agent, env, 3)
    other = make(seed=9, stage_steps=[256], refinement_steps=256, decoder=decoder)
    other.load_state_dict(agent.state_dict())
    other.load_training_state(agent.training_state())
    assert isinstance(other.policy.decoder, IdentityDecoder) == (decoder == "identity")
    for each in (agent, other):
        each.update(collect(each, bandit(lambda x: x, num_envs=32, seed=4), 8))
    pairs = zip(agent.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_evaluation_acts_by_the_latent_mean(bandit):
    agent = make(stage_steps=[256], refinement_steps=256)
    env = bandit(lambda x: x, num_envs=8)
    train(agent, bandit(lambda x: x, num_envs=32), 2)
    first = evaluate(agent.policy, env, episodes=8, seed=0).returns
    second = evaluate(agent.policy, env, episodes=8, seed=0).returns
    assert torch.equal(first, second)
    assert first.std() < 1e-6  # same observation, same action

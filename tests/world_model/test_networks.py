"""The networks of the world model (MBDPO specification, oracles 14 and 16)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.world_model import ModelSize, WorldModel, WorldModelSettings
from genpol.world_model.networks import ScoreNetwork
from genpol.world_model.settings import SIZES, episode_discount

SMALL = ModelSize(encoder_dim=16, mlp_dim=16, latent_dim=16, encoder_layers=2, num_critics=3)

# Millions, for observations of 39, actions of 6 and 80 tasks of embedding 96: TD-MPC2, with the
# classifier of the energy, with the score network besides.
PUBLISHED = {
    "1.7M": (1.44, 1.67, 1.95),
    "6M": (5.39, 5.97, 6.60),
    "21M": (18.97, 20.92, 22.96),
    "54M": (48.79, 53.57, 58.52),
    "340M": (317.38, 340.24, 363.48),
}


def make(**options):
    options = {"gamma": (0.99,) * max(1, len(options.get("action_dims", ())))} | options
    draw = torch.Generator().manual_seed(0)
    return WorldModel(3, 2, SMALL, horizon=3, generator=draw, **options)


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_as_many_as_published(size):
    """Oracle 14, on networks without memory."""
    counted = []
    for energy, score in ((False, False), (True, False), (True, True)):
        with torch.device("meta"):
            model = WorldModel(
                39,
                6,
                SIZES[size],
                horizon=3,
                gamma=(0.99,) * 80,
                energy=energy,
                score=score,
                action_dims=(6,) * 80,
            )
        counted.append(sum(x.numel() for x in model.parameters() if x.requires_grad) / 1e6)
    assert counted == pytest.approx(PUBLISHED[size], abs=0.0051)


@pytest.mark.parametrize(
    ("actions", "gamma"), [(500, 0.99), (200, 0.975), (100, 0.95), (1000, 0.995), (10_000, 0.995)]
)
def test_the_discount_follows_from_the_length_of_episodes(actions, gamma):
    """Oracle 14."""
    assert episode_discount(actions) == pytest.approx(gamma)
    specs = Specs(
        observation_dim=1,
        action_dim=1,
        num_envs=1,
        action_repeat=2,
        max_episode_steps=2 * actions,
    )
    assert WorldModelSettings().discounts(specs) == pytest.approx((gamma,))
    assert WorldModelSettings(gamma=0.5).discounts(specs) == (0.5,)
    assert WorldModelSettings().warmup(specs) == 2 * max(1000, 5 * actions)
    assert WorldModelSettings(warmup_steps=7).warmup(specs) == 7


def test_single_widths_replace_those_of_a_size():
    settings = WorldModelSettings(size="6M", latent_dim=64, num_critics=2)
    expected = ModelSize(
        encoder_dim=256, mlp_dim=512, latent_dim=64, encoder_layers=2, num_critics=2
    )
    assert settings.widths == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [("horizon", 0), ("size", "5M"), ("dropout", 1.0), ("gamma", 1.5), ("target_critics", "all")],
)
def test_settings_out_of_bounds_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"agent.{name}"):
        WorldModelSettings(**{name: value})


def test_rewards_values_and_energies_begin_at_zero():
    model = make(energy=True)
    latent, action, task = torch.rand(5, 16), torch.rand(5, 2), model.task()
    pair = model.pair(latent, action, task)
    assert model.scalar.decode(model.reward(pair)).abs().max() < 1e-5
    assert model.values(latent, action, task, members=None).abs().max() < 1e-5
    assert (model.energy(pair) == 0).all()


def test_averaged_critics_begin_as_the_live_ones_and_follow_them():
    model = make()
    for own, live in zip(model.averaged.parameters(), model.critics.parameters(), strict=True):
        assert own.equal(live)
        assert not own.requires_grad
    with torch.no_grad():
        for live in model.critics.parameters():
            live.add_(1.0)
    before = [x.clone() for x in model.averaged.parameters()]
    model.follow(0.01)
    for own, old in zip(model.averaged.parameters(), before, strict=True):
        torch.testing.assert_close(own, old + 0.01)


def test_latents_are_simplices_at_any_horizon():
    model = make()
    task = model.task()
    latents = model.imagine(model.encode(torch.randn(4, 3), task), torch.rand(5, 4, 2), task)
    assert latents.shape == (6, 4, 16)
    torch.testing.assert_close(latents.sum(-1), torch.full((6, 4), 2.0))


def test_the_policy_prior_is_a_tanh_normal_of_bounded_width():
    model = make()
    with torch.no_grad():
        model.policy.biases[-1][:] = torch.tensor([0.3, -0.2, -50.0, 50.0])
        model.policy.weights[-1].zero_()
    noise = torch.randn(7, 2)
    drawn = model.act(torch.rand(7, 16), noise, model.task())
    torch.testing.assert_close(drawn.log_std, torch.tensor([-10.0, 2.0]).expand(7, 2))
    wanted = torch.tanh(torch.tensor([0.3, -0.2]) + drawn.log_std.exp() * noise)
    torch.testing.assert_close(drawn.action, wanted)
    mode = model.act(torch.rand(7, 16), None, model.task()).action
    torch.testing.assert_close(mode, torch.tanh(torch.tensor([0.3, -0.2])).expand(7, 2))


def test_scores_tell_levels_apart_as_published():
    """sin, then cos of tau exp(-ln(1e4) i / 31)."""
    network = ScoreNetwork(4, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    own = network.net.forward
    network.net.forward = lambda x: seen.append(x) or own(x)
    state, noisy = torch.randn(2, 4), torch.randn(2, 3, 2)
    found = network(state, noisy, torch.tensor([0, 7]))
    assert found.shape == (2, 3, 2)
    assert found.abs().max() <= 1.0
    angles = torch.tensor([0.0, 7.0])[:, None] * 1e4 ** (-torch.arange(32) / 31)
    expected = torch.cat((state, noisy.view(2, 6), angles.sin(), angles.cos()), -1)
    torch.testing.assert_close(seen[0], expected)


# -- tasks ---------------------------------------------------------------------------------------


def test_tasks_are_told_to_every_network_behind_the_state():
    model = make(action_dims=(2, 1, 2), task_dim=4)
    task = model.task(torch.tensor([2, 0]))
    assert task.embedding.equal(model.tasks[[2, 0]])
    latent, action = torch.rand(5, 2, 16), torch.rand(5, 2, 2)
    expected = torch.cat((latent, model.tasks[[2, 0]].expand(5, 2, 4), action), -1)
    assert model.pair(latent, action, task).equal(expected)
    one, other = (model.encode(torch.ones(1, 3), model.task(torch.tensor([i]))) for i in (0, 1))
    assert not torch.allclose(one, other)


def test_embeddings_begin_small_and_stay_within_norm_one():
    model = make(action_dims=(2,) * 50, task_dim=64)
    assert model.tasks.abs().max() <= 0.02
    assert model.tasks.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.05)
    with torch.no_grad():
        model.tasks[3] *= 1000.0
    small = model.tasks[4].clone()
    direction = F.normalize(model.tasks[3].clone(), dim=0)
    model.follow(0.0)
    torch.testing.assert_close(model.tasks[3], direction, rtol=1e-4, atol=1e-6)
    assert model.tasks[4].equal(small)


def test_masks_hide_what_a_task_does_not_use():
    """Oracle 16."""
    model = make(action_dims=(2, 1))
    task = model.task(torch.tensor([1, 0]))
    assert task.hide(torch.ones(4, 2, 2))[0].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    plans = task.hide_plans(torch.ones(2, 5, 3, 2))
    assert (plans[0, ..., 1] == 0).all()
    assert (plans[1] == 1).all()
    assert task.repeat(2).mask.tolist() == task.mask.repeat_interleave(2, 0).tolist()
    assert task.tile(2).mask.tolist() == task.mask.repeat(2, 1).tolist()
    second = task.rows(torch.tensor([1]))
    assert second.mask.tolist() == [[True, True]]
    assert second.embedding.equal(model.tasks[:1])
    assert task.width(2).tolist() == [1.0, 2.0]
    assert model.task().width(2) == 2.0
    drawn = model.act(torch.rand(2, 16), torch.randn(2, 2), task).action
    assert drawn[0, 1] == 0.0
    assert drawn[1, 1] != 0.0

"""Learned scores and inverse dynamics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.errors import ConfigError
from genpol.nn.optimizer import GuardedOptimizer
from genpol.policies.correction import CorrectionSettings, ScoreCorrector
from genpol.policies.density import DenoisingScore, InverseDynamics, Standardizer

DOUBLE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def minimise(model, loss, iterations=25):
    """Take a smooth loss of all the data to its minimum."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=iterations,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def train(model, data, steps, *, batch=256, learning_rate=3e-3, seed=1):
    """Learn a score by Adam, its step size decaying to zero."""
    (state, action), draw = data, generator(seed)
    optimizer = GuardedOptimizer(
        list(model.parameters()), learning_rate, max_grad_norm=math.inf, eps=1e-8
    )
    for step in range(steps):
        optimizer.learning_rate = learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(state), (batch,), generator=draw)
        noise = torch.randn(batch, model.noise_dim, generator=draw, dtype=state.dtype)
        level = torch.randint(len(model.levels), (batch,), generator=draw)
        optimizer.step(model.loss(state[rows], action[rows], noise, level)[0])


def standardise(model, *columns):
    together = torch.cat(columns, dim=-1)
    model.set_statistics(together.mean(0), together.std(0, correction=0))


# --- oracle 1: linear models -------------------------------------------------------------------

FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.3, 0.0], [-0.2, 0.1, 0.15]], dtype=DOUBLE)


@pytest.mark.parametrize(
    ("sigma", "bound", "scale"),
    [
        (0.5, 0.02, (1.0, 1.0, 1.0)),
        (0.1, 0.05, (2.0, 0.5, 0.25)),
        (0.05, 0.05, (1.0, 1.0, 1.0)),
    ],
)
def test_a_linear_model_is_the_score_of_a_blurred_gaussian(sigma, bound, scale):
    """The blur has the standard deviation sigma k in raw units, and the gradient is raw."""
    model = DenoisingScore(2, 1, (), num_levels=1, max_noise=sigma, min_noise=sigma).double()
    scale = torch.tensor(scale, dtype=DOUBLE)
    model.set_statistics(torch.zeros(3), scale)
    y = (normal(200_000, 3) @ FACTOR.T) * scale
    noise, level = normal(200_000, 3, seed=1), torch.zeros(200_000, dtype=torch.int64)
    minimise(model, lambda: model.loss(y[:, :2], y[:, 2:], noise, level)[0])
    at = torch.eye(3, dtype=DOUBLE)
    zero = torch.zeros(3, 3, dtype=DOUBLE)
    found = torch.cat(model.score(at[:, :2], at[:, 2:], sigma), -1)
    found = found - torch.cat(model.score(zero[:, :2], zero[:, 2:], sigma), -1)
    blurred = FACTOR @ FACTOR.T + sigma**2 * torch.eye(3, dtype=DOUBLE)
    expected = -torch.linalg.inv(torch.diag(scale) @ blurred @ torch.diag(scale))
    assert (found - expected).norm() / expected.norm() < bound


def test_noise_on_actions_alone_gives_the_conditional_score():
    """At correlation 0.8 it vanishes at 0.8 s whatever the blur; there is no state block."""
    sigma = 0.3
    model = DenoisingScore(
        1, 1, (), noise_on="action", num_levels=1, max_noise=sigma, min_noise=sigma
    ).double()
    state = normal(200_000, 1)
    action = 0.8 * state + 0.6 * normal(200_000, 1, seed=1)
    noise, level = normal(200_000, 1, seed=2), torch.zeros(200_000, dtype=torch.int64)
    minimise(model, lambda: model.loss(state, action, noise, level)[0])
    at = torch.tensor([[1.0], [1.0], [-0.5]], dtype=DOUBLE)
    a = torch.tensor([[0.8], [0.0], [0.3]], dtype=DOUBLE)
    of_state, found = model.score(at, a, sigma)
    assert of_state is None
    expected = (0.8 * at - a) / (0.36 + sigma**2)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


# --- oracle 2: several levels at once ----------------------------------------------------------

MODES = torch.tensor([[-0.8, 0.6], [0.8, -0.6], [0.9, 0.9]])
SPREAD = 0.1


def mixture(number, seed):
    draw = generator(seed)
    which = torch.randint(len(MODES), (number,), generator=draw)
    return MODES[which] + SPREAD * torch.randn(number, 2, generator=draw)


def mixture_score(y, sigma):
    variance = SPREAD**2 + sigma**2
    away = MODES - y.unsqueeze(-2)
    share = torch.softmax(-away.square().sum(-1) / (2 * variance), dim=-1)
    return (share.unsqueeze(-1) * away).sum(-2) / variance


def assess(model, sigma):
    """Return relative squared error and mean cosine of a score at blurred samples."""
    y = mixture(20_000, 7)
    y = y + sigma * torch.randn(y.shape, generator=generator(8))
    with torch.no_grad():
        found = torch.cat(model.score(y[:, :1], y[:, 1:], sigma), -1)
    true = mixture_score(y, sigma)
    error = (found - true).square().sum(-1).mean() / true.square().sum(-1).mean()
    return float(error), float(torch.cosine_similarity(found, true, dim=-1).mean())


@pytest.mark.parametrize(
    ("steps", "batch", "errors", "cosine"),
    [
        (500, 256, (0.05, 0.05), 0.98),
        pytest.param(5000, 512, (0.01, 0.02), 0.99, marks=pytest.mark.slow),
    ],
)
def test_one_network_learns_the_scores_of_all_levels(steps, batch, errors, cosine):
    # Observed after 5000 steps: errors of 0.07 to 0.21 %, cosines of 0.998 and above.
    model = DenoisingScore(
        1, 1, (128, 128, 128), num_levels=8, min_noise=0.05, generator=generator()
    )
    y = mixture(200_000, 0)
    train(model, (y[:, :1], y[:, 1:]), steps, batch=batch)
    for sigma in [*model.levels.tolist(), 0.2]:  # 0.2 lies between two levels
        error, likeness = assess(model, sigma)
        assert error < errors[0 if sigma >= 0.1 else 1], sigma
        assert likeness > cosine, sigma


# --- oracle 10, learned: one Tweedie step on noised actions --------------------------------------


def test_a_learned_step_takes_noise_off_actions():
    """The squared distance to clean actions falls to q^2 / (q^2 + p^2), and so does the support."""
    q, p = 0.1, 0.1
    state = normal(20_000, 1, dtype=torch.float32)
    clean = 0.3 * state + q * normal(20_000, 1, seed=1, dtype=torch.float32)
    model = DenoisingScore(
        1, 1, (64, 64), noise_on="action", num_levels=4, min_noise=0.1, generator=generator()
    )
    standardise(model, state, clean)
    train(model, (state, clean), 500, batch=256)
    sigma = p / float(model.standardizer.scale[-1])  # levels are in units of the spread
    noised = clean + p * normal(20_000, 1, seed=2, dtype=torch.float32)
    with torch.no_grad():
        moved = noised + model.displacement(state, noised, sigma)[1]
        before = model.support_distance(state, noised, sigma).mean()
        after = model.support_distance(state, moved, sigma).mean()
    share = (moved - clean).square().mean() / (noised - clean).square().mean()
    assert share.item() == pytest.approx(q**2 / (q**2 + p**2), rel=0.05)
    assert after < 0.7 * before


# --- oracle 6: units ---------------------------------------------------------------------------


def walk():
    """Return states, actions and next states of an oscillator that is driven at random."""
    state = normal(500, 2)
    action = (0.3 * normal(500, 1, seed=1)).clamp(-0.9, 0.9)
    return state, action, state + 0.1 * torch.cat((state[:, 1:], action - state[:, :1]), -1)


def fitted(of_states, of_actions):
    """Return a corrector of the walk in other units, learned with the same seed."""
    state, action, after = walk()
    state, action, after = of_states * state, of_actions * action, of_states * after
    score = DenoisingScore(2, 1, (16, 16), generator=generator()).double()
    inverse = InverseDynamics(2, 1, (16,), generator=generator()).double()
    standardise(score, state, action)
    moves = after - state
    inverse.set_statistics(state.mean(0), state.std(0), moves.mean(0), moves.std(0))
    train(score, (state, action), 60, batch=64)
    optimizer = GuardedOptimizer(list(inverse.parameters()), 3e-3, max_grad_norm=math.inf, eps=1e-8)
    for _ in range(60):
        optimizer.step(inverse.loss(state, after, action)[0])
    return ScoreCorrector(score, inverse)


@pytest.mark.parametrize(
    ("of_states", "of_actions", "state_weight"), [(10.0, 0.5, 0.0), (10.0, 1.0, 0.5)]
)
def test_units_do_not_matter(of_states, of_actions, state_weight):
    """Rescaled data give rescaled corrections; tanh forbids it for auxiliary actions' own scale."""
    options = {"action_weight": 1.0, "state_weight": state_weight, "max_norm": math.inf}
    settings = CorrectionSettings(steps=2, noise_level=0.3, **options)
    state, action = normal(20, 2, seed=5), (0.4 * normal(20, 1, seed=6)).clamp(-0.9, 0.9)
    plain, found = fitted(1.0, 1.0).correct(state, action, settings)
    other, _ = fitted(of_states, of_actions).correct(
        of_states * state, of_actions * action, settings
    )
    assert found["correction"].mean() > 0.01
    assert (found["state_step"].mean() > 0.01) == (state_weight > 0)
    torch.testing.assert_close(other / of_actions, plain, atol=1e-5, rtol=0)


# --- oracle 7: inverse dynamics ----------------------------------------------------------------

DRIFT = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=DOUBLE)
DRIVE = torch.tensor([[0.005, 0.1]], dtype=DOUBLE)
PSEUDO_INVERSE = torch.linalg.pinv(DRIVE.T).squeeze(0)


def test_inverse_dynamics_of_a_linear_system_are_its_pseudo_inverse():
    """In the range where tanh is the identity, one linear layer behind it is enough.

    Off the states that an action leads to, a little noise in the dynamics is what decides.
    """
    small = 0.05
    state = small * normal(20_000, 2)
    action = small * (2 * torch.rand(20_000, 1, generator=generator(1), dtype=DOUBLE) - 1)
    after = state @ DRIFT.T + action @ DRIVE
    noised = after + small * 1e-3 * normal(20_000, 2, seed=2)
    model = InverseDynamics(2, 1, (), init="glorot", generator=generator()).double()
    moves = noised - state
    model.set_statistics(state.mean(0), state.std(0), moves.mean(0), moves.std(0))
    minimise(model, lambda: 1e4 * model.loss(state, noised, action)[0], iterations=200)
    with torch.no_grad():
        assert (model(state, after) - action).abs().max() < 1e-3 * small
        s, a = small * torch.tensor([0.3, -0.2], dtype=DOUBLE), small * 0.5
        s2 = DRIFT @ s + a * DRIVE[0]
        u = 0.02 * (-s2 / 0.25)
        difference = model(s, s2 + u) - model(s, s2)
    assert difference.item() == pytest.approx(float(PSEUDO_INVERSE @ u), rel=0.01)
    assert difference.item() == pytest.approx(small * 0.10843, rel=0.01)


def test_a_network_learns_which_action_was_taken():
    state = normal(4000, 2, dtype=torch.float32)
    action = 2 * torch.rand(4000, 1, generator=generator(1)) - 1
    after = state @ DRIFT.T.float() + action @ DRIVE.float()
    model = InverseDynamics(2, 1, (64, 64), generator=generator())
    moves = after - state
    model.set_statistics(state.mean(0), state.std(0), moves.mean(0), moves.std(0))
    optimizer = GuardedOptimizer(list(model.parameters()), 3e-3, max_grad_norm=math.inf, eps=1e-8)
    for step in range(300):
        rows = slice(step % 10 * 400, step % 10 * 400 + 400)
        optimizer.step(model.loss(state[rows], after[rows], action[rows])[0])
    assert (model(state, after) - action).abs().mean() < 0.03


def test_rows_that_did_not_move_are_not_learned_from():
    model = InverseDynamics(2, 1, (8,), generator=generator())
    state, action = torch.randn(4, 2), torch.rand(4, 1)
    after = state + torch.randn(4, 2)
    still = torch.cat((after[:3], state[3:]))
    torch.testing.assert_close(
        model.loss(state, still, action)[0], model.loss(state[:3], after[:3], action[:3])[0]
    )


# --- the rest ----------------------------------------------------------------------------------


def test_constant_coordinates_are_not_heard_and_not_moved():
    model = DenoisingScore(3, 1, (16,), generator=generator())
    with torch.no_grad():  # it starts with zeros
        model.network.mlp.linears[-1].weight.normal_(generator=generator())
    mean, std = torch.zeros(4), torch.tensor([1.0, 0.0, 2.0, 1.0])
    model.set_statistics(mean, std)
    state, action = torch.randn(5, 3), torch.randn(5, 1)
    noise, level = torch.randn(5, 4), torch.randint(10, (5,))
    other = state.clone()
    other[:, 1] = 7.0
    noised = noise.clone()
    noised[:, 1] = -3.0
    assert torch.equal(
        model.loss(state, action, noise, level)[0], model.loss(other, action, noised, level)[0]
    )
    moved = model.displacement(other, action, 0.1)[0]
    assert (moved[:, 1] == 0).all()
    assert (moved[:, [0, 2]] != 0).all()


def test_an_ignorant_model_has_a_loss_of_one_whatever_is_constant():
    model = DenoisingScore(3, 1, (16,), generator=generator())
    model.set_statistics(torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    loss, _ = model.loss(
        torch.randn(20_000, 3),
        torch.randn(20_000, 1),
        torch.randn(20_000, 4),
        torch.zeros(20_000).long(),
    )
    assert loss.item() == pytest.approx(1.0, abs=0.03)


def test_spreads_have_a_floor_and_constants_have_scale_one():
    standardizer = Standardizer(3)
    assert not standardizer.fitted
    standardizer.set_statistics(torch.ones(3), torch.tensor([0.0, 1e-4, 2.0]))
    torch.testing.assert_close(standardizer.scale, torch.tensor([1.0, 1e-3, 2.0]))
    found = standardizer(torch.tensor([5.0, 1.001, 5.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0]), atol=1e-3, rtol=0)
    assert standardizer.fitted


def test_levels_are_geometric_and_told_by_their_logarithm():
    model = DenoisingScore(1, 1, (8,), num_levels=3, max_noise=0.5, min_noise=0.02)
    torch.testing.assert_close(model.levels, torch.tensor([0.5, 0.1, 0.02]))
    told = []
    model.network.register_forward_pre_hook(lambda _, inputs: told.append(inputs[2]))
    for sigma in (0.5, 0.1, 0.02):
        model.displacement(torch.zeros(1, 1), torch.zeros(1, 1), sigma)
    model.loss(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 2), torch.arange(3))
    expected = torch.tensor([1.0, 0.5, 0.0])
    torch.testing.assert_close(torch.cat(told[:3]).squeeze(-1), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(told[3].squeeze(-1), expected, atol=1e-6, rtol=0)


def test_levels_that_were_not_learned_are_refused():
    model = DenoisingScore(1, 1, (8,))
    with pytest.raises(ConfigError, match=r"noise_level = 0\.6: must lie in \[0\.0"):
        model.displacement(torch.zeros(1, 1), torch.zeros(1, 1), 0.6)


def test_states_are_shared_by_several_actions():
    model = DenoisingScore(2, 1, (8,), generator=generator())
    with torch.no_grad():
        model.network.mlp.linears[-1].weight.normal_(generator=generator())
    state, action = torch.randn(4, 2), torch.randn(3, 4, 1)
    found = model.denoise(state, action, 0.1)
    assert found.state.shape == (3, 4, 2)
    assert found.support.shape == (3, 4)
    torch.testing.assert_close(found.action[1], model.displacement(state, action[1], 0.1)[1])

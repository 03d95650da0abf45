"""Corrections with scores and inverse dynamics in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.errors import ConfigError
from genpol.policies.correction import CorrectionSettings, ScoreCorrector, bounded, climb
from genpol.policies.density import Denoising

DOUBLE = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=DOUBLE)


class Gaussian:
    """The exact score of a Gaussian of (state, action), blurred on both or on actions alone."""

    def __init__(self, mean, covariance, *, states=0, noise_on="joint"):
        self.mean, self.covariance, self.states = mean, covariance, states
        blurred = torch.ones(len(mean), dtype=DOUBLE)
        if noise_on == "action":
            blurred[:states] = 0.0
        self.blurred = torch.diag(blurred)
        self.noise_on = noise_on

    def denoise(self, observation, action, sigma):
        y = torch.cat((observation, action), dim=-1) - self.mean
        precision = torch.linalg.inv(self.covariance + sigma**2 * self.blurred)
        moved = -(sigma**2) * y @ precision
        state, action = moved[..., : self.states], moved[..., self.states :]
        if self.noise_on == "action":
            return Denoising(None, action, action.norm(dim=-1) / sigma)
        return Denoising(state, action, moved.norm(dim=-1) / sigma)


class TwoModes:
    """The exact score of actions in one dimension at +-0.6, of standard deviation 0.05."""

    def denoise(self, observation, action, sigma):
        variance = 0.05**2 + sigma**2
        away = tensor(-0.6, 0.6) - action
        share = torch.softmax(-(away**2) / (2 * variance), dim=-1)
        moved = sigma**2 * (share * away).sum(-1, keepdim=True) / variance
        return Denoising(None, moved, moved.norm(dim=-1) / sigma)


class Linear:
    """The exact inverse dynamics of ``s' = A s + B a``."""

    def __init__(self, drift, drive):
        self.drift, self.inverse = drift, torch.linalg.pinv(drive)

    def __call__(self, observation, following):
        return (following - observation @ self.drift.T) @ self.inverse.T


def settings(**given):
    plain = {"action_weight": 1.0, "state_weight": 0.0, "max_norm": math.inf}
    return CorrectionSettings(**(plain | given))


def raw(step, sigma=1e-4, **given):
    """Return settings of a step along the raw score: the blur is all but nothing."""
    return settings(action_weight=step / sigma**2, noise_level=sigma, **given)


def corrected(score, action, how, observation=None):
    observation = action[..., :0] if observation is None else observation
    return ScoreCorrector(score).correct(observation, action, how)[0]


MEAN, COVARIANCE = tensor(0.1, -0.1), tensor([0.09, 0.05], [0.05, 0.04])
START = tensor(0.6, 0.5)


# --- oracle 3: Tweedie -------------------------------------------------------------------------


def test_a_full_step_lands_on_the_mean_of_the_clean_samples():
    found = corrected(Gaussian(MEAN, COVARIANCE), START, settings(noise_level=0.2))
    inverse = torch.linalg.inv(COVARIANCE + 0.04 * torch.eye(2, dtype=DOUBLE))
    expected = MEAN + COVARIANCE @ inverse @ (START - MEAN)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found, tensor(0.5494, 0.2316), atol=1e-4, rtol=0)


# --- oracle 4: fixed points of actions at correlation 0.8, at s = 1 -----------------------------

CORRELATED = tensor([1.0, 0.8], [0.8, 1.0])
ONE = tensor([1.0])


@pytest.mark.parametrize(
    ("noise_on", "sigma", "fixed"),
    [
        ("action", 0.1, 0.8),
        ("action", 0.3, 0.8),
        ("joint", 0.1, 0.8 / 1.01),
        ("joint", 0.3, 0.8 / 1.09),
    ],
)
def test_actions_settle_where_the_blurred_density_is_highest(noise_on, sigma, fixed):
    score = Gaussian(tensor(0.0, 0.0), CORRELATED, states=1, noise_on=noise_on)
    how = settings(noise_level=sigma, steps=800)
    found = corrected(score, tensor([0.2]), how, tensor([1.0]))
    assert found.item() == pytest.approx(fixed, abs=1e-6)
    known = {("joint", 0.1): 0.7921, ("joint", 0.3): 0.7339}
    assert found.item() == pytest.approx(known.get((noise_on, sigma), 0.8), abs=1e-4)


def quarter(noise_on="joint"):
    """Return the same in actions of a quarter of the size, so that 2.0 lies within bounds."""
    unit = torch.diag(tensor(1.0, 0.25))
    return Gaussian(tensor(0.0, 0.0), unit @ CORRELATED @ unit, states=1, noise_on=noise_on)


def test_raw_steps_follow_the_known_trajectory():
    found = corrected(quarter(), tensor([0.5]), raw(0.1 / 16, steps=10), tensor([1.0]))
    expected = 0.8 + (1 - 0.1 / 0.36) ** 10 * 1.2
    assert 4 * found.item() == pytest.approx(expected, abs=1e-5)
    assert 4 * found.item() == pytest.approx(0.84633, abs=1e-5)


@pytest.mark.parametrize(("step", "stable"), [(0.7, True), (0.8, False)])
def test_raw_steps_beyond_the_stability_limit_diverge(step, stable):
    near = tensor([0.25])
    found = corrected(quarter(), near, raw(step / 16, steps=6), tensor([1.0]))
    assert ((found - 0.2).abs() < (near - 0.2).abs()).item() is stable


# --- oracle 5: two modes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "start", "end"),
    [
        (0.1, 0.45, 0.570),
        (0.1, 0.9, 0.660),
        (0.1, 0.1, 0.500),
        (0.1, 0.0, 0.0),
        (0.4, 0.45, 0.557),
        (0.8, 0.45, 0.239),
    ],
)
def test_one_step_between_two_modes(sigma, start, end):
    found = corrected(TwoModes(), tensor([start]), settings(noise_level=sigma))
    assert found.item() == pytest.approx(end, abs=6e-4)


def test_a_climb_from_a_coarse_view_to_a_fine_one_ends_at_a_mode():
    start = tensor([0.05], [-0.05], [0.9])
    found = climb(TwoModes(), start[:, :0], start, [0.5, 0.3, 0.2, 0.1, 0.05, 0.05, 0.05])
    torch.testing.assert_close(found, tensor([0.6], [-0.6], [0.6]), atol=0.02, rtol=0)


# --- oracle 8: identity ------------------------------------------------------------------------


class NeverAsked:
    def denoise(self, observation, action, sigma):
        raise AssertionError("asked")


@pytest.mark.parametrize("given", [{"action_weight": 0.0, "state_weight": 0.0}, {"steps": 0}])
def test_nothing_to_do_is_the_identity_and_asks_nobody(given):
    observation, action = torch.randn(3, 4), torch.randn(3, 2) * 2
    before, state = action.clone(), torch.get_rng_state()
    found, rows = ScoreCorrector(NeverAsked(), NeverAsked()).correct(
        observation, action, CorrectionSettings(**given)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, before)
    assert all((x == 0).all() for x in rows.values())
    assert set(rows) == {"correction", "action_step", "state_step"}


def test_a_correction_draws_nothing():
    state = torch.get_rng_state()
    corrected(Gaussian(MEAN, COVARIANCE), START, settings())
    assert torch.equal(torch.get_rng_state(), state)


# --- oracle 9: neutrality ----------------------------------------------------------------------

# Action 0.4 holds the state at rest against a drift, so J(s, s) is not zero.
HOLDING = Linear(tensor([1.0, 0.1], [0.0, 0.9]), tensor([0.005], [0.1]))


@pytest.mark.parametrize(("form", "neutral"), [("delta", True), ("plain", False)])
def test_at_the_mode_only_the_delta_form_does_nothing(form, neutral):
    mean, spread = tensor(0.3, 0.5, 0.1), torch.diag(tensor(0.25, 0.25, 0.09))
    corrector = ScoreCorrector(Gaussian(mean, spread, states=2), HOLDING)
    how = settings(state_weight=0.5, form=form)
    action, found = corrector.correct(mean[:2], mean[2:], how)
    assert (found["state_step"] < 1e-4).item() is neutral
    assert ((action - mean[2:]).abs() < 1e-4).item() is neutral


# --- oracle 7: the auxiliary action of a linear system ------------------------------------------


class TowardsZero:
    """Displaces states by ``-0.2 s / 0.25``, as 0.02 times a raw score at eta_s = 0.1."""

    def denoise(self, observation, action, sigma):
        return Denoising(-0.2 * observation / 0.25, torch.zeros_like(action), action[..., 0] * 0)


DRIFT, DRIVE = tensor([1.0, 0.1], [0.0, 1.0]), tensor([0.005], [0.1])


def test_a_displaced_state_becomes_the_known_auxiliary_action():
    """s = (.3, -.2) and a = .5 lead to s2, whose displacement asks for B^+ u = 0.10843."""
    s2 = DRIFT @ tensor(0.3, -0.2) + DRIVE[:, 0] * 0.5
    corrector = ScoreCorrector(TowardsZero(), Linear(DRIFT, DRIVE))
    how = settings(action_weight=0.0, state_weight=0.1)
    action, found = corrector.correct(s2, tensor(0.5), how)
    u = 0.02 * (-s2 / 0.25)
    expected = (torch.linalg.pinv(DRIVE) @ u).item()
    assert (action - 0.5).item() == pytest.approx(expected, rel=1e-6)
    assert (action - 0.5).item() == pytest.approx(0.10843, abs=1e-5)
    assert found["state_step"].item() == pytest.approx(0.10843, abs=1e-5)


def test_fitted_inverse_dynamics_are_the_pseudo_inverse():
    """Least squares on the system with a little noise, which decides beyond reachable states."""
    draw = torch.Generator().manual_seed(0)
    state = torch.randn(50_000, 2, generator=draw, dtype=DOUBLE)
    action = 2 * torch.rand(50_000, 1, generator=draw, dtype=DOUBLE) - 1
    after = state @ DRIFT.T + action @ DRIVE.T
    noised = after + 1e-3 * torch.randn(50_000, 2, generator=draw, dtype=DOUBLE)
    read = torch.cat((state, noised - state), dim=-1)
    weights = torch.linalg.lstsq(read, action).solution

    def fitted(s, following):
        return torch.cat((s, following - s), dim=-1) @ weights

    assert (fitted(state, after) - action).abs().max() < 1e-3
    s2 = DRIFT @ tensor(0.3, -0.2) + DRIVE[:, 0] * 0.5
    corrector = ScoreCorrector(TowardsZero(), fitted)
    how = settings(action_weight=0.0, state_weight=0.1)
    step = corrector.correct(s2, tensor(0.5), how)[0] - 0.5
    assert step.item() == pytest.approx(0.10843, rel=0.01)


@pytest.mark.parametrize(("form", "end"), [("plain", 0.36), ("convex", 0.33)])
def test_other_forms_use_the_whole_displacement(form, end):
    """J(s, s') = s' here: at s = 0.3, displaced to 0.6, with weight 0.1 and the action 0.3."""

    class Away:
        def denoise(self, observation, action, sigma):
            return Denoising(observation, torch.zeros_like(action), action[..., 0])

    corrector = ScoreCorrector(Away(), lambda s, following: following)
    how = settings(action_weight=0.0, state_weight=0.1, form=form)
    found = corrector.correct(tensor(0.3), tensor(0.3), how)[0]
    assert found.item() == pytest.approx(end, abs=1e-9)


# --- oracle 10: support ------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.1, 0.1 / 3])
def test_a_full_step_takes_noise_off_actions(q):
    p = 0.1
    draw = torch.Generator().manual_seed(0)
    state, n, e = torch.randn(3, 50_000, 1, generator=draw, dtype=DOUBLE).unbind(0)
    clean = 0.1 * state + q * n
    covariance = tensor([1.0, 0.1], [0.1, 0.01 + q**2])
    score = Gaussian(tensor(0.0, 0.0), covariance, states=1, noise_on="action")
    noised = (clean + p * e).clamp(-1, 1)
    how = settings(noise_level=p)
    moved, found = ScoreCorrector(score).correct(state, noised, how)
    share = (moved - clean).square().mean() / (noised - clean).square().mean()
    assert share.item() == pytest.approx(q**2 / (q**2 + p**2), rel=0.05)
    assert found["support_after"].mean() < 0.6 * found["support_before"].mean()


# --- oracle 11: the proximal map ---------------------------------------------------------------


def proximal(eta):
    precision = torch.linalg.inv(COVARIANCE)
    matrix = torch.linalg.inv(precision + torch.eye(2, dtype=DOUBLE) / eta)
    return matrix @ (precision @ MEAN + START / eta)


@pytest.mark.parametrize("eta", [4e-4, 2e-4, 1e-4])
def test_small_steps_agree_with_the_proximal_map_to_second_order(eta):
    def gap(step):
        found = corrected(Gaussian(MEAN, COVARIANCE), START, raw(step))
        return (found - proximal(step)).norm()

    assert gap(eta) / gap(eta / 2) == pytest.approx(4.0, rel=0.2)


def test_large_raw_steps_overshoot_where_the_proximal_map_does_not():
    found = corrected(Gaussian(MEAN, COVARIANCE), START, raw(0.02))
    torch.testing.assert_close(proximal(0.02), tensor(0.60, 0.30), atol=5e-3, rtol=0)
    torch.testing.assert_close(found, tensor(0.78, -0.03), atol=5e-3, rtol=0)


# --- bounds, diagnostics, refusals --------------------------------------------------------------


def test_every_step_is_bounded_and_actions_stay_in_range():
    class FarAway:
        def denoise(self, observation, action, sigma):
            return Denoising(None, 100 * torch.ones_like(action), action[..., 0])

    action = torch.zeros(3, 4)
    how = CorrectionSettings(state_weight=0.0, max_norm=0.2, steps=2)
    found = corrected(FarAway(), action, how)
    torch.testing.assert_close(found.norm(dim=-1), torch.full((3,), 2 * 0.2 * 2.0))
    assert corrected(FarAway(), action, settings()).max() == 1.0
    short = torch.tensor([[0.1, 0.0]])
    assert torch.equal(bounded(short, 0.2), short)
    assert (bounded(torch.tensor([[3.0, 4.0]]), 0.0) == 0).all()


def test_what_lies_outside_the_range_is_clipped_before_it_is_corrected():
    score = Gaussian(MEAN, COVARIANCE)
    far, edge = tensor(1.7, 0.5), tensor(1.0, 0.5)
    assert torch.equal(corrected(score, far, settings()), corrected(score, edge, settings()))


def test_diagnostics_tell_what_was_done_to_each_row():
    mean, spread = tensor(0.0, 0.0, 0.0), torch.diag(tensor(0.25, 0.25, 0.09))
    score = Gaussian(mean, spread, states=2)
    state = tensor([0.0, 0.0], [0.5, -0.5])
    action = tensor([0.0], [0.4])
    how = settings(action_weight=0.5, state_weight=0.2, noise_level=0.3)
    moved, found = ScoreCorrector(score, HOLDING).correct(state, action, how)
    seen = score.denoise(state, action, 0.3)
    torch.testing.assert_close(found["support_before"], seen.support)
    torch.testing.assert_close(found["action_step"], 0.5 * seen.action.norm(dim=-1))
    auxiliary = 0.2 * seen.state @ HOLDING.inverse.T
    torch.testing.assert_close(found["state_step"], auxiliary.norm(dim=-1))
    torch.testing.assert_close(moved, action + 0.5 * seen.action + auxiliary)
    torch.testing.assert_close(found["correction"], (moved - action).norm(dim=-1))
    torch.testing.assert_close(found["support_after"], score.denoise(state, moved, 0.3).support)


def test_states_are_not_corrected_by_a_model_of_actions():
    score = Gaussian(tensor(0.0, 0.0), CORRELATED, states=1, noise_on="action")
    corrector = ScoreCorrector(score, HOLDING)
    with pytest.raises(ConfigError, match=r"state_weight = 0\.1: .* set corrector.state_weight=0"):
        corrector.correct(tensor([1.0]), tensor([0.2]), settings(state_weight=0.1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"action_weight": -0.1}, r"corrector\.action_weight = -0\.1"),
        ({"state_weight": math.nan}, r"corrector\.state_weight = nan"),
        ({"noise_level": 0.0}, r"corrector\.noise_level = 0\.0: must be > 0"),
        ({"steps": -1}, r"corrector\.steps = -1"),
        ({"form": "dleta"}, "Did you mean 'delta'"),
    ],
)
def test_settings_out_of_bounds_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        CorrectionSettings(**given)

"""Scores with a known answer: Gaussians and mixtures, and the metric that follows from them."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy, velocity_to_score
from genpol.policies.schedules import diffusers_schedule
from genpol.policies.score import (
    action_score,
    blur,
    curvature_metric,
    euclidean_metric,
    noised,
    outer_metric,
    path_score,
    point_metric,
    released_score,
    sampled_metric,
    tweedie_mean,
)

COVARIANCE = torch.tensor([[0.09, 0.05], [0.05, 0.04]], dtype=torch.float64)


class ExactFlow(FlowPolicy):
    """The flow to a mixture of Gaussians, whose velocity is known (in double precision)."""

    def __init__(self, means, covariances, weights=(1.0,), horizon=1):
        width = len(means[0])
        super().__init__(1, width // horizon, [2], horizon=horizon)
        self.double()
        self.means = torch.tensor(means, dtype=torch.float64)
        self.covariances = torch.stack([torch.as_tensor(c).double() for c in covariances])
        self.weights = torch.tensor(weights, dtype=torch.float64)

    def log_density(self, x, time):
        """Of x_t, ``[..., D]`` at ``[..., 1]``."""
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        t = time[..., None, None]
        spread = (1 - t) ** 2 * eye + t**2 * self.covariances
        off = x.unsqueeze(-2) - time[..., None] * self.means
        away = torch.linalg.solve(spread, off.unsqueeze(-1)).squeeze(-1)
        return (
            self.weights.log() - 0.5 * (off * away).sum(-1) - 0.5 * torch.linalg.slogdet(spread)[1]
        ).logsumexp(-1)

    def _flat_velocity(self, observation, flat, time):
        # v = (x + (1 - t) S) / t, with S the gradient of the log-density.
        point = flat.detach().requires_grad_()
        with torch.enable_grad():
            density = self.log_density(point, time.expand(*flat.shape[:-1], 1)).sum()
            (slope,) = torch.autograd.grad(density, point)
        return (flat + (1 - time) * slope) / time

    def draw(self, shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, math.prod(shape), True, generator=generator)
        which = which.reshape(shape)
        width = self.means.shape[-1]
        z = torch.randn(*shape, width, dtype=torch.float64, generator=generator)
        factors = torch.linalg.cholesky(self.covariances)
        return self.means[which] + (factors[which] @ z.unsqueeze(-1)).squeeze(-1)


def rotated(*stds, degrees=30.0):
    """Return the covariance of these standard deviations along turned axes."""
    angle = math.radians(degrees)
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    return turn @ torch.diag(torch.tensor(stds, dtype=torch.float64) ** 2) @ turn.T


def normal(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def at(time, *shape):
    return torch.full((*shape, 1), time, dtype=torch.float64)


SEEN = torch.zeros(1, 1, dtype=torch.float64)


# -- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [0.5, 0.8, 0.95])
def test_the_score_of_a_gaussian_follows_from_its_velocity(time):
    """Oracle 1, with the velocity in closed form: E[a|x] and E[eps|x] of a joint Gaussian."""
    mean = torch.tensor([0.3, -0.7], dtype=torch.float64)
    spread = (1 - time) ** 2 * torch.eye(2, dtype=torch.float64) + time**2 * COVARIANCE
    x = normal(50, 2)
    away = torch.linalg.solve(spread, (x - time * mean).T).T
    velocity = mean + time * away @ COVARIANCE - (1 - time) * away
    torch.testing.assert_close(velocity_to_score(velocity, x, time), -away, rtol=1e-10, atol=1e-10)
    general = path_score(
        velocity, x, signal=time, spread=1 - time, signal_rate=1.0, spread_rate=-1.0
    )
    torch.testing.assert_close(general, -away, rtol=1e-10, atol=1e-10)


def test_the_general_formula_holds_on_a_cosine_path():
    """Oracle 1: A = sin(pi t / 2), C = cos(pi t / 2)."""
    std, time = 0.4, 0.7
    signal, spread = math.sin(math.pi * time / 2), math.cos(math.pi * time / 2)
    rates = {"signal_rate": math.pi / 2 * spread, "spread_rate": -math.pi / 2 * signal}
    x = normal(50, 1)
    variance = (signal * std) ** 2 + spread**2
    action, noise = signal * std**2 / variance * x, spread / variance * x
    velocity = rates["signal_rate"] * action + rates["spread_rate"] * noise
    found = path_score(velocity, x, signal=signal, spread=spread, **rates)
    torch.testing.assert_close(found, -x / variance, rtol=1e-10, atol=1e-10)


def a_mixture(horizon=1):
    return ExactFlow(
        [[-0.6, 0.2], [0.5, -0.1]], [rotated(0.2, 0.05), rotated(0.1, 0.3)], [0.3, 0.7], horizon
    )


@pytest.mark.parametrize("time", [0.5, 0.8, 0.95])
def test_the_score_of_a_mixture_is_that_of_its_log_density(time):
    """Oracle 1; the log-density by torch's own mixture."""
    policy, x = a_mixture(), normal(20, 2).requires_grad_()
    spreads = (1 - time) ** 2 * torch.eye(2, dtype=torch.float64) + time**2 * policy.covariances
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(policy.weights),
        torch.distributions.MultivariateNormal(time * policy.means, spreads),
    )
    (expected,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    found = action_score(policy, SEEN, x.detach(), at(time, 20))
    torch.testing.assert_close(found, time * expected, rtol=1e-8, atol=1e-8)


def test_tweedies_mean_is_the_one_step_estimate_of_flow_and_diffusion():
    flow = FlowPolicy(3, 2, [8], zero_init=False, horizon=2)
    schedule = diffusers_schedule(num_levels=10, num_steps=10)
    diffusion = DiffusionPolicy(3, 2, [8], schedule=schedule, zero_init=False, horizon=2)
    seen, x = torch.randn(6, 3), torch.randn(6, 2, 2)
    for policy, time in ((flow, 0.9 * torch.rand(6, 1)), (diffusion, torch.arange(6)[:, None])):
        signal, spread = (part.unsqueeze(-1) for part in policy.mixture(time))
        score = policy.score(seen, x, time)
        found = tweedie_mean(x, score, signal=signal, spread=spread)
        torch.testing.assert_close(found, policy.denoised(seen, x, time), rtol=1e-4, atol=1e-4)


def test_a_noised_action_is_the_levels_mixture_of_chunk_and_noise():
    flow = FlowPolicy(3, 2, [8], horizon=2)
    chunk, noise, time = torch.randn(4, 2, 2), torch.randn(4, 2, 2), torch.rand(4, 1)
    t = time.unsqueeze(-1)
    torch.testing.assert_close(noised(flow, chunk, noise, time), t * chunk + (1 - t) * noise)
    torch.testing.assert_close(blur(flow, torch.tensor([0.8])), torch.tensor([0.25]))
    schedule = diffusers_schedule(num_levels=10, num_steps=10)
    diffusion = DiffusionPolicy(3, 2, [8], schedule=schedule)
    abar = schedule.alpha_bar[4]
    assert blur(diffusion, torch.tensor([4])).item() == pytest.approx((1 / abar - 1) ** 0.5)


# -- the Fisher matrix ---------------------------------------------------------------------------


def sampled_scores(policy, time, number, score=action_score):
    x = noised(policy, policy.draw((number,)), normal(number, 2), at(time, number))
    return score(policy, SEEN, x, at(time, number))


def test_the_smoothed_fisher_matrix_is_that_of_the_blurred_gaussian():
    """Oracle 2: t^2 F_t = (Sigma + kappa^2)^-1 within 2 %."""
    time = 0.8
    scores = sampled_scores(ExactFlow([[0.2, 0.1]], [rotated(0.5, 0.15)]), time, 400_000)
    found = scores.T @ scores / len(scores)
    blurred = rotated(0.5, 0.15) + ((1 - time) / time) ** 2 * torch.eye(2, dtype=torch.float64)
    assert torch.linalg.norm(found @ blurred - torch.eye(2)) < 0.02 * 2**0.5


@pytest.mark.parametrize(
    ("score", "expected"), [(released_score, (78.0, 79.5)), (action_score, (1.22, 83.2))]
)
def test_what_the_released_formula_makes_of_two_widths(score, expected):
    """Oracle 3: weights at t = 0.9 of standard deviations 1 and 0.05; ours are times t^2."""
    policy = ExactFlow([[0.0, 0.0]], [torch.diag(torch.tensor([1.0, 0.0025]))])
    scores = sampled_scores(policy, 0.9, 200_000, score)
    unit = 1.0 if score is released_score else 0.81
    weights = scores.square().mean(0) / unit
    assert weights.tolist() == pytest.approx(expected, rel=0.02)


def test_what_the_rank_one_forms_cost_where_the_shift_varies():
    """Oracle 4: delta = e a on N(0, 1), per e^2: 1.5 pointwise, 0.5 by state, exactly 1."""
    e, a = 0.01, normal(1_000_000, 1)
    pointwise = outer_metric(-a.unsqueeze(0), e * a).quadratic.mean() / 2
    some = a[:400]
    by_state = outer_metric(-a[:40_000].unsqueeze(1), e * some).quadratic.mean() / 2
    exact = 0.5 * ((1 + e) ** 2 - 1 - 2 * math.log(1 + e))
    assert pointwise.item() == pytest.approx(1.5 * e**2, rel=0.02)
    assert by_state.item() == pytest.approx(0.5 * e**2 * float(some.square().mean()), rel=0.02)
    assert exact == pytest.approx(e**2, rel=0.02)


def test_the_form_without_a_matrix_is_that_of_the_matrix():
    """Oracle 5."""
    scores, shift = normal(8, 5, 3), normal(5, 3, seed=2)
    matrix = torch.einsum("kbi,kbj->bij", scores, scores) / 8 + 0.1 * torch.eye(3)
    found = outer_metric(scores, shift, damping=0.1)
    expected = torch.einsum("bi,bij,bj->b", shift, matrix, shift)
    torch.testing.assert_close(found.quadratic, expected, rtol=1e-6, atol=0.0)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(-1)
    torch.testing.assert_close(found.trace, trace, rtol=1e-6, atol=0.0)


def test_round_scores_make_it_the_mean_square():
    """Oracle 5: then a budget over the trace is DeFlow's."""
    scores = 3.0 * torch.eye(4, dtype=torch.float64).unsqueeze(1).expand(4, 6, 4)
    shift = normal(6, 4)
    found, plain = outer_metric(scores, shift), euclidean_metric(shift)
    expected = shift.square().mean(-1)
    torch.testing.assert_close(found.quadratic / found.trace, expected)
    torch.testing.assert_close(plain.quadratic / plain.trace, expected)


@pytest.mark.parametrize(("number", "ratio", "tolerance"), [(1, 10.0, 0.3), (8, 77.0, 2.0)])
def test_a_trace_of_ones_own_scores_hides_the_anisotropy(number, ratio, tolerance):
    """Oracle 6: eigenvalues 100 and 1; with the mean trace the ratio is 100."""
    scores = normal(number, 400_000, 2) * torch.tensor([10.0, 1.0], dtype=torch.float64)

    def weight(axis):
        shift = torch.eye(2, dtype=torch.float64)[axis].expand(400_000, 2)
        return outer_metric(scores, shift)

    wide, narrow = weight(0), weight(1)
    own = (wide.quadratic / wide.trace).mean() / (narrow.quadratic / narrow.trace).mean()
    assert own.item() == pytest.approx(ratio, abs=tolerance)
    common = wide.quadratic.mean() / narrow.quadratic.mean()
    assert common.item() == pytest.approx(100.0, abs=3.0)


def test_only_the_displacement_has_a_gradient():
    scores, shift = normal(4, 3, 2).requires_grad_(), normal(3, 2, seed=2).requires_grad_()
    found = outer_metric(scores, shift)
    assert not found.trace.requires_grad
    by_scores, by_shift = torch.autograd.grad(
        found.quadratic.sum(), (scores, shift), allow_unused=True
    )
    assert by_scores is None
    assert (by_shift != 0).all()


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_sampled_metric_is_that_of_scores_at_noised_samples(horizon):
    policy = a_mixture(horizon)
    samples, noise = policy.draw((5, 4)), normal(5, 4, 2)
    time, shift = at(0.9, 5, 4), normal(4, 2, seed=3)
    x = 0.9 * samples + 0.1 * noise
    by_hand = torch.autograd.functional.jacobian(
        lambda point: policy.log_density(point, time).sum(), x
    )
    shape = samples.shape if horizon == 1 else (5, 4, 2, 1)
    found = sampled_metric(
        policy,
        SEEN,
        samples.reshape(shape),
        shift,
        noise=noise.reshape(shape),
        time=time,
    )
    expected = (0.9 * by_hand * shift).sum(-1).square().mean(0)
    torch.testing.assert_close(found.quadratic, expected, rtol=1e-6, atol=1e-9)


def test_the_point_metric_asks_at_the_action_itself():
    """Section 7.2: for stds 1 and 0.05 at t = 0.8 it has the wrong order, 2.16 and 1.45."""
    policy = ExactFlow([[0.0, 0.0]], [torch.diag(torch.tensor([1.0, 0.0025]))])
    action = policy.draw((200_000,))
    found = [
        point_metric(
            policy,
            SEEN,
            action,
            torch.eye(2, dtype=torch.float64)[axis].expand_as(action),
            time=at(0.8, len(action)),
        ).quadratic.mean()
        / 0.64
        for axis in (0, 1)
    ]
    # The paper's point is x = a, whose score is -(a) / V, not scaled to the path's t a.
    assert [x.item() for x in found] == pytest.approx([2.16, 1.45], rel=0.02)


class SmoothFlow(ExactFlow):
    """The same velocity in closed form, so that it can be differentiated in both modes."""

    def _flat_velocity(self, observation, flat, time):
        t = time[..., None, None]
        eye = torch.eye(flat.shape[-1], dtype=flat.dtype)
        spread = (1 - t) ** 2 * eye + t**2 * self.covariances
        off = flat.unsqueeze(-2) - time[..., None] * self.means
        away = torch.linalg.solve(spread, off.unsqueeze(-1)).squeeze(-1)
        each = self.weights.log() - 0.5 * (off * away).sum(-1)
        share = (each - 0.5 * torch.linalg.slogdet(spread)[1]).softmax(-1).unsqueeze(-1)
        return (flat - (1 - time) * (share * away).sum(-2)) / time


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_curvature_is_the_hessian_of_the_log_density(horizon):
    """Oracle 11, for a mixture."""
    means, covariances = [[-0.6, 0.2], [0.5, -0.1]], [rotated(0.2, 0.05), rotated(0.1, 0.3)]
    policy = SmoothFlow(means, covariances, [0.3, 0.7], horizon)
    action, noise, shift = policy.draw((20,)), normal(20, 2), normal(20, 2, seed=5)
    # One row lies between the modes and moves along the line through them.
    action[0], noise[0] = torch.tensor([-0.18, 0.08]), torch.zeros(2)
    shift[0] = torch.tensor([1.1, -0.3])
    time = at(0.85, 20)
    x = 0.85 * action + 0.15 * noise
    hessian = torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda point, t=t: policy.log_density(point, t), point
            )
            for point, t in zip(x, time, strict=True)
        ]
    )
    expected = -(0.85**2) * torch.einsum("bi,bij,bj->b", shift, hessian, shift)
    shape = action.shape if horizon == 1 else (20, 2, 1)
    shift.requires_grad_()
    found = curvature_metric(
        policy, SEEN, action.reshape(shape), shift, noise=noise.reshape(shape), time=time
    )
    assert expected[0] < 0
    torch.testing.assert_close(
        found.quadratic.detach(), expected.clamp_min(0.0), rtol=1e-8, atol=1e-8
    )
    (slope,) = torch.autograd.grad(found.quadratic.sum(), shift)
    twice = -2 * 0.85**2 * torch.einsum("bij,bj->bi", hessian, shift.detach())
    torch.testing.assert_close(slope, twice * (expected > 0)[:, None], rtol=1e-8, atol=1e-8)


def test_the_curvature_keeps_apart_modes_that_the_fisher_matrix_averages():
    """Section 3.5: two modes, narrow along one axis each; per state it is round."""
    narrow = [torch.diag(torch.tensor([0.04, 0.0025])), torch.diag(torch.tensor([0.0025, 0.04]))]
    policy = SmoothFlow([[-0.7, 0.0], [0.7, 0.0]], narrow, [0.5, 0.5])
    left = torch.tensor([[-0.7, 0.0]], dtype=torch.float64).expand(4000, 2)
    axes = torch.eye(2, dtype=torch.float64)

    def along(axis):
        shift, time = axes[axis].expand(4000, 2), at(0.9, 4000)
        curved = curvature_metric(policy, SEEN, left, shift, noise=normal(4000, 2), time=time)
        samples = policy.draw((4000,)).unsqueeze(1)
        blurred = sampled_metric(
            policy,
            SEEN,
            samples,
            axes[axis : axis + 1],
            noise=normal(4000, 1, 2),
            time=at(0.9, 4000, 1),
        )
        return curved.quadratic.mean().item(), blurred.quadratic.mean().item()

    (wide, mean_wide), (tight, mean_tight) = along(0), along(1)
    assert wide == pytest.approx(1 / (0.04 + 1 / 81), rel=0.02)
    assert tight == pytest.approx(1 / (0.0025 + 1 / 81), rel=0.02)
    assert mean_wide == pytest.approx(mean_tight, rel=0.1)

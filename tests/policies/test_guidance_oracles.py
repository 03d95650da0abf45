"""Guidance against closed forms: Gaussian and mixture data with their exact velocities."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.errors import ConfigError
from genpol.policies.flow import euler_steps
from genpol.policies.guidance import gradient_of, guided_sample

# What only the noise decides: the samplers below are affine in it, so two draws give mean and std.
ZERO_AND_ONE = torch.tensor([[0.0], [1.0]], dtype=torch.float64)


def spread_of_noised(t, std):
    """Return the variance at time t of the linear path from N(0, 1) to N(., std^2)."""
    return (1 - t) ** 2 + (t * std) ** 2


def gaussian_field(mean, std, num_steps):
    """Return the velocity of the linear path from N(0, 1) to N(mean, std^2)."""

    def field(x, step):
        t = step / num_steps
        return mean + (t * std**2 - (1 - t)) / spread_of_noised(t, std) * (x - t * mean)

    return field


def mixture_field(modes, std, num_steps):
    """Return that of a mixture of equal weights: the velocities of its parts by responsibility."""
    modes = torch.tensor(modes, dtype=torch.float64)

    def field(x, step):
        t = step / num_steps
        variance = spread_of_noised(t, std)
        distance = x - t * modes
        share = torch.softmax(-(distance**2) / (2 * variance), -1)
        parts = modes + (t * std**2 - (1 - t)) / variance * distance
        return (share * parts).sum(-1, keepdim=True)

    return field


def sampled(field, gradient, num_steps=10, weight=1.0, noise=ZERO_AND_ONE, **options):
    return guided_sample(
        field, euler_steps(num_steps), gradient, noise, weight=weight, clip=None, **options
    )


def mean_and_std(*arguments, **options):
    ends = sampled(*arguments, **options).squeeze(-1).tolist()
    return ends[0], abs(ends[1] - ends[0])


def in_the_limit(found, steps=60):
    """Return what a function of the number of steps tends to; errors fall with its inverse."""
    return [2 * b - a for a, b in zip(found(steps), found(2 * steps), strict=True)]


def linear(slope):
    return gradient_of(lambda a: (slope * a).sum(-1))


def quadratic(k, best):
    return gradient_of(lambda a: (-k / 2 * (a - best) ** 2).sum(-1))


# --- clean estimates and plain samples ---------------------------------------------------------


@pytest.mark.parametrize(
    ("std", "expected"), [(1.0, (0.8790, 0.9872)), (0.5, (0.4308, 0.4927)), (0.1, (0.0617, 0.0956))]
)
def test_euler_steps_shrink_a_gaussian_by_the_known_factor(std, expected):
    def found(steps):
        return mean_and_std(gaussian_field(0.0, std, steps), linear(0.0), steps, weight=0.0)

    for steps, value in zip((10, 100), expected, strict=True):
        assert found(steps) == (pytest.approx(0.0), pytest.approx(value, abs=1e-4))
    assert in_the_limit(found)[1] == pytest.approx(std, abs=1e-3)


def clean_estimate(field, x, step):
    coefficients = euler_steps(10)[step]
    return coefficients.clean_x * x + coefficients.clean_o * field(x, step)


@pytest.mark.parametrize("step", range(10))
@pytest.mark.parametrize("std", [0.1, 1.0])
def test_the_clean_estimate_is_the_posterior_mean(std, step):
    x, mean, t = torch.tensor([0.7], dtype=torch.float64), 0.2, step / 10
    gain = t * std**2 / spread_of_noised(t, std)
    found = clean_estimate(gaussian_field(mean, std, 10), x, step)
    torch.testing.assert_close(found, mean + gain * (x - t * mean))


@pytest.mark.parametrize("step", range(10))
def test_so_it_is_of_a_mixture(step):
    """Against sums over a fine grid of actions."""
    modes, std, t = (-0.8, 0.1, 1.0), 0.2, step / 10
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    action = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    density = sum(torch.exp(-((action - mode) ** 2) / (2 * std**2)) for mode in modes)
    seen = -((x - t * action) ** 2) / (2 * (1 - t) ** 2)
    posterior = density * torch.exp(seen - seen.max(-1, keepdim=True).values)
    expected = (posterior * action).sum(-1, keepdim=True) / posterior.sum(-1, keepdim=True)
    found = clean_estimate(mixture_field(modes, std, 10), x, step)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


# --- a linear value ----------------------------------------------------------------------------

SHIFTS = {  # with 10 steps, and with ever more
    ("denoised", 1.0): (1.1741, 1.2465),
    ("denoised", 0.5): (0.8112, 0.8608),
    ("denoised", 0.1): (0.2603, 0.3083),
    ("noisy", 1.0): (1.1741, 1.2465),
    ("noisy", 0.5): (0.8112, 0.8608),
    ("noisy", 0.1): (0.2603, 0.3083),
    ("jacobian", 1.0): (0.8790, 1.0),
    ("jacobian", 0.5): (0.4308, 0.5),
    ("jacobian", 0.1): (0.0617, 0.1),
}


@pytest.mark.parametrize(("estimator", "std"), SHIFTS)
def test_a_linear_value_shifts_the_mean_and_leaves_the_spread(estimator, std):
    def found(steps):
        field = gaussian_field(0.0, std, steps)
        return mean_and_std(field, linear(2.0), steps, weight=0.5, estimator=estimator)

    ten, ever_more = SHIFTS[estimator, std]
    mean, spread = found(10)
    assert mean == pytest.approx(ten, abs=1e-4)  # weight times slope is 1
    assert spread == pytest.approx(mean_and_std(gaussian_field(0.0, std, 10), linear(0.0))[1])
    assert in_the_limit(found) == pytest.approx([ever_more, std], abs=1e-3)


def test_at_the_end_of_the_steps_left_it_shifts_as_much_as_at_the_clean_estimate():
    ends = [
        mean_and_std(gaussian_field(0.0, 0.5, 10), linear(1.0), estimator=estimator)
        for estimator in ("rollout", "denoised")
    ]
    assert ends[0] == pytest.approx(ends[1])


@pytest.mark.parametrize("std", [1.0, 0.5, 0.1])
def test_the_factor_of_the_true_tilt_gives_it(std):
    """``(1 - t) / t`` times the Jacobian: the mean of ``p(a) exp(a)`` is ``std^2``, and no other.

    At t = 0 the factor is infinite and the Jacobian zero, so their product is passed as a weight.
    """

    def found(steps):
        times = [step / steps for step in range(steps)]
        weights = [(1 - t) * std**2 / spread_of_noised(t, std) for t in times]
        return mean_and_std(gaussian_field(0.0, std, steps), linear(1.0), steps, weight=weights)

    assert found(10)[0] == pytest.approx(std**2, rel=1e-3)
    assert in_the_limit(found) == pytest.approx([std**2, std], abs=1e-3)


def test_guidance_overshoots_the_tilt_of_narrow_data_thirtyfold():
    """The documented price of leaving that factor out."""

    def found(steps):
        return mean_and_std(gaussian_field(0.0, 0.1, steps), linear(1.0), steps)

    assert in_the_limit(found)[0] / 0.1**2 == pytest.approx(30.83, abs=0.1)


def steepness(std, num_steps):
    """Return ``1 + dv/dx / K`` of the Euler steps of N(0, std^2)."""
    times = [step / num_steps for step in range(num_steps)]
    return [1 + (t * std**2 - (1 - t)) / spread_of_noised(t, std) / num_steps for t in times]


@pytest.mark.parametrize(("std", "ten"), [(1.0, 1.3788), (0.5, 0.6589), (0.1, 0.0789)])
def test_through_the_remaining_steps_a_linear_value_shifts_by_their_product(std, ten):
    """Not by what the exact flow gives, below, which they tend to."""
    factors = steepness(std, 10)
    later = [math.prod(factors[step + 1 :]) for step in range(10)]
    expected = sum(f * x * x for f, x in zip(factors, later, strict=True)) / 10
    assert expected == pytest.approx(ten, abs=1e-4)

    def found(steps):
        return mean_and_std(gaussian_field(0.0, std, steps), linear(1.0), steps, estimator="bptt")

    assert found(10)[0] == pytest.approx(expected, rel=1e-9)
    assert in_the_limit(found, 15)[0] == pytest.approx(std * math.pi / 2, rel=0.03)


def exact_end(x, t, mean, std):
    """Return where the exact flow takes x from time t."""
    return mean + std * (x - t * mean) / math.sqrt(spread_of_noised(t, std))


def through_the_exact_flow(value, mean, std, steps, weight=1.0):
    """Return mean and std under gradients of a value at the exact flow's end."""
    clock = iter(range(steps))

    def gradient(x):
        t = next(clock) / steps
        return gradient_of(lambda y: value(exact_end(y, t, mean, std)).sum(-1))(x)

    field = gaussian_field(mean, std, steps)
    return mean_and_std(field, gradient, steps, weight=weight, estimator="noisy")


@pytest.mark.parametrize(("std", "expected"), [(1.0, 1.4773), (0.5, 0.7235), (0.1, 0.1211)])
def test_a_gradient_through_the_exact_flow_gives_the_known_shift(std, expected):
    def found(steps):
        return through_the_exact_flow(lambda end: end, 0.0, std, steps)

    assert found(10)[0] == pytest.approx(expected, abs=1e-4)
    assert in_the_limit(found)[0] == pytest.approx(std * math.pi / 2, abs=1e-3)


# --- a quadratic value -------------------------------------------------------------------------

ONE, WEAK, OTHER = (  # mean, std, k, best, weight
    (0.0, 1.0, 1.0, 1.0, 1.0),
    (0.0, 1.0, 1.0, 1.0, 0.1),
    (0.2, 0.5, 2.0, 0.8, 0.5),
)

QUADRATICS = [  # problem, estimator, guided mean and std with ten steps
    (ONE, "denoised", 0.7686, 0.4153),
    (ONE, "jacobian", 0.6225, 0.4172),
    (ONE, "noisy", 0.7760, 0.3010),
    (WEAK, "denoised", 0.1125, 0.8182),
    (WEAK, "jacobian", 0.0849, 0.8190),
    (WEAK, "noisy", 0.1125, 0.7937),
    (OTHER, "denoised", 0.5684, 0.2677),
    (OTHER, "jacobian", 0.4199, 0.3001),
    (OTHER, "noisy", 0.5800, 0.1358),
]


@pytest.mark.parametrize(("problem", "estimator", "mean", "std"), QUADRATICS)
def test_a_quadratic_value_gives_the_known_mean_and_spread(problem, estimator, mean, std):
    centre, width, k, best, weight = problem
    field = gaussian_field(centre, width, 10)
    found = mean_and_std(field, quadratic(k, best), weight=weight, estimator=estimator)
    assert found == (pytest.approx(mean, abs=1e-3), pytest.approx(std, abs=1e-3))


@pytest.mark.parametrize(
    ("problem", "mean", "std"),
    [(ONE, 0.7819, 0.1553), (WEAK, 0.1379, 0.7491), (OTHER, 0.5125, 0.1865)],
)
def test_through_the_exact_flow_a_quadratic_value_gives_them_too(problem, mean, std):
    centre, width, k, best, weight = problem
    found = through_the_exact_flow(
        lambda end: -k / 2 * (end - best) ** 2, centre, width, 10, weight
    )
    assert found == (pytest.approx(mean, abs=1e-3), pytest.approx(std, abs=1e-3))


@pytest.mark.parametrize(
    ("problem", "mean", "std"),
    [(ONE, 0.7751, math.exp(-math.pi / 4)), (WEAK, 0.1185, 0.9244), (OTHER, 0.5771, 0.3064)],
)
def test_many_steps_reach_the_known_mean_and_spread_of_continuous_time(problem, mean, std):
    centre, width, k, best, weight = problem

    def found(steps):
        field = gaussian_field(centre, width, steps)
        return mean_and_std(field, quadratic(k, best), steps, weight=weight)

    assert in_the_limit(found) == pytest.approx([mean, std], abs=1e-3)


@pytest.mark.parametrize(
    ("problem", "mean", "std"), [(ONE, 0.5, 0.7071), (WEAK, 0.0909, 0.9535), (OTHER, 0.32, 0.4472)]
)
def test_a_weight_for_each_step_gives_the_exact_tilt(problem, mean, std):
    """The factor ``(1 - t) / t J``, damped by the curvature that is left, is exact guidance."""
    centre, width, k, best, weight = problem

    def found(steps):
        times = [step / steps for step in range(steps)]
        weights = []
        for t in times:
            variance = spread_of_noised(t, width)
            left = (1 - t) ** 2 * width**2 / variance
            weights.append(weight * (1 - t) * width**2 / variance / (1 + weight * k * left))
        return mean_and_std(
            gaussian_field(centre, width, steps), quadratic(k, best), steps, weight=weights
        )

    assert found(10)[0] == pytest.approx(mean, abs=1e-4)
    assert in_the_limit(found) == pytest.approx([mean, std], abs=1e-3)
    if problem == ONE:
        assert found(100)[1] == pytest.approx(0.6977, abs=1e-3)


def test_weights_must_be_one_for_each_step():
    with pytest.raises(ConfigError, match=r"guidance\.weight has 3 entries: must have 10"):
        mean_and_std(gaussian_field(0.0, 1.0, 10), linear(1.0), weight=[1.0] * 3)


# --- a mixture ---------------------------------------------------------------------------------

MODES = (-1.0, 0.0, 1.0)
# Quantiles of a standard normal stand for its draws.
NOISES = math.sqrt(2) * torch.erfinv(torch.linspace(-1, 1, 20_001, dtype=torch.float64)[1:-1, None])


def shares(weight, gradient, estimator="denoised"):
    ends = sampled(
        mixture_field(MODES, 0.05, 10), gradient, weight=weight, noise=NOISES, estimator=estimator
    )
    nearest = (ends - torch.tensor(MODES, dtype=torch.float64)).abs().argmin(-1)
    return (torch.bincount(nearest, minlength=3) / len(ends)).tolist(), ends


TOWARDS_ONE = gradient_of(lambda a: -((a - 1) ** 2).sum(-1))


def misled(action):
    """The gradient of a critic that is wrong where there are no data."""
    return torch.where(action < -1.3, TOWARDS_ONE(action) - 12.0, TOWARDS_ONE(action))


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.0, (0.308, 0.383, 0.309)),
        (0.1, (0.212, 0.412, 0.376)),
        (0.3, (0.064, 0.405, 0.531)),
        (1.0, (0.0, 0.015, 0.985)),
    ],
)
def test_guidance_chooses_among_modes(weight, expected):
    assert shares(weight, TOWARDS_ONE)[0] == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_errors_of_the_critic_off_the_data_are_never_seen(weight):
    assert shares(weight, misled)[0] == shares(weight, TOWARDS_ONE)[0]


def test_a_gradient_at_the_noisy_action_falls_for_them():
    _, ends = shares(1.0, misled, "noisy")
    assert (ends < -1.3).double().mean().item() == pytest.approx(0.097, abs=0.005)


@pytest.mark.parametrize(
    ("field", "mean"),
    [
        (gaussian_field(0.2, 0.5, 10), 0.2),
        (mixture_field((-1.0, 0.2, 1.0), 0.05, 10), 0.2 / 3),
    ],
)
def test_the_first_push_is_the_same_for_every_noise(field, mean):
    """Before anything is known of the action, its estimate is the mean of the data."""
    asked = []

    def gradient(action):
        asked.append(action)
        return TOWARDS_ONE(action)

    sampled(field, gradient, noise=NOISES[::1000])
    torch.testing.assert_close(asked[0], torch.full_like(asked[0], mean))
    assert asked[1].std() > 0.01

"""Which rows count: BAPO, Clip-Cov, KL-Cov, CAPO, PIPO (surrogates specification)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from genpol.errors import ConfigError
from genpol.objectives.selection import (
    adam_shift,
    advantage_covariance,
    bapo_bounds,
    capo_mask,
    clip_cov_mask,
    gaussian_fisher,
    gaussian_score,
    kl_cov,
    pipo_coefficients,
    pipo_multiplier,
    softmax_fisher,
    softmax_score,
)
from genpol.policies.gaussian import log_prob

vector = partial(torch.tensor, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
SEARCH = {
    "low_start": 0.6,
    "low_end": 0.9,
    "high_start": 1.2,
    "high_end": 3.0,
    "low_step": 0.05,
    "high_step": 0.05,
}
# A standard normal by quadrature: points and weights.
GRID = torch.linspace(-10, 10, 20001, dtype=torch.float64)
WEIGHTS = torch.exp(-GRID.square() / 2) * 1e-3 / math.sqrt(2 * math.pi)


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


def rows(ratio):
    """Log-ratios that take a gradient."""
    return vector(ratio).log().requires_grad_()


def own_kl_cov(log_ratio, advantage, penalty="square"):
    return kl_cov(
        log_ratio, advantage, log_prob=log_ratio, fraction=0.3, coefficient=1.0, penalty=penalty
    )


# -- BAPO ----------------------------------------------------------------------------------------

BAPO_ROWS = (vector([1.5, 0.7, 0.5, 1.3]).log(), vector([1.0, 0.5, -1.0, -2.0]))


@pytest.mark.parametrize(
    ("measure", "low", "high", "expected"),
    [
        ("value", 0.6, 1.2, 0.32632),
        ("value", 0.9, 1.2, 0.30693),
        ("value", 0.9, 1.5, 0.34579),
        ("grad", 0.4, 1.2, 0.10145),
        ("grad", 0.6, 1.2, 0.11864),
        ("grad", 0.9, 1.5 + 1e-9, 0.41573),
    ],
)
def test_bapo_share_of_the_positives(measure, low, high, expected):
    fixed = {"low_start": low, "low_end": low, "high_start": high, "high_end": high}
    steps = {"low_step": 0.1, "high_step": 0.1}
    found = bapo_bounds(*BAPO_ROWS, share=0.9, measure=measure, **fixed, **steps)
    assert_close(torch.stack(found), vector([low, high, expected]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("share", "low", "high"),
    [
        (0.1, 0.4, 1.2),  # at once
        (0.11, 0.55, 1.2),  # the first lower bound that drops the ratio of 0.5
        (0.4, 0.9, 1.55),  # then the first upper one that admits 1.5
        (0.5, 0.9, 3.0),  # never
    ],
)
def test_bapo_raises_the_lower_bound_first_and_no_further_than_needed(share, low, high):
    # Steps that land beside the ratios themselves, where rounding would decide.
    search = {**SEARCH, "low_start": 0.4, "low_step": 0.15, "high_step": 0.35}
    found = bapo_bounds(*BAPO_ROWS, share=share, **search)
    assert_close(torch.stack(found[:2]), vector([low, high]))


def test_released_bapo_measure_only_loses_by_raising_the_lower_bound():
    low_only = {**SEARCH, "high_end": 1.2}
    found = bapo_bounds(*BAPO_ROWS, share=0.33, measure="value", **low_only)
    assert_close(torch.stack(found), vector([0.9, 1.2, 0.30693]), rtol=0, atol=1e-5)


def test_bapo_stops_at_the_last_bounds_though_the_step_leads_beyond():
    search = {**SEARCH, "low_step": 0.14, "high_step": 0.7}
    found = bapo_bounds(vector([3.2, 1.0]).log(), vector([1.0, -1.0]), share=0.5, **search)
    assert_close(torch.stack(found), vector([0.9, 3.0, 0.0]))


def test_bapo_without_advantages_stays_at_the_start():
    low, high, _ = bapo_bounds(BAPO_ROWS[0], torch.zeros(4).double(), share=0.5, **SEARCH)
    assert (low.item(), high.item()) == (0.6, 1.2)


@pytest.mark.parametrize("options", [{"low_step": 0.0}, {"high_end": 1.1}, {"measure": "values"}])
def test_unusable_bapo_search_is_refused(options):
    with pytest.raises(ConfigError, match="bapo"):
        bapo_bounds(*BAPO_ROWS, share=0.5, **{**SEARCH, **options})


# -- Clip-Cov and KL-Cov -------------------------------------------------------------------------

COV_ROWS = {"log_prob": vector([-1.0, -2.0, -0.5, -3.0]), "advantage": vector([1.0, -1, 2, -0.5])}


def drop(seed=0, log_ratio=None, **options):
    """Indices of the rows that Clip-Cov drops."""
    options = {"low": 1.0, "high": 5.0, "fraction": 0.5, **CLIP, **COV_ROWS, **options}
    log_ratio = torch.zeros_like(options["advantage"]) if log_ratio is None else log_ratio
    keep = clip_cov_mask(log_ratio, generator=torch.Generator().manual_seed(seed), **options)
    return (~keep).nonzero().flatten().tolist()


def test_covariance_of_rows():
    expected = vector([0.390625, 0.515625, 1.828125, 1.203125])
    assert_close(advantage_covariance(**COV_ROWS), expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 3]),
        ({"high": 1.5}, [3]),
        ({"low": 1.5}, [2]),
        ({"low": 4.0}, []),
        ({"fraction": 1.0}, [2, 3]),
    ],
)
def test_clip_cov_drops_only_rows_in_the_window(options, expected):
    assert drop(**options) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [([1, 1, 1.3, 1], [3]), ([1, 1, 1, 0.7], [2]), ([1, 1, 0.7, 1.3], [2, 3])],
)
def test_clip_cov_spares_rows_that_ppo_clips(ratio, expected):
    assert drop(log_ratio=vector(ratio).log()) == expected


def test_clip_cov_draws_from_its_generator():
    assert {drop(seed, fraction=0.01)[0] for seed in range(20)} == {2, 3}


def test_clip_cov_rounds_the_number_of_rows_down_and_repeats_its_choice():
    options = {"log_prob": torch.arange(100).double(), "advantage": torch.arange(100).double()}
    dropped = drop(fraction=0.039, low=-1.0, high=9999.0, **options)
    assert len(dropped) == 3
    assert drop(fraction=0.039, low=-1.0, high=9999.0, **options) == dropped


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_clip_cov_quantiles_do_not_depend_on_the_scale(scale):
    options = {
        "log_prob": scale * torch.arange(100).double(),
        "advantage": torch.ones(100).double(),
    }
    options["advantage"][-1] = 2.0
    covariance = advantage_covariance(**options)
    dropped = drop(fraction=1.0, low=0.9, high=0.98, quantiles=True, **options)
    assert sorted(covariance.argsort()[90:98].tolist()) == dropped


@pytest.mark.parametrize(("fraction", "selected"), [(0.01, [2]), (0.5, [2, 3]), (0.7, [2, 3])])
@pytest.mark.parametrize(
    ("penalty", "distance"), [("square", lambda x: x**2 / 2), ("absolute", abs)]
)
def test_kl_cov_penalises_the_rows_of_highest_covariance(fraction, selected, penalty, distance):
    log_ratio = vector([-0.1, 0.2, -0.3, 0.4])
    expected = -log_ratio.exp() * COV_ROWS["advantage"]
    expected[selected] += 2.0 * distance(log_ratio[selected])
    found = kl_cov(log_ratio, fraction=fraction, coefficient=2.0, penalty=penalty, **COV_ROWS)
    assert_close(found, expected)


def test_kl_cov_of_unknown_penalty_is_refused():
    with pytest.raises(ConfigError, match="kl_cov penalty"):
        own_kl_cov(torch.zeros(4), torch.ones(4), penalty="l1")


# -- CAPO ----------------------------------------------------------------------------------------


def test_gaussian_score_is_the_gradient_of_the_log_density():
    mean, log_scale = randn(7, 3).requires_grad_(), randn(7, 3).requires_grad_()
    action = randn(7, 3)
    expected = torch.autograd.grad(log_prob(mean, log_scale.exp(), action).sum(), (mean, log_scale))
    assert_close(gaussian_score(mean, log_scale.exp(), action), torch.cat(expected, -1))


def test_softmax_score_is_the_gradient_of_the_log_probability():
    logits, action = randn(7, 4).requires_grad_(), torch.randint(4, (7,))
    chosen = logits.log_softmax(-1).gather(-1, action[:, None])
    assert_close(softmax_score(logits, action), gradient(chosen, logits))


def test_gaussian_fisher_is_the_second_moment_of_the_score():
    scale, shift = vector([0.5]), vector([0.3, -0.7])
    score = gaussian_score(vector([0.2]), scale, 0.2 + 0.5 * GRID[:, None])
    expected = (WEIGHTS * (score @ shift).square()).sum()
    assert_close(gaussian_fisher(scale, shift), expected)


def test_softmax_fisher_is_the_second_moment_of_the_score():
    logits, shift = randn(4), randn(4)
    score = softmax_score(logits.expand(4, 4), torch.arange(4))
    expected = (logits.softmax(-1) * (score @ shift).square()).sum()
    assert_close(softmax_fisher(logits, shift), expected)


def test_one_gaussian_row():
    """Surrogates section 6: score 2, and u F u / 2 is the KL of the mean shift."""
    mean, scale, shift = vector([0.2]), vector([0.5]), vector([0.1, 0.0])
    assert gaussian_score(mean, scale, vector([0.7]))[0].item() == pytest.approx(2)
    kl = gaussian_fisher(scale, shift) / 2
    assert kl.item() == pytest.approx(kl_divergence(Normal(0.2, 0.5), Normal(0.3, 0.5)).item())


def objective_shift(action, shift):
    """Return what CAPO expects of a shift of the mean of one Gaussian row, found by bisection."""
    scale, shift = vector([0.5]), vector([shift, 0.0])
    score = gaussian_score(vector([0.2]), scale, vector([action]))
    fisher = gaussian_fisher(scale, shift)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        kept = capo_mask(vector(2.0), score, shift, fisher, max_kl=1.0, max_change=middle)
        low, high = (low, middle) if kept else (middle, high)
    return high


def true_change(action, shift):
    """Return ``A (r - 1)`` of that row once the mean has moved."""
    new, old = (Normal(vector(mean), vector(0.5)) for mean in (0.2 + shift, 0.2))
    log_ratio = new.log_prob(vector(action)) - old.log_prob(vector(action))
    return 2.0 * torch.expm1(log_ratio).item()


@pytest.mark.parametrize(
    ("action", "expected", "true"),
    # One standard deviation out the second order vanishes; not so at one and a half.
    [(0.7, 0.4, 0.39443), (0.95, 0.65, 0.64626)],
)
def test_capo_expects_the_true_change_to_second_order(action, expected, true):
    """Surrogates section 6; the error is of third order: an eighth with half the shift."""
    assert objective_shift(action, 0.1) == pytest.approx(expected)
    assert true_change(action, 0.1) == pytest.approx(true, abs=1e-5)
    error = [objective_shift(action, x) - true_change(action, x) for x in (0.05, 0.025)]
    assert error[0] / error[1] == pytest.approx(8, rel=0.1)


@pytest.mark.parametrize(
    ("advantage", "along", "fisher", "options", "kept"),
    [
        # the Gaussian row above: m_F = 0.02, m_H = 0.4
        (2.0, 0.2, 0.04, {"max_kl": 0.021, "max_change": 0.401}, True),
        (2.0, 0.2, 0.04, {"max_kl": 0.019}, False),
        (2.0, 0.2, 0.04, {"max_change": 0.399}, False),
        (-2.0, 0.2, 0.04, {"max_change": 0.401}, True),
        (-2.0, 0.2, 0.04, {"max_change": 0.399}, False),
        (-2.0, 0.2, 0.04, {"symmetric": False}, False),
        # an unlikely action: m_F = 0.02 or (s.u)^2 / 2 = 0.125, m_H = 0.5 + (0.25 - 0.04) / 2
        (1.0, 0.5, 0.04, {"max_kl": 0.1}, True),
        (1.0, 0.5, 0.04, {"max_kl": 0.1, "exact": False}, False),
        (1.0, 0.5, 0.04, {"max_change": 0.606}, True),
        (1.0, 0.5, 0.04, {"max_change": 0.604}, False),
    ],
)
def test_capo_keeps_rows_within_both_bounds(advantage, along, fisher, options, kept):
    score, shift = vector([along / 0.1, 7.0]), vector([0.1, 0.0])
    options = {"max_kl": 9.0, "max_change": 9.0, **options}
    assert capo_mask(vector(advantage), score, shift, vector(fisher), **options).item() == kept


def test_adam_shift_is_what_adam_does_to_one_row():
    layer = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-3)
    for _ in range(3):  # moments to start from
        optimizer.zero_grad()
        layer(randn(5, 3)).square().sum().backward()
        optimizer.step()
    state = {name: optimizer.state[layer.weight][name] for name in ("exp_avg", "exp_avg_sq")}
    options = {"step": 3, "learning_rate": 0.01, "betas": (0.8, 0.9), "eps": 1e-3}
    hidden, score, advantage = randn(3), randn(2), vector(-1.7)
    found = adam_shift(score, hidden, advantage, **state, **options)
    before = layer(hidden).detach()
    optimizer.zero_grad()
    (-advantage * score @ layer(hidden)).backward()
    optimizer.step()
    assert_close(found, layer(hidden).detach() - before)


def test_adam_shift_takes_rows_one_by_one():
    score, hidden, advantage = randn(5, 2), randn(5, 3), randn(5)
    options = {"exp_avg": randn(2, 3), "exp_avg_sq": randn(2, 3).square()}
    shift = partial(adam_shift, step=3, learning_rate=0.01, **options)
    expected = [shift(score[i], hidden[i], advantage[i]) for i in range(5)]
    assert_close(shift(score, hidden, advantage), torch.stack(expected))


# -- PIPO ----------------------------------------------------------------------------------------

HISTORY = vector([0.5, 0.6, 0.4, 0.5])


@pytest.mark.parametrize(
    ("mean_return", "options", "expected"),
    [
        (0.62, {}, 1.69706),
        (0.62, {"correction": 1}, 1.46969),
        (0.38, {}, -0.169706),
        (9.0, {"maximum": 2.0}, 2.0),
        (-9.0, {"maximum": 2.0}, -0.2),
        (0.62, {"gate": 1.6}, 1.69706),
        (0.62, {"gate": 1.7}, 0.0),
        (0.38, {"gate": 1.7}, 0.0),
    ],
)
def test_pipo_multiplier(mean_return, options, expected):
    found = pipo_multiplier(vector(mean_return), HISTORY, negative_scale=0.1, **options)
    assert found.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("length", [1, 7])
def test_pipo_history_without_spread_has_unit_deviation(length, correction):
    history = torch.full((length,), 0.1)
    found = pipo_multiplier(torch.tensor(0.4), history, negative_scale=0.1, correction=correction)
    assert found.item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("grouped", "expected"),
    [
        (True, [2.26274, -2.26274, 1.13137, -1.13137]),
        (False, [1.69706, -1.69706, 0.84853, -0.84853]),
    ],
)
def test_pipo_coefficients(grouped, expected):
    advantage = vector([1.0, -1.0, 0.5, -0.5])
    found = pipo_coefficients(advantage, vector(1.69706), grouped=grouped)
    assert_close(found, vector(expected), rtol=0, atol=1e-5)


def test_pipo_groups_scale_apart_and_may_be_all_zero():
    advantage = vector([[3.0, -1.0], [0.0, 0.0]])
    found = pipo_coefficients(advantage, vector(1.0), grouped=True)
    assert_close(found, vector([[1.5, -0.5], [0.0, 0.0]]))


def test_pipo_coefficients_are_bounded():
    found = pipo_coefficients(vector([100.0, -100.0]), vector(1.0), grouped=False)
    assert found.tolist() == [10.0, -10.0]

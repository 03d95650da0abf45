from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from genpol.errors import ConfigError
from genpol.objectives.bpo import (
    bpo,
    bpo_target,
)
from genpol.objectives.selection import (
    bapo_bounds,
    kl_cov,
)
from genpol.objectives.surrogates import (
    EWMA,
    clamped_log_ratio,
    mdpo,
    mdpo_step_size,
    mhpo,
    ppo_clip,
    ppo_ewma,
    r2vpo,
    r2vpo_multiplier,
    tsallis_divergence,
    tsallis_log,
)
from genpol.policies.gaussian import log_prob

vector = partial(torch.tensor, dtype=torch.float64)
randn = partial(torch.randn, dtype=torch.float64)
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
BOX = {"low": 0.8, "high": 1.2}
MHPO = {"bound": 1.5, "up_power": 1.5, "up_scale": 1.0, "down_power": 2.0, "down_scale": 0.8}
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


def bapo(log_ratio, advantage):
    low, high, _ = bapo_bounds(log_ratio, advantage, share=0.5, **SEARCH)
    return ppo_clip(log_ratio, advantage, clip_low=1 - low, clip_high=high - 1)


def signed_bpo(log_ratio, advantage):
    target = bpo_target(advantage, temperature=0.0, **BOX)
    return bpo(log_ratio, advantage, target=target)


def kl_mdpo(log_ratio, advantage):
    divergence = tsallis_divergence(log_ratio, torch.zeros_like(log_ratio), index=1.0)
    return mdpo(log_ratio, advantage, divergence=divergence, step_size=0.5)


def own_kl_cov(log_ratio, advantage, penalty="square"):
    return kl_cov(
        log_ratio, advantage, log_prob=log_ratio, fraction=0.3, coefficient=1.0, penalty=penalty
    )


def same_proximal(log_ratio, advantage):
    return ppo_ewma(log_ratio, advantage, log_proximal_ratio=torch.zeros_like(log_ratio), **CLIP)


# name: the surrogate of (log_ratio, advantage), and its gradient at ratio 1 over A
SURROGATES = {
    "ppo": (partial(ppo_clip, **CLIP), 1.0),
    "ppo_dual_clip": (partial(ppo_clip, dual_clip=3.0, **CLIP), 1.0),
    "ppo_ewma": (same_proximal, 1.0),
    "bapo": (bapo, 1.0),
    "r2vpo": (partial(r2vpo, multiplier=0.5, delta=0.02), 1.0),
    "mhpo": (partial(mhpo, **MHPO), 1.0),
    "mhpo_released": (partial(mhpo, normalise=False, **MHPO), 0.26507),
    "kl_cov": (own_kl_cov, 1.0),
    "kl_cov_released": (partial(own_kl_cov, penalty="absolute"), 1.0),
    "mdpo": (kl_mdpo, 1.0),
    "bpo": (signed_bpo, 1.0),
}
every_surrogate = pytest.mark.parametrize("surrogate", [f for f, _ in SURROGATES.values()])


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


def rows(ratio):
    """Log-ratios that take a gradient."""
    return vector(ratio).log().requires_grad_()


# -- what holds for every surrogate --------------------------------------------------------------


@pytest.mark.parametrize(("surrogate", "scale"), SURROGATES.values(), ids=SURROGATES)
def test_gradient_at_ratio_one_is_the_policy_gradient(surrogate, scale):
    """Acceptance (a)."""
    log_ratio = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    advantage = randn(20)
    found = gradient(surrogate(log_ratio, advantage), log_ratio)
    assert_close(found, -scale * advantage, rtol=1e-4, atol=0)


@every_surrogate
def test_extreme_ratios_are_finite(surrogate):
    """Acceptance (b)."""
    log_probability = torch.tensor([900.0, 900.0, -900.0, -900.0], requires_grad=True)
    log_ratio = clamped_log_ratio(log_probability, torch.zeros(4))
    loss = surrogate(log_ratio, torch.tensor([3.0, -3.0, 3.0, -3.0]))
    assert loss.isfinite().all()
    assert gradient(loss, log_ratio).isfinite().all()


@every_surrogate
def test_rows_may_come_in_any_order(surrogate):
    """Acceptance (c)."""
    log_ratio, advantage, order = 0.3 * randn(30), randn(30), torch.randperm(30)
    expected = surrogate(log_ratio, advantage)[order]
    assert_close(surrogate(log_ratio[order], advantage[order]), expected)


def median_bpo(log_ratio, advantage, probabilities):
    order = advantage.argsort()
    median = advantage[order][(probabilities[order].cumsum(0) >= 0.5).int().argmax()]
    target = bpo_target(advantage - median, temperature=0.0, **BOX)
    return bpo(log_ratio, advantage, target=target)


@pytest.mark.parametrize(
    ("surrogate", "final", "largest_drop"),
    [
        (lambda x, a, p: ppo_clip(x, a, **CLIP), 0.9478, 0.0),
        (lambda x, a, p: r2vpo(x, a, multiplier=0.5, delta=0.02), 0.9456, 0.0),
        (lambda x, a, p: mhpo(x, a, normalise=False, **MHPO), 0.6342, 0.0),
        (median_bpo, 0.8566, 0.0149),
    ],
    ids=["ppo", "r2vpo", "mhpo", "bpo"],
)
def test_bandit_is_learnt_at_the_predicted_speed(surrogate, final, largest_drop):
    """Acceptance (d): exact expectations, softmax logits, plain gradient descent."""
    values = vector([1.0, 0.0, -0.5])
    logits = vector([0.2, 0.3, 0.5]).log().requires_grad_()
    returns = [-0.05]
    for step in range(200):
        if step % 10 == 0:
            old = logits.detach().log_softmax(-1)
        advantage = values - (old.exp() * values).sum()
        loss = old.exp() * surrogate(logits.log_softmax(-1) - old, advantage, old.exp())
        logits = (logits - 0.1 * gradient(loss, logits)).detach().requires_grad_()
        returns.append((logits.softmax(-1) * values).sum().item())
    drops = -vector(returns).diff()
    assert returns[-1] == pytest.approx(final, abs=1e-4)
    assert drops.max().clamp_min(0).item() == pytest.approx(largest_drop, abs=1e-4)


def test_log_ratio_is_clamped_on_both_sides():
    found = clamped_log_ratio(torch.tensor([1.0, 50.0, -50.0]), torch.tensor([0.5, 0.0, 0.0]))
    assert found.tolist() == [0.5, 20.0, -20.0]


# -- PPO and PPO-EWMA ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip_low", "ratio", "advantage", "expected", "flows"),
    [
        (0.2, 1.5, 1.0, -1.2, False),
        (0.2, 1.5, -1.0, 1.5, True),
        (0.2, 0.5, -1.0, 0.8, False),
        (0.1, 0.5, -1.0, 0.9, False),
        (0.1, 1.5, 1.0, -1.2, False),
        (0.1, 0.5, 1.0, -0.5, True),
    ],
)
def test_ppo_clips_each_side_at_its_own_bound(clip_low, ratio, advantage, expected, flows):
    log_ratio = rows([ratio])
    loss = ppo_clip(log_ratio, vector([advantage]), clip_low=clip_low, clip_high=0.2)
    assert loss.item() == pytest.approx(expected)
    assert (gradient(loss, log_ratio) != 0).item() == flows


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"), [(10.0, -2.0, 6.0), (2.0, -2.0, 4.0), (10.0, 1.0, -1.2)]
)
def test_dual_clip_bounds_only_the_loss_of_bad_actions(ratio, advantage, expected):
    loss = ppo_clip(rows([ratio]), vector([advantage]), dual_clip=3.0, **CLIP)
    assert loss.item() == pytest.approx(expected)


def test_dual_clip_inside_the_band_is_refused():
    with pytest.raises(ConfigError, match="dual_clip"):
        ppo_clip(torch.zeros(1), torch.zeros(1), dual_clip=1.0, **CLIP)


@pytest.mark.parametrize(
    ("proximal", "current", "advantage", "expected", "flows"),
    [
        (0.6, 0.9, 1.0, -1.44, False),
        (0.6, 0.9, -1.0, 1.8, True),
        (0.9, 0.95, -1.0, 1.9, True),  # inside the proximal band, though far from the old policy
    ],
)
def test_ppo_ewma_clips_around_the_proximal_policy(proximal, current, advantage, expected, flows):
    log_ratio, proximal = rows([current / 0.5]), vector([proximal / 0.5]).log()
    loss = ppo_ewma(log_ratio, vector([advantage]), log_proximal_ratio=proximal, **CLIP)
    assert loss.item() == pytest.approx(expected)
    assert (gradient(loss, log_ratio) != 0).item() == flows


def test_ppo_ewma_around_the_old_policy_is_ppo():
    log_ratio, advantage = 0.5 * randn(100), randn(100)
    assert_close(same_proximal(log_ratio, advantage), ppo_clip(log_ratio, advantage, **CLIP))


@pytest.mark.parametrize(("advantage", "expected", "slope"), [(-1.0, 100, 100), (1.0, -0.12, 0)])
def test_ppo_ewma_scales_stale_rows_down(advantage, expected, slope):
    """A ratio of 1000 counts as 100; the clipped 1.2 shrinks alike."""
    log_ratio = rows([1000.0])
    loss = same_proximal(log_ratio, vector([advantage]))
    assert loss.item() == pytest.approx(expected)
    assert gradient(loss, log_ratio).item() == pytest.approx(slope)


def scalar_module(value):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_ewma_is_bias_corrected():
    ewma = EWMA(scalar_module(1.0), decay=0.5)
    found = [(1.0, 1.0)]
    for value in (2.0, 3.0):
        ewma.update(scalar_module(value))
        found.append((ewma.average.weight.item(), ewma.total_weight.item()))
    assert_close(torch.tensor(found), torch.tensor([[1, 1], [1.66667, 1.5], [2.42857, 1.75]]))


def test_ewma_continues_from_its_state():
    ewma, resumed = EWMA(scalar_module(1.0), decay=0.5), EWMA(scalar_module(7.0), decay=0.5)
    ewma.update(scalar_module(2.0))
    resumed.load_state_dict(ewma.state_dict())
    for average in (ewma, resumed):
        average.update(scalar_module(3.0))
    assert torch.equal(resumed.average.weight, ewma.average.weight)


def test_ewma_is_a_copy_without_gradient():
    module = scalar_module(1.0)
    ewma = EWMA(module, decay=0.5)
    nn.init.constant_(module.weight, 5.0)
    assert ewma.average.weight.item() == 1
    assert not ewma.average.weight.requires_grad


def test_ewma_copies_statistics_unaveraged():
    module = nn.BatchNorm1d(1)
    ewma = EWMA(module, decay=0.5)
    module.running_mean.fill_(4.0)
    ewma.update(module)
    assert ewma.average.running_mean.item() == 4


# -- MDPO ----------------------------------------------------------------------------------------

OLD = vector([0.2, 0.3, 0.5])
ACTION_VALUES = vector([1.0, 0.0, -0.5])


def categorical_kl(logits, old):
    new = logits.log_softmax(-1)
    return (new.exp() * (new - old.log())).sum().expand(3)


def tsallis(logits, old, index):
    return tsallis_divergence(logits.log_softmax(-1) - old.log(), old.log(), index=index)


def mdpo_loss(logits, old, values, step_size, divergence=categorical_kl):
    """The exact expectation under ``old`` of the surrogate, for softmax logits."""
    surrogate = mdpo(
        logits.log_softmax(-1) - old.log(),
        values - (old * values).sum(),
        divergence=divergence(logits, old),
        step_size=step_size,
    )
    return (old * surrogate).sum()


def mirror_step(old, values, step_size, divergence=categorical_kl):
    """Run the inner loop to convergence."""
    logits = old.log().requires_grad_()
    tolerances = {"tolerance_grad": 1e-10, "tolerance_change": 1e-14}
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **tolerances)

    def closure():
        optimizer.zero_grad()
        loss = mdpo_loss(logits, old, values, step_size, divergence)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


@pytest.mark.parametrize(
    ("step_size", "expected", "kl", "gain"),
    [
        (1.0, [0.474013, 0.261570, 0.264417], 0.204724, 0.391805),
        (0.5, [0.323550, 0.294364, 0.382086], 0.047290, 0.182507),
    ],
)
def test_mirror_step_of_a_bandit(step_size, expected, kl, gain):
    """MDPO oracle 1."""
    new = mirror_step(OLD, ACTION_VALUES, step_size)
    assert_close(new, vector(expected), rtol=0, atol=1e-5)
    assert categorical_kl(new.log(), OLD)[0].item() == pytest.approx(kl, abs=1e-5)
    assert ((new - OLD) @ ACTION_VALUES).item() == pytest.approx(gain, abs=1e-5)


def test_soft_mirror_steps_lead_to_the_softmax():
    """MDPO oracle 2: the entropy enters linearised, through the advantage."""
    policy = OLD
    for step in range(60):
        policy = mirror_step(policy, ACTION_VALUES - 0.2 * policy.log(), step_size=1.0)
        if step == 0:
            assert_close(policy, vector([0.506777, 0.257867, 0.235357]), rtol=0, atol=1e-5)
    assert_close(policy, vector([0.992762, 0.006689, 0.000549]), rtol=0, atol=2e-6)


def test_divergence_acts_from_the_second_inner_step_on():
    """MDPO oracle 3."""
    logits = OLD.log().requires_grad_()
    policy_gradient = -OLD * (ACTION_VALUES - OLD @ ACTION_VALUES)
    first = gradient(mdpo_loss(logits, OLD, ACTION_VALUES, 0.5), logits)
    assert_close(first, policy_gradient)
    moved = (logits - 0.5 * first).detach().requires_grad_()
    free = gradient(mdpo_loss(moved, OLD, ACTION_VALUES, 1e12), moved)
    second = gradient(mdpo_loss(moved, OLD, ACTION_VALUES, 0.5), moved)
    assert (second - free).abs().max() > 1e-2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_mirror_steps_add_up_in_any_order(order):
    """MDPO oracle 4."""
    values = vector([[1.0, 0.0, -0.5], [0.0, 2.0, 0.0], [-1.0, 0.5, 0.3]])
    policy = OLD
    for index in order:
        policy = mirror_step(policy, values[index], step_size=0.4)
    expected = (OLD.log() + 0.4 * values.sum(0)).softmax(-1)
    assert_close(policy, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("step_size", "expected"),
    [(0.4, [0.366667, 0.266667, 0.366667]), (1.0, [0.616667, 0.216667, 0.166667])],
)
def test_tsallis_step_of_index_two_is_a_euclidean_projection(step_size, expected):
    """MDPO oracle 7."""
    new = mirror_step(OLD, ACTION_VALUES, step_size, partial(tsallis, index=2.0))
    assert_close(new, vector(expected), rtol=0, atol=1e-5)


def bregman(new, old, index):
    def potential(pi):
        return (pi * tsallis_log(pi.log(), index)).sum()

    slope = torch.func.grad(potential)(old)
    return potential(new) - potential(old) - slope @ (new - old)


@pytest.mark.parametrize("index", [1.0, 1.4, 2.0])
def test_tsallis_rows_average_to_the_bregman_divergence(index):
    new = vector([0.5, 0.4, 0.1])
    assert_close((OLD * tsallis(new.log(), OLD, index)).sum(), bregman(new, OLD, index))


def test_tsallis_divergence_tends_to_kl():
    new = vector([0.5, 0.4, 0.1])
    found = (OLD * tsallis(new.log(), OLD, 1.0001)).sum().item()
    assert found == pytest.approx(categorical_kl(new.log(), OLD)[0].item(), abs=1e-4)


@pytest.mark.parametrize("index", [1.0, 1.4, 2.0])
def test_tsallis_rows_are_never_negative(index):
    assert (tsallis_divergence(randn(1000), randn(1000), index=index) >= 0).all()


def test_tsallis_log_of_index_two_is_the_density_less_one():
    assert_close(tsallis_log(vector([0.1, 2.5]).log(), 2.0), vector([-0.9, 1.5]))


def test_tsallis_log_near_index_one_keeps_its_digits():
    log_density = torch.tensor([-3.0, 1e-3, 2.0])
    assert_close(tsallis_log(log_density, 1.0 + 1e-7), log_density, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("form", "first", "middle", "last"),
    [("genpol", 1.0, 0.5, 0.01), ("released", 1.01, 0.51, 0.02)],
)
def test_mirror_steps_shrink_linearly(form, first, middle, last):
    """MDPO oracle 8."""
    found = [mdpo_step_size(iteration, 100, form=form) for iteration in (0, 50, 99)]
    assert found == pytest.approx([first, middle, last])


def test_mirror_step_has_a_floor():
    assert mdpo_step_size(99, 100, floor=0.02) == 0.02


@pytest.mark.parametrize("options", [{"form": "linear"}, {"iteration": 100}])
def test_unusable_mirror_step_is_refused(options):
    with pytest.raises(ConfigError, match="mdpo"):
        mdpo_step_size(**{"iteration": 0, "total": 100, **options})


# -- R2VPO and MHPO ------------------------------------------------------------------------------


def test_r2vpo_loss_and_gradient_weights():
    log_ratio, advantage = rows([0.8, 1.0, 1.5]), vector([1.0, -1.0, 2.0])
    loss = r2vpo(log_ratio, advantage, multiplier=0.5, delta=0.02)
    assert loss.mean().item() == pytest.approx(-0.895)
    weights = -gradient(loss, log_ratio) / log_ratio.exp()
    assert_close(weights, vector([1.2, -1.0, 1.5]))


def test_r2vpo_penalty_is_the_chi_square_divergence():
    scale = vector([0.5])
    action = scale * GRID[:, None]
    log_ratio = log_prob(vector([0.1]), scale, action) - log_prob(vector([0.0]), scale, action)
    penalty = r2vpo(log_ratio, torch.zeros_like(GRID), multiplier=1.0, delta=0.0)
    assert (WEIGHTS * penalty).sum().item() == pytest.approx(0.0408108, abs=1e-7)


@pytest.mark.parametrize(
    ("start", "moment", "expected"),
    [(0.5, 0.0966667, 0.5766667), (0.5, 0.0, 0.48), (0.5, 100.0, 50.0), (0.01, 0.0, 0.0)],
)
def test_r2vpo_multiplier_follows_the_constraint_within_bounds(start, moment, expected):
    found = r2vpo_multiplier(vector(start), vector(moment), delta=0.02, rate=1.0, maximum=50.0)
    assert found.item() == pytest.approx(expected)


MHPO_TABLE = [
    (0.5, -0.6477, 2.0570, 0.0544),
    (1.0, 0.0, 1.3278, 0.2651),
    (1.2, 0.1814, 1.2743, 0.3303),
    (2.0, 0.6477, 1.3813, 0.3907),
    (5.0, 1.1859, 1.8615, 0.1908),
]


@pytest.mark.parametrize(("ratio", "psi", "hazard", "multiplier"), MHPO_TABLE)
def test_mhpo_loss_and_multiplier(ratio, psi, hazard, multiplier):
    log_ratio = rows([ratio])
    loss = mhpo(log_ratio, vector([-2.0]), normalise=False, **MHPO)
    assert loss.item() == pytest.approx(2 * math.exp(psi - hazard), rel=2e-4)
    assert gradient(loss, log_ratio).item() == pytest.approx(2 * multiplier, abs=1.5e-4)


def test_normalised_mhpo_is_the_released_one_over_its_value_at_one():
    log_ratio, advantage = randn(50), randn(50)
    released = mhpo(log_ratio, advantage, normalise=False, **MHPO)
    unit = -mhpo(torch.zeros(1).double(), vector([1.0]), normalise=False, **MHPO)
    assert_close(mhpo(log_ratio, advantage, **MHPO), released / unit)

"""OGPO's advantages: the algebra of its specification, oracles O7, O9 and O11."""

from __future__ import annotations

import pytest
import torch

from genpol.errors import ConfigError
from genpol.objectives.critic_groups import group_advantage, sample_mean


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_heads(*advantages):
    """Return values of a group of two whose first action has these advantages."""
    heads = torch.tensor(advantages, dtype=torch.float64)
    return torch.stack((heads, -heads)).unsqueeze(-1)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ((0.2, 0.5, 0.1), 0.1),
        ((-0.3, -0.1), -0.1),
        ((0.2, -0.1), 0.0),
        ((0.2, 0.0, 0.4), 0.0),
        ((-0.2, 0.0), 0.0),
    ],
)
def test_only_what_all_critics_agree_on_counts(heads, expected):
    """O7."""
    found = group_advantage(of_heads(*heads))
    assert found[0].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("heads", "expected"), [((0.2, 0.5, 0.1), 0.2), ((-0.3, -0.1, -0.2), -0.2), ((0.3, -0.1), 0.0)]
)
def test_the_second_of_those_that_agree(heads, expected):
    assert group_advantage(of_heads(*heads), how="second")[0].item() == pytest.approx(expected)


def test_identical_critics_make_it_the_plain_advantage():
    values = normal(8, 1, 5).expand(8, 10, 5)
    torch.testing.assert_close(group_advantage(values), group_advantage(values, how="mean"))


def test_it_scales_with_the_value_and_is_never_larger_than_the_mean():
    values = normal(8, 4, 50)
    found = group_advantage(values)
    assert (found != 0).any()
    torch.testing.assert_close(group_advantage(3.0 * values), 3.0 * found)
    assert (found.abs() <= group_advantage(values, how="mean").abs() + 1e-6).all()


def test_of_pure_noise_next_to_nothing_passes():
    """O7: 2^-9 with ten critics."""
    values = normal(32, 10, 40_000)
    share = (group_advantage(values) != 0).double().mean().item()
    assert share == pytest.approx(0.00195, abs=0.0002)


@pytest.mark.parametrize("how", ["mean", "min"])
def test_plain_advantages_sum_to_nothing_and_forget_the_state(how):
    """O11."""
    values = normal(8, 4, 6)
    found = group_advantage(values, how=how)
    torch.testing.assert_close(found.sum(0), torch.zeros(6), atol=1e-5, rtol=0.0)
    shifted = group_advantage(values + normal(6, seed=1), how=how)
    torch.testing.assert_close(found, shifted, atol=1e-5, rtol=0.0)


def test_no_gradient_comes_back_from_an_advantage():
    assert not group_advantage(normal(4, 2, 3).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("how", "factor"), [("mean", 0.125), ("median", 0.168), ("trimmed", 0.147)]
)
def test_several_samples_lower_the_variance_of_a_target(how, factor):
    """O9: Q = 2 a with a of standard deviation 0.1, 0.99^4 ahead."""
    values = 2 * 0.1 * normal(8, 400_000) * 0.99**4
    found = sample_mean(values, how=how)
    assert values[0].var().item() == pytest.approx(0.03691, rel=0.02)
    assert (found.var() / values[0].var()).item() == pytest.approx(factor, rel=0.02)
    assert abs(found.mean().item()) < 1e-3


def test_the_median_of_an_even_number_lies_midway():
    assert sample_mean(torch.tensor([4.0, 1.0, 2.0, 9.0]), how="median").item() == 3.0
    assert sample_mean(torch.tensor([4.0, 1.0, 9.0]), how="median").item() == 4.0


def test_unknown_ways_are_refused():
    with pytest.raises(ConfigError, match="how"):
        group_advantage(normal(2, 2, 2), how="max")
    with pytest.raises(ConfigError, match="how"):
        sample_mean(normal(2, 2), how="max")

from __future__ import annotations

import torch

from genpol.objectives.advantages import brax_gae, gae, normalize_advantage

# GoRL oracle 6: U = 3, gamma = 0.9, lambda = 0.5, bootstrap 2.
REWARD = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
VALUE = torch.tensor([[0.5, 1.0, 1.5]], dtype=torch.float64)
NEXT_VALUE = torch.tensor([[1.0, 1.5, 2.0]], dtype=torch.float64)
NEVER = torch.zeros(1, 3, dtype=torch.bool)
SECOND = torch.tensor([[False, True, False]])


def check(actual: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_gae_without_ends_is_the_decayed_sum():
    advantage, target = gae(REWARD, VALUE, NEXT_VALUE, NEVER, NEVER, 0.9, 0.5)
    check(advantage, 3.12575, 3.835, 3.3)
    check(target, 3.62575, 4.835, 4.8)


def test_brax_gae_without_ends():
    advantage, target = brax_gae(REWARD, VALUE, NEXT_VALUE, NEVER, NEVER, 0.9, 0.5)
    check(advantage, 4.8515, 5.32, 3.3)
    check(target, 3.62575, 4.835, 4.8)


def test_brax_gae_gives_truncated_steps_no_advantage():
    advantage, target = brax_gae(REWARD, VALUE, NEXT_VALUE, NEVER, SECOND, 0.9, 0.5)
    check(advantage, 1.4, 0.0, 3.3)
    check(target, 0.5 + 1.4, 1.0, 1.5 + 3.3)


def test_gae_bootstraps_where_truncated():
    next_value = NEXT_VALUE.clone()
    next_value[0, 1] = 10.0  # the value of the observation lost to the reset
    advantage, _ = gae(REWARD, VALUE, next_value, NEVER, SECOND, 0.9, 0.5)
    check(advantage, 1.4 + 0.45 * 10.0, 2.0 + 9.0 - 1.0, 3.3)


def test_neither_bootstraps_where_terminated():
    next_value = NEXT_VALUE.clone()
    next_value[0, 1] = torch.nan  # must not leak through 0 x NaN
    for estimate in (gae, brax_gae):
        advantage, _ = estimate(REWARD, VALUE, next_value, SECOND, SECOND, 0.9, 0.5)
        first = 1.4 + (0.9 if estimate is brax_gae else 0.45) * 1.0
        check(advantage, first, 1.0, 3.3)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    generator = torch.Generator().manual_seed(0)
    reward, value = torch.rand(2, 4, 6, generator=generator).unbind(0)
    next_value = torch.cat((value[:, 1:], torch.zeros(4, 1)), 1)
    never = torch.zeros(4, 6, dtype=torch.bool)
    _, target = gae(reward, value, next_value, never, never, 0.97, 1.0)
    discount = 0.97 ** torch.arange(6)
    torch.testing.assert_close(target[:, 0], (reward * discount).sum(1))


def test_estimates_carry_no_gradient():
    value = VALUE.clone().requires_grad_()
    advantage, target = gae(REWARD, value, NEXT_VALUE, NEVER, NEVER, 0.9, 0.5)
    assert not advantage.requires_grad
    assert not target.requires_grad


def test_normalised_advantage_ignores_masked_entries():
    advantage = torch.tensor([1.0, 3.0, torch.nan])
    out = normalize_advantage(advantage, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(out, torch.tensor([-1.0, 1.0, 0.0]))


def test_normalised_advantage_has_zero_mean_and_unit_std():
    out = normalize_advantage(5 + 3 * torch.randn(100, 7))
    assert abs(out.mean()) < 1e-5
    torch.testing.assert_close(out.std(correction=0), torch.tensor(1.0))

"""Chunks that are bound to the one before: against the formulas, and where they are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genpol.policies.denoiser import DenoisingNetwork, Field
from genpol.policies.flow import FlowPolicy
from genpol.policies.real_time import STRENGTH, bound_sample, pull

B, H, A = 3, 4, 2


def flow(num_steps: int = 5, **options) -> FlowPolicy:
    return FlowPolicy(
        3,
        A,
        [16],
        horizon=H,
        num_steps=num_steps,
        zero_init=False,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).requires_grad_(False)


def drawn(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return observations, noise, and chunks of before."""
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, 3, generator=draw),
        torch.randn(B, H, A, generator=draw),
        torch.rand(B, H, A, generator=draw) - 0.5,
    )


# --- the factor --------------------------------------------------------------------------------


def published(t: float, strength: float) -> float:
    """Return the factor of equation 2 of arXiv 2506.07339 with r^2 of equation 4 written out."""
    r_squared = (1.0 - t) ** 2 / (t**2 + (1.0 - t) ** 2)
    return min(strength, (1.0 - t) / (t * r_squared))


@pytest.mark.parametrize("strength", [0.5, 3.0, 5.0, 1e9])
@pytest.mark.parametrize("t", [0.01, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_the_factor_is_the_published_one(t: float, strength: float) -> None:
    assert pull(t, strength) == pytest.approx(published(t, strength), rel=1e-12)


def test_the_factor_is_bounded_where_the_published_one_has_no_value() -> None:
    assert pull(0.0) == pull(1.0) == STRENGTH == 5.0
    assert pull(0.5) == pytest.approx(2.0)  # r^2 = 1/2


# --- what it is made of ------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 5])
def test_without_weights_it_is_the_flow_s_own_sample(num_steps: int) -> None:
    policy = flow(num_steps)
    observation, noise, previous = drawn()
    own = policy.sample(observation, noise)
    found = bound_sample(policy, observation, noise, previous, torch.zeros(B, H))
    torch.testing.assert_close(found, own.clamp(-1.0, 1.0), atol=1e-6, rtol=1e-6)
    assert (own.abs() > 1.0).any()  # which is why it is clipped


def test_weights_of_zero_hide_what_is_not_a_number() -> None:
    policy = flow()
    observation, noise, previous = drawn()
    kept = torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(B, H)
    wanted = bound_sample(policy, observation, noise, previous, kept)
    previous[:, 2:] = math.nan
    assert torch.equal(bound_sample(policy, observation, noise, previous, kept), wanted)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_step_is_euler_s_with_the_pull_through_the_jacobian(num_steps: int) -> None:
    """Each row by itself, with the whole Jacobian of the clean estimate."""
    policy = flow(num_steps)
    observation, noise, previous = drawn()
    kept = torch.tensor([[1.0, 1.0, 0.4, 0.0]] * B)
    found = bound_sample(policy, observation, 0.3 * noise, previous, kept)
    for row in range(B):
        x = 0.3 * noise[row].flatten()
        weights = torch.diag(kept[row].repeat_interleave(A))
        for step in range(num_steps):
            t = step / num_steps

            def velocity(state: Tensor, t: float = t, row: int = row) -> Tensor:
                made = policy.velocity(
                    observation[row : row + 1], state.view(1, H, A), torch.full((1, 1), t)
                )
                return made.flatten()

            def clean(state: Tensor, t: float = t, velocity=velocity) -> Tensor:
                return state + (1.0 - t) * velocity(state)

            jacobian = torch.autograd.functional.jacobian(clean, x)
            error = previous[row].flatten() - clean(x)
            factor = STRENGTH if t == 0.0 else published(t, STRENGTH)
            x = x + (velocity(x) + factor * jacobian.T @ weights @ error) / num_steps
        expected = x.view(H, A).clamp(-1.0, 1.0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    assert found.abs().max() < 1.0 or num_steps == 1


def test_rows_do_not_see_each_other() -> None:
    policy = flow()
    observation, noise, previous = drawn()
    kept = torch.tensor([[1.0, 1.0, 0.5, 0.0]] * B)
    together = bound_sample(policy, observation, noise, previous, kept)
    for row in range(B):
        one = slice(row, row + 1)
        alone = bound_sample(policy, observation[one], noise[one], previous[one], kept[one])
        torch.testing.assert_close(together[one], alone)


def test_the_strength_is_a_bound_on_the_pull() -> None:
    policy = flow()
    observation, noise, previous = drawn()
    kept = torch.ones(B, H)
    none = bound_sample(policy, observation, noise, previous, kept, strength=0.0)
    own = policy.sample(observation, noise).clamp(-1.0, 1.0)
    torch.testing.assert_close(none, own, atol=1e-6, rtol=1e-6)
    some = bound_sample(policy, observation, noise, previous, kept, strength=0.5)
    whole = bound_sample(policy, observation, noise, previous, kept)
    free, half, bound = ((x - previous).square().mean() for x in (none, some, whole))
    assert bound < half < free


# --- where the answer is known -----------------------------------------------------------------

STD = 0.5


class GaussianData(DenoisingNetwork):
    """The exact velocity of the path from N(0, 1) to N(0, STD^2), whatever is observed."""

    def forward(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return slope(time) * x

    def on_grid(self, observation: Tensor, times: Tensor) -> Field:
        return lambda x, step: slope(times[step]) * x

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """There are none."""


def slope(t):
    return (t * STD**2 - (1.0 - t)) / ((1.0 - t) ** 2 + (t * STD) ** 2)


def gaussian(num_steps: int) -> FlowPolicy:
    return FlowPolicy(3, A, [], horizon=H, num_steps=num_steps, network=GaussianData())


def by_hand(x: float, wanted: float, weight: float, num_steps: int) -> float:
    """Return where the pulled flow takes a number: its Jacobian is a number as well."""
    for step in range(num_steps):
        t = step / num_steps
        factor = STRENGTH if t == 0.0 else published(t, STRENGTH)
        jacobian = 1.0 + (1.0 - t) * slope(t)
        pulled = factor * jacobian * weight * (wanted - jacobian * x)
        x += (slope(t) * x + pulled) / num_steps
    return min(max(x, -1.0), 1.0)


@pytest.mark.parametrize("num_steps", [5, 10, 50])
def test_gaussian_data_are_pulled_as_the_closed_form_says(num_steps: int) -> None:
    observation, noise, previous = drawn()
    kept = torch.tensor([[1.0, 0.7, 0.2, 0.0]] * B)
    found = bound_sample(gaussian(num_steps), observation, noise, previous, kept)
    for row in range(B):
        for i in range(H):
            for j in range(A):
                expected = by_hand(
                    float(noise[row, i, j]),
                    float(previous[row, i, j]),
                    float(kept[row, i]),
                    num_steps,
                )
                assert float(found[row, i, j]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("num_steps", [5, 10, 50])
def test_what_is_carried_out_before_comes_out_near_what_it_was(num_steps: int) -> None:
    """Ever nearer the more it is bound; what is not bound stays as it was."""
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(4000, H, A, generator=draw)
    previous = (STD * torch.randn(4000, H, A, generator=draw)).clamp(-1.0, 1.0)
    kept = torch.tensor([[1.0, 0.5, 0.1, 0.0]]).expand(4000, H)
    policy = gaussian(num_steps)
    found = bound_sample(policy, torch.zeros(4000, 3), noise, previous, kept)
    own = policy.sample(torch.zeros(4000, 3), noise).clamp(-1.0, 1.0)
    apart = (found - previous).square().mean((0, 2)).sqrt()
    unbound = (own - previous).square().mean((0, 2)).sqrt()
    share = apart / unbound
    assert share[0] < 0.2  # of the distance that two chunks have which know nothing of each other
    assert share[0] < share[1] < share[2] < 0.95
    assert share[3] == pytest.approx(1.0, abs=1e-5)

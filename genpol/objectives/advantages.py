"""Generalised advantage estimation, the textbook's and Brax's.

All tensors are ``[..., T]``. ``next_value`` is the value of the *true* next observation, never of
the one after an automatic reset, so a truncated step bootstraps from where the episode was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages by GAE (Schulman et al., arXiv 1506.02438, equation 16).

    ``delta_t = r_t + gamma (1 - terminated_t) V'_t - V_t`` and
    ``A_t = delta_t + gamma lam (1 - done_t) A_{t+1}``.

    Args:
        reward: Rewards ``[..., T]``.
        value: Values of the observations.
        next_value: Values of the true next observations; ignored where terminated.
        terminated: True where the episode ended for good.
        done: True where it ended for any reason.
        gamma: Discount.
        lam: Decay of the longer estimates.

    Returns:
        Advantage and value target ``A + V``, ``[..., T]``.
    """
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    advantage = _discounted_sums(delta, torch.where(done, 0.0, gamma * lam))
    return advantage, advantage + value


@torch.no_grad()
def brax_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages as Brax's PPO does, which GoRL and FPO build on.

    With ``gamma_t = gamma (1 - terminated_t)`` and ``k_t = 1 - truncated_t``:
    ``delta_t = k_t (r_t + gamma_t V'_t - V_t)``, ``e_t = delta_t + gamma_t lam k_t e_{t+1}``,
    target ``V_t + e_t``, advantage ``A_t = delta_t + k_t gamma_t e_{t+1}``. Two differences from
    :func:`gae`: the first link of the advantage has no lambda, and a truncated step has zero
    advantage and zero value error instead of bootstrapping.

    Arguments and returns are those of :func:`gae`.
    """
    truncated = done & ~terminated
    delta = reward + gamma * torch.where(terminated, 0.0, next_value) - value
    delta = torch.where(truncated, 0.0, delta)
    discount = torch.where(done, 0.0, torch.full_like(delta, gamma))
    error = _discounted_sums(delta, discount * lam)
    following = torch.cat((error[..., 1:], torch.zeros_like(error[..., :1])), dim=-1)
    return delta + discount * following, value + error


@torch.no_grad()
def normalize_advantage(advantage: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ``(A - mean) / (std + 1e-8)`` over all entries, those of weight zero left out.

    The standard deviation is that of the population, as in Brax.
    """
    if weight is None:
        std, mean = torch.std_mean(advantage, correction=0)
        return (advantage - mean) / (std + 1e-8)
    counted = advantage[(weight != 0).expand_as(advantage)]
    if counted.numel() == 0:
        return torch.zeros_like(advantage)
    std, mean = torch.std_mean(counted, correction=0)
    return torch.where(weight != 0, (advantage - mean) / (std + 1e-8), 0.0)


def _discounted_sums(delta: Tensor, decay: Tensor) -> Tensor:
    """Return ``e_t = delta_t + decay_t e_{t+1}`` with ``e`` zero behind the last step."""
    # Time first and contiguous: a column of [N, T] would touch one cache line per environment.
    delta, decay = (x.expand_as(delta).movedim(-1, 0).contiguous() for x in (delta, decay))
    sums = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for step in range(delta.shape[0] - 1, -1, -1):
        running = torch.addcmul(delta[step], decay[step], running, out=sums[step])
    return sums.movedim(0, -1).contiguous()

"""Losses of off-policy actor-critics with an entropy bonus, as pure functions.

Log-densities come per action dimension ``[..., A]``. For KL and entropy the joint density would do,
but Tsallis' logarithm of a product is not a sum, and powers of joint densities overflow: like the
released code of MDPO it is applied to every dimension and summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpol.objectives.surrogates import tsallis_log

# Densities are floored here (released code of MDPO), so that powers of them stay finite. The
# gradient below the floor is zero.
_LOG_FLOOR = -13.815510557964274  # log 1e-6


def mdpo_actor_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    value: Tensor,
    *,
    kl_coefficient: float | Tensor,
    temperature: float | Tensor,
    tsallis_index: float = 1.0,
    divergence: Tensor | None = None,
) -> Tensor:
    """Return ``mean [c log_q pi + q (lambda - c) log_q pi_old - Q]``.

    Off-policy MDPO (arXiv 2005.09814, section 4.2 and released code), with the action
    reparameterised in all three terms. At ``c = lambda`` the old policy drops out and it is SAC's
    loss; ``lambda = 0`` is the mirror step without an entropy bonus.

    At ``q = 1`` that is ``lambda log pi + (c - lambda) KL(pi || pi_old) - Q`` in expectation; given
    the KL divergence in closed form, it is taken from there, without the noise of one draw.

    Args:
        log_prob: Log-densities under the policy that is trained ``[B, A]``.
        old_log_prob: Under the frozen previous policy, at the same actions ``[B, A]``.
        value: Action values ``[B]``.
        kl_coefficient: ``c``, the inverse of the mirror step size; at least ``temperature``.
        temperature: ``lambda``, weight of the entropy.
        tsallis_index: ``q`` in [1, 2]; 1 is Shannon's entropy and the KL divergence.
        divergence: ``KL(pi || pi_old)`` in closed form ``[B]``, at ``q = 1`` only; ``None`` takes
            it from the draw, as released.
    """
    if divergence is not None:
        entropy = entropy_term(log_prob)
        return (temperature * entropy + (kl_coefficient - temperature) * divergence - value).mean()
    new, old = entropy_term(log_prob, tsallis_index), entropy_term(old_log_prob, tsallis_index)
    repulsion = tsallis_index * (temperature - kl_coefficient)
    return (kl_coefficient * new + repulsion * old - value).mean()


def entropy_term(log_prob: Tensor, tsallis_index: float = 1.0) -> Tensor:
    """Return ``sum_i log_q p_i`` over the last dimension; minus its mean is the entropy."""
    if tsallis_index == 1.0:
        return log_prob.sum(-1)
    return tsallis_log(log_prob.clamp_min(_LOG_FLOOR), tsallis_index).sum(-1)


@torch.no_grad()
def soft_bellman_target(
    reward: Tensor, terminated: Tensor, next_value: Tensor, gamma: float
) -> Tensor:
    """Return ``r + gamma (1 - terminated) V(s')``, ``[B]``; truncated steps bootstrap."""
    return reward + gamma * torch.where(terminated, 0.0, next_value)


def temperature_loss(log_temperature: Tensor, entropy_term: Tensor, target: float) -> Tensor:
    """Return ``-mean log lambda (log pi + H_target)`` (arXiv 1812.05905, equation 18).

    As in the authors' code the multiplier is ``log lambda``, not ``lambda``: the step does not
    shrink with the temperature.

    Args:
        log_temperature: Scalar parameter.
        entropy_term: Log-densities of the policy's actions ``[B]``; constants here.
        target: Entropy to hold, in nats.
    """
    return -(log_temperature * (entropy_term.detach() + target)).mean()

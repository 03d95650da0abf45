"""Offline data beside a rollout, in the critic and in the actor (HNPG, arXiv 2311.08384).

A critic ``f(s, a)`` of action values regresses the returns of the rollout and, on offline tuples,
its own backup under the present policy: fitted policy evaluation. Averaged over fresh actions it is
a value, ``V(s)``. The actor learns from the rollout, with advantages that build on V, and at
offline *states*, where it acts afresh: ``a ~ pi`` with ``f(s, a) - V(s)``. One update:

1. Targets offline: :func:`~genpol.objectives.actor_critic.soft_bellman_target` of the next state's
   :func:`policy_value` under an averaged critic. Then :func:`hybrid_critic_loss`.
2. Advantages: of the rollout, GAE on :func:`policy_value`; offline, :func:`fresh_advantage`.
3. :func:`join_rows`, and any surrogate of :mod:`genpol.objectives.surrogates` on the result.

The paper's step is that of natural policy gradient, in a table ``pi <- pi exp(eta f)``, on a finite
horizon with a network for each step. Ours: any surrogate, one network, and :func:`offline_weight`,
which leaves the offline data out of both losses while the critic cannot fit them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpol.objectives.surrogates import clamped_log_ratio
from genpol.settings import positive


def hybrid_critic_loss(
    value: Tensor,
    returns: Tensor,
    offline_value: Tensor,
    offline_target: Tensor,
    *,
    offline_weight: float | Tensor = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``E_on (f - G)^2 + offline_weight E_off (f - r - gamma f'(s', a'))^2``.

    In the paper (arXiv 2311.08384) both have the same weight. Returns and targets are constants.

    Args:
        value: ``f`` at the rollout's states and actions ``[B]``.
        returns: Their Monte-Carlo returns G ``[B]``.
        offline_value: ``f`` at offline states and actions ``[M]``; M may be 0.
        offline_target: Their backups ``[M]``.
        offline_weight: From :func:`offline_weight`. At 0 offline rows may hold NaN.

    Returns:
        The loss, and both of its parts as if their weights were one, for :func:`offline_weight`.
    """
    on_policy = (returns.detach() - value).square().mean()
    offline_error = offline_target.detach() - offline_value
    metrics = {
        "loss/on_policy": on_policy.detach(),
        "loss/offline": _mean_or_zero(offline_error.detach().square()),
    }
    weight = torch.as_tensor(offline_weight, dtype=value.dtype, device=value.device)
    offline = _mean_or_zero(torch.where(weight != 0, offline_error, 0.0).square())
    return on_policy + weight * offline, metrics


@torch.no_grad()
def offline_weight(
    on_policy_loss: Tensor, offline_loss: Tensor, *, maximum_ratio: float = 5.0
) -> Tensor:
    """Return 1, or 0 if the offline loss exceeds ``maximum_ratio`` times that of the rollout.

    Ours; the paper keeps the offline data whatever their Bellman error. A loss that is not finite
    exceeds every other.

    Args:
        on_policy_loss: ``loss/on_policy`` of :func:`hybrid_critic_loss`, ``[]``.
        offline_loss: Its ``loss/offline``, ``[]``; averages over several updates switch less often.
        maximum_ratio: The positive bound.

    Raises:
        ConfigError: If the bound is not positive.
    """
    positive("maximum_ratio", maximum_ratio)
    within = offline_loss.isfinite() & (offline_loss <= maximum_ratio * on_policy_loss)
    return within.to(offline_loss.dtype)


def policy_value(fresh: Tensor) -> Tensor:
    """Return ``V(s) = mean_m f(s, a_m)`` ``[...]`` (arXiv 2311.08384; M = 10 in its code).

    Args:
        fresh: Action values ``[..., M]`` of actions drawn from the present policy.
    """
    return fresh.mean(-1)


@torch.no_grad()
def fresh_advantage(action_value: Tensor, fresh: Tensor) -> Tensor:
    """Return ``f(s, a) - V(s)`` ``[...]`` at states of the offline data.

    Its mean under the policy is zero (arXiv 2311.08384, released code). An action that is one of
    those that V averages has ``1 - 1 / M`` of its advantage in expectation: draw it apart.

    Args:
        action_value: ``f`` of a fresh action ``[...]``, not of the one in the data.
        fresh: As for :func:`policy_value`, ``[..., M]``.
    """
    return action_value - policy_value(fresh)


@dataclass(frozen=True)
class JoinedRows:
    """Rows of a rollout, then those of offline states, ``[B + M]`` each, for a surrogate.

    Attributes:
        log_prob: Under the policy that is trained; carries gradient, as does ``log_ratio``.
        log_ratio: Against the policy that acted: offline that is the present one, so it is zero.
        advantage: Constants.
        weight: For :func:`~genpol.nn.masked.weighted_mean` of the surrogate's rows.
    """

    log_prob: Tensor
    log_ratio: Tensor
    advantage: Tensor
    weight: Tensor


def join_rows(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    offline_log_prob: Tensor,
    offline_advantage: Tensor,
    *,
    offline_weight: float | Tensor = 1.0,
) -> JoinedRows:
    """Put a rollout and offline states into one batch, as HNPG does (arXiv 2311.08384).

    The ratio of offline rows is ``pi / sg(pi)``: their actions come from the present policy, so its
    gradient is the score. The advantages of both are in units of the return; whiten them together,
    by :func:`~genpol.objectives.advantages.normalize_advantage` with the weight, if at all. The
    paper takes as many rows of one as of the other.

    Args:
        log_prob: Of the rollout's actions under the policy that is trained ``[B]``.
        old_log_prob: Under the policy that collected ``[B]``.
        advantage: Of the rollout ``[B]``.
        offline_log_prob: Of fresh actions at offline states ``[M]``; M may be 0.
        offline_advantage: From :func:`fresh_advantage`, ``[M]``.
        offline_weight: From :func:`offline_weight`; at 0 the offline rows do not count.
    """
    switch = torch.as_tensor(offline_weight, dtype=advantage.dtype, device=advantage.device)
    on_policy = clamped_log_ratio(log_prob, old_log_prob)
    offline = clamped_log_ratio(offline_log_prob, offline_log_prob.detach())
    weights = torch.ones_like(advantage), switch.expand(offline_advantage.shape)
    return JoinedRows(
        log_prob=torch.cat((log_prob, offline_log_prob)),
        log_ratio=torch.cat((on_policy, offline)),
        advantage=torch.cat((advantage, offline_advantage)).detach(),
        weight=torch.cat(weights),
    )


def _mean_or_zero(rows: Tensor) -> Tensor:
    return rows.mean() if rows.numel() > 0 else rows.new_zeros(())

"""Scores of a generative policy, and the metric that they put on its actions.

A flow or diffusion model knows the density of behaviour only blurred: at level t it is that of
``x_t = signal a + spread eps``, and ``grad_a`` of its logarithm at ``x_t`` is ``signal S_t(x_t)``.
In the action's units the blur has the standard deviation ``spread / signal`` (:func:`blur`), a
quarter at a flow's t = 0.8 and a ninth at t = 0.9. Directions in which actions spread less than
that all look alike.

The **Fisher matrix** ``F(s) = E[S S^T]`` of those scores is the local curvature of the divergence:
shifting all actions of a state by the same ``delta`` moves them ``delta^T F delta / 2`` nats away
from behaviour (Fisher Decorator, arXiv 2604.17919). For Gaussian behaviour of covariance Sigma,
F is ``(Sigma + blur^2)^-1``. If delta varies with the action, this leaves the term of its
divergence out: for N(0, 1) and ``delta = e a`` the exact second order is ``e^2``, the form at the
state ``e^2 / 2`` and that of each action's own score (:func:`point_metric`) ``3 e^2 / 2``.

All metrics here take flattened displacements ``[B, D]``, D = H A, and return the quadratic form and
the trace of the matrix, ``[B]`` each. Only displacements carry gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from genpol.policies.denoiser import flatten_chunk
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy

ScoredPolicy = FlowPolicy | DiffusionPolicy
"""A policy that knows its scores."""


class Metric(NamedTuple):
    """What a displacement costs, and the scale of that.

    Attributes:
        quadratic: ``delta^T F delta``, ``[B]``.
        trace: ``tr F``, ``[B]``; no gradient flows into it.
    """

    quadratic: Tensor
    trace: Tensor


def path_score(
    velocity: Tensor,
    x: Tensor,
    *,
    signal: float,
    spread: float,
    signal_rate: float,
    spread_rate: float,
) -> Tensor:
    """Return the score of the path ``x_t = A(t) a + C(t) eps`` where its velocity is known.

    From ``x = A E[a|x] + C E[eps|x]`` and ``v = A' E[a|x] + C' E[eps|x]`` follows ``E[eps|x] =
    (A' x - A v) / (A' C - A C')``; the score is that over -C. For the linear path (A = t,
    C = 1 - t) it is ``(t v - x) / (1 - t)``.

    Args:
        velocity: ``v(x_t)``.
        x: ``x_t``.
        signal: ``A(t)``.
        spread: ``C(t)`` > 0.
        signal_rate: ``A'(t)``.
        spread_rate: ``C'(t)``.
    """
    noise = (signal_rate * x - signal * velocity) / (signal_rate * spread - signal * spread_rate)
    return -noise / spread


def tweedie_mean(x: Tensor, score: Tensor, *, signal: Tensor, spread: Tensor) -> Tensor:
    """Return ``E[a | x_t] = (x + spread^2 S_t(x)) / signal`` (Efron 2011, Tweedie's formula)."""
    return (x + spread.square() * score) / signal


def blur(policy: ScoredPolicy, time: Tensor) -> Tensor:
    """Return by how much a level blurs actions: the standard deviation ``spread / signal``."""
    signal, spread = policy.mixture(time)
    return spread / signal


def noised(policy: ScoredPolicy, action: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Return ``x_t`` of actions ``[..., A]`` or ``[..., H, A]`` at levels ``[..., 1]``."""
    signal, spread = (_per_action(policy, x) for x in policy.mixture(time))
    return signal * action + spread * noise


def action_score(policy: ScoredPolicy, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
    """Return the score with respect to the action, ``signal S_t(x_t)``, flattened ``[..., D]``."""
    signal, _ = policy.mixture(time)
    return signal * flatten_chunk(policy.score(observation, x, time), policy.horizon)


def released_score(policy: FlowPolicy, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
    """Return ``v / (1 - t)``, which Fisher Decorator's released code takes for the score.

    It is ``S / t + x / (t (1 - t))``: the raw action leaks in, and broad directions are penalised
    like narrow ones (at t = 0.9, standard deviations 1 and 0.05: 78 and 80 instead of 1.2 and 83).
    """
    velocity = policy.velocity(observation, x, time) / (1.0 - _per_action(policy, time))
    return flatten_chunk(velocity, policy.horizon)


def outer_metric(scores: Tensor, displacement: Tensor, *, damping: float = 0.0) -> Metric:
    """Return the metric ``mean_k S_k S_k^T + damping``, which is never formed.

    Args:
        scores: K of each row, ``[K, B, D]``. K of at least 8: with the trace of the same scores
            divided out, few make an anisotropic matrix look round (a ratio of 100 between the
            eigenvalues becomes 10 with K = 1, 77 with K = 8).
        displacement: ``[B, D]``.
        damping: Added to every eigenvalue.
    """
    scores = scores.detach()
    along = (scores * displacement).sum(-1).square().mean(0)
    quadratic = along + damping * displacement.square().sum(-1)
    trace = scores.square().sum(-1).mean(0) + damping * displacement.shape[-1]
    return Metric(quadratic, trace)


def sampled_metric(
    policy: ScoredPolicy,
    observation: Tensor,
    action: Tensor,
    displacement: Tensor,
    *,
    noise: Tensor,
    time: Tensor,
    damping: float = 0.0,
    score: Callable[..., Tensor] = action_score,
) -> Metric:
    """Return the metric of scores at noised actions: the Fisher matrix of each state.

    Args:
        policy: Behaviour.
        observation: ``[B, d]``.
        action: Samples of behaviour, K of each state: ``[K, B, A]`` or ``[K, B, H, A]``.
        displacement: ``[B, D]``.
        noise: Of the shape of ``action``.
        time: Levels ``[K, B, 1]``.
        damping: See :func:`outer_metric`.
        score: :func:`action_score`, or :func:`released_score`.
    """
    with torch.no_grad():
        scores = score(policy, observation, noised(policy, action, noise, time), time)
    return outer_metric(scores, displacement, damping=damping)


def point_metric(
    policy: ScoredPolicy,
    observation: Tensor,
    action: Tensor,
    displacement: Tensor,
    *,
    time: Tensor,
    damping: float = 0.0,
) -> Metric:
    """Return the metric of the score at the action itself, of rank one (the paper's).

    At an action that is not noised the score is not that of what a level has seen: for a Gaussian
    narrower than :func:`blur` its size *falls* with the width.

    Args:
        policy: Behaviour.
        observation: ``[B, d]``.
        action: Where, ``[B, A]`` or ``[B, H, A]``.
        displacement: ``[B, D]``.
        time: Levels ``[B, 1]``.
        damping: See :func:`outer_metric`.
    """
    with torch.no_grad():
        scores = action_score(policy, observation, action, time).unsqueeze(0)
    return outer_metric(scores, displacement, damping=damping)


def curvature_metric(
    policy: ScoredPolicy,
    observation: Tensor,
    action: Tensor,
    displacement: Tensor,
    *,
    noise: Tensor,
    time: Tensor,
    damping: float = 0.0,
) -> Metric:
    """Return the metric ``-Hessian of log p_t`` at each noised action, never formed.

    It tells the modes of a state apart, which the Fisher matrix averages. Where the density is not
    log-concave the quadratic form is negative, and counted as zero. The trace is the squared size
    of the score, whose expectation is that of the curvature's trace.

    Args:
        policy: Behaviour.
        observation: ``[B, d]``.
        action: ``[B, A]`` or ``[B, H, A]``.
        displacement: ``[B, D]``.
        noise: Of the shape of ``action``.
        time: Levels ``[B, 1]``.
        damping: Added to every eigenvalue.
    """
    x = noised(policy, action, noise, time)
    signal, _ = policy.mixture(time)

    def score(point: Tensor) -> Tensor:
        return action_score(policy, observation, point, time)

    fixed = displacement.detach()
    with torch.no_grad():  # neither graph may reach the weights: behaviour is not to bend
        scores, pull = torch.func.vjp(score, x)  # type: ignore[misc]
        tangent = (signal * fixed).reshape(x.shape)
        _, change = torch.func.jvp(score, (x,), (tangent,))  # type: ignore[misc]
        (pulled,) = pull(fixed)
    # The value is d^T H d and the gradient (H + H^T) d: a learned field has no symmetric Jacobian.
    back = signal * pulled.reshape(fixed.shape)
    curved = (displacement * (change + back)).sum(-1) - (fixed * change).sum(-1)
    size = displacement.square().sum(-1)
    trace = scores.square().sum(-1) + damping * displacement.shape[-1]
    return Metric((-curved).clamp_min(0.0) + damping * size, trace)


def euclidean_metric(displacement: Tensor) -> Metric:
    """Return the metric of the identity: squared distance, as in DeFlow (arXiv 2601.10471)."""
    size = displacement.square().sum(-1)
    return Metric(size, torch.full_like(size, displacement.shape[-1]).detach())


def _per_action(policy: ScoredPolicy, level: Tensor) -> Tensor:
    """Add the dimension of a horizon to what there is one of per chunk, ``[..., 1]``."""
    return level.unsqueeze(-1) if policy.horizon > 1 else level

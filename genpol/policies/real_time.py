"""Real-time chunking: a chunk that goes on from the one that is being carried out.

A policy that takes d periods to answer must make a chunk whose first d actions are those that are
carried out meanwhile, and whose next ones do not jump. Real-time action chunking (arXiv 2506.07339)
treats this as inpainting: each Euler step of a flow is pulled towards the chunk before,

``v + min(beta, (1 - t) / (t r^2)) J^T diag(W) (A_before - A_hat)``, ``A_hat = x + (1 - t) v``,
``r^2 = (1 - t)^2 / (t^2 + (1 - t)^2)``, J the Jacobian of A_hat (arXiv 2310.04432), with weights W
that are 1 for what is certainly carried out, fall off over what both chunks hold, and are 0 for
what only the new one does (:func:`genpol.deploy.chunks.kept_weights`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from genpol.policies.denoiser import flatten_chunk, unflatten_chunk
from genpol.policies.flow import FlowPolicy
from genpol.policies.guidance import guided_sample

STRENGTH = 5.0
"""beta: bound on the pull, as published; near t = 0 the exact one grows without bound."""


def pull(time: float, strength: float = STRENGTH) -> float:
    """Return the factor on the gradient at time t: ``min(beta, (t^2 + (1 - t)^2)/(t (1 - t)))``."""
    if time <= 0.0 or time >= 1.0:
        return strength
    return min(strength, (time**2 + (1.0 - time) ** 2) / (time * (1.0 - time)))


@torch.no_grad()
def bound_sample(
    flow: FlowPolicy,
    observation: Tensor,
    noise: Tensor,
    previous: Tensor,
    kept: Tensor,
    *,
    strength: float = STRENGTH,
) -> Tensor:
    """Return chunks that go on from ``previous``, within [-1, 1].

    Args:
        flow: Of chunks of H actions.
        observation: ``[B, d]``, as the flow sees it.
        noise: ``[B, H, A]``.
        previous: What is left of the chunk before, ``[B, H, A]``.
        kept: Weights of its actions, ``[B, H]``; where all are 0 the chunk is the flow's own.
        strength: beta.
    """
    horizon = flow.horizon
    wanted = flatten_chunk(previous, horizon)
    weights = flatten_chunk(kept.unsqueeze(-1).expand_as(previous), horizon)
    steps = flow.sampling_steps()
    flat = guided_sample(
        flow.field(observation),
        steps,
        lambda clean: weights * torch.where(weights > 0, wanted - clean, 0.0),
        flatten_chunk(noise, horizon),
        weight=[pull(step.time, strength) for step in steps],
        estimator="jacobian",
        clip=None,
    )
    return unflatten_chunk(flat.clamp(-1.0, 1.0), horizon)

"""Models of behaviour: flows and diffusion models of chunks, learned by imitation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.guidance import (
    ClassifierFreePolicy,
    GuidanceSettings,
    GuidedPolicy,
    Sampler,
    Value,
    best_of,
)

_CHUNK_DIMS = 3  # of one chunk per row, [B, H, A]


def imitation_loss(
    policy: FlowPolicy | DiffusionPolicy,
    observation: Tensor,
    chunk: Tensor,
    valid: Tensor,
    draws: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of cloning chunks where they are valid, and metrics.

    Args:
        policy: The model, of horizon H.
        observation: ``[B, d]``.
        chunk: ``[B, H', A]`` with ``H' >= H``, of which the first H actions are learned.
        valid: Which actions are, ``[B, H']``; others may be anything.
        draws: Of :func:`draw_imitation`.
    """
    horizon = policy.horizon
    chunk, valid = chunk[:, :horizon], valid[:, :horizon].float()
    return policy.bc_loss(
        observation,
        own_chunk(chunk, horizon),
        own_chunk(draws["imitation"], horizon),
        draws["time"],
        weight=valid if horizon > 1 else valid.squeeze(-1),
    )


def draw_imitation(
    policy: FlowPolicy | DiffusionPolicy, rows: int, action_dim: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw noise ``[B, H, A]`` and times ``[B, 1]`` for :func:`imitation_loss`."""
    return {
        "imitation": draw_noise((rows, policy.horizon, action_dim), 1, generator),
        "time": policy.draw_time((rows,), generator),
    }


def sample_chunks(
    policy: FlowPolicy | DiffusionPolicy | ClassifierFreePolicy,
    observation: Tensor,
    noise: Tensor,
    *,
    value: Value | None = None,
    guidance: GuidanceSettings | None = None,
) -> Tensor:
    """Return chunks ``[B, H, A]`` within [-1, 1], also where H is 1.

    Args:
        policy: The model.
        observation: ``[B, d]``.
        noise: ``[B, H, A]``; or N draws ``[N, B, H, A]``, of which the value chooses.
        value: Values ``[..., B]`` of observations and chunks ``[..., B, H, A]``.
        guidance: How the value bends the samples.
    """
    horizon = policy.horizon
    sampler: Sampler = policy
    if value is not None and guidance is not None and guidance.weight > 0:

        def valued(state: Tensor, action: Tensor) -> Tensor:
            return value(state, as_chunk(action, horizon))

        sampler = GuidedPolicy(policy, valued, weight=guidance.weight, estimator=guidance.estimator)
    chunks = as_chunk(sampler.sample(observation, own_chunk(noise, horizon)), horizon).clamp(
        -1.0, 1.0
    )
    if value is None or noise.ndim == _CHUNK_DIMS:
        return chunks
    return best_of(chunks, value(observation, chunks))


def draw_noise(shape: Sequence[int], number: int, generator: torch.Generator) -> Tensor:
    """Return standard normal draws ``[*shape]``, or ``[number, *shape]`` of more than one."""
    shape = (number, *shape) if number > 1 else tuple(shape)
    return torch.randn(shape, generator=generator, device=generator.device)


def own_chunk(chunk: Tensor, horizon: int) -> Tensor:
    """Return what the policy takes: without the dimension of a horizon of one."""
    return chunk if horizon > 1 else chunk.squeeze(-2)


def as_chunk(action: Tensor, horizon: int) -> Tensor:
    """Return a policy's actions as chunks ``[..., H, A]``, also where H is 1."""
    return action if horizon > 1 else action.unsqueeze(-2)

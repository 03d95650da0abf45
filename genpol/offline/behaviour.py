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
    if policy.past_steps:  # the chunk's end, which the windows do not hold
        present = torch.arange(horizon, device=valid.device) < horizon - policy.past_steps
        valid = valid * present
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
        noise: ``[B, H, A]``; or N draws ``[N, B, H, A]``, of which the value chooses. If the
            policy's steps have noise, that may stand behind it: ``[..., num_draws * H, A]``.
        value: Values ``[..., B]`` of observations and chunks ``[..., B, H, A]``.
        guidance: How the value bends the samples.
    """
    horizon = policy.horizon
    noise, step_noise = _split(noise, horizon)
    sampler: Sampler = policy
    if value is not None and guidance is not None and guidance.weight > 0:

        def valued(state: Tensor, action: Tensor) -> Tensor:
            return value(state, as_chunk(action, horizon))

        sampler = GuidedPolicy(policy, valued, weight=guidance.weight, estimator=guidance.estimator)
    start = own_chunk(noise, horizon)
    if step_noise is not None and isinstance(sampler, DiffusionPolicy):
        action = sampler.sample(observation, start, own_chunk(step_noise, horizon))
    else:
        action = sampler.sample(observation, start)
    chunks = as_chunk(action, horizon).clamp(-1.0, 1.0)
    if value is None or noise.ndim == _CHUNK_DIMS:
        return chunks
    return best_of(chunks, value(observation, chunks))


def _split(noise: Tensor, horizon: int) -> tuple[Tensor, Tensor | None]:
    """Return what a sample begins from, and the noise of its steps ``[..., K, H, A]``."""
    if noise.shape[-2] == horizon:
        return noise, None
    draws = noise.unflatten(-2, (-1, horizon))
    return draws[..., 0, :, :], draws[..., 1:, :, :]


def draw_noise(shape: Sequence[int], number: int, generator: torch.Generator) -> Tensor:
    """Return standard normal draws ``[*shape]``, or ``[number, *shape]`` of more than one."""
    shape = (number, *shape) if number > 1 else tuple(shape)
    return torch.randn(shape, generator=generator, device=generator.device)


def draw_start(
    policy: FlowPolicy | DiffusionPolicy,
    leading: Sequence[int],
    action_dim: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw what :func:`sample_chunks` begins from, with the noise of the steps behind it."""
    shape = (*leading, policy.num_draws * policy.horizon, action_dim)
    return draw_noise(shape, 1, generator)


def own_chunk(chunk: Tensor, horizon: int) -> Tensor:
    """Return what the policy takes: without the dimension of a horizon of one."""
    return chunk if horizon > 1 else chunk.squeeze(-2)


def as_chunk(action: Tensor, horizon: int) -> Tensor:
    """Return a policy's actions as chunks ``[..., H, A]``, also where H is 1."""
    return action if horizon > 1 else action.unsqueeze(-2)

"""Models of behaviour: flows and diffusion models of chunks, learned by imitation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.guidance import (
    BestOf,
    ClassifierFreePolicy,
    GuidanceSettings,
    GuidedPolicy,
    Value,
)


def imitation_loss(
    policy: FlowPolicy | DiffusionPolicy,
    observation: Tensor,
    chunk: Tensor,
    valid: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of cloning chunks where they are valid, and metrics.

    Args:
        policy: The model, of horizon H.
        observation: ``[B, d]``.
        chunk: ``[B, H', A]`` with ``H' >= H``, of which the first H actions are learned.
        valid: Which actions are, ``[B, H']``; others may be anything.
        generator: Source of noise and times.
    """
    horizon = policy.horizon
    chunk, valid = chunk[:, :horizon], valid[:, :horizon].float()
    noise = torch.randn(chunk.shape, generator=generator, device=generator.device)
    return policy.bc_loss(
        observation,
        _own(chunk, horizon),
        _own(noise, horizon),
        policy.draw_time((len(chunk),), generator),
        weight=valid if horizon > 1 else valid.squeeze(-1),
    )


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
    own = _own(noise, horizon)
    if value is None:
        return _chunk(policy.sample(observation, own), horizon).clamp(-1.0, 1.0)

    def valued(state: Tensor, action: Tensor) -> Tensor:
        return value(state, _chunk(action, horizon))

    guidance = guidance or GuidanceSettings()
    guided = GuidedPolicy(policy, valued, weight=guidance.weight, estimator=guidance.estimator)
    return _chunk(BestOf(guided, valued).sample(observation, own), horizon).clamp(-1.0, 1.0)


def draw_noise(shape: Sequence[int], number: int, generator: torch.Generator) -> Tensor:
    """Return standard normal draws ``[*shape]``, or ``[number, *shape]`` of more than one."""
    shape = (number, *shape) if number > 1 else tuple(shape)
    return torch.randn(shape, generator=generator, device=generator.device)


def _own(chunk: Tensor, horizon: int) -> Tensor:
    """Return what the policy takes: without the dimension of a horizon of one."""
    return chunk if horizon > 1 else chunk.squeeze(-2)


def _chunk(action: Tensor, horizon: int) -> Tensor:
    return action if horizon > 1 else action.unsqueeze(-2)

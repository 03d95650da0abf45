"""Critics of chunks, state values, actors and models of behaviour."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genpol.nn.ensemble import EnsembleMLP
from genpol.nn.mlp import MLP
from genpol.offline.settings import FlowSettings, NetworkSettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.schedules import diffusers_schedule


class Critic(nn.Module):
    """Values ``Q_i(s, a_0 .. a_{H-1})`` of an ensemble.

    Args:
        observation_dim: Width d of the observation, a goal included.
        action_dim: Width A of one action.
        horizon: Actions H of a chunk.
        settings: Layers.
        num_members: Size K of the ensemble.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        horizon: int,
        settings: NetworkSettings,
        *,
        num_members: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        width = observation_dim + horizon * action_dim
        self.net = EnsembleMLP(num_members, width, 1, **_layers(settings, generator))

    def forward(self, observation: Tensor, action: Tensor, *, frozen: bool = False) -> Tensor:
        """Return ``[K, ..., B]``.

        Args:
            observation: ``[B, d]``.
            action: ``[..., B, H, A]``: any number of chunks for each observation.
            frozen: Let no gradient reach the weights.
        """
        flat = action.flatten(-2)
        observation = observation.expand(*flat.shape[:-1], observation.shape[-1])
        together = torch.cat((observation, flat), dim=-1)
        values: Tensor = self.net(together.flatten(0, -2), frozen=frozen).squeeze(-1)
        return values.unflatten(-1, flat.shape[:-1])


class StateValue(nn.Module):
    """A value ``V(s)``.

    Args:
        observation_dim: Width d of the observation, a goal included.
        settings: Layers.
        generator: Source of the initial weights.
    """

    def __init__(
        self, observation_dim: int, settings: NetworkSettings, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.net = MLP(observation_dim, 1, **_layers(settings, generator))

    def forward(self, observation: Tensor) -> Tensor:
        """Map ``[..., d]`` to ``[...]``."""
        value: Tensor = self.net(observation)
        return value.squeeze(-1)


class ChunkNetwork(nn.Module):
    """A chunk from an observation, and perhaps another chunk: ``mu(s)``, or ``mu(s, z)`` of noise.

    Args:
        observation_dim: Width d of the observation.
        action_dim: Width A of one action.
        horizon: Actions H of a chunk.
        settings: Layers.
        chunk_input: Whether it reads a chunk, too: noise, or an action to change.
        zero_init: Start with a zero output.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        horizon: int,
        settings: NetworkSettings,
        *,
        chunk_input: bool = False,
        zero_init: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._chunk = (horizon, action_dim)
        width = horizon * action_dim
        self.net = MLP(
            observation_dim + chunk_input * width,
            width,
            output_gain=0.0 if zero_init else 1.0,
            **_layers(settings, generator),
        )

    def forward(self, observation: Tensor, chunk: Tensor | None = None) -> Tensor:
        """Return chunks ``[B, H, A]``, not clipped; ``chunk`` is ``[B, H, A]``."""
        if chunk is not None:
            observation = torch.cat((observation, chunk.flatten(-2)), dim=-1)
        flat: Tensor = self.net(observation)
        return flat.unflatten(-1, self._chunk)


def make_denoiser(
    observation_dim: int,
    action_dim: int,
    settings: FlowSettings,
    generator: torch.Generator,
    *,
    horizon: int | None = None,
) -> FlowPolicy | DiffusionPolicy:
    """Return the model of behaviour that the settings describe, of their horizon by default.

    A flow reads the bare time, as in FQL; a diffusion model has a cosine schedule of as many levels
    as steps, and clips its clean estimate to the range of actions.
    """
    options: dict[str, Any] = {"horizon": horizon or settings.horizon, "zero_init": False}
    options |= _layers(settings.actor, generator)
    if settings.denoiser == "flow":
        return FlowPolicy(
            observation_dim,
            action_dim,
            num_steps=settings.solver_steps,
            time_embedding_dim=1,
            **options,
        )
    schedule = diffusers_schedule(num_levels=settings.solver_steps, num_steps=settings.solver_steps)
    return DiffusionPolicy(observation_dim, action_dim, schedule=schedule, clip=1.0, **options)


def _layers(settings: NetworkSettings, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden": settings.hidden,
        "activation": settings.activation,
        "layer_norm": settings.layer_norm,
        "init": settings.init,
        "generator": generator,
    }

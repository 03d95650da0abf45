"""Critics of chunks, state values, actors and models of behaviour."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genpol.nn.ensemble import EnsembleMLP
from genpol.nn.mlp import MLP
from genpol.offline.settings import FlowSettings, NetworkSettings
from genpol.policies.denoiser import DenoisingNetwork
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.embedded import EmbeddedDenoiser
from genpol.policies.flow import FlowPolicy
from genpol.policies.schedules import Schedule, diffusers_schedule
from genpol.policies.unet import ConditionalUnet1D


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

    A flow reads the bare time, as in FQL. A diffusion model reads the share of its noise level
    among all of them; networks that learn how to embed it read the level itself.
    """
    horizon = horizon or settings.horizon
    options: dict[str, Any] = {"horizon": horizon, "zero_init": False}
    options |= _layers(settings.actor, generator)
    options["network"] = _network(observation_dim, action_dim, horizon, settings, generator)
    if settings.denoiser == "flow":
        options |= {"spread": settings.time_grid, "state_clip": settings.state_clip or None}
        return FlowPolicy(
            observation_dim,
            action_dim,
            num_steps=settings.solver_steps,
            time_embedding_dim=1,
            **options,
        )
    own = settings.diffusion
    options |= {"prediction": own.prediction, "sampler": own.sampler}
    return DiffusionPolicy(
        observation_dim,
        action_dim,
        schedule=_schedule(settings),
        clip=own.clean_clip or None,
        **options,
    )


def _schedule(settings: FlowSettings) -> Schedule:
    own = settings.diffusion
    schedule = diffusers_schedule(
        "linear" if own.schedule == "linear" else "squaredcos_cap_v2",
        num_levels=own.levels or settings.solver_steps,
        num_steps=settings.solver_steps,
        spacing="leading" if own.spacing == "leading" else "trailing",
    )
    if settings.network == "mlp":
        return schedule
    return replace(schedule, time=tuple(float(level) for level in range(len(schedule.time))))


def _network(
    observation_dim: int,
    action_dim: int,
    horizon: int,
    settings: FlowSettings,
    generator: torch.Generator,
) -> DenoisingNetwork | None:
    """Return the network that is injected into the model; None for its own perceptron."""
    own, actor = settings.unet, settings.actor
    if settings.network == "mlp":
        return None
    if settings.network == "unet":
        return ConditionalUnet1D(
            observation_dim,
            action_dim,
            horizon,
            actor.hidden,
            time_dim=settings.time_dim,
            kernel_size=own.kernel_size,
            groups=own.groups,
            scale=own.scale,
            past_steps=own.past_steps,
            init=actor.init,
            generator=generator,
        )
    return EmbeddedDenoiser(
        observation_dim,
        horizon * action_dim,
        actor.hidden,
        residual=settings.network == "residual_mlp",
        time_dim=settings.time_dim,
        activation=actor.activation,
        layer_norm=actor.layer_norm,
        init=actor.init,
        generator=generator,
    )


def _layers(settings: NetworkSettings, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden": settings.hidden,
        "activation": settings.activation,
        "layer_norm": settings.layer_norm,
        "init": settings.init,
        "generator": generator,
    }

"""Decoders that are not generative models: the identity, and a Gaussian for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genpol.policies.gaussian import GaussianPolicy


class IdentityDecoder(nn.Module):
    """The decoder ``a = z`` of GoRL's first stage, or ``a = gain z``.

    With a gain above 1 a standard normal latent reaches the bounds behind the squash: a robot that
    lies on its back explores with bursts and not with jitter.

    Args:
        gain: Factor on the latent.
    """

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return ``gain * noise``; at a gain of 1 that is ``noise`` itself."""
        return noise if self.gain == 1.0 else self.gain * noise


class GaussianDecoder(GaussianPolicy):
    """The decoder ``a = mean(s) + std(s) * z``, fitted by maximum likelihood.

    It takes the place of a flow in GoRL's refinement to tell the gain of staging from that of a
    multimodal decoder. It starts as the identity (mean 0, standard deviation 1).

    Args:
        observation_dim: Width of the observation.
        action_dim: Width of latent and action.
        hidden: Widths of the hidden layers.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        min_scale: Smallest standard deviation; below 1.
        max_scale: Largest standard deviation.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        *,
        activation: str = "silu",
        min_scale: float = 1e-3,
        max_scale: float = 10.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            observation_dim,
            action_dim,
            hidden,
            activation=activation,
            min_scale=min_scale,
            max_scale=max_scale,
            generator=generator,
        )
        self.reset_to_prior()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the hidden weights anew, forget the statistics, and start from the identity."""
        super().reset(generator)
        self.reset_to_prior()

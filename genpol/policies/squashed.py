"""Gaussian policy behind a tanh, whose density is that of the squashed action."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpol.nn.mlp import MLP


@dataclass(frozen=True)
class SquashedSample:
    """A reparameterised draw.

    Attributes:
        action: ``tanh(pre_squash)`` ``[..., A]``.
        pre_squash: Draw of the Gaussian ``[..., A]``; densities are evaluated here and not by
            inverting the tanh, which diverges near the bounds.
        log_prob: Log-density of every dimension of the action ``[..., A]``.
        mean: Of the Gaussian before the squash ``[..., A]``.
        scale: Its standard deviation ``[..., A]``.
    """

    action: Tensor
    pre_squash: Tensor
    log_prob: Tensor
    mean: Tensor
    scale: Tensor


class SquashedGaussianPolicy(nn.Module):
    """``a = tanh(u)``, ``u ~ N(mean(s), scale(s)^2)`` (SAC, arXiv 1801.01290, appendix C).

    ``log scale`` runs smoothly between its bounds, as a tanh of the network's output: a clamp would
    lose its gradient there.

    Args:
        observation_dim: Width of the observation.
        action_dim: Width of the action.
        hidden: Widths of the hidden layers.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        log_scale_bounds: Least and greatest logarithm of the standard deviation before the tanh.
        output_gain: Of the initial weights of the last layer.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        *,
        activation: str = "relu",
        log_scale_bounds: tuple[float, float] = (-5.0, 2.0),
        output_gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.log_scale_bounds = log_scale_bounds
        self.net = MLP(
            observation_dim,
            2 * action_dim,
            hidden,
            activation=activation,
            output_gain=output_gain,
            generator=generator,
        )

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale before the squash, ``[..., A]`` each."""
        mean, raw = self.net(observation).chunk(2, dim=-1)
        low, high = self.log_scale_bounds
        return mean, (low + 0.5 * (high - low) * (torch.tanh(raw) + 1.0)).exp()

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return ``tanh(mean + scale * noise)``, ``[..., A]``."""
        mean, scale = self(observation)
        return torch.tanh(mean + scale * noise)

    def mode(self, observation: Tensor) -> Tensor:
        """Return ``tanh(mean)``, ``[..., A]``."""
        mean: Tensor = self(observation)[0]
        return torch.tanh(mean)

    def draw(self, observation: Tensor, noise: Tensor) -> SquashedSample:
        """Return a draw with its densities, differentiable in the weights."""
        mean, scale = self(observation)
        pre_squash = mean + scale * noise
        log_prob = squashed_log_prob(mean, scale, pre_squash)
        return SquashedSample(torch.tanh(pre_squash), pre_squash, log_prob, mean, scale)

    def log_prob(self, observation: Tensor, pre_squash: Tensor) -> Tensor:
        """Return the log-density of every dimension of ``tanh(pre_squash)``, ``[..., A]``."""
        mean, scale = self(observation)
        return squashed_log_prob(mean, scale, pre_squash)


def squashed_log_prob(mean: Tensor, scale: Tensor, pre_squash: Tensor) -> Tensor:
    """Return ``log N(u; mean, scale^2) - log(1 - tanh(u)^2)`` of every dimension.

    The last term is computed as ``2 (log 2 - u - softplus(-2 u))``, which does not saturate.
    """
    standard = (pre_squash - mean) / scale
    gaussian = -0.5 * standard.square() - scale.log() - 0.5 * math.log(2 * math.pi)
    slope = 2.0 * (math.log(2.0) - pre_squash - F.softplus(-2.0 * pre_squash))
    return gaussian - slope

"""Features of the generative time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from genpol.errors import ConfigError


class TimeEmbedding(nn.Module):
    """Octave embedding ``[cos(2^k t), sin(2^k t)]``, ``k = 0 .. dim/2 - 1`` (GoRL and FPO codes).

    All cosines come first, then all sines; there is no factor of 2 pi.

    Args:
        dim: Number of features: even, or 1 for the bare time as in FQL.

    Raises:
        ConfigError: If ``dim`` is neither 1 nor a positive even number.
    """

    frequencies: Tensor

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        if dim != 1 and (dim < 2 or dim % 2):
            raise ConfigError(f"time_embedding_dim = {dim}: must be 1 or a positive even number")
        self.dim = dim
        self.register_buffer("frequencies", 2.0 ** torch.arange(dim // 2), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        """Map times ``[..., 1]`` to features ``[..., dim]``."""
        if self.dim == 1:
            return time
        angle = time * self.frequencies
        return torch.cat((angle.cos(), angle.sin()), dim=-1)


class TimeMLP(nn.Module):
    """Sinusoidal features of the time, and a learned perceptron with one Mish layer of them.

    The features are ``[sin(w_k t), cos(w_k t)]`` with ``w_k = 10000^(-k / (dim/2 - 1))``, all sines
    first (Diffuser, Diffusion Policy, DPPO and ReinFlow codes). They tell times apart that differ
    by about 1 or more, such as noise levels; between 0 and 1 they are nearly linear.

    Its weights are those of whoever holds it to initialise.

    Args:
        dim: Number of features, and of outputs: even, at least 4.
        hidden: Width of the hidden layer.

    Raises:
        ConfigError: If ``dim`` is something else.
    """

    frequencies: Tensor

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ConfigError(f"time_dim = {dim}: must be even, and at least 4")
        half = dim // 2
        exponents = torch.arange(half) * (-math.log(10_000) / (half - 1))
        self.register_buffer("frequencies", exponents.exp(), persistent=False)
        self.first = skip_init(nn.Linear, dim, hidden)
        self.last = skip_init(nn.Linear, hidden, dim)

    def forward(self, time: Tensor) -> Tensor:
        """Map times ``[..., 1]`` to ``[..., dim]``."""
        angle = time * self.frequencies
        features = torch.cat((angle.sin(), angle.cos()), dim=-1)
        out: Tensor = self.last(F.mish(self.first(features)))
        return out

"""Features of the generative time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

"""Denoising networks that learn how to embed the time: perceptrons, plain or residual.

They are the networks of DPPO (Ren et al., arXiv 2409.00588) and ReinFlow (arXiv 2505.22094): a
perceptron on ``concat(x, embedded time, observation)``. The residual one is a linear layer, blocks
of two pre-activated layers each with a shortcut, and another linear layer, with no activation but
in the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from genpol.errors import ConfigError
from genpol.nn.mlp import ACTIVATIONS, initialise
from genpol.nn.time_embedding import TimeMLP
from genpol.policies.denoiser import DenoisingNetwork, Field
from genpol.settings import one_of

# Of the codes above, where the norms have gain and bias.
_PLAIN_EPS, _RESIDUAL_EPS = 1e-5, 1e-6


class EmbeddedDenoiser(DenoisingNetwork):
    """A perceptron on ``concat(x, embedded time, observation)``; see the module.

    As in :class:`~genpol.policies.denoiser.Denoiser` the first layer is split in three, so that
    samplers compute the shares of observation and times once.

    Args:
        observation_dim: Width of the (normalised) observation.
        x_dim: Width of the noisy action, flattened over the horizon; also the output's width.
        hidden: Widths of the hidden layers. Of a residual network they are equal, and an odd
            number: the first layer and two for each block.
        residual: Whether the layers have shortcuts.
        time_dim: Width of the embedded time.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        layer_norm: ``"none"``, or ``"before"`` the activations.
        init: See :class:`~genpol.nn.mlp.MLP`.
        output_gain: Factor on the last layer's initial weights.
        generator: Source of the initial weights.

    Raises:
        ConfigError: If the widths do not suit a residual network, or there is no such norm.
    """

    def __init__(
        self,
        observation_dim: int,
        x_dim: int,
        hidden: Sequence[int],
        *,
        residual: bool,
        time_dim: int = 16,
        activation: str = "mish",
        layer_norm: str = "none",
        init: str = "lecun",
        output_gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        one_of("layer_norm", layer_norm, ("none", "before"))
        _check_widths(hidden, residual)
        self.widths = (x_dim, time_dim, observation_dim)
        self.init = init
        self.output_gain = output_gain
        self.embedding = TimeMLP(time_dim, 2 * time_dim)
        self.first = skip_init(nn.Linear, sum(self.widths), hidden[0])
        norm = layer_norm == "before"
        layers: list[nn.Module]
        if residual:
            layers = [_Block(hidden[0], activation, norm=norm) for _ in hidden[1::2]]
            layers.append(skip_init(nn.Linear, hidden[-1], x_dim))
        else:
            eps = _PLAIN_EPS if norm else None
            layers = [_Layer(a, b, activation, eps) for a, b in pairwise((*hidden, x_dim))]
        self.layers = nn.ModuleList(layers)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew and zero the biases; the output gain applies again."""
        initialise(self, self.init, generator)
        last = self.layers[-1]
        linear = last.linear if isinstance(last, _Layer) else last
        assert isinstance(linear, nn.Linear)
        linear.weight.mul_(self.output_gain)

    def forward(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Evaluate at ``x`` ``[..., x_dim]`` and ``time`` ``[..., 1]``; leading dims broadcast."""
        x_weight, time_weight, _ = self._weights()
        hidden = F.linear(x, x_weight) + self._observation_part(observation)
        return self._after_first(hidden + F.linear(self.embedding(time), time_weight))

    def on_grid(self, observation: Tensor, times: Tensor) -> Field:
        """See :class:`~genpol.policies.denoiser.DenoisingNetwork`."""
        x_weight, time_weight, _ = self._weights()
        observation_part = self._observation_part(observation)
        time_parts = F.linear(self.embedding(times), time_weight).unbind(0)

        def output(x: Tensor, step: int) -> Tensor:
            hidden = F.linear(x, x_weight, time_parts[step]) + observation_part
            return self._after_first(hidden)

        return output

    def _weights(self) -> tuple[Tensor, ...]:
        """Return the first layer's weights of x, time and observation."""
        return self.first.weight.split(list(self.widths), dim=1)

    def _observation_part(self, observation: Tensor) -> Tensor:
        return F.linear(observation, self._weights()[2], self.first.bias)

    def _after_first(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class _Layer(nn.Module):
    """Norm, activation and linear map."""

    def __init__(self, fan_in: int, fan_out: int, activation: str, norm_eps: float | None) -> None:
        super().__init__()
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(fan_in, eps=norm_eps)
        self.linear = skip_init(nn.Linear, fan_in, fan_out)
        self._activate = ACTIVATIONS[activation][0]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self._activate(self.norm(x)))
        return out


class _Block(nn.Module):
    """Two layers with a shortcut."""

    def __init__(self, width: int, activation: str, *, norm: bool) -> None:
        super().__init__()
        eps = _RESIDUAL_EPS if norm else None
        self.first = _Layer(width, width, activation, eps)
        self.second = _Layer(width, width, activation, eps)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.first(x))
        return out


def _check_widths(hidden: Sequence[int], residual: bool) -> None:
    if not hidden:
        raise ConfigError("actor.hidden = []: this network needs a hidden layer, such as [512]")
    if residual and (len(hidden) % 2 == 0 or len(set(hidden)) > 1):
        raise ConfigError(
            f"actor.hidden = {list(hidden)}: a residual_mlp needs an odd number of equal widths, "
            "such as [512, 512, 512]"
        )

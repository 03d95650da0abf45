"""The network behind flow and diffusion policies: f(observation, x, time)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpol.nn.masked import weighted_mean
from genpol.nn.mlp import MLP
from genpol.nn.time_embedding import TimeEmbedding

Field = Callable[[Tensor, int], Tensor]
"""A network on a sampler's grid: ``(x, step) -> output`` for flattened actions ``[..., H * A]``."""


class DenoisingNetwork(nn.Module, ABC):
    """A network of observation, noised action and time, as flow and diffusion policies need it.

    Attributes:
        past_steps: Actions of the past that it models with a chunk, which stand at the chunk's end
            and are neither carried out nor learned.
    """

    past_steps: int = 0

    @abstractmethod
    def forward(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Evaluate at ``x`` ``[..., x_dim]`` and ``time`` ``[..., 1]``; leading dims broadcast."""

    @abstractmethod
    def on_grid(self, observation: Tensor, times: Tensor) -> Field:
        """Return ``(x, step) -> output`` at ``times[step]``, with ``times`` ``[steps, 1]``.

        What does not depend on x is computed here, once.
        """

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew."""


class Denoiser(DenoisingNetwork):
    """An MLP on ``concat(observation, x, time embedding)`` with its first layer split in three.

    The first layer is linear, so it is the sum of a part for each input. A sampler computes the
    observation's part once and the time's part once per step for all rows together; training with
    several noise draws per row computes the observation's part once per row. The result equals
    that of the concatenated input up to rounding.

    Args:
        observation_dim: Width of the (normalised) observation.
        x_dim: Width of the noisy action, flattened over the horizon; also the output's width.
        hidden: Widths of the hidden layers.
        time_embedding_dim: See :class:`~genpol.nn.time_embedding.TimeEmbedding`.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        layer_norm: See :class:`~genpol.nn.mlp.MLP`.
        init: See :class:`~genpol.nn.mlp.MLP`.
        zero_init: Start with a zero last layer, hence a zero output.
        output_scale: Constant factor on the output (0.25 in some published codes).
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        x_dim: int,
        hidden: Sequence[int],
        *,
        time_embedding_dim: int = 8,
        activation: str = "silu",
        layer_norm: str = "none",
        init: str = "lecun",
        zero_init: bool = True,
        output_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.widths = (observation_dim, x_dim, time_embedding_dim)
        self.output_scale = output_scale
        self.embedding = TimeEmbedding(time_embedding_dim)
        self.mlp = MLP(
            sum(self.widths),
            x_dim,
            hidden,
            activation=activation,
            layer_norm=layer_norm,
            init=init,
            output_gain=0.0 if zero_init else 1.0,
            generator=generator,
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew."""
        self.mlp.reset_parameters(generator)

    def observation_part(self, observation: Tensor) -> Tensor:
        """Return the observation's share of the first layer, bias included: ``[..., width]``."""
        first = self.mlp.linears[0]
        return F.linear(observation, first.weight[:, : self.widths[0]], first.bias)

    def time_part(self, time: Tensor) -> Tensor:
        """Return the share of times ``[..., 1]`` in the first layer: ``[..., width]``."""
        weight = self.mlp.linears[0].weight[:, sum(self.widths[:2]) :]
        return F.linear(self.embedding(time), weight)

    def forward(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Evaluate at ``x`` ``[..., x_dim]`` and ``time`` ``[..., 1]``; leading dims broadcast."""
        hidden = F.linear(x, self._x_weight()) + self.observation_part(observation)
        return self._scaled(self.mlp.after_first(hidden + self.time_part(time)))

    def on_grid(self, observation: Tensor, times: Tensor) -> Field:
        """Return ``(x, step) -> output`` at ``times[step]``, with ``times`` ``[steps, 1]``.

        What does not depend on x is computed here, once. A time that all rows share is merely the
        bias of x's share of the first layer.
        """
        observation_part = self.observation_part(observation)
        time_parts = self.time_part(times).unbind(0)
        weight = self._x_weight()

        def output(x: Tensor, step: int) -> Tensor:
            hidden = F.linear(x, weight, time_parts[step]) + observation_part
            return self._scaled(self.mlp.after_first(hidden))

        return output

    def _x_weight(self) -> Tensor:
        start = self.widths[0]
        return self.mlp.linears[0].weight[:, start : start + self.widths[1]]

    def _scaled(self, output: Tensor) -> Tensor:
        return output if self.output_scale == 1.0 else output * self.output_scale


def flatten_chunk(action: Tensor, horizon: int) -> Tensor:
    """Turn ``[..., H, A]`` into ``[..., H * A]``; actions of horizon 1 are flat already."""
    return action.flatten(-2) if horizon > 1 else action


def unflatten_chunk(flat: Tensor, horizon: int) -> Tensor:
    """Undo :func:`flatten_chunk`."""
    return flat.unflatten(-1, (horizon, -1)) if horizon > 1 else flat


def clean_rows(action: Tensor, weight: Tensor | None) -> Tensor:
    """Zero the action vectors ``[..., A]`` that have weight zero, so that they may hold NaN."""
    return action if weight is None else torch.where(weight.unsqueeze(-1) != 0, action, 0.0)


def regression_loss(
    prediction: Tensor, target: Tensor, horizon: int, weight: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error per action vector, averaged with ``weight`` over rows and draws."""
    error = unflatten_chunk((prediction - target).square(), horizon).mean(-1)
    loss = weighted_mean(error, weight)
    return loss, {"loss/bc": loss.detach()}

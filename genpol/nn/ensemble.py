"""Several multilayer perceptrons of one shape, computed together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from genpol.nn.mlp import ACTIVATIONS, INITIALISERS, LAYER_NORM, hidden_activation
from genpol.settings import one_of


class EnsembleMLP(nn.Module):
    """``num_members`` independent perceptrons as batched matrix products.

    Initialised like :class:`~genpol.nn.mlp.MLP`, each member from its own draws.

    Args:
        num_members: Size of the ensemble.
        input_dim: Width of the input.
        output_dim: Width of the output, which passes no activation.
        hidden: Widths of the hidden layers.
        activation: One of :data:`~genpol.nn.mlp.ACTIVATIONS`.
        layer_norm: See :class:`~genpol.nn.mlp.MLP`.
        init: See :class:`~genpol.nn.mlp.MLP`.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        num_members: int,
        input_dim: int,
        output_dim: int,
        hidden: Sequence[int],
        *,
        activation: str = "relu",
        layer_norm: str = "none",
        init: str = "lecun",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        one_of("layer_norm", layer_norm, LAYER_NORM)
        one_of("init", init, INITIALISERS)
        self.num_members = num_members
        self.activation = activation
        self.layer_norm = layer_norm
        self.init = init
        widths = list(pairwise((input_dim, *hidden, output_dim)))
        self.weights = nn.ParameterList(
            torch.empty(num_members, fan_in, fan_out) for fan_in, fan_out in widths
        )
        self.biases = nn.ParameterList(
            torch.zeros(num_members, 1, fan_out) for _, fan_out in widths
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew and zero the biases."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            for member in weight:
                INITIALISERS[self.init](member.T, generator)
            bias.zero_()

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """Map ``[B, input_dim]`` to ``[num_members, B, output_dim]``.

        Args:
            x: The input.
            frozen: Let no gradient reach the weights.
        """
        activate = ACTIVATIONS[self.activation][0]
        hidden = x.expand(self.num_members, *x.shape)
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            hidden = torch.baddbmm(bias, hidden, weight)
            if index < last:
                hidden = hidden_activation(hidden, activate, self.layer_norm)
        return hidden

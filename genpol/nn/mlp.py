"""Multilayer perceptrons whose initial weights come from a generator of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from genpol.settings import one_of

# Name -> (activation, its in-place form). Flax's GELU, which the JAX codes of many papers use, is
# the tanh approximation.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, partial(F.silu, inplace=True)),
    "relu": (F.relu, torch.relu_),
    "elu": (F.elu, partial(F.elu, inplace=True)),
    "mish": (F.mish, partial(F.mish, inplace=True)),
    "tanh": (torch.tanh, torch.tanh_),
    "gelu": (F.gelu, F.gelu),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"),) * 2,
}


LAYER_NORM = ("none", "before", "after")
"""Where hidden layers are normalised: nowhere, before their activation, or after it."""

# Flax's; torch's default is 1e-5.
LAYER_NORM_EPS = 1e-6


def hidden_activation(
    hidden: Tensor, activate: Callable[[Tensor], Tensor], layer_norm: str
) -> Tensor:
    """Apply activation and layer norm (without gain and bias of its own) to ``[..., width]``."""
    if layer_norm == "before":
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPS)
    hidden = activate(hidden)
    if layer_norm == "after":
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=LAYER_NORM_EPS)
    return hidden


def lecun_uniform_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``weight`` ``[fan_out, fan_in]`` from ``U(-sqrt(3 / fan_in), sqrt(3 / fan_in))``."""
    return _uniform_(weight, (3.0 / weight.shape[1]) ** 0.5, generator)


def glorot_uniform_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``weight`` ``[fan_out, fan_in]`` from ``U(-b, b)``, ``b^2 = 6 / (fan_in + fan_out)``."""
    return _uniform_(weight, (6.0 / sum(weight.shape)) ** 0.5, generator)


def _uniform_(weight: Tensor, bound: float, generator: torch.Generator | None) -> Tensor:
    # Drawn where the generator lives, so that a seed means the same weights on every device.
    device = generator.device if generator is not None else weight.device
    draws = torch.rand(weight.shape, generator=generator, device=device, dtype=weight.dtype)
    return weight.copy_(draws.mul_(2 * bound).sub_(bound))


INITIALISERS: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "lecun": lecun_uniform_,
    "glorot": glorot_uniform_,
}
"""Initialisers of weights by name: ``lecun`` keeps the scale of forward signals, ``glorot`` is
Flax's uniform variance scaling over the mean fan, which FQL, QC, DQC and QGF use."""


@torch.no_grad()
def initialise(module: nn.Module, init: str, generator: torch.Generator | None = None) -> None:
    """Draw the weights of all linear and convolutional layers anew, in the order of registration.

    Kernels are taken as matrices, ``[out, in * width]``; biases become zero, norms the identity.

    Args:
        module: What holds the layers.
        init: One of :data:`INITIALISERS`.
        generator: Source of the draws; torch's global one by default.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            INITIALISERS[init](layer.weight.flatten(1), generator)
            assert layer.bias is not None
            layer.bias.zero_()
        elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            layer.reset_parameters()


class MLP(nn.Module):
    """A multilayer perceptron with zero biases.

    Args:
        input_dim: Width of the input.
        output_dim: Width of the output, which passes no activation.
        hidden: Widths of the hidden layers; empty for a linear map.
        activation: One of :data:`ACTIVATIONS`, applied behind every hidden layer.
        layer_norm: One of :data:`LAYER_NORM`.
        init: One of :data:`INITIALISERS`.
        output_gain: Factor on the last layer's initial weights; 0.0 starts with a zero output.
        generator: Source of the initial weights. Without it torch's global generator is used.
            The global generator is otherwise left untouched.

    Raises:
        ConfigError: If activation, norm or initialiser is unknown.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden: Sequence[int],
        *,
        activation: str = "silu",
        layer_norm: str = "none",
        init: str = "lecun",
        output_gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        one_of("layer_norm", layer_norm, LAYER_NORM)
        one_of("init", init, INITIALISERS)
        self.activation = activation
        self.layer_norm = layer_norm
        self.init = init
        self.output_gain = output_gain
        # nn.Linear would draw weights from the global generator, only for us to overwrite them.
        self.layers = nn.ModuleList(
            skip_init(nn.Linear, fan_in, fan_out)
            for fan_in, fan_out in pairwise((input_dim, *hidden, output_dim))
        )
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew and zero the biases; the output gain applies again."""
        for layer in self.linears:
            INITIALISERS[self.init](layer.weight, generator)
            layer.bias.zero_()
        self.linears[-1].weight.mul_(self.output_gain)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers, input side first."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., input_dim]`` to ``[..., output_dim]``."""
        return self.after_first(self.layers[0](x))

    def features(self, x: Tensor) -> Tensor:
        """Return what the last layer reads, ``[..., hidden[-1]]``; ``x`` itself without any."""
        activate = ACTIVATIONS[self.activation][0]
        for layer in self.linears[:-1]:
            x = hidden_activation(layer(x), activate, self.layer_norm)
        return x

    def after_first(self, hidden: Tensor) -> Tensor:
        """Apply everything behind the first linear layer to that layer's output.

        Samplers call it directly: they split the first layer to reuse the part that stays the
        same from step to step. ``hidden`` is overwritten where gradients are off, which saves an
        allocation per layer.
        """
        activate = ACTIVATIONS[self.activation][0 if torch.is_grad_enabled() else 1]
        for layer in islice(self.layers, 1, None):
            linear = cast(nn.Linear, layer)
            hidden = hidden_activation(hidden, activate, self.layer_norm)
            hidden = F.linear(hidden, linear.weight, linear.bias)
        return hidden

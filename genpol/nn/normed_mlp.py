"""Perceptrons of TD-MPC2: every hidden layer is Linear, LayerNorm, Mish.

Beside :class:`~genpol.nn.mlp.MLP` and :class:`~genpol.nn.ensemble.EnsembleMLP` these have norms
with a gain and a bias of their own, normally distributed initial weights of one width everywhere,
and may end in simplices (TD-MPC2, arXiv 2310.16828, section 3 and official code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpol.nn.simplicial import check_groups, simplicial
from genpol.settings import at_least, within

# The official code truncates at +-2, a hundred of these: no draw is ever cut.
INITIAL_STD = 0.02
LAYER_NORM_EPS = 1e-5  # torch's default, which the official code keeps
_GREATEST_EXP = 2e17


class _Mish(torch.autograd.Function):
    """``x tanh(ln(1 + e^x)) = x - 2 x / d`` with ``v = 1 + e^x`` and ``d = v^2 + 1``.

    One exponential where torch's kernel takes three transcendental functions, which in the small
    networks of control cost more than the matrix product before them.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        # Beyond e^40 the slope is 1, and further on the squares overflow.
        v = x.exp().clamp_(max=_GREATEST_EXP).add_(1.0)
        r = (v * v).add_(1.0).reciprocal_()
        ctx.save_for_backward(x, v, r)
        return torch.addcmul(x, x, r, value=-2.0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        # 1 - 2 r + 4 x e^x v r^2 with r = 1 / d, where e^x v = d - 1 - v.
        x, v, r = ctx.saved_tensors  # type: ignore[attr-defined]
        (g,) = gradients
        slope = torch.addcmul(x, x, torch.addcmul(r, v, r), value=-1.0).mul_(4.0).sub_(2.0)
        return torch.addcmul(g, g * r, slope)


def mish(x: Tensor) -> Tensor:
    """Return ``x tanh(softplus(x))`` (Misra 2019, arXiv 1908.08681), ``[...]``."""
    if torch.is_grad_enabled() and x.requires_grad:
        activated: Tensor = _Mish.apply(x)
        return activated
    v = x.exp().add_(1.0)
    return torch.addcdiv(x, x, v.mul_(v).add_(1.0), value=-2.0)


def dropout_mask(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Draw what dropout multiplies with: 0 for that share of the entries, ``1 / (1 - share)`` else.

    The gaps between the zeros of independent draws are geometric: a share of 1 % takes a hundredth
    of the random numbers that drawing every entry would.

    Args:
        shape: Of the mask.
        share: Probability that an entry is dropped, in [0, 1).
        generator: Source of the draws; the mask lies where it does.
    """
    within("dropout", share, 0.0, 0.99)
    size = math.prod(shape)
    mask = torch.full((size + 1,), 1.0 / (1.0 - share), device=generator.device)
    if share > 0.0:
        # Six standard deviations more than expected; in case they do not suffice, the rest stays.
        number = math.ceil(share * size + 6.0 * math.sqrt(share * size) + 6.0)
        uniform = torch.rand(number, generator=generator, device=generator.device)
        gaps = (uniform.clamp_min(1e-12).log() / math.log1p(-share)).floor().long() + 1
        mask[(gaps.cumsum(0) - 1).clamp_max(size)] = 0.0
    return mask[:size].view(*shape)


class NormedMLP(nn.Module):
    """A perceptron ``[Linear, LayerNorm, Mish]`` per hidden layer, and a last layer.

    Weights are normal with standard deviation 0.02, biases zero.

    Args:
        input_dim: Width of the input.
        output_dim: Width of the output.
        hidden: Widths of the hidden layers.
        group: Size of the simplices that the output consists of, behind a LayerNorm; 0 for a plain
            linear output.
        zero_output: Begin with a zero output.
        generator: Source of the initial weights.

    Raises:
        ConfigError: If simplices of that size do not fill the output.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden: Sequence[int],
        *,
        group: int = 0,
        zero_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if group:
            check_groups("output_dim", output_dim, group)
        self.group = group
        widths = list(pairwise((input_dim, *hidden, output_dim)))
        normed = [*hidden, *([output_dim] if group else [])]
        self.weights = nn.ParameterList(torch.empty(high, low) for low, high in widths)
        self.biases = nn.ParameterList(torch.zeros(high) for _, high in widths)
        self.gains = nn.ParameterList(torch.ones(width) for width in normed)
        self.shifts = nn.ParameterList(torch.zeros(width) for width in normed)
        _initialise(self.weights, zero_output, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., input_dim]`` to ``[..., output_dim]``."""
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(x, weight, bias)
            if index < len(self.gains):
                gain, shift = self.gains[index], self.shifts[index]
                x = F.layer_norm(x, x.shape[-1:], gain, shift, LAYER_NORM_EPS)
            if index < len(self.weights) - 1:
                x = mish(x)
        return simplicial(x, self.group) if self.group else x


class NormedEnsemble(nn.Module):
    """Several independent :class:`NormedMLP` of one shape with linear outputs, computed together.

    Args:
        num_members: Size of the ensemble.
        input_dim: Width of the input.
        output_dim: Width of the output.
        hidden: Widths of the hidden layers.
        zero_output: Begin with a zero output.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        num_members: int,
        input_dim: int,
        output_dim: int,
        hidden: Sequence[int],
        *,
        zero_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        at_least("num_members", num_members, 1)
        self.num_members = num_members
        self.hidden = list(hidden)
        widths = list(pairwise((input_dim, *hidden, output_dim)))
        m = num_members
        self.weights = nn.ParameterList(torch.empty(m, low, high) for low, high in widths)
        self.biases = nn.ParameterList(torch.zeros(m, 1, high) for _, high in widths)
        self.gains = nn.ParameterList(torch.ones(m, 1, width) for width in hidden)
        self.shifts = nn.ParameterList(torch.zeros(m, 1, width) for width in hidden)
        _initialise(self.weights, zero_output, generator)

    def forward(
        self,
        x: Tensor,
        *,
        members: Tensor | None = None,
        frozen: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map ``[..., input_dim]`` to ``[M, ..., output_dim]``.

        Args:
            x: The input.
            members: Which to ask, int64 ``[M]``; all by default.
            frozen: Let no gradient reach the weights.
            mask: Of :func:`dropout_mask`, for the output of the first layer before its norm,
                ``[M, rows, hidden[0]]`` where rows is the product of the leading dimensions.
        """

        def of(parameters: nn.ParameterList, index: int) -> Tensor:
            chosen: Tensor = parameters[index]
            chosen = chosen.detach() if frozen else chosen
            return chosen if members is None else chosen.index_select(0, members)

        leading = x.shape[:-1]
        rows = x.reshape(-1, x.shape[-1])
        number = self.num_members if members is None else len(members)
        y = rows.expand(number, *rows.shape)
        for index in range(len(self.weights)):
            y = torch.baddbmm(of(self.biases, index), y, of(self.weights, index))
            if index == 0 and mask is not None:
                y = y * mask
            if index < len(self.gains):
                y = mish(_each_normed(y, of(self.gains, index), of(self.shifts, index)))
        return y.view(number, *leading, y.shape[-1])


def _each_normed(y: Tensor, gains: Tensor, shifts: Tensor) -> Tensor:
    """Return ``[M, B, W]`` behind the norms of M members.

    One by one: that is a kernel for each, where all together the gains would be an operation of
    their own, with sums over the batch in its derivative.
    """
    each = zip(y.unbind(0), gains.unbind(0), shifts.unbind(0), strict=True)
    width = y.shape[-1:]
    return torch.stack(
        [F.layer_norm(x, width, gain[0], shift[0], LAYER_NORM_EPS) for x, gain, shift in each]
    )


@torch.no_grad()
def _initialise(
    weights: nn.ParameterList, zero_output: bool, generator: torch.Generator | None
) -> None:
    for weight in weights:
        if weight.is_meta:  # a network without memory, to be counted
            continue
        # Drawn where the generator lives, so that a seed means the same weights on every device.
        device = generator.device if generator is not None else weight.device
        draws = torch.randn(weight.shape, generator=generator, device=device)
        weight.copy_(draws * INITIAL_STD)
    if zero_output:
        weights[-1].zero_()

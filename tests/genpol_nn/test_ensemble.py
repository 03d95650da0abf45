"""Ensembles of perceptrons."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from genpol.nn.ensemble import EnsembleMLP
from genpol.nn.mlp import MLP


def ensemble(**options) -> EnsembleMLP:
    return EnsembleMLP(3, 4, 2, [8, 6], generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("layer_norm", ["none", "before", "after"])
def test_members_equal_single_perceptrons(layer_norm: str) -> None:
    together = ensemble(layer_norm=layer_norm)
    x = torch.randn(5, 4)
    for index, output in enumerate(together(x)):
        hidden = x
        for layer, (weight, bias) in enumerate(zip(together.weights, together.biases, strict=True)):
            hidden = F.linear(hidden, weight[index].T, bias[index, 0])
            if layer < 2:
                width = hidden.shape[-1:]
                hidden = F.layer_norm(hidden, width, eps=1e-6) if layer_norm == "before" else hidden
                hidden = F.relu(hidden)
                hidden = F.layer_norm(hidden, width, eps=1e-6) if layer_norm == "after" else hidden
        torch.testing.assert_close(output, hidden)


def test_members_differ_and_start_like_a_perceptron() -> None:
    together = ensemble()
    assert not torch.equal(together.weights[0][0], together.weights[0][1])
    for init in ("lecun", "glorot"):
        alone = MLP(4, 2, [8, 6], init=init, generator=torch.Generator().manual_seed(0))
        first = ensemble(init=init).weights[0][0].T
        torch.testing.assert_close(first, alone.linears[0].weight, rtol=0, atol=0)


def test_gradients_do_not_mix_members() -> None:
    together = ensemble()
    together(torch.randn(5, 4))[0].sum().backward()
    for weight in together.weights:
        assert weight.grad is not None
        assert (weight.grad[0] != 0).any()
        assert (weight.grad[1:] == 0).all()

"""SimNorm (MBDPO specification, oracle 2)."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.errors import ConfigError
from genpol.nn.simplicial import check_groups, simplicial


def test_groups_are_distributions():
    y = simplicial(10.0 * torch.randn(5, 512))
    # Simplex i has the features i, i + 64, i + 128, ...
    sums = torch.stack([y[:, i::64].sum(-1) for i in range(64)], -1)
    torch.testing.assert_close(sums, torch.ones(5, 64))
    assert (y >= 0).all()
    torch.testing.assert_close(y.sum(-1), torch.full((5,), 64.0))


def test_norm_is_bounded_whatever_comes_in():
    norms = simplicial(torch.randn(200, 512) * torch.logspace(-3, 3, 200)[:, None]).norm(dim=-1)
    assert norms.min() >= math.sqrt(8) - 1e-4
    assert norms.max() <= 8 + 1e-4
    assert norms[0] == pytest.approx(math.sqrt(8), abs=1e-3)
    assert norms[-1] > 7.5


def test_a_constant_for_a_group_changes_nothing():
    x = torch.randn(3, 64)
    shift = torch.randn(3, 8)  # one for each simplex
    torch.testing.assert_close(simplicial(x + shift.repeat(1, 8)), simplicial(x))
    assert not torch.allclose(simplicial(x + shift.repeat_interleave(8, 1)), simplicial(x))


def test_other_sizes_of_simplices():
    y = simplicial(torch.randn(2, 12), group=4)
    torch.testing.assert_close(y.view(2, 4, 3).sum(1), torch.ones(2, 3))


@pytest.mark.parametrize(("width", "group", "advice"), [(100, 8, 96), (3, 8, 8), (8, 0, 8)])
def test_widths_that_are_not_filled_are_refused(width, group, advice):
    with pytest.raises(ConfigError, match=f"agent.latent_dim = {width}.*take {advice}"):
        check_groups("agent.latent_dim", width, group)

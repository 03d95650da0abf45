"""Two-hot scalars (MBDPO specification, oracle 1)."""

from __future__ import annotations

import math

import pytest
import torch

from genpol.errors import ConfigError
from genpol.nn.two_hot import TwoHot, symexp, symlog

# Across all bins, on bins, at the ends and at zero.
SCALARS = torch.tensor([0.0, 0.05, -0.3, 1.0, -7.5, 123.4, -999.0, 22025.4, -22025.4])


def test_symexp_inverts_symlog():
    torch.testing.assert_close(symexp(symlog(SCALARS)), SCALARS, rtol=1e-5, atol=1e-6)


def test_what_is_encoded_is_decoded():
    scalar = TwoHot()
    logits = (scalar.encode(SCALARS) + 1e-12).log()
    torch.testing.assert_close(scalar.decode(logits), SCALARS, rtol=2e-5, atol=1e-5)


def test_scalars_beyond_the_last_bin_are_cut():
    scalar = TwoHot()
    logits = (scalar.encode(torch.tensor([1e5, -1e5])) + 1e-12).log()
    assert scalar.decode(logits).tolist() == pytest.approx([22025.47, -22025.47], rel=1e-5)


def test_two_neighbouring_bins_share_the_weight():
    weights = TwoHot().encode(torch.cat((SCALARS, torch.tensor([1e6, -1e6]))))
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    assert ((weights > 0).sum(-1) <= 2).all()
    places = [row.nonzero().flatten().tolist() for row in weights]
    assert all(len(place) == 1 or place[1] - place[0] == 1 for place in places)
    assert weights[-2].argmax() == 100
    assert weights[-1].argmax() == 0


def test_bins_are_where_the_paper_has_them():
    scalar = TwoHot()
    torch.testing.assert_close(scalar.bins, -10.0 + 0.2 * torch.arange(101))
    weights = scalar.encode(symexp(torch.tensor([0.25])))[0]
    torch.testing.assert_close(weights[51:53], torch.tensor([0.75, 0.25]), rtol=0, atol=1e-5)


def test_cross_entropy_is_that_of_the_weights():
    scalar = TwoHot(21, 4.0)
    logits, target = torch.randn(3, 5, 21), 5.0 * torch.randn(5)
    expected = -(scalar.encode(target) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(scalar.cross_entropy(logits, target), expected)


def test_the_least_cross_entropy_is_the_entropy_of_the_weights():
    scalar = TwoHot()
    weights = scalar.encode(SCALARS)
    least = scalar.cross_entropy((weights + 1e-12).log(), SCALARS)
    entropy = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(least, entropy, rtol=1e-4, atol=1e-5)
    assert (least <= math.log(2) + 1e-5).all()


def test_an_even_mixture_decodes_in_the_space_of_symlog():
    scalar = TwoHot()
    both = 0.5 * scalar.encode(torch.tensor([0.0, 100.0])).sum(0)
    assert float(scalar.decode((both + 1e-12).log())) == pytest.approx(9.05, abs=0.01)


def test_equal_logits_decode_to_zero():
    assert TwoHot().decode(torch.zeros(4, 101)).abs().max() < 1e-5


@pytest.mark.parametrize(("bins", "limit"), [(2, 10.0), (101, 0.0)])
def test_too_few_bins_are_refused(bins, limit):
    with pytest.raises(ConfigError, match="must be"):
        TwoHot(bins, limit)

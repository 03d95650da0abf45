from __future__ import annotations

import math

import pytest
import torch

from genpol.errors import ConfigError
from genpol.nn.time_embedding import TimeEmbedding


def test_cosines_then_sines_of_octaves():
    t = 0.3
    expected = [math.cos(2**k * t) for k in range(4)] + [math.sin(2**k * t) for k in range(4)]
    torch.testing.assert_close(TimeEmbedding(8)(torch.tensor([[t]])), torch.tensor([expected]))


def test_keeps_leading_dimensions():
    assert TimeEmbedding(4)(torch.rand(5, 3, 1)).shape == (5, 3, 4)


def test_one_feature_is_the_bare_time():
    time = torch.rand(5, 1)
    assert torch.equal(TimeEmbedding(1)(time), time)


@pytest.mark.parametrize("dim", [0, -2, 3])
def test_odd_dimensions_are_refused(dim: int):
    with pytest.raises(ConfigError, match="time_embedding_dim"):
        TimeEmbedding(dim)

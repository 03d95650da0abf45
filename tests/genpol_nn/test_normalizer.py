from __future__ import annotations

import pytest
import torch

from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer


def test_is_the_identity_before_any_data():
    x = torch.tensor([[-1e3, 0.5, 1e3]])
    assert torch.equal(RunningNormalizer(3)(x), x)


def test_uneven_batches_merge_to_the_statistics_of_the_whole():
    data = 3.0 * torch.randn(1000, 2, dtype=torch.float64) + torch.tensor([5.0, -1e4])
    normalizer = RunningNormalizer(2)
    for batch in data.split([1, 9, 490, 500]):
        normalizer.update(batch)
    assert normalizer.count == 1000
    torch.testing.assert_close(normalizer.mean, data.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(normalizer.std, data.std(0, correction=0), rtol=1e-10, atol=0)


def test_normalises_and_clips():
    normalizer = RunningNormalizer(1, clip=2.0)
    normalizer.set_statistics(torch.tensor([1.0]), torch.tensor([0.5]))
    out = normalizer(torch.tensor([[1.0], [1.5], [0.25], [9.0], [-9.0]]))
    assert out.flatten().tolist() == [0.0, 1.0, -1.5, 2.0, -2.0]
    assert out.dtype == torch.float32


@pytest.mark.parametrize(("merge", "shrinks"), [("exact", False), ("released", True)])
def test_std_after_k_batches_is_right_or_shrinks_as_released(merge, shrinks):
    """GoRL oracle 8: after k equal batches from N(1, 2^2), std 2, or 2/sqrt(k) with the defect."""
    generator = torch.Generator().manual_seed(0)
    normalizer = RunningNormalizer(1, merge=merge)
    for k in range(1, 26):
        normalizer.update(1 + 2 * torch.randn(32, 625, 1, generator=generator))
        if k in (1, 4, 25):
            expected = 2.0 / k**0.5 if shrinks else 2.0
            assert normalizer.std.item() == pytest.approx(expected, abs=0.02)
    assert normalizer.mean.item() == pytest.approx(1.0, abs=0.02)


def test_constant_feature_is_centred_not_scaled():
    normalizer = RunningNormalizer(1)
    normalizer.update(torch.full((100, 1), 7.1))
    torch.testing.assert_close(normalizer(torch.tensor([[7.6]])), torch.tensor([[0.5]]))


def test_masked_rows_do_not_count():
    data = torch.randn(4, 5, 2)
    data[1, 2] = torch.nan
    mask = ~data.isnan().any(-1)
    normalizer = RunningNormalizer(2)
    normalizer.update(data, mask)
    assert normalizer.count == 19
    torch.testing.assert_close(normalizer.mean, data[mask].mean(0).double())


def test_reset_is_the_identity_again():
    normalizer = RunningNormalizer(2)
    normalizer.update(torch.randn(10, 2))
    normalizer.reset()
    x = 100 * torch.randn(3, 2)
    assert torch.equal(normalizer(x), x)


def test_state_survives_save_and_load():
    first, second = RunningNormalizer(2), RunningNormalizer(2)
    first.update(torch.randn(50, 2))
    second.load_state_dict(first.state_dict())
    more, x = torch.randn(50, 2), 20 * torch.randn(4, 2)
    assert torch.equal(first(x), second(x))
    first.update(more)
    second.update(more)
    assert torch.equal(first(x), second(x))


def test_unknown_merge_is_refused():
    with pytest.raises(ConfigError, match="exact"):
        RunningNormalizer(2, merge="exakt")

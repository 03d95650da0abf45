"""Running mean and variance of observations."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from genpol import parallel
from genpol.settings import one_of

# Below it a feature counts as constant: it is centred, not scaled (dividing by its rounding noise
# would send every later deviation to the clip).
SMALLEST_STD = 1e-6


class RunningNormalizer(nn.Module):
    """Standardise the last dimension with statistics gathered over all data seen.

    Until the first :meth:`update` or :meth:`set_statistics` it is the identity, without clipping.
    Statistics accumulate in float64; what :meth:`forward` needs is derived on update, so that a
    call is one subtraction, one multiplication and one clamp.

    Args:
        dim: Size of the last dimension.
        clip: Bound on the absolute normalised value; ``None`` for none.
        merge: ``"exact"`` merges batches as Chan et al. (1979) do. ``"released"`` reproduces the
            published codes of FPO and GoRL's first version, where each batch overwrites the sum of
            squared deviations while the count keeps growing: after k batches the standard
            deviation is too small by about ``sqrt(k)``.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    shift: Tensor
    inverse_std: Tensor
    bound: Tensor

    def __init__(
        self,
        dim: int,
        *,
        clip: float | None = 10.0,
        merge: Literal["exact", "released"] = "exact",
    ) -> None:
        super().__init__()
        one_of("merge", merge, ("exact", "released"))
        self.dim = dim
        self.clip = clip
        self.merge = merge
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("inverse_std", torch.ones(dim))
        self.register_buffer("bound", torch.tensor(math.inf))

    @property
    def std(self) -> Tensor:
        """Population standard deviation ``[dim]`` in float64; ones before any data."""
        if self.count == 0:
            return torch.ones_like(self.mean)
        return (self.m2 / self.count).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``clip((x - mean) / std)`` of ``[..., dim]`` in float32."""
        centred = x.to(self.shift.dtype) - self.shift
        return (centred * self.inverse_std).clamp(-self.bound, self.bound)

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None, *, of_all_ranks: bool = False) -> None:
        """Merge a batch ``[..., dim]`` into the statistics.

        Args:
            x: Raw values.
            mask: Boolean ``[...]``, True for the rows to count; diverged rows must not be.
            of_all_ranks: Merge those of all ranks, see :mod:`genpol.parallel`, and not only this
                one's.
        """
        rows = x.reshape(-1, self.dim)
        if mask is not None:
            rows = rows[mask.reshape(-1)]
        rows = rows.to(torch.float64)
        new = rows.shape[0]
        if of_all_ranks and parallel.size() > 1:
            sums = parallel.total(torch.cat((rows.sum(0), rows.new_tensor([float(new)]))))
            new = int(sums[-1])
            batch_mean = sums[:-1] / sums[-1]
            squares = parallel.total((rows - batch_mean).square().sum(0))
        elif new > 0:
            batch_mean = rows.mean(0)
            squares = (rows - batch_mean).square().sum(0)
        if new == 0:
            return
        total = self.count + new
        # Integer tensors would divide to float32.
        share = new / total.to(torch.float64)
        delta = batch_mean - self.mean
        added = squares + delta.square() * (self.count * share)
        self.mean.add_(delta * share)
        self.m2.copy_(added if self.merge == "released" else self.m2 + added)
        self.count.copy_(total)
        self._refresh()

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor, count: int = 1) -> None:
        """Fix mean and standard deviation ``[dim]``, for instance those of a data set.

        Args:
            mean: New mean.
            std: New standard deviation.
            count: How many rows they stand for, should :meth:`update` be called later.
        """
        self.count.fill_(count)
        self.mean.copy_(mean)
        self.m2.copy_(std.to(self.m2).square() * count)
        self._refresh()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all data; the identity again."""
        self.count.zero_()
        self.mean.zero_()
        self.m2.zero_()
        self._refresh()

    def _refresh(self) -> None:
        std = self.std
        self.shift.copy_(self.mean)
        self.inverse_std.copy_(torch.where(std > SMALLEST_STD, 1.0 / std, 1.0))
        seen = self.count > 0
        self.bound.copy_(
            torch.where(seen, self.clip if self.clip is not None else math.inf, math.inf)
        )

"""Ranks: processes that learn one policy together, each from its share of the environments.

``torchrun`` starts them, the command line joins them, and they stay equal: from equal weights they
take equal steps along the mean of their gradients. Everything here is the identity in a process
that is alone, to the bit, and also where a host has a process group of its own: only :func:`join`
makes ranks.

Every function that speaks of all ranks must be called by all of them, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from genpol.errors import GenpolError
from genpol.seeding import derive

T = TypeVar("T")

# Ranks wait for each other in evaluations, too, which only the first one makes.
_PATIENCE = timedelta(hours=6)


class _Membership:
    """Which of how many ranks this process is."""

    rank = 0
    size = 1


_SELF = _Membership()


class RankError(GenpolError):
    """Another rank has gone, or ranks that must be equal are not."""


def started_by_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process is one of several ranks that were started together."""
    return "TORCHELASTIC_RUN_ID" in environ and int(environ.get("WORLD_SIZE", "1")) > 1


def own_device(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the device that a rank means by ``cuda``: one for each rank of a machine."""
    return f"cuda:{environ['LOCAL_RANK']}" if name == "cuda" and _SELF.size > 1 else name


@contextmanager
def join() -> Iterator[None]:
    """Be one of the ranks that ``torchrun`` started, while the ``with`` block runs."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE
    )
    _SELF.rank, _SELF.size = dist.get_rank(), dist.get_world_size()
    try:
        yield
    finally:
        _SELF.rank, _SELF.size = 0, 1
        dist.destroy_process_group()


def rank() -> int:
    """Return this process's number; 0 where it is alone."""
    return _SELF.rank


def size() -> int:
    """Return the number of ranks; 1 where it is alone."""
    return _SELF.size


def is_first() -> bool:
    """Return whether this process writes, evaluates and prints."""
    return _SELF.rank == 0


def total(x: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    return x if _SELF.size == 1 else _reduced(x, dist.ReduceOp.SUM)


def mean(x: Tensor) -> Tensor:
    """Return the mean of a floating-point tensor over all ranks."""
    return x if _SELF.size == 1 else _reduced(x, dist.ReduceOp.SUM) / _SELF.size


def greatest(x: Tensor) -> Tensor:
    """Return the largest of a tensor's values on all ranks, entry by entry."""
    return x if _SELF.size == 1 else _reduced(x, dist.ReduceOp.MAX)


def least(number: int) -> int:
    """Return the smallest of an integer's values on all ranks."""
    if _SELF.size == 1:
        return number
    return int(_reduced(torch.tensor(number), dist.ReduceOp.MIN))


def any_of(truth: bool) -> bool:
    """Return whether something is true on any rank."""
    if _SELF.size == 1:
        return truth
    return bool(greatest(torch.tensor(int(truth))))


def std_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return standard deviation (of the population) and mean of all entries on all ranks."""
    if _SELF.size == 1:
        std, mean = torch.std_mean(x, correction=0)
        return std, mean
    wide = x.detach().double()
    count, first = total(torch.stack((wide.new_tensor(wide.numel()), wide.sum())))
    centre = first / count
    variance = total((wide - centre).square().sum()) / count
    return variance.sqrt().to(x), centre.to(x)


def mean_gradients(
    gradients: Sequence[Tensor | None], losses: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Return gradients and losses averaged over all ranks, in one exchange.

    What is not finite on one rank is not finite in the mean, so that all ranks skip a step or none.
    """
    if _SELF.size == 1:
        return list(gradients), list(losses)
    given = [*(g for g in gradients if g is not None), *losses]
    flat = mean(torch.cat([x.detach().flatten() for x in given]))
    pieces = iter(flat.split([x.numel() for x in given]))
    averaged = [None if g is None else next(pieces).view(g.shape) for g in gradients]
    return averaged, [next(pieces).view(loss.shape) for loss in losses]


def branch(generator: torch.Generator) -> torch.Generator:
    """Return a generator whose numbers differ from rank to rank.

    Generators of learners are equal on all ranks and stay so: this draws one number, however many
    are then drawn from the branch. A process that is alone gets ``generator`` itself.
    """
    if _SELF.size == 1:
        return generator
    device = generator.device
    drawn = torch.randint(2**31, (), generator=generator, device=device)
    return torch.Generator(device).manual_seed(derive(int(drawn), f"rank/{_SELF.rank}"))


def gather(thing: T) -> list[T]:
    """Return what all ranks have, in their order, tensors where this rank's are.

    It is pickled on the way.
    """
    if _SELF.size == 1:
        return [thing]
    found: list[Any] = [None] * _SELF.size
    devices = {x.device for x in pytree.tree_leaves(thing) if isinstance(x, Tensor)}
    with _telling():
        dist.all_gather_object(found, _moved(thing, torch.device("cpu")))
    home = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return [_moved(x, home) for x in found]


def _moved(thing: T, device: torch.device) -> T:
    moved: T = pytree.tree_map_only(Tensor, lambda x: x.to(device), thing)
    return moved


def from_first(thing: T) -> T:
    """Return what the first rank has."""
    if _SELF.size == 1:
        return thing
    box: list[Any] = [thing]
    with _telling():
        dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


def _reduced(x: Tensor, operation: Any) -> Tensor:
    result = x.detach().clone()
    with _telling():
        dist.all_reduce(result, op=operation)
    return result


@contextmanager
def _telling() -> Iterator[None]:
    """Say in one line that another rank is gone, which torch tells at length."""
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RankError(
            f"rank {_SELF.rank} of {_SELF.size}: lost the others ({reason}); go on from the last "
            "checkpoint with resume=<run folder>, on as many ranks"
        ) from None

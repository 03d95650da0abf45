"""Functions compiled where that works, and run as they are where it does not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T], *, name: str, graphs: bool = False) -> Callable[P, T]:
    """Return ``function`` compiled by ``torch.compile`` at its first call.

    Where the compiler fails (no C++ compiler on the machine, an operation that it does not know)
    one warning says so, and the function itself is run from then on; what the function itself
    raises is raised. Shapes are taken as fixed: the compiler starts again for others.

    Args:
        function: Of tensors, without effects but its result.
        name: The setting that asked for it, for the warning.
        graphs: Whether to record CUDA graphs. Tensors and tuples of them that are returned are
            copied then, for the next call overwrites them.
    """
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if graphs else None)
    best = _copying(fast) if graphs else fast
    chosen: list[Callable[P, T]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if chosen:
            return chosen[0](*args, **kwargs)
        try:
            result = best(*args, **kwargs)
        except Exception as error:
            result = function(*args, **kwargs)  # if the fault is its own, this raises it
            _warn(name, error)
            chosen.append(function)
        else:
            chosen.append(best)
        return result

    return run


def _copying(function: Callable[P, T]) -> Callable[P, T]:
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        copied: T = _copied(function(*args, **kwargs))
        return copied

    return run


def _copied(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.clone()
    if isinstance(result, tuple):
        parts = map(_copied, result)
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result


def _warn(name: str, error: Exception) -> None:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason")
    warnings.warn(
        f"{name} = True: cannot compile here, so it runs uncompiled ({type(error).__name__}: "
        f"{reason[:200]})",
        stacklevel=3,
    )

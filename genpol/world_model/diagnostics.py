"""How far the search lies from the policy prior that the critics evaluate."""

from __future__ import annotations

from torch import Tensor

from genpol.nn.masked import weighted_mean


def search_drift(
    searched: Tensor, own: Tensor, targets: tuple[Tensor, Tensor], width: Tensor, valid: Tensor
) -> dict[str, Tensor]:
    """Return the drift and the cross-TD error as metrics.

    The *drift* is the mean of ``||a_search - mode pi||_2 / sqrt(A)``; the *cross-TD error* that of
    ``|y(a_search) - y(a_pi)|`` at the same transition. Both are plotted in the MBDPO paper, whose
    definitions are not known; these are ours.

    Args:
        searched: Actions of the search, ``[R, A]``.
        own: Modes of the policy prior, ``[R, A]``.
        targets: Of the critics with either, ``[R]`` each.
        width: Dimensions A that the task uses, ``[]`` or ``[R]``.
        valid: Which rows count, bool ``[R]``.
    """
    here, there = targets
    return {
        "plan/drift": weighted_mean((searched - own).norm(dim=-1) / width.sqrt(), valid),
        "plan/cross_td_error": weighted_mean((here - there).abs(), valid),
    }

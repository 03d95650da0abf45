"""Policies for the worst of several models, as a sequence of ordinary problems (IWOCS, 2410.06212).

With stationary policies and rectangular sets of models a robust problem has the value of its worst
model, so one may solve models one by one: find the model that is worst for the present policy,
solve it, and act by the least of all action values so far, until no model is worse than expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from genpol.errors import ConfigError, NonFiniteError
from genpol.settings import at_least

Model = TypeVar("Model")
Solution = TypeVar("Solution")
Policy = TypeVar("Policy")


def pessimistic_value(
    q_values: Tensor, support: Tensor | None = None, *, unsupported: float = -math.inf
) -> Tensor:
    """Return ``min_j Q_j`` ``[...]`` over the models whose training has seen an entry.

    ArXiv 2410.06212. Where no model has, the paper is silent; ours is ``unsupported``.

    Args:
        q_values: Action values of J models ``[J, ...]``; those without support may hold NaN.
        support: Boolean ``[J, ...]``, True where a model's value counts; ``None`` for everywhere.
        unsupported: Value where none counts; the default is taken by no greedy policy.

    Raises:
        ConfigError: If there is no model, or the shapes differ.
    """
    if len(q_values) == 0:
        raise ConfigError("q_values: holds no model; stack at least the nominal one's")
    if support is None:
        return q_values.amin(0)
    if support.shape != q_values.shape:
        raise ConfigError(
            f"support of shape {list(support.shape)}: must have that of q_values, "
            f"{list(q_values.shape)}"
        )
    least = torch.where(support, q_values, math.inf).amin(0)
    return torch.where(support.any(0), least, unsupported)


@dataclass(frozen=True)
class Curriculum(Generic[Solution, Policy]):
    """What a curriculum of worst cases came to.

    Attributes:
        policy: The last one.
        models: Indices of the models that were solved, the nominal one first.
        solutions: Of these models.
        estimates: What each policy was expected to reach under the models known to it.
        worst_values: What it reached under the model that is worst for it.
        converged: Whether the last policy reached what was expected of it, up to the tolerance.
    """

    policy: Policy
    models: tuple[int, ...]
    solutions: tuple[Solution, ...]
    estimates: tuple[float, ...]
    worst_values: tuple[float, ...]
    converged: bool

    @property
    def iterations(self) -> int:
        """Searches for a worst case, the one that found none included."""
        return len(self.worst_values)


def worst_case_curriculum(
    models: Sequence[Model],
    *,
    solve: Callable[[Model], Solution],
    plan: Callable[[Sequence[Solution]], tuple[Policy, float]],
    evaluate: Callable[[Policy, Model], float],
    tolerance: float,
    max_iterations: int = 5,
) -> Curriculum[Solution, Policy]:
    """Solve models one by one, always the worst for the present policy (arXiv 2410.06212).

    It ends when the worst model takes no more than ``tolerance`` from what the policy is expected
    to reach. Ours: it also ends, without having converged, when the worst model is one that was
    solved before, since to solve it again would teach nothing; and the search is exhaustive.

    Args:
        models: The finite set, the nominal model first.
        solve: Returns the solution of one model, such as its action values and their support.
        plan: Returns the policy for all models solved so far and its expected return, such as the
            greedy policy on :func:`pessimistic_value` and that value at the start.
        evaluate: Returns the return of a policy under a model.
        tolerance: In units of the return; a hundredth of the nominal one is sensible (ours).
        max_iterations: Most models to solve beside the nominal one.

    Raises:
        ConfigError: If there is no model, or tolerance or iterations are negative.
        NonFiniteError: If a return or an expectation is not finite.
    """
    if len(models) == 0:
        raise ConfigError("models: is empty; give at least the nominal model")
    at_least("tolerance", tolerance, 0.0)
    at_least("max_iterations", max_iterations, 0)
    solved, solutions = [0], [solve(models[0])]
    estimates: list[float] = []
    worst_values: list[float] = []
    while True:
        policy, expected = plan(solutions)
        estimates.append(_finite("the expected return of plan", expected))
        values = [
            _finite(f"the return under models[{index}]", evaluate(policy, model))
            for index, model in enumerate(models)
        ]
        worst = min(range(len(models)), key=values.__getitem__)
        worst_values.append(values[worst])
        converged = values[worst] >= estimates[-1] - tolerance
        if converged or worst in solved or len(solved) > max_iterations:
            break
        solved.append(worst)
        solutions.append(solve(models[worst]))
    return Curriculum(
        policy=policy,
        models=tuple(solved),
        solutions=tuple(solutions),
        estimates=tuple(estimates),
        worst_values=tuple(worst_values),
        converged=converged,
    )


def _finite(what: str, value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteError(f"worst-case curriculum: {what} is {number}; look at what made it")
    return number

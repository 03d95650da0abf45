"""What ``guidance.*`` on the command line asks of a trained policy, and the choice of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, nearest

if TYPE_CHECKING:
    from genpol.agent import Agent
    from genpol.policies.guidance import GuidanceSettings
    from genpol.training.evaluation import Evaluation

_OPTIONS = ("weight", "best_of", "estimator", "critic")


@dataclass(frozen=True)
class Request:
    """Guidance that was asked for.

    Attributes:
        weights: Weights to try; empty for the policy's own.
        changes: Other settings of :class:`~genpol.policies.guidance.GuidanceSettings`.
        critic: Run whose critic is asked; ``None`` for the policy's own.
    """

    weights: tuple[float, ...]
    changes: Mapping[str, Any]
    critic: Path | None


def parse(options: Mapping[str, str]) -> Request | None:
    """Read the options behind ``guidance.``; return ``None`` if there are none.

    Raises:
        ConfigError: If one is unknown or not a number.
    """
    if not options:
        return None
    for name in options:
        if name not in _OPTIONS:
            known = ", ".join(f"guidance.{option}" for option in _OPTIONS)
            raise ConfigError(
                f"unknown option 'guidance.{name}'.{nearest(name, _OPTIONS)} There are {known}"
            )
    changes: dict[str, Any] = {}
    if "estimator" in options:
        changes["estimator"] = options["estimator"]
    if "best_of" in options:
        changes["best_of"] = _number("best_of", options["best_of"], int)
    texts = options["weight"].split(",") if "weight" in options else []
    return Request(
        weights=tuple(_number("weight", text, float) for text in texts),
        changes=changes,
        critic=Path(options["critic"]) if "critic" in options else None,
    )


def guide(
    agent: Agent, request: Request, weight: float | None, critic: Agent | None
) -> GuidanceSettings:
    """Let an agent act under guidance, and return the settings that it then has.

    Raises:
        ConfigError: If it cannot.
    """
    from genpol.offline import OfflineAgent

    if not isinstance(agent, OfflineAgent) or not (
        critic is None or isinstance(critic, OfflineAgent)
    ):
        raise ConfigError("guidance: only agents that learn from data take it, and have critics")
    changes = dict(request.changes) | ({} if weight is None else {"weight": weight})
    agent.guide(replace(agent.guidance, **changes), critic)
    return agent.guidance


def choose(
    request: Request, evaluate: Callable[[float], Evaluation]
) -> tuple[float | None, list[dict[str, Any]]]:
    """Return the weight to evaluate, and what each of several did on the episodes of choice.

    Args:
        request: What was asked for.
        evaluate: Evaluates under one weight, on episodes that are not those of the evaluation.
    """
    if len(request.weights) < 2:
        return next(iter(request.weights), None), []
    rows: list[dict[str, Any]] = []
    for weight in request.weights:
        summary = evaluate(weight).summary()
        rows.append({"weight": weight, **summary})
    column = "success_mean" if "success_mean" in rows[0] else "return_mean"
    sound = [row for row in rows if math.isfinite(row[column])] or rows
    best = max(sound, key=lambda row: row[column])
    return best["weight"], rows


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number, or several: 0,0.02,0.04"
        raise ConfigError(f"guidance.{name} = {text!r}: must be {wanted}") from None

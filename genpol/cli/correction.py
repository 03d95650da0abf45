"""What ``corrector=`` on the command line asks of a trained policy, and how its step is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, DatasetError, nearest

if TYPE_CHECKING:
    from genpol.agents.cdsa import CDSA
    from genpol.cli.runs import TrainedRun
    from genpol.offline.correction import Choice, CorrectedPolicy
    from genpol.policies.correction import CorrectionSettings

_WEIGHTS = ("action_weight", "state_weight")
_OPTIONS = (*_WEIGHTS, "noise_level", "steps", "max_norm", "form", "select")


@dataclass(frozen=True)
class Request:
    """A correction that was asked for.

    Attributes:
        run: Run of agent=cdsa that corrects.
        changes: Settings of :class:`~genpol.policies.correction.CorrectionSettings`.
        select: Whether the weights are to be chosen from the corrector's data.
    """

    run: Path
    changes: Mapping[str, Any]
    select: bool


def parse(corrector: str | None, options: Mapping[str, str]) -> Request | None:
    """Read ``corrector`` and the options behind ``corrector.``; return ``None`` for none.

    Raises:
        ConfigError: If one is unknown, malformed, or contradicts another.
    """
    for name in options:
        if name not in _OPTIONS:
            known = ", ".join(f"corrector.{option}" for option in _OPTIONS)
            raise ConfigError(
                f"unknown option 'corrector.{name}'.{nearest(name, _OPTIONS)} There are {known}"
            )
    if corrector in (None, "none"):
        if options:
            raise ConfigError(
                f"corrector.{next(iter(options))}: there is no corrector; add corrector=cdsa:<run>"
            )
        return None
    kind, _, path = (corrector or "").partition(":")
    if kind != "cdsa" or not path:
        raise ConfigError(
            f"corrector = {corrector!r}: must be none or cdsa:<run>, a run of agent=cdsa."
            f"{nearest(kind, ('cdsa', 'none')) if kind != 'cdsa' else ''}"
        )
    weighted = [name for name in _WEIGHTS if name in options]
    select = _flag(options["select"]) if "select" in options else not weighted
    if select and weighted:
        raise ConfigError(
            f"corrector.select = true chooses the weights; leave out corrector.{weighted[0]}"
        )
    changes = {name: _value(name, text) for name, text in options.items() if name != "select"}
    return Request(Path(path), changes, select and changes.get("steps") != 0)


def apply(
    trained: TrainedRun, request: Request, *, seed: int, deterministic: bool
) -> tuple[CorrectedPolicy, dict[str, Any]]:
    """Let a trained policy act corrected from now on.

    Args:
        trained: The policy's run; its agent is changed.
        request: What was asked for.
        seed: Seed of the choice of a step.
        deterministic: Whether the policy will act by its mode.

    Returns:
        The corrected policy, and the settings that it has, with what was tried for them.

    Raises:
        ConfigError: If corrector and policy do not go together, or nothing was held out to choose
            on.
        DatasetError: If the corrector's data are gone.
    """
    from genpol.offline.correction import CorrectedPolicy
    from genpol.policies.correction import CorrectionSettings

    # The evaluation's device and threads: two runs may differ in both.
    here = [f"device={trained.settings.device}", "num_threads=0"]
    corrector, agent = _load(request.run, here)
    _check_alike(trained, corrector, request.run)
    models = agent.corrector()
    defaults = {} if models.inverse_dynamics is not None else {"state_weight": 0.0}
    settings = CorrectionSettings(**(defaults | dict(request.changes)))
    lowest, highest = agent.score.min_noise, agent.score.max_noise
    if not settings.changes_nothing and not lowest <= settings.noise_level <= highest:
        raise ConfigError(
            f"corrector.noise_level = {settings.noise_level!r}: {request.run} has learned levels "
            f"from {lowest:g} to {highest:g}; take one of these"
        )
    chosen: dict[str, Any] = {}
    if request.select:
        choice = _choose(trained, corrector, agent, settings, seed, deterministic)
        settings, chosen = choice.settings, _told(choice)
    policy = CorrectedPolicy(trained.agent.policy, models, settings)
    trained.agent.policy = policy
    # JSON has no infinity.
    values = {k: str(v) if v == math.inf else v for k, v in asdict(settings).items()}
    used = {f"corrector_{name}": value for name, value in values.items()}
    return policy, {"corrector": str(corrector.checkpoint), **used, **chosen}


def outcome(policy: CorrectedPolicy) -> dict[str, float]:
    """Return what the correction did in an evaluation, under the names that it reports."""
    return {f"corrector_mean_{name}": value for name, value in policy.means().items()}


def lines(chosen: dict[str, Any]) -> list[str]:
    """Take what was tried for the step out of ``chosen``, as lines for a reader."""
    found = []
    for row in chosen.pop("corrector_tried", ()):
        change = row["value_change"]
        value = "" if change is None else f", value {change:+.2%}"
        found.append(
            f"action weight {row['action_weight']:g}, state weight {row['state_weight']:g}: "
            f"correction {row['correction']:.3f}, support {row['support']:.3f}{value}"
            f"{'' if row['allowed'] else ' (not allowed)'}"
        )
    if found:
        criterion = chosen.pop("corrector_criterion")
        support = chosen.pop("corrector_support_of_data")
        found.append(f"support of the data {support:.3f}; {criterion}")
    return found


def _told(choice: Choice) -> dict[str, Any]:
    criterion = (
        "chosen by support and value"
        if choice.by_value
        else ("chosen by support alone: no critic of the policy is asked")
    )
    if not choice.supported:
        criterion += "; none reaches the support of the data, so the nearest to it"
    return {
        "corrector_tried": [dict(row) for row in choice.tried],
        "corrector_support_of_data": choice.support_of_data,
        "corrector_criterion": criterion,
    }


def _load(path: Path, overrides: Sequence[str]) -> tuple[TrainedRun, CDSA]:
    from genpol.agents.cdsa import CDSA
    from genpol.cli.runs import load_run

    trained = load_run(path, overrides)
    if not isinstance(trained.agent, CDSA):
        raise ConfigError(
            f"corrector = cdsa:{path}: is a run of agent={trained.settings.choices.agent}; train "
            "one of agent=cdsa on the same data"
        )
    return trained, trained.agent


def _check_alike(trained: TrainedRun, corrector: TrainedRun, path: Path) -> None:
    """Refuse a corrector that was made for something else."""
    theirs, own = corrector.agent.specs, trained.agent.specs
    for what, found, wanted in (
        ("was trained in", _environment(corrector), _environment(trained)),
        ("sees observations of width", theirs.observation_dim, own.observation_dim),
        ("corrects actions of width", theirs.action_dim, own.action_dim),
        ("holds each action for steps:", theirs.action_repeat, own.action_repeat),
    ):
        if found != wanted:
            raise ConfigError(
                f"corrector = cdsa:{path}: {what} {found}, the policy {wanted}; train one of "
                "agent=cdsa in the policy's environment"
            )


def _environment(run: TrainedRun) -> str:
    """Return the name of an environment, whatever its task: all tasks share OGBench's data."""
    from genpol.envs import OGBenchSettings, label

    env = run.settings.env
    if isinstance(env, OGBenchSettings):
        return label(replace(env, task=0, goal_conditioned=False))
    return label(env)


def _choose(
    trained: TrainedRun,
    corrector: TrainedRun,
    agent: CDSA,
    settings: CorrectionSettings,
    seed: int,
    deterministic: bool,
) -> Choice:
    from genpol.cli.building import open_data
    from genpol.offline.correction import choose_step

    try:
        # As the policy's task sees them: it may be told goals where the corrector saw none.
        dataset = open_data(replace(corrector.settings, env=trained.settings.env), agent)
    except DatasetError as error:
        raise DatasetError(
            f"{error} (corrector.select needs the corrector's data; without them give "
            "corrector.action_weight and corrector.state_weight)"
        ) from None
    assert dataset is not None
    return choose_step(
        trained.agent,
        agent.corrector(),
        dataset,
        settings,
        holdout=agent.settings.holdout,
        seed=seed,
        deterministic=deterministic,
    )


def _value(name: str, text: str) -> Any:
    """Return the text as the type of that setting."""
    from genpol.policies.correction import CorrectionSettings

    kinds = {field.name: field.type for field in fields(CorrectionSettings)}
    kind = {"float": float, "int": int, "str": str}[str(kinds[name])]
    try:
        return kind(text.removeprefix(".") if kind is float and text == ".inf" else text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise ConfigError(f"corrector.{name} = {text!r}: must be {wanted}") from None


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigError(f"corrector.select = {text!r}: must be true or false")
    return text.lower() == "true"

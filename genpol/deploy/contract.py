"""What a policy and a robot agree on: names, order, units and limits of what goes between them.

A contract is a JSON file, ``contract.json`` of a bundle. What is infinite is ``null`` there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from genpol.deploy.safety import JointLimits
from genpol.errors import CheckpointError, ConfigError, nearest

FILE = "contract.json"
FORMAT = "genpol.bundle"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One number of an observation.

    Attributes:
        name: What it is.
        unit: Its unit; 1 for none.
        low: Least value that makes sense; observations beyond it are not acted on.
        high: Greatest value that makes sense.
    """

    name: str
    unit: str = "1"
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        """Refuse bounds that are none.

        Raises:
            ConfigError: If they are no numbers, or the first is not less than the second.
        """
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"observation {self.name!r}: {name} = {value!r}: not a number")
        if not self.low < self.high:
            raise ConfigError(
                f"observation {self.name!r}: low = {self.low!r} must be less than high = "
                f"{self.high!r}"
            )


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What must be known to act with a policy.

    Attributes:
        env: Environment that it was trained in.
        agent: Algorithm that trained it.
        observation: What a robot tells in a period, in order.
        observation_steps: Observations that the policy sees side by side, the oldest first; an
            episode's first one stands for those before it.
        goal_dim: Numbers at the end of an observation that are a goal, and are not repeated.
        action: What it commands, in order. The policy's -1 and 1 are ``low`` and ``high`` of
            ``commands``, which may be wider than what a robot may be told.
        commands: Least and greatest command of each action that the policy can ask for.
        period_s: Seconds from one action to the next.
        horizon: Actions H of a chunk.
        action_steps: Actions of a chunk that are carried out before the next.
        inputs: Shapes of the policy's inputs, by name: ``observation``, ``noise`` (standard normal
            numbers), and what :attr:`memory` tells of.
        memory: What it is told of the chunk before: ``none``; ``plan``, what was left of it with
            zeros behind (``previous`` ``[H, A]``); ``chunk``, also how much it is bound to each
            action (``kept`` ``[H]``), see :mod:`genpol.policies.real_time`.
        sampling: ``mode``, where the policy takes modes where it has them, or ``sample``.
        solver_steps: Of a flow or a diffusion model; 0 for others.
        files: SHA-256 of each other file of the bundle.
        parity: Greatest difference from the trained policy, by format.
        versions: Of the packages that made it.
        source: Where it comes from: run, checkpoint, evaluation.
    """

    env: str
    agent: str
    observation: tuple[Channel, ...]
    action: tuple[JointLimits, ...]
    commands: tuple[tuple[float, float], ...]
    period_s: float
    horizon: int
    action_steps: int
    inputs: Mapping[str, tuple[int, ...]]
    sampling: str
    memory: str = "none"
    observation_steps: int = 1
    goal_dim: int = 0
    solver_steps: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what does not fit together.

        Raises:
            ConfigError: With the first such thing.
        """
        if not (self.observation and self.action):
            raise ConfigError("contract: observation and action need one entry at least")
        for what, entries in (("observation", self.observation), ("action", self.action)):
            names = [entry.name for entry in entries]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ConfigError(f"contract: {what} has two entries of the name {twice!r}")
        if len(self.commands) != len(self.action):
            raise ConfigError(
                f"contract: commands has {len(self.commands)} entries for {len(self.action)} joints"
            )
        for joint, (low, high) in zip(self.action, self.commands, strict=True):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError(
                    f"contract: commands of {joint.name!r} are [{low}, {high}]: must be finite, "
                    "the first less than the second"
                )
        if not self.period_s > 0:
            raise ConfigError(f"contract: period_s = {self.period_s}: must be > 0")
        if not 1 <= self.action_steps <= self.horizon:
            raise ConfigError(
                f"contract: action_steps = {self.action_steps}: must lie in [1, {self.horizon}]"
            )

        single = len(self.observation) - self.goal_dim
        width = single * self.observation_steps + self.goal_dim
        if tuple(self.inputs.get("observation", ())) != (width,):
            raise ConfigError(
                f"contract: observation has {len(self.observation)} entries, which make {width} "
                f"numbers; the policy takes {self.inputs.get('observation')}"
            )

    def to_commands(self, action: list[float]) -> list[float]:
        """Return what the policy's actions in [-1, 1] are in the robot's units."""
        return [
            low + 0.5 * (x + 1.0) * (high - low)
            for x, (low, high) in zip(action, self.commands, strict=True)
        ]

    def with_limits(self, limits: Mapping[str, Mapping[str, Any]]) -> Contract:
        """Return the contract with other limits.

        Args:
            limits: By a joint's name, what is otherwise: ``low``, ``high``, ``velocity``,
                ``acceleration``, ``jerk``, ``neutral``, ``unit``, ``interface``, or a new ``name``.

        Raises:
            ConfigError: If there is no such joint or limit, or a value is wrong.
        """
        names = [joint.name for joint in self.action]
        known = [x.name for x in fields(JointLimits)]
        for name, given in limits.items():
            if name not in names:
                raise ConfigError(
                    f"limits: no joint {name!r}.{nearest(name, names)} There are {', '.join(names)}"
                )
            for key in given:
                if key not in known:
                    raise ConfigError(
                        f"limits: joint {name!r}: unknown limit {key!r}.{nearest(key, known)}"
                    )
        return replace(
            self,
            action=tuple(
                replace(joint, **_numbers(joint.name, limits.get(joint.name, {})))
                for joint in self.action
            ),
        )


def _numbers(joint: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return limits as numbers, but for what is text."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("name", "unit", "interface"):
            found[key] = str(value)
            continue
        try:
            found[key] = math.inf if value is None else float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"limits: joint {joint!r}: {key} = {value!r}: not a number") from None
    return found


def loosest(
    name: str, low: float, high: float, period_s: float, *, unit: str, interface: str
) -> JointLimits:
    """Return limits that nothing within ``[low, high]`` can break: what simulations are told.

    In a period a command can move by the range, its change by twice and the change of that by four
    times as much.
    """
    span = (high - low) * (1.0 + 1e-9)
    return JointLimits(
        name=name,
        unit=unit,
        interface=interface,
        low=low,
        high=high,
        velocity=span / period_s,
        acceleration=2.0 * span / period_s**2,
        jerk=4.0 * span / period_s**3,
        neutral=min(max(0.0, low), high),
    )


def to_json(contract: Contract) -> str:
    """Return the text of ``contract.json``."""
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(contract)}
    return json.dumps(_without_infinity(record), indent=1, allow_nan=False) + "\n"


def _without_infinity(x: Any) -> Any:
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {key: _without_infinity(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_without_infinity(value) for value in x]
    return x


def read(path: Path) -> Contract:
    """Read ``contract.json``.

    Raises:
        CheckpointError: If it is missing, damaged, foreign or of a newer format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is no contract of a genpol bundle (format {FORMAT!r})")
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {record.get('format_version')!r}; this genpol reads "
            f"{FORMAT_VERSION}, so take the genpol that wrote it, or export anew"
        )
    try:
        return Contract(
            **{
                entry.name: record[entry.name]
                for entry in fields(Contract)
                if entry.name not in ("observation", "action", "commands", "inputs")
            },
            inputs={name: tuple(shape) for name, shape in record["inputs"].items()},
            observation=tuple(Channel(**_with_infinity(x)) for x in record["observation"]),
            action=tuple(JointLimits(**_with_infinity(x)) for x in record["action"]),
            commands=tuple((float(low), float(high)) for low, high in record["commands"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__}: {error})") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _with_infinity(entry: Mapping[str, Any]) -> dict[str, Any]:
    missing = {
        key: -math.inf if key == "low" else math.inf for key, x in entry.items() if x is None
    }
    return {**entry, **missing}

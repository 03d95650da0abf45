"""What stands between a policy and a robot, in every tick and on by default.

What is not finite or of the wrong size is refused before anything else is done with it. What is
left is brought within each joint's bounds (:mod:`genpol.deploy.motion`), measured from the last
command that was *sent*. Where there is nothing to send, the filter falls back step by step:

=========== ======================================================================================
mode        what is commanded
=========== ======================================================================================
``run``     the target, within the bounds
``hold``    nothing came, for less than ``hold_s``: positions come to rest, velocities and efforts
            stay as they are
``damp``    nothing came for longer: velocities and efforts go to neutral; positions rest, and the
            link may lower the robot's stiffness
``stop``    latched by :meth:`SafetyFilter.stop`: as ``damp``, until :meth:`SafetyFilter.reset`
=========== ======================================================================================

Every intervention is counted, and the last ones are kept with their numbers.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from genpol.deploy.motion import Joint, MotionBounds
from genpol.errors import ConfigError
from genpol.settings import one_of

INTERFACES = ("position", "velocity", "effort")

_EVENTS = 10_000
_GREATEST = 3.4e38


class Mode(StrEnum):
    """What the filter commands; see the module."""

    RUN = "run"
    HOLD = "hold"
    DAMP = "damp"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class JointLimits(MotionBounds):
    """A joint: what is commanded, and what its commands keep to.

    Attributes:
        name: Of the joint or actuator.
        unit: Of its command: rad, m, rad/s, N m, ...
        interface: What is commanded: position, velocity or effort.
        neutral: Command of a velocity or an effort that does nothing.
    """

    name: str
    unit: str
    interface: str = "position"
    neutral: float = 0.0

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
            one_of("interface", self.interface, INTERFACES)
        except ConfigError as error:
            raise ConfigError(f"joint {self.name!r}: {error}") from None
        if not self.low <= self.neutral <= self.high:
            raise ConfigError(
                f"joint {self.name!r}: limits: neutral = {self.neutral!r}: must lie between low = "
                f"{self.low!r} and high = {self.high!r}"
            )


@dataclass(frozen=True)
class Event:
    """An intervention.

    Attributes:
        tick: Number of the tick, from 0.
        what: What was done, or why.
        joint: Whose command was changed; empty if all were.
        asked: What was asked for, if it is a number.
        sent: What was sent instead.
    """

    tick: int
    what: str
    joint: str = ""
    asked: float = math.nan
    sent: float = math.nan


@dataclass(frozen=True, slots=True)
class Command:
    """What is sent to a robot in a tick.

    Attributes:
        values: One for each joint, finite, in its unit.
        mode: Why.
    """

    values: list[float]
    mode: Mode


class SafetyFilter:
    """Makes of whatever a policy wants what a robot may be told.

    Args:
        limits: Of each joint.
        period_s: Seconds from tick to tick.
        start: Commands that the robot is at when it begins, one for each joint.
        hold_s: How long it holds when nothing comes before it damps.
        limited: Whether bounds are kept. Without them what is finite is sent as it is.

    Attributes:
        tick: Ticks so far.
        counts: Interventions by what was done.
        events: The last interventions.
        stop_reason: Why it is stopped; empty if it is not.

    Raises:
        ConfigError: If sizes do not fit, or a value is out of bounds.
    """

    def __init__(
        self,
        limits: Sequence[JointLimits],
        period_s: float,
        start: Sequence[float],
        *,
        hold_s: float = 0.2,
        limited: bool = True,
    ) -> None:
        if len(start) != len(limits) or not limits:
            raise ConfigError(f"start has {len(start)} commands for {len(limits)} joints")
        if not hold_s >= 0:
            raise ConfigError(f"hold_s = {hold_s!r}: must be >= 0")
        self.limits = tuple(limits)
        self.limited = limited
        self.tick = 0
        self.counts: Counter[str] = Counter()
        self.events: deque[Event] = deque(maxlen=_EVENTS)
        self.stop_reason = ""
        self._hold_ticks = math.ceil(hold_s / period_s - 1e-9) if period_s > 0 else 0
        self._missed = 0
        self._joints = [Joint(bounds, period_s, x) for bounds, x in zip(limits, start, strict=True)]

    @property
    def sent(self) -> list[float]:
        """The last commands."""
        return [joint.position for joint in self._joints]

    @property
    def at_rest(self) -> bool:
        """Whether all commands have come to rest."""
        return all(joint.at_rest for joint in self._joints)

    def step(self, target: Sequence[float] | None) -> Command:
        """Return what to send in this tick.

        Args:
            target: What the policy wants, one number for each joint; ``None`` if nothing came.
        """
        if target is not None and (refusal := self._refusal(target)):
            self.note(refusal)
            target = None
        if self.stop_reason:
            command = Command([self._rest(i) for i in range(len(self._joints))], Mode.STOP)
        elif target is None:
            command = self._without_target()
        else:
            self._missed = 0
            command = Command(self._towards(target), Mode.RUN)
        self.tick += 1
        return command

    def stop(self, reason: str) -> None:
        """Come to rest and stay there until :meth:`reset`, whatever comes."""
        if not self.stop_reason:
            self.stop_reason = reason
            self.note(f"stop: {reason}")

    def reset(self, standing: Sequence[float] | None = None) -> None:
        """Go on after a stop.

        Args:
            standing: Commands that the robot is at, which may have been moved meanwhile;
                ``None`` for the last ones.

        Raises:
            ConfigError: If it has not come to rest yet.
        """
        if not self.at_rest:
            raise ConfigError("reset: the robot still moves; wait until it has come to rest")
        if self.stop_reason:
            self.note("reset")
        self.stop_reason = ""
        self._missed = 0
        if standing is not None:
            for joint, position in zip(self._joints, standing, strict=True):
                joint.begin(position)

    def _refusal(self, target: Sequence[float]) -> str:
        try:
            if len(target) != len(self._joints):
                return f"size: {len(target)} numbers for {len(self._joints)} joints"
            finite = all(map(math.isfinite, target))
        except (TypeError, OverflowError):
            return "not numbers"
        return "" if finite else "not finite"

    def _towards(self, target: Sequence[float]) -> list[float]:
        values = []
        for limits, joint, wanted in zip(self.limits, self._joints, target, strict=True):
            wanted = float(wanted)
            if self.limited:
                value = joint.step(wanted)
                if value != wanted:
                    outside = not limits.low <= wanted <= limits.high
                    self.note("position" if outside else "motion", limits.name, wanted, value)
            else:
                value = joint.jump(wanted)
            values.append(value)
        return values

    def _without_target(self) -> Command:
        mode = Mode.HOLD if self._missed < self._hold_ticks else Mode.DAMP
        self._missed += 1
        self.note(mode.value)
        if mode is Mode.DAMP:
            return Command([self._rest(i) for i in range(len(self._joints))], mode)
        return Command([joint.rest() for joint in self._joints], mode)

    def _rest(self, index: int) -> float:
        limits, joint = self.limits[index], self._joints[index]
        return joint.rest() if limits.interface == "position" else joint.step(limits.neutral)

    def note(
        self, what: str, joint: str = "", asked: float = math.nan, sent: float = math.nan
    ) -> None:
        """Count an intervention, and keep it; see :class:`Event`."""
        self.counts[what] += 1
        self.events.append(Event(self.tick, what, joint, asked, sent))


class ObservationGuard:
    """Refuses observations that a policy must not act on.

    Args:
        bounds: Least and greatest value of each number that makes sense.
        max_age_s: Greatest age.
        frozen_ticks: Observations in a row that are equal to the bit, behind which a sensor counts
            as frozen; 0 for never.
    """

    def __init__(
        self, bounds: Sequence[tuple[float, float]], *, max_age_s: float, frozen_ticks: int = 0
    ) -> None:
        self._size = len(bounds)
        self._bounds = [
            (place, low, high)
            for place, (low, high) in enumerate(bounds)
            if math.isfinite(low) or math.isfinite(high)
        ]
        self._max_age_s = max_age_s
        self._frozen_ticks = frozen_ticks
        self._last: tuple[float, ...] = ()
        self._same = 0

    def refusal(self, observation: Sequence[float], age_s: float, *, moving: bool = True) -> str:
        """Return why an observation is refused; empty if it is not.

        Args:
            observation: Its numbers.
            age_s: Seconds since it was taken; negative where a clock jumped.
            moving: Whether the robot was told anything new: only then must it see anything new.
        """
        if len(observation) != self._size:
            return "observation: size"
        if not all(map(math.isfinite, observation)):
            return "observation: not finite"
        # Policies take single precision, in which what is greater is infinite.
        if max(observation) > _GREATEST or min(observation) < -_GREATEST:
            return "observation: not finite"
        if not all(low <= observation[place] <= high for place, low, high in self._bounds):
            return "observation: beyond its limits"
        if not -self._max_age_s <= age_s <= self._max_age_s:
            return "observation: too old" if age_s > 0 else "observation: from the future"
        values = tuple(observation)
        if values != self._last:
            self._same = 0
        elif moving:
            self._same += 1
        self._last = values
        if self._frozen_ticks and self._same >= self._frozen_ticks:
            return "observation: frozen"
        return ""


class Watchdog:
    """Knows whether something has been heard of lately.

    Args:
        timeout_s: Silence that is too long.
        now_s: Time of a monotonic clock.
    """

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._last_s = now_s

    def beat(self, now_s: float) -> None:
        """Take note that it was heard of."""
        self._last_s = max(self._last_s, now_s)

    def expired(self, now_s: float) -> bool:
        """Return whether the silence is too long."""
        return now_s - self._last_s > self._timeout_s

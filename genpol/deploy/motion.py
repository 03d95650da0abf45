"""One joint's commands within bounds on position, velocity, acceleration and jerk, always.

A command per period: with ``p`` the last one, ``v`` its difference from the one before and ``a``
the difference of differences, both over the period ``dt``, a new command has

    a' = a + j dt,   v' = v + a' dt,   p' = p + v' dt.

Bounds on all four cannot be kept by clipping one after the other: who moves fast near a bound must
have begun to brake before. So a command is sent only if from there a way to rest is known that
keeps all bounds; the way is followed when nothing else is possible. By induction every command is
within all bounds, whatever is asked for and whenever.

The way to rest stops within one period where the bounds allow it. Else it brings the acceleration
to zero over n periods, which changes the velocity by ``a (n - 1)/2`` and the position by
``n v + a (n^2 - 1)/3``, and brakes from there by a trapezoid of acceleration with ramps of m and a
plateau of h periods: ``v1 = -peak (m + h)``, over the distance ``v1 (2m + h - 2)/2``. (All in units
of the period.) It is not the shortest, so that a joint may begin to brake a little early.

Plain Python: a tick costs a few microseconds a joint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from genpol.errors import ConfigError

_BISECTIONS = 6
# Bounds are held to this share of them, which is what rounding can cost.
_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class MotionBounds:
    """What a joint's commands keep to, in its unit (rad, m, N m, ...) and seconds.

    Attributes:
        low: Least command.
        high: Greatest command.
        velocity: Greatest change per second; infinite for none.
        acceleration: Greatest change of that per second; infinite for none.
        jerk: Greatest change of that per second; infinite for none.
    """

    low: float
    high: float
    velocity: float = math.inf
    acceleration: float = math.inf
    jerk: float = math.inf

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(
                f"limits: low = {self.low!r} and high = {self.high!r}: must be finite, low < high"
            )
        for name in ("velocity", "acceleration", "jerk"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"limits: {name} = {value!r}: must be > 0, or infinite")


class _Rest(NamedTuple):
    """A way to rest, in periods: the acceleration to zero, then a trapezoid of it.

    Attributes:
        start: Acceleration where it begins.
        level_off: Periods n over which that falls to zero, evenly.
        peak: Of the trapezoid, with the sign of the braking.
        ramp: Periods m over which it rises to the peak; it falls in as many.
        hold: Further periods h at the peak.
    """

    start: float
    level_off: int
    peak: float
    ramp: int
    hold: int

    def acceleration(self, k: int) -> float | None:
        """Return the acceleration of period k = 1, 2, ...; ``None`` behind the end."""
        if k <= self.level_off:
            return self.start * (1.0 - k / self.level_off)
        k -= self.level_off
        length = 2 * self.ramp - 1 + self.hold if self.ramp else 0
        if k > length:
            return None
        return self.peak * min(1.0, k / self.ramp, (length + 1 - k) / self.ramp)


class Joint:
    """The motion of one joint.

    Args:
        bounds: What its commands keep to.
        period_s: Seconds from one command to the next.
        start: The command it begins from, at rest; cut to the bounds.

    Attributes:
        position: The last command.

    Raises:
        ConfigError: If the period is not positive.
    """

    # Within, the unit of time is the period: velocities are changes from command to command.
    __slots__ = ("_a", "_bounds", "_k", "_most", "_rest", "_v", "position")

    def __init__(self, bounds: MotionBounds, period_s: float, start: float) -> None:
        if not (math.isfinite(period_s) and period_s > 0):
            raise ConfigError(f"period_s = {period_s!r}: must be > 0")
        self._bounds = bounds
        self._most = (
            bounds.velocity * period_s,
            bounds.acceleration * period_s**2,
            bounds.jerk * period_s**3,
        )
        self.begin(start)

    def begin(self, position: float) -> None:
        """Be at rest at a position, cut to the bounds.

        Raises:
            ValueError: If it is not finite.
        """
        if not math.isfinite(position):
            raise ValueError(f"position = {position!r}: must be finite")
        self.position = min(max(float(position), self._bounds.low), self._bounds.high)
        self._v = self._a = 0.0
        self._rest: _Rest | None = None
        self._k = 0

    @property
    def at_rest(self) -> bool:
        """Whether the last commands were all the same."""
        return self._v == 0.0 and self._a == 0.0

    def step(self, target: float) -> float:
        """Return the next command: the target where that is allowed, else what comes near it.

        Args:
            target: Finite.
        """
        low, high = self._bounds.low, self._bounds.high
        target = min(max(target, low), high)
        position, v, a = self.position, self._v, self._a
        most_v, most_a, most_j = self._most
        wanted_v = target - position
        wanted = wanted_v - v
        if (
            abs(wanted_v) <= most_v
            and abs(wanted) <= most_a
            and abs(wanted - a) <= most_j
            and self._can_rest(target, wanted_v, wanted, low, high)
        ):
            return self._accept(target, wanted_v, wanted)
        # As fast as the bounds allow, and so that it could come to rest before the target.
        wanted = min(max(wanted_v, -most_v), most_v) - v
        wanted = min(max(wanted, -most_a), most_a)
        wanted = min(max(wanted, a - most_j), a + most_j)
        before, behind = min(position, target), max(position, target)
        braking = self._next_of_rest()
        allowed, refused = braking, wanted
        found = None
        for attempt in range(_BISECTIONS + 1):
            middle = wanted if attempt == 0 else 0.5 * (allowed + refused)
            moved = v + middle
            if self._can_rest(position + moved, moved, middle, before, behind):
                found = allowed = middle
                if attempt == 0:
                    break
            else:
                refused = middle
        if found is None:
            return self._follow(braking)
        return self._accept(position + v + found, v + found, found)

    def rest(self) -> float:
        """Return the next command on the way to rest."""
        if self.at_rest:
            return self.position
        return self._follow(self._next_of_rest())

    def jump(self, target: float) -> float:
        """Return the target itself, which no bound is asked about, and begin anew there."""
        self.position = float(target)
        self._v = self._a = 0.0
        self._rest = None
        return self.position

    def _accept(self, position: float, v: float, a: float) -> float:
        self._rest = None
        return self._move(position, v, a)

    def _move(self, position: float, v: float, a: float) -> float:
        self.position = min(max(position, self._bounds.low), self._bounds.high)
        self._v, self._a = v, a
        return self.position

    def _next_of_rest(self) -> float:
        """Return the next acceleration of the way to rest."""
        if self._rest is None:
            self._rest, self._k = self._way(self._v, self._a), 0
        found = self._rest.acceleration(self._k + 1)
        return 0.0 if found is None else found

    def _follow(self, braking: float) -> float:
        assert self._rest is not None
        self._k += 1
        if self._rest.acceleration(self._k) is None:  # it has stood since the last command
            return self._move(self.position, 0.0, 0.0)
        v = self._v + braking
        if self._rest.acceleration(self._k + 1) is None:
            v = 0.0  # but for rounding
        return self._move(self.position + v, v, braking)

    def _way(self, v: float, a: float) -> _Rest:
        """Return a way to rest from this velocity and acceleration."""
        if self._stops_at_once(v, a):
            return _Rest(a, 0, -v, int(v != 0.0), 0)
        n, v1, _ = self._level_off(v, a)
        ramp, hold = self._trapezoid(v1)
        return _Rest(a, n, -v1 / (ramp + hold) if ramp else 0.0, ramp, hold)

    def _stops_at_once(self, v: float, a: float) -> bool:
        _, most_a, most_j = self._most
        return abs(v) <= most_a and abs(v) <= most_j and abs(v + a) <= most_j

    def _level_off(self, v: float, a: float) -> tuple[int, float, float]:
        """Return the periods until the acceleration is zero, the velocity then, and the way."""
        most_j = self._most[2]
        if a == 0.0 or most_j == math.inf:
            return 0, v, 0.0
        n = math.ceil(abs(a) / most_j)
        return n, v + 0.5 * a * (n - 1), n * v + a * (n * n - 1) / 3.0

    def _trapezoid(self, v: float) -> tuple[int, int]:
        """Return periods of a ramp and of the plateau of what brakes from a velocity."""
        if v == 0.0:
            return 0, 0
        _, most_a, most_j = self._most
        steep = 0.0 if most_j == math.inf else most_a / most_j
        ramp = max(1, math.ceil(min(math.sqrt(abs(v) / most_j), steep)))
        return ramp, max(0, math.ceil(abs(v) / most_a - ramp))

    def _can_rest(self, position: float, v: float, a: float, low: float, high: float) -> bool:
        """Return whether the way to rest from there keeps all bounds, with these on positions."""
        slack = _SLACK * (high - low)
        low, high = low - slack, high + slack
        if not low <= position <= high:
            return False
        most_v = self._most[0] * (1.0 + _SLACK)
        if abs(v) > most_v or abs(a) > self._most[1] * (1.0 + _SLACK):
            return False
        if self._stops_at_once(v, a):
            return True
        n, v1, travel = self._level_off(v, a)
        if abs(v1) > most_v:
            return False
        if v * v1 < 0.0 and not (
            low <= position + n * min(v, v1) and position + n * max(v, v1) <= high
        ):
            return False  # for all that is known of where it turns round
        ramp, hold = self._trapezoid(v1)
        middle = position + travel
        end = middle + 0.5 * v1 * max(0, 2 * ramp + hold - 2)
        return low <= middle <= high and low <= end <= high

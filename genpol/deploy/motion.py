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

A joint that is not where it is wanted goes there as fast as the bounds allow, and so that it could
come to rest *beside* the target before it reaches it: where the target moves, that is a rest in its
frame, or the joint would stay behind it for ever.

Plain Python: a tick costs a few microseconds a joint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from genpol.errors import ConfigError

_BISECTIONS = 4
# Bounds are held to this share of them, which is what rounding can cost.
_SLACK = 1e-9
# Share by which the velocity of a target may change and still count as the same.
_SAME = 0.02


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
    __slots__ = (
        *("_a", "_bounds", "_chase", "_chase_drift", "_chase_k", "_k"),
        *("_most", "_rest", "_slack", "_target", "_v", "position"),
    )

    def __init__(self, bounds: MotionBounds, period_s: float, start: float) -> None:
        if not (math.isfinite(period_s) and period_s > 0):
            raise ConfigError(f"period_s = {period_s!r}: must be > 0")
        self._bounds = bounds
        self._most = (
            bounds.velocity * period_s,
            bounds.acceleration * period_s**2,
            bounds.jerk * period_s**3,
        )
        self._slack = _SLACK * (bounds.high - bounds.low)
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
        self._chase: _Rest | None = None
        self._chase_drift = 0.0
        self._chase_k = 0
        self._target: float | None = None

    @property
    def at_rest(self) -> bool:
        """Whether the last commands were all the same."""
        return self._v == 0.0 and self._a == 0.0

    def step(self, target: float) -> float:
        """Return the next command: the target where that is allowed, else what comes near it.

        Args:
            target: Finite.
        """
        target = min(max(target, self._bounds.low), self._bounds.high)
        position, v, a = self.position, self._v, self._a
        most_v, most_a, most_j = self._most
        # What its last move says of a target that moves; one that jumps does not.
        drift = 0.0 if self._target is None else target - self._target
        drift = drift if abs(drift) <= most_v else 0.0
        on_target, self._target = position == self._target, target
        wanted_v = target - position
        wanted = wanted_v - v
        if (
            abs(wanted_v) <= most_v
            and abs(wanted) <= most_a
            and abs(wanted - a) <= most_j
            and (on_target or self._stops_at_once(wanted_v - drift, wanted))
            and self._can_rest(target, wanted_v, wanted)
        ):
            return self._accept(target, wanted_v, wanted)
        wanted = min(max(wanted_v, -most_v), most_v) - v
        wanted = min(max(wanted, -most_a), most_a)
        wanted = min(max(wanted, a - most_j), a + most_j)
        refused, allowed = wanted, self._next_of_chase(drift)
        braking = allowed
        found = None
        for attempt in range(_BISECTIONS + 1):
            middle = wanted if attempt == 0 else 0.5 * (allowed + refused)
            if self._comes_to_rest(position + v + middle, v + middle, middle, target, drift):
                found = allowed = middle
                if attempt == 0:
                    break
            else:
                refused = middle
        if found is not None:
            return self._accept(position + v + found, v + found, found)
        if drift and self._can_rest(position + v + braking, v + braking, braking):
            self._chase_k += 1
            return self._accept(position + v + braking, v + braking, braking, chasing=True)
        return self._follow(self._next_of_rest())

    def rest(self) -> float:
        """Return the next command on the way to rest."""
        self._target = None
        if self.at_rest:
            return self.position
        return self._follow(self._next_of_rest())

    def jump(self, target: float) -> float:
        """Return the target itself, which no bound is asked about, and begin anew there."""
        self.position = float(target)
        self._v = self._a = 0.0
        self._rest = None
        self._target = None
        return self.position

    def _accept(self, position: float, v: float, a: float, *, chasing: bool = False) -> float:
        self._rest = None
        if not chasing:
            self._chase = None
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

    def _next_of_chase(self, drift: float) -> float:
        """Return the next acceleration of the way to rest in a frame that moves."""
        if drift == 0.0:
            self._chase = None
            return self._next_of_rest()
        if self._chase is None or abs(drift - self._chase_drift) > _SAME * abs(drift):
            self._chase, self._chase_k = self._way(self._v - drift, self._a), 0
            self._chase_drift = drift
        found = self._chase.acceleration(self._chase_k + 1)
        return 0.0 if found is None else found

    def _follow(self, braking: float) -> float:
        assert self._rest is not None
        self._chase = None
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
        most_j = self._most[2]
        n = 0 if a == 0.0 or most_j == math.inf else math.ceil(abs(a) / most_j)
        v1 = v + 0.5 * a * (n - 1) if n else v
        ramp, hold = self._trapezoid(v1)
        return _Rest(a, n, -v1 / (ramp + hold) if ramp else 0.0, ramp, hold)

    def _stops_at_once(self, v: float, a: float) -> bool:
        _, most_a, most_j = self._most
        return abs(v) <= most_a and abs(v) <= most_j and abs(v + a) <= most_j

    def _trapezoid(self, v: float) -> tuple[int, int]:
        """Return periods of a ramp and of the plateau of what brakes from a velocity."""
        if v == 0.0:
            return 0, 0
        _, most_a, most_j = self._most
        steep = 0.0 if most_j == math.inf else most_a / most_j
        ramp = max(1, math.ceil(min(math.sqrt(abs(v) / most_j), steep)))
        return ramp, max(0, math.ceil(abs(v) / most_a - ramp))

    def _reach(self, v: float, a: float) -> tuple[float, float, float]:
        """Return how far the way to rest goes back and forth, and its velocity where a is zero.

        The first two are at most and at least 0. What is known of where it turns round is a bound.
        """
        _, most_a, most_j = self._most
        if abs(v) <= most_a and abs(v) <= most_j and abs(v + a) <= most_j:
            return 0.0, 0.0, 0.0
        if a == 0.0 or most_j == math.inf:
            least = most = travel = 0.0
            v1 = v
        else:
            n = math.ceil(abs(a) / most_j)
            v1 = v + 0.5 * a * (n - 1)
            travel = n * v + a * (n * n - 1) / 3.0
            least, most = min(0.0, travel), max(0.0, travel)
            if v * v1 < 0.0:
                least, most = min(least, n * min(v, v1)), max(most, n * max(v, v1))
        if v1 != 0.0:
            ramp, hold = self._trapezoid(v1)
            end = travel + 0.5 * v1 * max(0, 2 * ramp + hold - 2)
            least, most = min(least, end), max(most, end)
        return least, most, v1

    def _can_rest(self, position: float, v: float, a: float) -> bool:
        """Return whether the way to rest from there keeps all bounds."""
        return self._comes_to_rest(position, v, a, None, 0.0)

    def _comes_to_rest(
        self, position: float, v: float, a: float, target: float | None, drift: float
    ) -> bool:
        """Return whether the way to rest keeps all bounds, and one by a target does not pass it.

        Args:
            position: After a step.
            v: Velocity of that.
            a: Acceleration of that.
            target: On the far side of which no way may lead; ``None`` for none.
            drift: Velocity of the target.
        """
        bounds, slack = self._bounds, self._slack
        low, high = bounds.low - slack, bounds.high + slack
        if not low <= position <= high:
            return False
        most_v = self._most[0] * (1.0 + _SLACK)
        if abs(v) > most_v or abs(a) > self._most[1] * (1.0 + _SLACK):
            return False
        least, most, v1 = self._reach(v, a)
        if not (low <= position + least and position + most <= high and abs(v1) <= most_v):
            return False
        if target is None:
            return True
        if drift:
            least, most, _ = self._reach(v - drift, a)
        if target - drift > self.position:  # as it was before this step
            return position + most <= target + slack
        return position + least >= target - slack

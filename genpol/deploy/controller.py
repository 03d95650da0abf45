"""The control loop: at a fixed rate from an observation to a command, whatever happens.

Ticks begin at deadlines on the monotonic clock, a period apart, the first where the first
observation came. In each tick

1. the newest observation is read, waiting a little for one, and judged;
2. if a chunk is due, the policy is asked for it, and may take part of the period to answer;
3. the action that is due, in the robot's units, goes through the safety filter, which stands in
   where there is none;
4. what comes out is sent.

What fails has an end that is safe: without a new action the rest of the chunk is carried out, then
the robot holds and damps; a silent robot, a policy that ended and a request from the robot's side
stop it until somebody resets it. A tick that is late is not made up for: the deadlines go on.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from genpol import settings as check
from genpol.deploy.chunks import Answer, ChunkPlayer
from genpol.deploy.contract import Contract
from genpol.deploy.links.base import Link, Observed
from genpol.deploy.safety import Command, Event, ObservationGuard, SafetyFilter, Watchdog
from genpol.deploy.start import start_commands, undisturbed
from genpol.errors import ConfigError

_CHECK_S = 0.1
_SETTLE_S = 60.0
_TOLD_EVENTS = 100


class Planner(Protocol):
    """Makes chunks elsewhere: :class:`genpol.deploy.policy_process.PolicyProcess`, by default."""

    @property
    def pending(self) -> bool:
        """Whether a question has not been answered yet."""
        ...

    @property
    def waited_s(self) -> float:
        """Seconds since that question; 0 if there is none."""
        ...

    @property
    def slowest_s(self) -> float:
        """Seconds that the slowest of the last answers took."""
        ...

    @property
    def failure(self) -> str:
        """Why it answers no more; empty if it does."""
        ...

    def ask(self, tick: int, observation: Sequence[float], *, delay: int, anew: bool) -> None:
        """Ask for a chunk without waiting."""
        ...

    def answer(self, timeout_s: float) -> Answer | None:
        """Return the chunk that was asked for; ``None`` if it does not come in time."""
        ...

    def check(self) -> None:
        """Take note if it has ended."""
        ...


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """How the control loop waits, and for how long."""

    observation_wait: float = 0.25
    """Share of a period to wait for an observation that is not there when the tick begins."""
    policy_wait: float = 0.5
    """Share of a period, from its beginning, in which the policy may answer; 0 never waits, and
    chunks then overlap."""
    blend_steps: int = 0
    """Actions over which a chunk takes over from the one before."""
    max_age: float = 2.0
    """Greatest age of an observation, in periods."""
    frozen_s: float = 1.0
    """Seconds of observations equal to the bit behind which a sensor counts as frozen; 0 for
    never."""
    hold_s: float = 0.2
    """Seconds without an action behind which the robot is damped."""
    link_timeout_s: float = 0.5
    """Seconds without an observation behind which the robot is stopped."""
    policy_timeout_s: float = 1.0
    """Seconds without an answer behind which the robot is stopped."""
    connect_s: float = 10.0
    """Seconds to wait for the first observation."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.within("observation_wait", self.observation_wait, 0.0, 1.0)
        check.within("policy_wait", self.policy_wait, 0.0, 1.0)
        check.at_least("blend_steps", self.blend_steps, 0)
        for name in ("frozen_s", "hold_s"):
            check.at_least(name, getattr(self, name), 0.0)
        for name in ("max_age", "link_timeout_s", "policy_timeout_s", "connect_s"):
            check.positive(name, getattr(self, name))


@dataclass
class Report:
    """What happened.

    Attributes:
        period_s: Seconds from tick to tick.
        ticks: Ticks that were carried out.
        skipped: Ticks that were not, because one before took longer than a period.
        late: Ticks whose command was sent after the period's end.
        unanswered: Ticks for which no action was there, though observations were sound.
        stop_reason: Why the robot was stopped; empty if it was not.
        interventions: Of the safety filter and before it, by what was done.
        events: The last of these.
        link: What was lost or dropped on the way.
        work_s: Seconds from a tick's beginning to its command.
        jitter_s: Seconds by which ticks began too late.
        answer_s: Seconds that the policy took, in its own process.
        age_s: Ages of the observations that were acted on.
    """

    period_s: float
    ticks: int = 0
    skipped: int = 0
    late: int = 0
    unanswered: int = 0
    stop_reason: str = ""
    interventions: Counter[str] = field(default_factory=Counter)
    events: list[Event] = field(default_factory=list)
    link: dict[str, int] = field(default_factory=dict)
    work_s: array[float] = field(default_factory=lambda: array("d"))
    jitter_s: array[float] = field(default_factory=lambda: array("d"))
    answer_s: array[float] = field(default_factory=lambda: array("d"))
    age_s: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True, slots=True)
class Tick:
    """What was done in one tick, for whoever looks on.

    Attributes:
        number: Of the tick, from 0.
        time_s: Since the first tick.
        observed: What was read; ``None`` if nothing came.
        target: What the policy wanted, in the robot's units; ``None`` if nothing.
        command: What was sent.
        events: Interventions in this tick.
        work_s: Seconds since the tick began.
        accepted: Whether what was read could be acted on.
    """

    number: int
    time_s: float
    observed: Observed | None
    target: list[float] | None
    command: Command
    events: tuple[Event, ...]
    work_s: float
    accepted: bool = True


class Controller:
    """Runs a policy on a robot.

    Args:
        contract: What both agree on; its limits are those of the filter's joints.
        link: To the robot.
        planner: The policy, started.
        safety: Between both.
        settings: How to wait.
        standing: Returns the commands that a robot is at, from an observation, where it goes on
            after a stop; by default :func:`~genpol.deploy.start.start_commands`.
        look_on: Called after each command, with what was done; it must not take long.
        clock: Monotonic, in seconds.
        sleep: Sleeps so many seconds.
    """

    def __init__(
        self,
        contract: Contract,
        link: Link,
        planner: Planner,
        safety: SafetyFilter,
        settings: ControllerSettings,
        *,
        standing: Callable[[Observed], list[float]] | None = None,
        look_on: Callable[[Tick], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        period = contract.period_s
        self._contract = contract
        self._link = link
        self._planner = planner
        self._safety = safety
        self._settings = settings
        self._standing = standing or partial(start_commands, contract)
        self._look_on = look_on
        self._clock = clock
        self._sleep = sleep
        self._player = ChunkPlayer(contract.action_steps, blend_steps=settings.blend_steps)
        self._guard = ObservationGuard(
            [(channel.low, channel.high) for channel in contract.observation],
            max_age_s=settings.max_age * period,
            frozen_ticks=math.ceil(settings.frozen_s / period),
        )
        self._history = History(contract.observation_steps, contract.goal_dim)
        self._checked_s = -math.inf
        self._begins = True  # an episode, or what follows a reset
        self._anew = True  # for the policy, which has not been asked since
        self._valid_from = 0
        self._told = 0
        self._reset_wanted = False
        self._old_since_s = math.inf
        self._sent = safety.sent
        self._stop = False
        self.report = Report(period)

    def stop(self) -> None:
        """End the run at the next tick; for signal handlers and other threads."""
        self._stop = True

    def run(self, first: Observed, seconds: float = math.inf) -> Report:
        """Run for so long or until :meth:`stop`, bring the robot to rest, and tell what happened.

        Args:
            first: What :func:`~genpol.deploy.start.await_robot` returned, just before.
            seconds: For how long.
        """
        period, report = self._contract.period_s, self.report
        last = math.inf if seconds == math.inf else math.ceil(seconds / period - 1e-9)
        with undisturbed():
            start = self._clock()
            try:
                number = self._run(first, start, last)
            except Exception:  # of whoever looks on, or of the link
                self._settle(self.report.ticks + self.report.skipped, start)
                raise
            self._settle(number, start)
        report.link = self._link.statistics()
        return report

    def _run(self, first: Observed, start: float, last: float) -> int:
        """Carry out the ticks until the last; return the number of the next."""
        period, report = self._contract.period_s, self.report
        watchdog = Watchdog(self._settings.link_timeout_s, start)
        number = 0
        observed: Observed | None = first
        while number < last and not self._stop:
            deadline = start + number * period
            self._sleep(max(0.0, deadline - self._clock()))
            begin = self._clock()
            if number:
                observed = self._link.read(self._settings.observation_wait * period)
            if observed is not None:
                watchdog.beat(self._clock())
            elif watchdog.expired(self._clock()):
                self._safety.stop(
                    f"no observation for {self._settings.link_timeout_s:g} s: the link is lost"
                )
            self._tick(number, deadline, observed, start)
            now = self._clock()
            report.work_s.append(now - begin)
            report.jitter_s.append(begin - deadline)
            report.ticks += 1
            report.late += now > deadline + period
            passed = max(1, math.floor((now - start) / period))
            report.skipped += max(0, passed - number - 1)
            number = max(number + 1, passed)
        return number

    def _tick(self, number: int, deadline: float, observed: Observed | None, start: float) -> None:
        safety, link = self._safety, self._link
        seen = self._judge(observed)
        if reason := link.stop_requested:
            safety.stop(reason)
        self._reset_wanted |= link.take_reset()
        if self._reset_wanted and seen is not None:  # not before it is known where the robot stands
            self._reset(number, seen)
        if seen is not None:
            self._ask(number, seen, deadline)
        elif self._planner.pending:  # what it has answered meanwhile
            self._take(number, self._clock())
        self._check_policy()
        action = self._player.action(number)
        if action is None and seen is not None:
            self.report.unanswered += 1
        target = None if action is None else self._contract.to_commands(action)
        command = safety.step(target)
        link.write(command)
        if self._look_on is not None:
            count = safety.counts.total()
            new = min(count - self._told, len(safety.events))
            self._told = count
            events = tuple(safety.events[i] for i in range(-new, 0))
            now = self._clock()
            tick = Tick(
                *(number, now - start, observed, target, command, events, now - deadline),
                accepted=seen is not None,
            )
            self._look_on(tick)

    def _judge(self, observed: Observed | None) -> Observed | None:
        """Return the observation if it can be acted on."""
        if observed is None:
            self._safety.note("observation: none")
            return None
        age = self._clock() - observed.measured_s
        if observed.first:
            self._begins = True
        # A robot that is told to stand still may see the same again.
        moving, self._sent = self._safety.sent != self._sent, self._safety.sent
        refusal = self._guard.refusal(observed.values, age, moving=moving)
        self._check_delay(refusal == "observation: too old")
        if refusal:
            self._safety.note(refusal)
            return None
        self.report.age_s.append(age)
        return observed

    def _check_delay(self, late: bool) -> None:
        """Stop where delay lasts: what is always late would count as new after a while."""
        now = self._clock()
        self._old_since_s = min(self._old_since_s, now) if late else math.inf
        if now - self._old_since_s > self._settings.link_timeout_s:
            self._safety.stop(
                f"observations are too old for {self._settings.link_timeout_s:g} s: the link is "
                "late"
            )

    def _ask(self, number: int, observed: Observed, deadline: float) -> None:
        """Ask for a chunk if one is due, and take what comes in time."""
        player, planner = self._player, self._planner
        if self._begins:
            self._begins, self._anew = False, True
            player.forget()
            self._history.forget()
            self._valid_from = number
        seen = self._history.add(observed.values)
        until = deadline + self._settings.policy_wait * self._contract.period_s
        if planner.pending:
            self._take(number, until)
        if player.due(number) and not planner.pending and not planner.failure:
            planner.ask(number, seen, delay=self._delay(), anew=self._anew)
            self._anew = False
            player.asked(number)
            self._take(number, until)

    def _delay(self) -> int:
        """Return the ticks that will have passed when the answer comes."""
        wait, period = self._settings.policy_wait, self._contract.period_s
        return max(0, math.ceil(self._planner.slowest_s / period - wait))

    def _take(self, number: int, until: float) -> None:
        answer = self._planner.answer(until - self._clock())
        if answer is None:
            return
        self.report.answer_s.append(answer.seconds)
        if answer.tick >= self._valid_from:
            self._player.give(answer.tick, answer.chunk, number)

    def _check_policy(self) -> None:
        now = self._clock()
        if now - self._checked_s >= _CHECK_S:
            self._checked_s = now
            self._planner.check()
        timeout = self._settings.policy_timeout_s
        if self._planner.failure:
            self._safety.stop(self._planner.failure)
        elif self._planner.waited_s > timeout:
            self._safety.stop(f"the policy has not answered for {timeout:g} s")

    def _reset(self, number: int, observed: Observed) -> None:
        self._reset_wanted = False
        try:
            standing = self._standing(observed)
            self._safety.reset(standing)
        except ConfigError as error:
            self._safety.note(f"reset refused: {error}")
            return
        self._begins = True
        self._player.forget()
        self._valid_from = number

    def _settle(self, number: int, start: float) -> None:
        """Come to rest before the link is closed."""
        safety, period = self._safety, self._contract.period_s
        self.report.stop_reason = safety.stop_reason
        events = list(safety.events)[-_TOLD_EVENTS:]
        counts = Counter(safety.counts)
        safety.stop("the run has ended")
        for passed in range(math.ceil(_SETTLE_S / period)):
            deadline = start + (number + passed) * period
            self._sleep(max(0.0, deadline - self._clock()))
            self._link.read(0.0)
            before = safety.sent
            command = safety.step(None)
            self._link.write(command)
            if safety.at_rest and command.values == before:
                break
        self.report.events = events
        self.report.interventions = counts


class History:
    """The last observations side by side, the oldest first, and the goal behind them.

    Args:
        steps: Observations.
        goal_dim: Numbers at the end of each that are the goal.
    """

    def __init__(self, steps: int, goal_dim: int) -> None:
        self._steps = steps
        self._goal_dim = goal_dim
        self._shown: list[Sequence[float]] = []

    def forget(self) -> None:
        """Take the next observation for an episode's first."""
        self._shown = []

    def add(self, observation: Sequence[float]) -> Sequence[float]:
        """Take the newest observation, and return what the policy sees."""
        if self._steps == 1:
            return observation
        width = len(observation) - self._goal_dim
        shown, goal = observation[:width], observation[width:]
        self._shown = [*self._shown[1:], shown] if self._shown else [shown] * self._steps
        return [x for part in (*self._shown, goal) for x in part]

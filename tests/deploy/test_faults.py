"""What may go wrong between a policy, a controller and a robot: real processes, real sockets.

In each case all commands that the robot gets are finite and within limits, it ends in a safe mode,
and the report says what happened.
"""

from __future__ import annotations

import heapq
import math
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genpol.deploy.bundle import Bundle
from genpol.deploy.contract import Channel, Contract
from genpol.deploy.controller import Controller, ControllerSettings, Report, Tick
from genpol.deploy.links import Observed
from genpol.deploy.links.udp import UdpLink, UdpRobot, parse_address
from genpol.deploy.messages import Endpoint, Kind
from genpol.deploy.policy_process import PolicyProcess
from genpol.deploy.reporting import summary
from genpol.deploy.safety import Command, JointLimits, Mode, SafetyFilter
from genpol.deploy.start import await_robot, start_commands

pytestmark = pytest.mark.usefixtures("uncollected")

DT = 0.01
KEY = b"sixteen bytes or more"
OTHER_KEY = b"another key of some length"
BEGIN = 30  # tick in which something goes wrong

CONTRACT = Contract(
    env="Arm",
    agent="bc",
    observation=(Channel(name="arm.position"), Channel(name="arm.velocity"), Channel(name="clock")),
    action=(
        JointLimits(
            name="arm", unit="rad", low=-1, high=1, velocity=1.5, acceleration=40, jerk=4000
        ),
        JointLimits(
            name="motor",
            unit="N m",
            interface="effort",
            low=-2.0,
            high=2.0,
            velocity=20.0,
            neutral=0.5,
        ),
    ),
    commands=((-3.0, 3.0), (-8.0, 8.0)),  # which is more than the robot may be told
    period_s=DT,
    horizon=4,
    action_steps=2,
    inputs={"observation": (3,), "noise": (8,)},
    sampling="mode",
)
START = [0.25, 0.5]

Datagrams = Callable[[bytes], Sequence[tuple[float, bytes]]]
"""A datagram to those that go on instead, each after so many seconds."""


class Arm(threading.Thread):
    """A robot that is wherever it was commanded last.

    Attributes:
        shows: What it tells, by where it stands and how often it has told; ``None`` for nothing.
        received: Commands in the order in which they came.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.robot = UdpRobot("127.0.0.1:0", KEY)
        self.shows: Callable[[float, int], Sequence[float] | None] = sound
        self.received: list[Command] = []
        self._over = threading.Event()

    def run(self) -> None:
        due, told, stands = time.monotonic(), 0, START[0]
        while not self._over.is_set():
            command = self.robot.command(min(0.002, max(0.0, due - time.monotonic())))
            if command is not None:
                self.received.append(command)
                stands = command.values[0]
            if time.monotonic() >= due:
                due += DT
                told += 1
                shown = self.shows(stands, told)
                if shown is not None:
                    self.robot.observation(shown)
        self.robot.close()

    def showing(self, shows: Callable[[float, int], Sequence[float] | None]) -> Callable[[], None]:
        """Return what makes it tell something else."""

        def begin() -> None:
            self.shows = shows

        return begin

    def end(self) -> None:
        self._over.set()
        self.join(2.0)


def sound(stands: float, told: int) -> list[float]:
    return [stands, 0.0, 1e-3 * told]


class Proxy(threading.Thread):
    """Does to datagrams between a controller and a robot what networks do.

    Attributes:
        address: Where the controller finds it.
    """

    def __init__(self, robot: str) -> None:
        super().__init__(daemon=True)
        self._front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._front.bind(("127.0.0.1", 0))
        self._back = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._back.bind(("127.0.0.1", 0))
        self._robot = parse_address(robot)
        self._controller: Any = None
        self._over = threading.Event()
        self.address = "{}:{}".format(*self._front.getsockname())
        self._down: Datagrams = untouched
        self._up: Datagrams = untouched

    def do(self, down: Datagrams, up: Datagrams) -> None:
        """Do something to the controller's datagrams, and to the robot's."""
        self._down, self._up = down, up

    def run(self) -> None:
        held: list[tuple[float, int, bytes, bool]] = []
        count = 0
        while not self._over.is_set():
            for ready in select.select([self._front, self._back], [], [], 0.001)[0]:
                datagram, address = ready.recvfrom(65_535)
                down = ready is self._front
                if down:
                    self._controller = address
                for delay, whole in (self._down if down else self._up)(datagram):
                    count += 1
                    heapq.heappush(held, (time.monotonic() + delay, count, whole, down))
            while held and held[0][0] <= time.monotonic():
                _, _, datagram, down = heapq.heappop(held)
                if down:
                    self._back.sendto(datagram, self._robot)
                elif self._controller is not None:
                    self._front.sendto(datagram, self._controller)
        self._front.close()
        self._back.close()

    def end(self) -> None:
        self._over.set()
        self.join(2.0)


def untouched(datagram: bytes) -> list[tuple[float, bytes]]:
    return [(0.0, datagram)]


class TellingLink(UdpLink):
    """A link that remembers what it sent."""

    def __init__(self, address: str) -> None:
        super().__init__(address, KEY)
        self.sent: list[Command] = []

    def write(self, command: Command) -> None:
        self.sent.append(Command(list(command.values), command.mode))
        super().write(command)


class World:
    """A policy's process, a controller, a proxy and a robot.

    Args:
        policy: The policy, started.
    """

    def __init__(self, policy: PolicyProcess) -> None:
        self.policy = policy
        self.arm = Arm()
        self.proxy = Proxy(self.arm.robot.address)
        self.link = TellingLink(self.proxy.address)
        self.ticks: list[Tick] = []
        for thread in (self.arm, self.proxy):
            thread.start()
        self.link.open()

    def run(
        self, ticks: int, then: Mapping[int, Callable[[], None]] | None = None, **options: Any
    ) -> Report:
        """Run for so many ticks; call what is to be called, once, behind a tick or the next."""
        left = dict(then or {})

        def look(tick: Tick) -> None:
            self.ticks.append(tick)
            for number in [x for x in left if x <= tick.number]:
                left.pop(number)()

        settings = {"max_age": 10.0, "link_timeout_s": 0.25, "policy_timeout_s": 0.4} | options
        first = await_robot(self.link, 5.0)
        start = [start_commands(CONTRACT, first)[0], START[1]]
        assert start == START
        safety = SafetyFilter(CONTRACT.action, DT, start, hold_s=0.03)
        controller = Controller(
            CONTRACT, self.link, self.policy, safety, ControllerSettings(**settings), look_on=look
        )
        report = controller.run(first, ticks * DT)
        assert not left
        time.sleep(0.02)  # until the last commands have come
        return report

    def modes(self, begin: int = 0, end: int = 1 << 30) -> list[Mode]:
        """Return the modes of the ticks in [begin, end)."""
        return [tick.command.mode for tick in self.ticks if begin <= tick.number < end]

    @property
    def pid(self) -> int:
        """Of the policy's process."""
        process = self.policy._process
        assert process is not None
        assert process.pid is not None
        return process.pid

    @property
    def sent(self) -> np.ndarray:
        return np.array([command.values for command in self.link.sent])

    def end(self) -> None:
        self.link.close()
        self.proxy.end()
        self.arm.end()


@pytest.fixture(scope="module")
def bundle(make_wild_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a policy that wants something far out in every tick, and never the same."""
    folder: Path = tmp_path_factory.mktemp("bundles")
    made: Bundle = make_wild_bundle(folder / "wild", CONTRACT)
    return made


@pytest.fixture(scope="module")
def shared_policy(bundle: Bundle) -> Iterator[PolicyProcess]:
    process = PolicyProcess(bundle.folder, bundle.contract)
    process.start()
    yield process
    process.close()


@pytest.fixture
def world(shared_policy: PolicyProcess) -> Iterator[World]:
    while shared_policy.pending:  # what the test before has asked
        shared_policy.answer(1.0)
    made = World(shared_policy)
    yield made
    made.end()


@pytest.fixture
def own_world(bundle: Bundle, start_policy: Any) -> Iterator[World]:
    """Return a world whose policy may be killed."""
    made = World(start_policy(bundle))
    yield made
    made.end()


@pytest.fixture
def assert_safe(violation: Any) -> Callable[[World], None]:
    """Return what checks all that was sent, and all that came of it."""

    def check(world: World) -> None:
        sent = world.sent
        assert violation(CONTRACT, sent, START) == ""
        assert (sent[-1] == sent[-2]).all()  # it ends at rest
        # What came is what was sent, in its order; and so are steps within what the limits allow.
        places, last = iter(enumerate(world.link.sent)), -1
        assert len(world.arm.received) > 10
        before = START
        for command in world.arm.received:
            place = next((i for i, x in places if x == command), None)
            assert place is not None, f"{command} was not sent, or came out of order"
            for joint, a, b in zip(CONTRACT.action, before, command.values, strict=True):
                assert math.isfinite(b)
                assert joint.low <= b <= joint.high
                assert abs(b - a) <= joint.velocity * DT * (place - last) * (1 + 1e-6)
            before, last = command.values, place

    return check


Safe = Callable[[World], None]


def test_without_faults_it_runs_from_end_to_end(world: World, assert_safe: Safe) -> None:
    """The others say nothing unless this one does."""
    report = world.run(80)
    assert_safe(world)
    assert world.modes().count(Mode.RUN) > 0.7 * len(world.ticks)
    assert report.stop_reason == ""
    assert report.interventions["motion"] + report.interventions["position"] > 40
    assert np.abs(np.diff(world.sent[:, 0])).max() > 0.5 * 1.5 * DT  # it is near its limits
    assert np.ptp(world.sent[:, 1]) > 0.3
    assert len(world.arm.received) > 0.7 * len(world.ticks)


# --- the policy ----------------------------------------------------------------------------------


def test_a_policy_that_is_killed_stops_the_robot(own_world: World, assert_safe: Safe) -> None:
    world = own_world
    report = world.run(80, {BEGIN: lambda: os.kill(world.pid, signal.SIGKILL)})
    assert_safe(world)
    assert report.stop_reason.startswith("the policy's process ended")
    assert set(world.modes(BEGIN + 20)) == {Mode.STOP}
    assert world.sent[-1][1] == 0.5  # neutral
    assert any(name.startswith("stop: the policy's") for name in report.interventions)


def test_a_policy_that_hangs_stops_the_robot(own_world: World, assert_safe: Safe) -> None:
    world = own_world
    pid = world.pid
    report = world.run(110, {BEGIN: lambda: os.kill(pid, signal.SIGSTOP)})
    os.kill(pid, signal.SIGKILL)  # or its end would have to be waited for
    assert_safe(world)
    assert report.stop_reason == "the policy has not answered for 0.4 s"
    after = [mode for mode, _ in groupby(world.modes(BEGIN + 5))]
    assert after[-2:] == [Mode.DAMP, Mode.STOP]
    assert Mode.RUN not in after


def test_what_is_infinite_to_the_policy_alone_is_held(world: World, assert_safe: Safe) -> None:
    """An observation that is finite here, and is not in the policy's single precision."""
    report = world.run(70, {BEGIN: world.arm.showing(lambda at, told: [at, 1e300, 1e-3 * told])})
    assert_safe(world)
    assert report.interventions["observation: not finite"] > 10
    assert world.modes()[-1] is Mode.DAMP


# --- the robot -----------------------------------------------------------------------------------


def test_a_robot_that_falls_silent_is_stopped_until_it_is_reset(
    world: World, assert_safe: Safe
) -> None:
    heard, reset = BEGIN + 40, BEGIN + 60
    report = world.run(
        reset + 25,
        {
            BEGIN: world.arm.showing(lambda at, told: None),
            heard: world.arm.showing(sound),
            reset: world.arm.robot.reset,
        },
    )
    assert_safe(world)
    reason = "stop: no observation for 0.25 s: the link is lost"
    assert report.interventions[reason] == 1
    assert report.interventions["reset"] == 1
    assert report.interventions["observation: none"] >= 20
    assert set(world.modes(heard - 5, reset)) == {Mode.STOP}
    before = [tick for tick in world.ticks if heard + 5 <= tick.number < reset]
    assert any(tick.observed is not None for tick in before)  # to be heard was not enough
    assert Mode.RUN in world.modes(reset + 2)


def test_a_robot_that_stays_silent_leaves_a_stop_in_the_report(
    world: World, assert_safe: Safe
) -> None:
    found = summary(world.run(70, {BEGIN: world.arm.showing(lambda at, told: None)}))
    assert_safe(world)
    assert found["stop_reason"] == "no observation for 0.25 s: the link is lost"
    assert any(event["what"] == "observation: none" for event in found["events"])


def test_a_robot_whose_program_starts_anew_is_heard_again() -> None:
    """It waits for a greeting before it tells anything."""
    robot = UdpRobot("127.0.0.1:0", KEY)
    address = robot.address
    link = UdpLink(address, KEY)
    link.open()
    for _ in range(3):
        robot.command(0.05)
        robot.observation([1.0])
        link.read(0.05)
    assert robot.connected
    robot.close()
    again = UdpRobot(address, KEY)
    try:
        found: Observed | None = None
        for _ in range(30):
            link.write(Command([0.0], Mode.STOP))  # as in every tick
            again.command(0.0)
            again.observation([2.0])
            found = link.read(0.02)
            if found is not None:
                break
        assert found is not None
        assert found.values == (2.0,)
    finally:
        again.close()
        link.close()


def test_a_stop_that_the_robot_asks_for_lasts_until_it_resets(
    world: World, assert_safe: Safe
) -> None:
    reset = BEGIN + 30
    report = world.run(reset + 20, {BEGIN: world.arm.robot.stop, reset: world.arm.robot.reset})
    assert_safe(world)
    assert set(world.modes(BEGIN + 5, reset)) == {Mode.STOP}
    assert Mode.RUN in world.modes(reset + 2)
    assert report.interventions["stop: the robot's side asked for it"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_observations_that_are_not_finite_are_held(
    world: World, assert_safe: Safe, value: float
) -> None:
    report = world.run(60, {BEGIN: world.arm.showing(lambda at, told: [at, value, 1e-3 * told])})
    assert_safe(world)
    assert report.interventions["observation: not finite"] > 10
    assert set(world.modes(BEGIN + 15)) == {Mode.DAMP}
    assert report.stop_reason == ""  # it is heard of


def test_an_observation_of_another_size_is_held(world: World, assert_safe: Safe) -> None:
    report = world.run(60, {BEGIN: world.arm.showing(lambda at, told: [at, 1e-3 * told])})
    assert_safe(world)
    assert report.interventions["observation: size"] > 10
    assert world.modes()[-1] is Mode.DAMP


def test_a_frozen_sensor_is_held(world: World, assert_safe: Safe) -> None:
    frozen = world.arm.showing(lambda at, told: [0.1, 0.0, 0.5])
    report = world.run(80, {BEGIN: frozen}, frozen_s=0.1)
    assert_safe(world)
    assert report.interventions["observation: frozen"] > 10
    assert world.modes()[-1] is Mode.DAMP
    assert any(event.what == "observation: frozen" for event in report.events)


# --- what lies between ---------------------------------------------------------------------------


def some(share: float, otherwise: Datagrams, seed: int = 0) -> Datagrams:
    """Return what does something to a share of all datagrams."""
    draw = random.Random(seed)
    return lambda datagram: otherwise(datagram) if draw.random() < share else untouched(datagram)


def corrupted(datagram: bytes) -> list[tuple[float, bytes]]:
    damaged = bytearray(datagram)
    damaged[len(damaged) // 2] ^= 0x10
    return [(0.0, bytes(damaged))]


def forged(kind: Kind, numbers: Sequence[float]) -> Datagrams:
    """Return what puts a stranger's message before each datagram, newer than all that there are."""
    sender = Endpoint(OTHER_KEY)
    return lambda datagram: [(0.0, sender.message(kind, numbers)), (0.0, datagram)]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        pytest.param(lambda x: [(0.0, x), (0.0, x), (0.03, x)], "late or twice", id="twice"),
        pytest.param(some(0.4, lambda x: [(0.035, x)]), "late or twice", id="reordered"),
        pytest.param(some(0.4, corrupted), "wrong signature", id="corrupted"),
        pytest.param(some(0.4, lambda x: [(0.0, x[:-1])]), "wrong signature", id="cut short"),
        pytest.param(some(0.4, lambda x: [(0.0, x[:20])]), "too short", id="cut very short"),
        pytest.param(some(0.4, lambda x: []), None, id="lost"),
        pytest.param(
            lambda x: [(0.0, b"GPL2" + x[4:]), (0.0, x)], "another protocol", id="another version"
        ),
    ],
)
def test_what_networks_do_is_dropped_counted_and_survived(
    world: World, assert_safe: Safe, fault: Datagrams, told: str | None
) -> None:
    """Both ways, and a policy goes on where enough comes through."""
    report = world.run(80, {BEGIN: lambda: world.proxy.do(fault, fault)})
    assert_safe(world)
    assert report.stop_reason == ""
    assert Mode.RUN in world.modes(BEGIN + 20)
    if told is None:
        assert report.link["lost"] > 5
        return
    robot = world.arm.robot._socket.statistics()
    for side in (report.link, robot):
        assert sum(n for name, n in side.items() if told in name) > 5


def test_strangers_can_neither_command_nor_be_seen(world: World, assert_safe: Safe) -> None:
    down, up = forged(Kind.COMMAND, [0.9, -1.9]), forged(Kind.OBSERVATION, [0.0, 0.0, 1e6])
    report = world.run(70, {BEGIN: lambda: world.proxy.do(down, up)})
    assert_safe(world)
    assert all(tick.observed is None or tick.observed.values[2] < 1e3 for tick in world.ticks)
    assert not any(command.values == [0.9, -1.9] for command in world.arm.received)
    assert report.link["dropped: wrong signature"] > 10
    assert Mode.RUN in world.modes(BEGIN + 20)
    assert report.stop_reason == ""


@pytest.mark.parametrize("kind", [Kind.STOP, Kind.RESET])
def test_strangers_can_neither_stop_nor_reset(world: World, assert_safe: Safe, kind: Kind) -> None:
    then = {BEGIN + 10: lambda: world.proxy.do(untouched, forged(kind, []))}
    if kind is Kind.RESET:
        then[BEGIN] = world.arm.robot.stop
    report = world.run(BEGIN + 40, then)
    assert_safe(world)
    assert report.link["dropped: wrong signature"] > 10
    stopped = {Mode.STOP in world.modes(BEGIN + 12), Mode.RUN not in world.modes(BEGIN + 12)}
    assert stopped == {kind is Kind.RESET}


def test_a_recording_of_the_robot_s_messages_cannot_be_played_back(
    world: World, assert_safe: Safe
) -> None:
    """As from a stranger without the key."""
    kept: list[bytes] = []

    def record(datagram: bytes) -> list[tuple[float, bytes]]:
        kept.append(datagram)
        return untouched(datagram)

    def play(datagram: bytes) -> list[tuple[float, bytes]]:
        return [(0.0, kept.pop(0))] if kept else []

    world.proxy.do(untouched, record)
    report = world.run(80, {BEGIN: lambda: world.proxy.do(untouched, play)})
    assert_safe(world)
    assert report.link["dropped: late or twice"] > 10
    assert "the link is lost" in report.stop_reason
    assert world.modes()[-1] is Mode.STOP


def test_a_link_on_which_nothing_comes_whole_is_lost(world: World, assert_safe: Safe) -> None:
    report = world.run(80, {BEGIN: lambda: world.proxy.do(untouched, corrupted)})
    assert_safe(world)
    assert "the link is lost" in report.stop_reason
    assert report.link["dropped: wrong signature"] > 10
    assert world.modes()[-1] is Mode.STOP


def test_observations_that_are_all_late_are_not_taken_for_new(
    world: World, assert_safe: Safe
) -> None:
    """They are twenty periods on their way, and ten is the greatest age."""

    def late(datagram: bytes) -> list[tuple[float, bytes]]:
        return [(0.2, datagram)]

    report = world.run(110, {BEGIN: lambda: world.proxy.do(untouched, late)}, link_timeout_s=0.6)
    assert_safe(world)
    assert Mode.RUN not in world.modes(BEGIN + 15)
    assert report.interventions["observation: too old"] > 20


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_the_system_s_clock_may_jump(
    world: World, assert_safe: Safe, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """While it runs nothing depends on it."""
    now, now_ns = time.time, time.time_ns

    def set_clock() -> None:
        monkeypatch.setattr(time, "time", lambda: now() + jump)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + round(jump * 1e9))

    report = world.run(70, {BEGIN: set_clock})
    assert_safe(world)
    assert report.stop_reason == ""
    assert Mode.RUN in world.modes(BEGIN + 20)
    wrong = ("observation: too old", "observation: from the future", "dropped: late or twice")
    assert not {*report.interventions, *report.link} & {*wrong}


def test_a_controller_that_starts_after_the_clock_was_set_back_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a computer whose clock is set by the network some time after it has started."""
    robot = UdpRobot("127.0.0.1:0", KEY)
    first = UdpLink(robot.address, KEY)
    first.open()
    robot.command(1.0)
    first.read(0.05)
    robot.command(1.0)
    first.write(Command([1.0], Mode.RUN))
    assert robot.command(1.0) == Command([1.0], Mode.RUN)
    first.close()
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - 3_600_000_000_000)
    second = UdpLink(robot.address, KEY)
    try:
        second.open()
        time.sleep(1.0)  # the first one's place is free then
        for _ in range(3):
            second.read(0.12)
            robot.command(0.1)
        second.write(Command([2.0], Mode.RUN))
        assert robot.command(0.5) == Command([2.0], Mode.RUN)
    finally:
        second.close()
        robot.close()

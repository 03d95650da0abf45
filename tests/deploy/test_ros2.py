"""Controller and a simulated robot of ros2_control in two processes, over DDS on the loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genpol.deploy.chunks import Answer
from genpol.deploy.contract import Channel, Contract
from genpol.deploy.controller import Controller, ControllerSettings, Report, Tick
from genpol.deploy.links import Observed
from genpol.deploy.links.ages import Ages
from genpol.deploy.links.ros2 import Ros2Link, peer_configuration
from genpol.deploy.safety import Command, JointLimits, Mode, SafetyFilter
from genpol.deploy.start import LinkError, await_robot, start_commands
from genpol.errors import ConfigError

pytest.importorskip("cyclonedds", reason="needs the extra genpol[ros2]")

pytestmark = pytest.mark.usefixtures("uncollected")

PROGRAM = Path(__file__).with_name("ros2_robot.py")
DT = 0.01

JOINTS = ("shoulder", "elbow")
STANDS = {"elbow": -0.2, "gripper": 0.04, "shoulder": 0.3}
CONTRACT = Contract(
    env="Arm",
    agent="bc",
    observation=tuple(
        Channel(name=x)
        for x in ("elbow.position", "shoulder.position", "shoulder.velocity", "gripper.position")
    ),
    action=tuple(
        JointLimits(name=x, unit="rad", low=-1.5, high=1.5, velocity=2.0, acceleration=20.0)
        for x in JOINTS
    ),
    commands=((-2.0, 2.0),) * 2,
    period_s=DT,
    horizon=4,
    action_steps=2,
    inputs={"observation": (4,), "noise": (0,)},
    sampling="mode",
)

Violation = Callable[[Contract, np.ndarray, list[float]], str]

# Domains of their own, so that tests of several processes do not meet; beyond 100 their ports are
# those that any socket may be given.
_DOMAINS = count(7 * os.getpid())


@pytest.fixture
def domain() -> int:
    return 1 + next(_DOMAINS) % 99


@dataclass
class Robot:
    """A robot's process."""

    process: subprocess.Popen[str]

    def end(self) -> list[dict[str, Any]]:
        """Return the commands that it was given."""
        out, _ = self.process.communicate("end\n", timeout=10.0)
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def start_robot(domain: int) -> Iterator[Callable[..., Robot]]:
    started: list[Robot] = []

    def start(**changes: Any) -> Robot:
        given = {
            "domain": domain,
            "joints": list(STANDS),
            "stands": STANDS,
            "controlled": JOINTS,
            "trajectory": False,
            "stamp_s": 0.0,
        } | changes
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(Robot(process))
        return started[-1]

    yield start
    for robot in started:
        robot.process.kill()
        robot.process.communicate()


@pytest.fixture
def open_link(domain: int) -> Iterator[Callable[..., Ros2Link]]:
    opened: list[Ros2Link] = []

    def make(contract: Contract = CONTRACT, **options: Any) -> Ros2Link:
        link = Ros2Link(
            contract, controller="/arm_controller", domain=domain, peers="127.0.0.1", **options
        )
        link.open()
        opened.append(link)
        return link

    yield make
    for link in opened:
        link.close()


class Towards:
    """A policy that wants joints to be somewhere."""

    pending = False
    waited_s = slowest_s = 0.0
    failure = ""

    def __init__(self, target: Sequence[float]) -> None:
        self._action = [x / 2.0 for x in target]
        self._tick = -1
        self.seen: list[tuple[float, ...]] = []

    def ask(self, tick: int, observation: Sequence[float], *, delay: int, anew: bool) -> None:
        self._tick = tick
        self.seen.append(tuple(observation))

    def answer(self, timeout_s: float) -> Answer | None:
        return Answer(self._tick, [self._action] * 4, 1e-4)

    def check(self) -> None:
        """It does not end."""


@dataclass
class Run:
    """What came of a run."""

    report: Report
    ticks: list[Tick]
    start: list[float]
    policy: Towards

    @property
    def sent(self) -> np.ndarray:
        return np.array([tick.command.values for tick in self.ticks])

    @property
    def modes(self) -> list[Mode]:
        return [tick.command.mode for tick in self.ticks]


def drive(
    link: Ros2Link,
    target: Sequence[float],
    seconds: float,
    look_on: Callable[[Tick], None] = lambda tick: None,
    **options: Any,
) -> Run:
    ticks: list[Tick] = []

    def look(tick: Tick) -> None:
        ticks.append(tick)
        look_on(tick)

    first = await_robot(link, 10.0)
    start = start_commands(CONTRACT, first)
    settings = ControllerSettings(**{"max_age": 10.0, **options})
    safety = SafetyFilter(CONTRACT.action, DT, start, hold_s=0.05)
    policy = Towards(target)
    controller = Controller(CONTRACT, link, policy, safety, settings, look_on=look)
    return Run(controller.run(first, seconds), ticks, start, policy)


def assert_obeyed(run: Run, received: list[dict[str, Any]]) -> np.ndarray:
    """Check that what was received is what was sent, in its order; return it."""
    found = np.array([record["values"] for record in received])
    sent = [tuple(tick.command.values) for tick in run.ticks]
    places = iter(range(len(sent)))
    during = [tuple(x) for x in found[: len(found) - 2]]
    missing = [x for x in during if not any(sent[i] == x for i in places)]
    # At the end stand the commands of coming to rest, all like the last one.
    assert all(x == tuple(found[-1]) for x in missing)
    return found


# --- two processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["array", "trajectory"])
def test_a_robot_in_another_process_goes_where_the_policy_wants_it(
    command: str, start_robot: Any, open_link: Any, violation: Violation
) -> None:
    robot = start_robot(trajectory=command == "trajectory")
    run = drive(open_link(command=command), (0.8, -0.6), 0.8)
    received = robot.end()
    assert run.report.stop_reason == ""
    assert run.start == pytest.approx([0.3, -0.2], abs=1e-5)
    assert violation(CONTRACT, run.sent, run.start) == ""
    found = assert_obeyed(run, received)
    assert len(found) >= 0.8 * run.report.ticks
    assert violation(replace(CONTRACT, period_s=3 * DT), found, run.start) == ""  # if two are lost
    assert found[-1] == pytest.approx([0.8, -0.6], abs=0.01)
    # What it sees is where the robot stands, by name and not by place.
    elbow, shoulder, _, gripper = run.policy.seen[-1]
    assert (shoulder, elbow) == (pytest.approx(0.8, abs=0.05), pytest.approx(-0.6, abs=0.05))
    assert gripper == pytest.approx(0.04, abs=1e-5)
    assert run.report.link == {"unknown joints": 0, "wrong size": 0}
    if command == "trajectory":
        assert {tuple(record["joints"]) for record in received} == {JOINTS}
        assert {record["ahead_s"] for record in received} == {DT}
        assert {tuple(record["stamp"]) for record in received} == {(0, 0)}
        assert all(record["rest"] == [[], []] for record in received)


def test_a_robot_whose_process_is_killed_is_a_lost_link(start_robot: Any, open_link: Any) -> None:
    robot = start_robot()

    def kill(tick: Tick) -> None:
        if tick.number == 20:
            robot.process.send_signal(signal.SIGKILL)

    run = drive(open_link(), (1.4, -1.4), 0.6, kill, link_timeout_s=0.1)
    assert "the link is lost" in run.report.stop_reason
    stopped = run.modes.index(Mode.STOP)
    assert 20 < stopped < 50
    assert set(run.modes[stopped:]) == {Mode.STOP}
    assert Mode.HOLD in run.modes[20:stopped]
    assert run.report.interventions["observation: none"] > 10
    assert (run.sent[-1] == run.sent[-2]).all()


def test_a_robot_that_comes_back_does_not_move_by_itself(start_robot: Any, open_link: Any) -> None:
    robots = [start_robot()]

    def restart(tick: Tick) -> None:
        if tick.number == 10:
            robots[0].process.kill()
            stands = dict(STANDS, shoulder=tick.command.values[0], elbow=tick.command.values[1])
            robots.append(start_robot(stands=stands))

    run = drive(open_link(), (1.4, -1.4), 1.2, restart, link_timeout_s=0.1)
    received = robots[1].end()
    assert run.modes[-1] is Mode.STOP
    assert run.ticks[-1].observed is not None  # it is heard again
    assert received
    values = {tuple(record["values"]) for record in received}
    assert values == {tuple(run.sent[-1])}


def test_a_joint_that_is_missing_is_counted_and_held(start_robot: Any, open_link: Any) -> None:
    start_robot(joints=["elbow", "gripper"])
    link = open_link()
    with pytest.raises(LinkError, match="names are the same on both sides"):
        await_robot(link, 1.0)
    counted = link.statistics()["unknown joints"]
    assert counted > 5
    first = Observed((0.0, 0.0, 0.0, 0.0), time.monotonic())
    safety = SafetyFilter(CONTRACT.action, DT, [0.3, -0.2], hold_s=0.05)
    ticks: list[Tick] = []
    settings = ControllerSettings(link_timeout_s=10.0)
    controller = Controller(CONTRACT, link, Towards((1, 1)), safety, settings, look_on=ticks.append)
    report = controller.run(first, 0.2)
    modes = [tick.command.mode for tick in ticks]
    assert modes[-1] is Mode.DAMP
    assert Mode.HOLD in modes
    assert report.link["unknown joints"] > counted
    assert report.interventions["observation: none"] == len(ticks) - 1


def test_clocks_of_two_machines_need_not_agree(start_robot: Any, open_link: Any) -> None:
    start_robot(stamp_s=-86_400.0)
    run = drive(open_link(), (0.4, -0.1), 0.3, max_age=5.0)
    assert run.report.stop_reason == ""
    assert run.modes.count(Mode.RUN) > 0.9 * len(run.modes)
    assert max(run.report.age_s) < 5 * DT


# --- both sides in one process -------------------------------------------------------------------


class Side:
    """The robot's side of one topic, for messages of any content."""

    def __init__(self, domain: int, topic: str, kind: str) -> None:
        from cyclonedds.domain import DomainParticipant
        from cyclonedds.pub import DataWriter
        from cyclonedds.topic import Topic

        from genpol.deploy.links import ros2_messages
        from genpol.deploy.links.ros2 import _qos

        self.ros: Any = ros2_messages
        participant = DomainParticipant(domain)
        kind_of: Any = getattr(ros2_messages, kind)
        self._writer = DataWriter(
            participant, Topic(participant, f"rt{topic}", kind_of), _qos()["write"]
        )

    def told(self, link: Ros2Link, message: Any, tries: int = 50) -> Observed | None:
        """Send until the link answers, or that often."""
        for _ in range(tries):
            self._writer.write(message)
            found = link.read(0.02)
            if found is not None:
                return found
        return None


def test_whole_observations_come_as_they_are(domain: int, open_link: Any) -> None:
    link = open_link(observations="/policy/observation")
    side = Side(domain, "/policy/observation", "Float64MultiArray")
    array = side.ros.Float64MultiArray
    found = side.told(link, array(data=[1.0, 2.0, 3.0, 4.5]))
    assert found is not None
    assert found.values == (1.0, 2.0, 3.0, 4.5)
    assert side.told(link, array(data=[1.0, 2.0]), tries=5) is None
    assert link.statistics()["wrong size"] == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ["shoulder", "elbow", "gripper"], "position": [1.0, 2.0, 3.0]},  # no velocity
        {"name": ["shoulder", "elbow"], "position": [1.0, 2.0], "velocity": [0.0, 0.0]},
        {"name": ["shoulder", "elbow", "gripper"], "position": [1.0], "velocity": [0.0] * 3},
        {"name": [], "position": [], "velocity": []},
    ],
)
def test_states_that_lack_a_number_are_counted(
    domain: int, open_link: Any, fields: dict[str, Any]
) -> None:
    link = open_link()
    side = Side(domain, "/joint_states", "JointState")
    whole = {
        "name": ["gripper", "shoulder", "elbow"],
        "position": [7.0, 8.0, 9.0],
        "velocity": [0.7, 0.8, 0.9],
    }
    found = side.told(link, side.ros.JointState(**whole))
    assert found is not None
    assert found.values == (9.0, 8.0, 0.8, 7.0)
    assert side.told(link, side.ros.JointState(**fields), tries=3) is None
    assert link.statistics()["unknown joints"] == 3


def test_a_stop_and_a_reset_come_from_the_robot_s_side(domain: int, open_link: Any) -> None:
    link = open_link()
    side = Side(domain, "/genpol/stop", "Bool")

    def told(stop: bool) -> bool:
        """Say it until it is heard, as the link may be discovered late."""
        for _ in range(40):
            side._writer.write(side.ros.Bool(data=stop))
            assert link.read(0.05) is None  # it is no observation
            if bool(link.stop_requested) == stop and (stop or link.take_reset()):
                return True
        return False

    assert link.stop_requested == ""
    for _ in range(5):
        side._writer.write(side.ros.Bool(data=False))  # a false without a stop is nothing
        link.read(0.02)
    assert not link.take_reset()
    assert told(True)
    assert link.stop_requested == "/genpol/stop asked for it"
    assert not link.take_reset()
    assert told(False)
    assert link.stop_requested == ""
    assert not link.take_reset()  # once


def test_a_command_nobody_listens_to_is_lost_and_nothing_else(open_link: Any) -> None:
    link = open_link()
    begin = time.monotonic()
    for _ in range(100):
        link.write(Command([0.0, 0.0], Mode.STOP))
    assert link.read(0.0) is None
    assert time.monotonic() - begin < 0.5


def test_a_link_that_is_closed_can_be_opened_again(domain: int, open_link: Any) -> None:
    open_link().close()
    link = open_link()
    side = Side(domain, "/joint_states", "JointState")
    message = side.ros.JointState(name=list(STANDS), position=[1.0] * 3, velocity=[0.0] * 3)
    assert side.told(link, message) is not None


def test_messages_are_laid_out_as_in_ros() -> None:
    """From the .msg files of common_interfaces and rcl_interfaces."""
    from genpol.deploy.links import ros2_messages as ros

    wanted: dict[Any, tuple[str, list[str]]] = {
        ros.Time: ("builtin_interfaces.msg.dds_.Time_", ["sec", "nanosec"]),
        ros.Duration: ("builtin_interfaces.msg.dds_.Duration_", ["sec", "nanosec"]),
        ros.Header: ("std_msgs.msg.dds_.Header_", ["stamp", "frame_id"]),
        ros.JointState: (
            "sensor_msgs.msg.dds_.JointState_",
            ["header", "name", "position", "velocity", "effort"],
        ),
        ros.MultiArrayDimension: (
            "std_msgs.msg.dds_.MultiArrayDimension_",
            ["label", "size", "stride"],
        ),
        ros.MultiArrayLayout: ("std_msgs.msg.dds_.MultiArrayLayout_", ["dim", "data_offset"]),
        ros.Float64MultiArray: ("std_msgs.msg.dds_.Float64MultiArray_", ["layout", "data"]),
        ros.JointTrajectoryPoint: (
            "trajectory_msgs.msg.dds_.JointTrajectoryPoint_",
            ["positions", "velocities", "accelerations", "effort", "time_from_start"],
        ),
        ros.JointTrajectory: (
            "trajectory_msgs.msg.dds_.JointTrajectory_",
            ["header", "joint_names", "points"],
        ),
    }
    for kind, (name, fields) in wanted.items():
        assert kind.__idl_typename__ == name
        assert list(kind.__annotations__) == fields
    # A layout without dimensions (sequence length, offset), and two numbers behind their length.
    data = ros.Float64MultiArray(data=[1.0, -2.0]).serialize()
    assert data[4:16] == b"\0" * 8 + (2).to_bytes(4, "little")
    assert np.frombuffer(data[-16:], "<f8").tolist() == [1.0, -2.0]


# --- what does not suit --------------------------------------------------------------------------


def channels(*names: str) -> Contract:
    inputs = {"observation": (len(names),), "noise": (0,)}
    return replace(CONTRACT, observation=tuple(Channel(name=name) for name in names), inputs=inputs)


def with_interface(interface: str) -> Contract:
    return replace(CONTRACT, action=tuple(replace(x, interface=interface) for x in CONTRACT.action))


@pytest.mark.parametrize(
    ("contract", "options", "message"),
    [
        (channels("elbow.position", "observation[1]"), {}, r"'observation\[1\]' is no JOINT\.pos"),
        (channels("elbow.angle"), {}, r"'elbow\.angle' is no JOINT\.position"),
        (channels("position"), {}, "'position' is no JOINT"),
        (with_interface("effort"), {"command": "trajectory"}, "take command=array"),
        (CONTRACT, {"command": "poses"}, "command"),
        (CONTRACT, {"controller": "arm_controller"}, "controller = 'arm_controller'"),
        (CONTRACT, {"states": "/joint_states/"}, "states = '/joint_states/'"),
        (CONTRACT, {"domain": -1}, "domain"),
        (CONTRACT, {"observations": "observation"}, "observations = 'observation'"),
    ],
)
def test_what_does_not_suit_is_refused_in_one_line(
    contract: Contract, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Ros2Link(contract, **options)
    assert "\n" not in str(caught.value)


def test_whole_observations_need_no_names() -> None:
    Ros2Link(channels("anything", "else[3]"), observations="/observation")


def test_peers_are_asked_one_by_one_and_nobody_else() -> None:
    found = peer_configuration(["127.0.0.1", "10.0.0.2"])
    assert "<AllowMulticast>false</AllowMulticast>" in found
    assert found.index('"127.0.0.1"') < found.index('"10.0.0.2"')


# --- ages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0.0, 1e6, -1e6, 1.7e9])
def test_ages_are_told_without_trust_in_the_robot_s_clock(ahead: float) -> None:
    ages = Ages()
    delays = [0.003, 0.001, 0.004, 0.001, 0.050, 0.002]
    found = [ages.age(10.0 + 0.01 * i + ahead, 10.0 + 0.01 * i + x) for i, x in enumerate(delays)]
    assert found == pytest.approx([0.0, 0.0, 0.003, 0.0, 0.049, 0.001], abs=1e-6)


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
def test_a_robot_s_clock_that_jumps_is_known_anew_in_seconds(jump: float) -> None:
    """Until then what it sends counts as old, if anything: never as from the future."""
    ages = Ages()
    found: list[float] = []
    for i in range(600):
        now = 100.0 + 0.01 * i
        stamp = now - 0.001 - 0.0005 * (i % 2) + (jump if i >= 300 else 0.0)
        found.append(ages.age(stamp, now))
    assert max(found[:300]) < 0.002
    assert min(found) >= 0.0
    assert max(found[-90:]) < 0.002
    assert max(found[300:505]) == pytest.approx(3600.0 if jump < 0 else 0.0005, rel=1e-3)


def test_an_old_best_time_is_forgotten() -> None:
    """A way that has become longer is not for ever taken for delay."""
    ages = Ages()
    ages.age(1.0, 1.001)
    assert ages.age(1.5, 1.55) == pytest.approx(0.049)
    assert ages.age(4.0, 4.05) == pytest.approx(0.0, abs=1e-9)

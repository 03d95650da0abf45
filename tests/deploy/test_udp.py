"""Controller and robot over a real socket on the loopback."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator

import pytest

from genpol.deploy.links.udp import UdpLink, UdpRobot, parse_address
from genpol.deploy.messages import Kind
from genpol.deploy.safety import Command, Mode
from genpol.errors import ConfigError

KEY = b"sixteen bytes or more"


@pytest.fixture
def robot() -> Iterator[UdpRobot]:
    made = UdpRobot("127.0.0.1:0", KEY)
    yield made
    made.close()


def meet(robot: UdpRobot, link: UdpLink) -> None:
    """Have a robot answer the greeting of a link that has been opened."""
    assert robot.command(1.0) is None
    assert not robot.connected  # before it has greeted with the robot's session
    assert link.read(0.05) is None
    assert robot.command(1.0) is None
    assert robot.connected


def meet_again(robot: UdpRobot, link: UdpLink) -> None:
    """Have a robot answer a link that has greeted, and the link greet with its session."""
    for _ in range(3):
        robot.command(0.05)
        link.read(0.12)
    assert robot.connected


@pytest.fixture
def link(robot: UdpRobot) -> Iterator[UdpLink]:
    made = UdpLink(robot.address, KEY)
    made.open()
    meet(robot, made)
    yield made
    made.close()


def test_observations_and_commands_go_through(robot: UdpRobot, link: UdpLink) -> None:
    before = time.monotonic()
    robot.observation([1.0, -2.5, math.inf], age_s=0.25)
    found = link.read(1.0)
    assert found is not None
    assert found.values == (1.0, -2.5, math.inf)
    assert before - 0.25 <= found.measured_s <= time.monotonic() - 0.25
    link.write(Command([0.5, -0.5], Mode.DAMP))
    assert robot.command(1.0) == Command([0.5, -0.5], Mode.DAMP)


def test_the_newest_is_what_counts(robot: UdpRobot, link: UdpLink) -> None:
    for value in range(5):
        robot.observation([float(value)])
        link.write(Command([float(value)], Mode.RUN))
    time.sleep(0.05)
    assert link.read(0.5).values == (4.0,)
    assert link.read(0.0) is None
    assert robot.command(0.5).values == [4.0]
    assert robot.command() is None


def test_silence_is_none_after_the_time_given(link: UdpLink) -> None:
    before = time.monotonic()
    assert link.read(0.05) is None
    assert 0.04 < time.monotonic() - before < 0.5


def test_a_robot_that_comes_up_late_is_greeted_again() -> None:
    free = UdpRobot("127.0.0.1:0", KEY)
    address = free.address
    free.close()
    link = UdpLink(address, KEY)
    link.open()
    assert link.read(0.05) is None
    robot = UdpRobot(address, KEY)
    try:
        for _ in range(20):
            link.read(0.05)
            robot.command()
            if robot.connected:
                break
        robot.observation([3.0])
        assert link.read(0.5).values == (3.0,)
    finally:
        link.close()
        robot.close()


def test_a_stop_from_the_robot_is_told(robot: UdpRobot, link: UdpLink) -> None:
    assert link.stop_requested == ""
    robot.stop()
    link.read(0.2)
    assert link.stop_requested


def test_strangers_are_not_heard(robot: UdpRobot, link: UdpLink) -> None:
    stranger = UdpLink(robot.address, b"another key of some length")
    stranger.open()
    stranger.write(Command([9.0], Mode.RUN))
    assert robot.command(0.2) is None
    host, port = parse_address(robot.address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
        noise.sendto(b"x" * 80, (host, port))
        noise.sendto(b"", (host, port))
    assert robot.command(0.2) is None
    link.write(Command([1.0], Mode.RUN))
    assert robot.command(0.5).values == [1.0]
    stranger.close()


def test_a_controller_that_starts_anew_takes_over_from_one_that_is_silent(
    robot: UdpRobot, link: UdpLink
) -> None:
    link.write(Command([1.0], Mode.RUN))
    assert robot.command(0.5).values == [1.0]
    second = UdpLink(robot.address, KEY)
    second.open()
    assert robot.command(0.5) is None
    assert second.read(0.05) is None
    second.write(Command([2.0], Mode.RUN))
    assert robot.command(0.1) is None  # another commands
    time.sleep(1.0)
    second.read(0.05)  # which greets again
    meet_again(robot, second)
    second.write(Command([2.0], Mode.RUN))
    assert robot.command(0.5).values == [2.0]
    link.write(Command([1.0], Mode.RUN))  # who has commanded before is not heard any more
    assert robot.command(0.2) is None
    robot.observation([5.0])
    assert second.read(0.5).values == (5.0,)
    second.close()


def test_a_greeting_that_was_recorded_takes_nobody_s_place(robot: UdpRobot, link: UdpLink) -> None:
    """It cannot be answered with the robot's session by who does not hold the key."""
    other = UdpLink(robot.address, KEY)
    greeting = other._socket.endpoint.message(Kind.GREETING)
    other.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
        for _ in range(3):
            thief.sendto(greeting, parse_address(robot.address))
        assert robot.command(0.2) is None
        robot.observation([7.0])
        assert link.read(0.5).values == (7.0,)
    link.write(Command([1.0], Mode.RUN))
    assert robot.command(0.5).values == [1.0]


def test_what_a_link_sent_itself_is_nothing_to_it(robot: UdpRobot, link: UdpLink) -> None:
    endpoint = link._socket.endpoint
    assert endpoint.read(endpoint.message(Kind.GREETING)) is None
    assert endpoint.dropped == {"from this process": 1}


def test_a_stop_that_was_lost_comes_with_every_observation(robot: UdpRobot, link: UdpLink) -> None:
    robot.stop()
    link._socket.messages(0.2)  # lost
    assert link.stop_requested == ""
    robot.observation([1.0], first=True)
    found = link.read(0.5)
    assert (found.values, found.first) == ((1.0,), True)
    assert link.stop_requested == "the robot's side asked for it"
    robot.reset()
    robot.observation([1.0])
    assert link.read(0.5).first is False
    assert link.stop_requested == ""
    assert link.take_reset()


def test_a_robot_whose_program_began_anew_is_a_stop(robot: UdpRobot, link: UdpLink) -> None:
    robot.close()
    again = UdpRobot(robot.address, KEY)
    try:
        time.sleep(0.12)
        assert link.read(0.05) is None  # it greets
        meet_again(again, link)
        assert link.stop_requested == "the robot's program began anew"
    finally:
        again.close()


def test_how_long_a_robot_was_told_nothing(robot: UdpRobot, link: UdpLink) -> None:
    assert robot.silence_s == math.inf
    link.write(Command([1.0], Mode.RUN))
    robot.command(0.5)
    assert robot.silence_s < 0.5
    time.sleep(0.02)
    assert robot.silence_s >= 0.02


def test_a_robot_that_is_gone_is_silence(robot: UdpRobot, link: UdpLink) -> None:
    robot.close()
    link.write(Command([1.0], Mode.RUN))
    link.write(Command([1.0], Mode.RUN))
    assert link.read(0.05) is None


@pytest.mark.parametrize("text", ["host", "host:", ":90", "host:port", "host:99999"])
def test_addresses_have_host_and_port(text: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        parse_address(text)


def test_a_taken_port_is_told(robot: UdpRobot) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        UdpRobot(robot.address, KEY)

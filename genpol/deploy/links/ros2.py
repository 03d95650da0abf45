"""Robots of ros2_control, over DDS and without a ROS installation.

Observations are ``sensor_msgs/JointState`` messages, whose numbers are found by the contract's
names ``JOINT.position``, ``JOINT.velocity`` and ``JOINT.effort``; or, for whatever else a policy
sees, whole vectors in the contract's order as ``std_msgs/Float64MultiArray``. Commands are
``Float64MultiArray`` for forward command controllers or ``JointTrajectory`` of one point, a period
ahead, for joint trajectory controllers. The modes hold, damp and stop are in the numbers alone.
``std_msgs/Bool`` on ``/genpol/stop`` stops the robot with true, and a false behind that lets it go
on, also after a stop for another reason.

A forward command controller goes on with the last command it was told if the controller's computer
dies: set a command timeout on the robot's side.

DDS is not authenticated here: whoever is in the domain may command. Keep robots in a network of
their own, or take ``link=udp``, which is signed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from genpol.deploy.contract import Contract
from genpol.deploy.links.ages import Ages
from genpol.deploy.links.base import Link, Observed
from genpol.deploy.safety import Command
from genpol.errors import ConfigError, require
from genpol.settings import at_least, one_of

FIELDS = ("position", "velocity", "effort")
COMMANDS = ("array", "trajectory")

_STOP_TOPIC = "/genpol/stop"
_MOST = 64  # messages that are taken at once


class Ros2Link(Link):
    """The controller's side.

    Args:
        contract: What is observed and commanded.
        controller: Topic of the commands' controller, ``/forward_position_controller`` say, in
            whose namespace the commands are sent: ``commands`` or ``joint_trajectory``.
        command: ``array`` or ``trajectory``.
        states: Topic of the joint states.
        observations: Topic of whole observations; empty where joint states are all that is seen.
        domain: DDS domain, ROS_DOMAIN_ID.
        peers: Addresses to look at, with commas, where multicast is not to be had; empty for
            multicast, or for what CYCLONEDDS_URI says.

    Raises:
        ConfigError: If the contract's names or interfaces do not suit the topics.
        MissingExtraError: If cyclonedds is not installed.
    """

    def __init__(
        self,
        contract: Contract,
        *,
        controller: str = "/forward_position_controller",
        command: str = "array",
        states: str = "/joint_states",
        observations: str = "",
        domain: int = 0,
        peers: str = "",
    ) -> None:
        one_of("command", command, COMMANDS)
        at_least("domain", domain, 0)
        topics = {"controller": controller, "states": states, "observations": observations or "/"}
        for name, topic in topics.items():
            if topic == "/" and name == "observations":
                continue
            if not topic.startswith("/") or topic.endswith("/"):
                raise ConfigError(f"{name} = {topic!r}: topics are written /like/this")
        self._places = [] if observations else _places(contract)
        self._width = len(contract.observation)
        self._joints = [joint.name for joint in contract.action]
        if command == "trajectory" and {x.interface for x in contract.action} != {"position"}:
            raise ConfigError(
                "command = 'trajectory': is for joints that are told positions; take command=array"
            )
        require("cyclonedds.domain", "ros2")
        self._period_s = contract.period_s
        self._trajectory = command == "trajectory"
        self._command_topic = (
            f"{controller}/{'joint_trajectory' if self._trajectory else 'commands'}"
        )
        self._observation_topic = observations or states
        self._whole = bool(observations)
        self._domain = domain
        self._peers = [peer for peer in peers.split(",") if peer]
        self._ages = Ages()
        self._counts = {"unknown joints": 0, "wrong size": 0}
        self._entities: list[Any] = []

    def open(self) -> None:
        """See :class:`~genpol.deploy.links.Link`; a robot may come up later."""
        from cyclonedds.core import InstanceState, ReadCondition, SampleState, ViewState, WaitSet
        from cyclonedds.domain import Domain, DomainParticipant
        from cyclonedds.pub import DataWriter
        from cyclonedds.sub import DataReader
        from cyclonedds.topic import Topic

        from genpol.deploy.links import ros2_messages as ros

        if self._peers:
            self._entities.append(Domain(self._domain, peer_configuration(self._peers)))
        self._participant = DomainParticipant(self._domain)
        seen = ros.Float64MultiArray if self._whole else ros.JointState
        told = ros.JointTrajectory if self._trajectory else ros.Float64MultiArray
        qos = _qos()
        self._reader = DataReader(
            self._participant,
            Topic(self._participant, f"rt{self._observation_topic}", seen),
            qos["read"],
        )
        self._writer = DataWriter(
            self._participant,
            Topic(self._participant, f"rt{self._command_topic}", told),
            qos["write"],
        )
        self._condition = ReadCondition(
            self._reader, SampleState.NotRead | ViewState.Any | InstanceState.Any
        )
        self._stops = DataReader(
            self._participant, Topic(self._participant, f"rt{_STOP_TOPIC}", ros.Bool), qos["read"]
        )
        self._waiting = WaitSet(self._participant)
        self._waiting.attach(self._condition)
        self._messages = ros

    def read(self, timeout_s: float) -> Observed | None:
        """See :class:`~genpol.deploy.links.Link`."""
        deadline = time.monotonic() + timeout_s
        self._heed_stops()
        while True:
            found = self._newest()
            left = deadline - time.monotonic()
            if found is not None or left <= 0.0:
                return found
            self._waiting.wait(max(1, int(left * 1e9)))

    def write(self, command: Command) -> None:
        """See :class:`~genpol.deploy.links.Link`."""
        ros = self._messages
        if not self._trajectory:
            self._writer.write(ros.Float64MultiArray(data=command.values))
            return
        seconds = int(self._period_s)
        ahead = ros.Duration(seconds, round((self._period_s - seconds) * 1e9))
        point = ros.JointTrajectoryPoint(positions=command.values, time_from_start=ahead)
        # A header of zeros: carry it out when it comes.
        self._writer.write(ros.JointTrajectory(joint_names=self._joints, points=[point]))

    def statistics(self) -> dict[str, int]:
        """See :class:`~genpol.deploy.links.Link`."""
        return dict(self._counts)

    def close(self) -> None:
        """See :class:`~genpol.deploy.links.Link`."""
        for name in ("_waiting", "_condition", "_stops", "_reader", "_writer", "_participant"):
            if hasattr(self, name):
                delattr(self, name)
        self._entities.clear()

    def _heed_stops(self) -> None:
        stops: list[Any] = self._stops.take(_MOST)
        for message in stops:
            if message.sample_info.valid_data:
                # Only what follows a stop is a reset: a robot may say no again and again.
                self._reset |= bool(self._stop) and not message.data
                self._stop = f"{_STOP_TOPIC} asked for it" if message.data else ""

    def _newest(self) -> Observed | None:
        newest = None
        messages: list[Any] = self._reader.take(_MOST)
        for message in messages:
            now = time.monotonic()
            if not hasattr(message, "sample_info") or not message.sample_info.valid_data:
                continue
            if self._whole:
                values: Sequence[float] | None = message.data
                measured = now
                if len(message.data) != self._width:
                    self._counts["wrong size"] += 1
                    values = None
            else:
                values = self._of_joints(message)
                stamp = message.header.stamp
                stamp_s = stamp.sec + 1e-9 * stamp.nanosec
                # Zero is what a robot says that does not stamp.
                measured = now - self._ages.age(stamp_s, now) if stamp_s else now
            if values is not None:
                newest = Observed(tuple(values), measured)
        return newest

    def _of_joints(self, message: Any) -> list[float] | None:
        places = {name: index for index, name in enumerate(message.name)}
        values = []
        for joint, field in self._places:
            numbers = getattr(message, field)
            place = places.get(joint, -1)
            if not 0 <= place < len(numbers):
                self._counts["unknown joints"] += 1
                return None
            values.append(numbers[place])
        return values


def _places(contract: Contract) -> list[tuple[str, str]]:
    """Return joint and field of each observation."""
    found = []
    for channel in contract.observation:
        joint, _, name = channel.name.rpartition(".")
        if not joint or name not in FIELDS:
            raise ConfigError(
                f"link=ros2: observation {channel.name!r} is no JOINT.position, JOINT.velocity or "
                "JOINT.effort; name it in robot=<file> of genpol export, or send whole "
                "observations: observations=/topic"
            )
        found.append((joint, name))
    return found


def peer_configuration(peers: Sequence[str]) -> str:
    """Return the configuration of Cyclone DDS that looks at these addresses alone."""
    entries = "".join(f'<Peer Address="{peer}"/>' for peer in peers)
    return (
        "<CycloneDDS><Domain><General><AllowMulticast>false</AllowMulticast></General>"
        f"<Discovery><ParticipantIndex>auto</ParticipantIndex><Peers>{entries}</Peers></Discovery>"
        "</Domain></CycloneDDS>"
    )


def _qos() -> dict[str, Any]:
    """Return how topics are read and written: the newest counts, as ROS encodes it."""
    from cyclonedds.core import Policy, Qos
    from cyclonedds.util import duration

    encoding = Policy.DataRepresentation(
        use_cdrv0_representation=True, use_xcdrv2_representation=False
    )
    newest = Policy.History.KeepLast(1)
    return {
        "read": Qos(Policy.Reliability.BestEffort, newest, encoding),
        "write": Qos(Policy.Reliability.Reliable(duration(milliseconds=1)), newest, encoding),
    }

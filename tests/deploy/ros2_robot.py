"""A simulated robot of ros2_control, as a program: it tells its joints 100 times a second.

It stands wherever it was told last, and writes down every command as a line of JSON. It ends when
its standard input does.
"""

from __future__ import annotations

import json
import select
import sys
import time
from typing import Any

from cyclonedds.core import Policy, Qos
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

from genpol.deploy.links import ros2_messages as ros
from genpol.deploy.links.ros2 import peer_configuration

_PERIOD_S = 0.01


class Robot:
    """The robot.

    Args:
        given: ``domain``; ``joints``, the names that it tells, in its order; ``stands``, where all
            of its joints stand; ``controlled``, the joints that are commanded, in the controller's
            order; ``trajectory``, whether by trajectories; ``stamp_s``, what its clock is ahead.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        domain = given["domain"]
        self._given = given
        self._stands: dict[str, float] = dict(given["stands"])
        self._moves = dict.fromkeys(self._stands, 0.0)
        self._domain = Domain(domain, peer_configuration(["127.0.0.1"]))
        participant = DomainParticipant(domain)
        # As ros2_control's own topics: reliable, and in the encoding of ROS.
        qos = Qos(
            Policy.Reliability.Reliable(duration(milliseconds=10)),
            Policy.History.KeepLast(100),
            Policy.DataRepresentation(
                use_cdrv0_representation=True, use_xcdrv2_representation=False
            ),
        )
        kind = ros.JointTrajectory if given["trajectory"] else ros.Float64MultiArray
        name = "joint_trajectory" if given["trajectory"] else "commands"
        self._commands = DataReader(
            participant, Topic(participant, f"rt/arm_controller/{name}", kind), qos
        )
        self._states = DataWriter(
            participant, Topic(participant, "rt/joint_states", ros.JointState), qos
        )

    def obey(self) -> None:
        """Go where the commands say."""
        for message in self._commands.take(100):
            if not message.sample_info.valid_data:
                continue
            if self._given["trajectory"]:
                (point,) = message.points
                joints, values = message.joint_names, list(point.positions)
                more = {
                    "ahead_s": point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec,
                    "stamp": [message.header.stamp.sec, message.header.stamp.nanosec],
                    "rest": [list(point.velocities), list(point.accelerations)],
                }
            else:
                joints, values, more = self._given["controlled"], list(message.data), {}
            record = {"joints": list(joints), "values": values, **more}
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()
            for joint, value in zip(joints, values, strict=True):
                self._moves[joint] = (value - self._stands[joint]) / _PERIOD_S
                self._stands[joint] = value

    def tell(self) -> None:
        """Tell where the joints stand."""
        seconds = time.time() + self._given["stamp_s"]
        stamp = ros.Time(int(seconds), int(1e9 * (seconds % 1.0)))
        joints = self._given["joints"]
        # Noise below any encoder's, so that the sensors do not seem frozen.
        noise = 1e-9 * (time.monotonic_ns() % 1000)
        self._states.write(
            ros.JointState(
                header=ros.Header(stamp, "base"),
                name=joints,
                position=[self._stands[joint] + noise for joint in joints],
                velocity=[self._moves[joint] for joint in joints],
            )
        )


def main() -> None:
    """Run until nobody is interested any more."""
    robot = Robot(json.loads(sys.argv[1]))
    due = time.monotonic()
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        robot.obey()
        if time.monotonic() >= due:
            due += _PERIOD_S
            robot.tell()
    robot.obey()


if __name__ == "__main__":
    main()

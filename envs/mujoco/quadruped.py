"""The quadruped of the dm_control suite: walk, run."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import SuiteTask, draw_without_contact, random_rotations

_TIME_LIMIT_S = 20
_LIFT_M = 0.01
_LEGS = ("front_left", "front_right", "back_right", "back_left")


def _model(speed_m_s: float) -> mujoco.MjModel:
    from dm_control.suite import common, quadruped

    # The floor is as long as the robot can walk.
    xml = quadruped.make_model(floor_size=_TIME_LIMIT_S * speed_m_s)
    return mujoco.MjModel.from_xml_string(xml, common.ASSETS)


class Quadruped(SuiteTask):
    """A four-legged robot, its actuators first-order filters, that starts in any orientation.

    Observation (78): joint angles in rad (16), joint velocities in rad/s (16), actuator activations
    (12), torso velocity in its own frame in m/s (3), vertical component of the torso's z-axis (1),
    acceleration in m/s^2 and angular velocity in rad/s of the torso (6), and ``arcsinh`` of forces
    and torques at the toes (24).
    """

    fields: ClassVar = ("xmat", "sensordata", "ncon")

    def __init__(self, *, speed_m_s: float) -> None:
        super().__init__(_model(speed_m_s), control_period_s=0.02, time_limit_s=_TIME_LIMIT_S)
        self._desired_speed = speed_m_s
        self._torso = self.model.body("torso").id
        self._velocity = self.sensor("velocimeter")
        self._imu = self.sensors("imu_accel", "imu_gyro")
        self._toes = self.sensors(
            *(f"{kind}_toe_{leg}" for kind in ("force", "torque") for leg in _LEGS)
        )

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw a rotation and lift the robot from the floor by centimetres until it is clear."""
        sim.qpos[ids, 3:7] = random_rotations(len(ids), generator)
        height = 0.0

        def lift(pending: Tensor) -> None:
            nonlocal height
            sim.qpos[pending, 2] = height
            height += _LIFT_M

        draw_without_contact(sim, ids, lift)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return egocentric state and sensors ``[num_envs, 78]``."""
        sensor = sim.field("sensordata")
        return torch.cat(
            [
                sim.qpos[:, 7:],
                sim.qvel[:, 6:],
                sim.act,
                sensor[:, self._velocity],
                sim.field("xmat")[:, self._torso, 8:],
                sensor[:, self._imu],
                torch.arcsinh(sensor[:, self._toes]),
            ],
            -1,
        )

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return uprightness times forward speed."""
        upright = tolerance(
            sim.field("xmat")[:, self._torso, 8],
            (1.0, float("inf")),
            margin=2,
            value_at_margin=0,
            sigmoid="linear",
        )
        move = tolerance(
            sim.field("sensordata")[:, self._velocity.start],
            (self._desired_speed, float("inf")),
            margin=self._desired_speed,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return upright * move


TASKS = {
    "QuadrupedWalk": partial(Quadruped, speed_m_s=0.5),
    "QuadrupedRun": partial(Quadruped, speed_m_s=5.0),
}

"""The dog of the dm_control suite: walk, run."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import SuiteTask, into_frame, uniform

_TIME_LIMIT_S = 15
_MIN_UPRIGHT_COSINE = math.cos(math.radians(30))
_STAND_HEIGHT_FRACTION = 0.9


def _model(speed_m_s: float) -> mujoco.MjModel:
    from dm_control.suite import dog

    # The floor is as long as the dog can walk.
    return mujoco.MjModel.from_xml_string(*dog.get_model_and_assets(_TIME_LIMIT_S * speed_m_s))


class Dog(SuiteTask):
    """A dog with 38 filtered actuators that starts standing, pushed and tensed at random.

    Observation (223): joint angles in rad (73), joint velocities in rad/s (73), heights of torso
    and pelvis in m (2), vertical components of the axes of skull, torso and pelvis (9), velocity of
    the centre of mass in the torso's frame in m/s (3), acceleration in m/s^2, velocity in m/s and
    angular velocity in rad/s of the head (9), forces at feet and hands in N (12), touch forces of
    palms and soles in N (4), and actuator activations (38).
    """

    fields: ClassVar = ("xmat", "xpos", "sensordata")
    # Activations are drawn at random, and dm_control's first observation of forces ignores them.
    actuated_start: ClassVar = False

    def __init__(self, *, speed_m_s: float) -> None:
        super().__init__(_model(speed_m_s), control_period_s=0.015, time_limit_s=_TIME_LIMIT_S)
        self._desired_speed = speed_m_s
        self._torso, self._pelvis, self._skull = self.bodies("torso", "pelvis", "skull")
        self._inertial = self.sensors("accelerometer", "velocimeter", "gyro")
        self._forces = self.sensors("foot_L", "foot_R", "hand_L", "hand_R")
        self._touch = self.sensors("palm_L", "palm_R", "sole_L", "sole_R")
        self._velocity = self.sensor("torso_linvel")
        weight = -self.model.opt.gravity[2] * self.model.body_subtreemass[self._torso]
        self._weight = float(weight)
        data = mujoco.MjData(self.model)
        mujoco.mj_kinematics(self.model, data)
        self._stand_height = [
            float(data.xpos[body, 2]) * _STAND_HEIGHT_FRACTION
            for body in (self._torso, self._pelvis)
        ]

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw heading, horizontal velocity, turning rate and activations."""
        count = len(ids)
        half_azimuth = uniform(0, 2 * math.pi, (count,), generator) / 2
        sim.qpos[ids, 3] = half_azimuth.cos()
        sim.qpos[ids, 6] = half_azimuth.sin()
        velocity = 2 * torch.randn(count, 3, generator=generator, dtype=torch.float64)
        sim.qvel[ids[:, None], torch.tensor([0, 1, 5])] = velocity
        activation = uniform(-1, 1, (count, self.action_dim), generator)
        sim.act[ids] = self._control_centre + activation * self._control_half_range

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return joints, posture, sensors and activations ``[num_envs, 223]``."""
        xpos, xmat, sensor = sim.field("xpos"), sim.field("xmat"), sim.field("sensordata")
        return torch.cat(
            [
                sim.qpos[:, 7:],
                sim.qvel[:, 6:],
                xpos[:, [self._torso, self._pelvis], 2],
                xmat[:, [self._skull, self._torso, self._pelvis], 6:].flatten(1),
                self._velocity_in_torso(sim),
                sensor[:, self._inertial],
                sensor[:, self._forces],
                sensor[:, self._touch],
                sim.act,
            ],
            -1,
        )

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return the product of posture, ground contact and forward speed."""
        forward = tolerance(
            self._velocity_in_torso(sim)[:, 0],
            (self._desired_speed, 2 * self._desired_speed),
            margin=max(1.0, self._desired_speed),
            value_at_margin=0,
            sigmoid="linear",
        )
        return self._stand_reward(sim) * (4 * forward + 1) / 5

    def _stand_reward(self, sim: BatchedSimulation) -> Tensor:
        xpos, xmat = sim.field("xpos"), sim.field("xmat")
        torso, pelvis = (
            tolerance(xpos[:, body, 2], (height, float("inf")), margin=height)
            for body, height in zip((self._torso, self._pelvis), self._stand_height, strict=True)
        )
        upright = tolerance(
            xmat[:, [self._skull, self._torso, self._pelvis], 8],
            (_MIN_UPRIGHT_COSINE, float("inf")),
            margin=_MIN_UPRIGHT_COSINE + 1,
            value_at_margin=0,
            sigmoid="linear",
        )
        touch = tolerance(
            sim.field("sensordata")[:, self._touch].sum(-1),
            (self._weight, float("inf")),
            margin=self._weight,
            value_at_margin=0.9,
            sigmoid="linear",
        )
        return torso * pelvis * upright.prod(-1) * touch

    def _velocity_in_torso(self, sim: BatchedSimulation) -> Tensor:
        velocity = sim.field("sensordata")[:, self._velocity]
        return into_frame(velocity, sim.field("xmat")[:, self._torso])


TASKS = {
    "DogWalk": partial(Dog, speed_m_s=1.0),
    "DogRun": partial(Dog, speed_m_s=9.0),
}

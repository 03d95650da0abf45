"""The planar walker of the dm_control suite: stand, walk, run."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import JointRandomizer, SuiteTask

_STAND_HEIGHT_M = 1.2


class Walker(SuiteTask):
    """A planar two-legged walker that starts in any pose.

    Observation (24): horizontal and vertical components of each body's x-axis (14), torso height in
    m (1), and velocities in m/s and rad/s (9).
    """

    fields: ClassVar = ("xmat", "xpos", "sensordata")

    def __init__(self, *, speed_m_s: float) -> None:
        super().__init__("walker.xml", control_period_s=0.025, time_limit_s=25)
        self._desired_speed = speed_m_s
        self._randomize = JointRandomizer(self.model)
        self._torso = self.model.body("torso").id
        self._speed = self.sensor("torso_subtreelinvel").start

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw every joint and the pitch uniformly; the walker falls to the floor."""
        self._randomize(sim, ids, generator)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return orientations, height and velocities ``[num_envs, 24]``."""
        orientations = sim.field("xmat")[:, 1:, [0, 2]].flatten(1)
        height = sim.field("xpos")[:, self._torso, 2:]
        return torch.cat([orientations, height, sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return standing upright (stand), times forward speed (walk, run)."""
        standing = tolerance(
            sim.field("xpos")[:, self._torso, 2],
            (_STAND_HEIGHT_M, float("inf")),
            margin=_STAND_HEIGHT_M / 2,
        )
        upright = (1 + sim.field("xmat")[:, self._torso, 8]) / 2
        stand = (3 * standing + upright) / 4
        if self._desired_speed == 0:
            return stand
        move = tolerance(
            sim.field("sensordata")[:, self._speed],
            (self._desired_speed, float("inf")),
            margin=self._desired_speed / 2,
            value_at_margin=0.5,
            sigmoid="linear",
        )
        return stand * (5 * move + 1) / 6


TASKS = {
    "WalkerStand": partial(Walker, speed_m_s=0.0),
    "WalkerWalk": partial(Walker, speed_m_s=1.0),
    "WalkerRun": partial(Walker, speed_m_s=8.0),
}

"""The acrobot of the dm_control suite: swing up."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import SuiteTask, uniform


class Acrobot(SuiteTask):
    """A double pendulum driven at the elbow that must raise its tip to the target.

    Observation (6): horizontal (2) and vertical (2) components of the axes of upper and lower arm,
    and joint velocities in rad/s (2).
    """

    fields: ClassVar = ("xmat", "site_xpos")

    def __init__(self) -> None:
        super().__init__("acrobot.xml", control_period_s=0.01, time_limit_s=10)
        self._arms = self.bodies("upper_arm", "lower_arm")
        self._tip, self._target = self.model.site("tip").id, self.model.site("target").id
        self._target_radius = float(self.model.site_size[self._target, 0])

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw both angles uniformly from the full circle."""
        sim.qpos[ids] = uniform(-math.pi, math.pi, (len(ids), 2), generator)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return orientations and velocities ``[num_envs, 6]``."""
        xmat = sim.field("xmat")[:, self._arms]
        return torch.cat([xmat[..., 2], xmat[..., 8], sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 with the tip in the target, falling off over 1 m."""
        site = sim.field("site_xpos")
        distance = (site[:, self._target] - site[:, self._tip]).norm(dim=-1)
        return tolerance(distance, (0.0, self._target_radius), margin=1)


TASKS = {"AcrobotSwingup": Acrobot}

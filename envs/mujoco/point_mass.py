"""The point mass of the dm_control suite: easy."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import JointRandomizer, SuiteTask


class PointMass(SuiteTask):
    """A point mass in the plane that must reach the target in the centre.

    Observation (4): position in m (2) and velocity in m/s (2).
    """

    fields: ClassVar = ("geom_xpos",)

    def __init__(self) -> None:
        super().__init__("point_mass.xml", control_period_s=0.02, time_limit_s=20)
        self._randomize = JointRandomizer(self.model)
        self._mass, self._target = self.model.geom("pointmass").id, self.model.geom("target").id
        self._target_radius = float(self.model.geom_size[self._target, 0])

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw the position uniformly from the arena."""
        self._randomize(sim, ids, generator)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return position and velocity ``[num_envs, 4]``."""
        return torch.cat([sim.qpos, sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return closeness to the target times small control."""
        position = sim.field("geom_xpos")
        distance = (position[:, self._target] - position[:, self._mass]).norm(dim=-1)
        near = tolerance(distance, (0.0, self._target_radius), margin=self._target_radius)
        small_control = tolerance(sim.ctrl, margin=1, value_at_margin=0, sigmoid="quadratic")
        return near * ((small_control.mean(-1) + 4) / 5)


TASKS = {"PointMassEasy": PointMass}

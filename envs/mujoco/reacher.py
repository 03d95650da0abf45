"""The reacher of the dm_control suite: easy, hard."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import JointRandomizer, SuiteTask, uniform


class Reacher(SuiteTask):
    """A planar two-joint arm whose finger must reach a target.

    Observation (6): joint angles in rad (2), target from the finger in m (2), and joint velocities
    in rad/s (2).
    """

    fields: ClassVar = ("geom_xpos",)
    expanded: ClassVar = ("geom_pos",)

    def __init__(self, *, target_radius_m: float) -> None:
        super().__init__("reacher.xml", control_period_s=0.02, time_limit_s=20)
        self._randomize = JointRandomizer(self.model)
        self._finger, self._target = self.model.geom("finger").id, self.model.geom("target").id
        self.model.geom_size[self._target, 0] = target_radius_m
        self._reach = float(self.model.geom_size[[self._target, self._finger], 0].sum())

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw the joints, and the target 5 to 20 cm from the shoulder."""
        self._randomize(sim, ids, generator)
        angle = uniform(0, 2 * math.pi, (len(ids),), generator)
        radius = uniform(0.05, 0.20, (len(ids),), generator)
        position = sim.model_field("geom_pos")
        position[ids, self._target, 0] = radius * angle.sin()
        position[ids, self._target, 1] = radius * angle.cos()

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return angles, target and velocities ``[num_envs, 6]``."""
        return torch.cat([sim.qpos, self._finger_to_target(sim), sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 while finger and target overlap, else 0."""
        return tolerance(self._finger_to_target(sim).norm(dim=-1), (0.0, self._reach))

    def _finger_to_target(self, sim: BatchedSimulation) -> Tensor:
        position = sim.field("geom_xpos")
        return position[:, self._target, :2] - position[:, self._finger, :2]


TASKS = {
    "ReacherEasy": partial(Reacher, target_radius_m=0.05),
    "ReacherHard": partial(Reacher, target_radius_m=0.015),
}

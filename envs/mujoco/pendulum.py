"""The pendulum of the dm_control suite: swing up."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import SuiteTask, uniform

_COSINE_BOUND = math.cos(math.radians(8))


class Pendulum(SuiteTask):
    """A weak-motored pendulum that must be swung up and balanced.

    Observation (3): cosine and sine of the pole's angle, and angular velocity in rad/s.
    """

    fields: ClassVar = ("xmat",)

    def __init__(self) -> None:
        super().__init__("pendulum.xml", control_period_s=0.02, time_limit_s=20)
        self._pole = self.model.body("pole").id

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw the angle uniformly from the full circle."""
        sim.qpos[ids] = uniform(-math.pi, math.pi, (len(ids), 1), generator)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return orientation and velocity ``[num_envs, 3]``."""
        return torch.cat([sim.field("xmat")[:, self._pole][:, [8, 2]], sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 within 8 degrees of upright, else 0."""
        return tolerance(sim.field("xmat")[:, self._pole, 8], (_COSINE_BOUND, 1.0))


TASKS = {"PendulumSwingup": Pendulum}

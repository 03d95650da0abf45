"""The cheetah of the dm_control suite: run."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation, Stage
from genpol.envs.mujoco.suite import SuiteTask

_RUN_SPEED_M_S = 10.0
_SETTLING_STEPS = 200


class Cheetah(SuiteTask):
    """A planar two-legged runner that starts settled on the floor.

    Observation (17): positions without the horizontal one, in m and rad (8), and velocities (9).
    """

    fields: ClassVar = ("sensordata",)

    def __init__(self) -> None:
        super().__init__("cheetah.xml", control_period_s=0.01, time_limit_s=10)
        limited = torch.from_numpy(self.model.jnt_limited.astype(bool))
        self._limited = limited.nonzero().view(-1)
        self._low, high = torch.from_numpy(self.model.jnt_range.copy())[limited].unbind(-1)
        self._range = high - self._low
        self._speed = self.sensor("torso_subtreelinvel").start

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw the legs' joints uniformly and let the cheetah fall and settle."""
        draw = torch.rand(len(ids), len(self._limited), generator=generator, dtype=torch.float64)
        start = sim.qpos[ids]
        start[:, self._limited] = self._low + draw * self._range
        # dm_control's first settling step takes the forces of the default pose, which are the
        # last it has computed, and applies them at the pose just drawn.
        sim.step(1, Stage.NONE, ids)
        sim.qpos[ids] = start + self.model.opt.timestep * sim.qvel[ids]
        sim.step(_SETTLING_STEPS - 1, Stage.NONE, ids)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions and velocities ``[num_envs, 17]``."""
        return torch.cat([sim.qpos[:, 1:], sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return the forward speed as a share of 10 m/s, at most 1."""
        return tolerance(
            sim.field("sensordata")[:, self._speed],
            (_RUN_SPEED_M_S, float("inf")),
            margin=_RUN_SPEED_M_S,
            value_at_margin=0,
            sigmoid="linear",
        )


TASKS = {"CheetahRun": Cheetah}

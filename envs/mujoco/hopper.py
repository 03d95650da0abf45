"""The hopper of the dm_control suite: stand, hop."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import JointRandomizer, SuiteTask

_STAND_HEIGHT_M = 0.6
_HOP_SPEED_M_S = 2.0


class Hopper(SuiteTask):
    """A planar one-legged robot that starts in any pose, lying included.

    Observation (15): joint positions without the horizontal one (6), velocities (7), and
    ``log(1 + force)`` of the touch sensors of toe and heel (2).
    """

    fields: ClassVar = ("xipos", "sensordata")

    def __init__(self, *, hopping: bool) -> None:
        super().__init__("hopper.xml", control_period_s=0.02, time_limit_s=20)
        self._hopping = hopping
        self._randomize = JointRandomizer(self.model)
        self._torso, self._foot = self.model.body("torso").id, self.model.body("foot").id
        self._touch = [self.sensor("touch_toe").start, self.sensor("touch_heel").start]
        self._speed = self.sensor("torso_subtreelinvel").start

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw every joint uniformly; the hopper may start upside down."""
        self._randomize(sim, ids, generator)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions, velocities and touch ``[num_envs, 15]``."""
        touch = torch.log1p(sim.field("sensordata")[:, self._touch])
        return torch.cat([sim.qpos[:, 1:], sim.qvel, touch], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return standing times small control (stand) or forward speed (hop)."""
        height = sim.field("xipos")[:, self._torso, 2] - sim.field("xipos")[:, self._foot, 2]
        standing = tolerance(height, (_STAND_HEIGHT_M, 2.0))
        if self._hopping:
            return standing * tolerance(
                sim.field("sensordata")[:, self._speed],
                (_HOP_SPEED_M_S, float("inf")),
                margin=_HOP_SPEED_M_S / 2,
                value_at_margin=0.5,
                sigmoid="linear",
            )
        small_control = tolerance(sim.ctrl, margin=1, value_at_margin=0, sigmoid="quadratic")
        return standing * (small_control.mean(-1) + 4) / 5


TASKS = {
    "HopperStand": partial(Hopper, hopping=False),
    "HopperHop": partial(Hopper, hopping=True),
}

"""The finger of the dm_control suite: spin, turn easy, turn hard."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import JointRandomizer, SuiteTask, draw_without_contact, uniform

_SPIN_DAMPING = 0.03
_SPIN_SPEED_RAD_S = 15.0


class _Finger(SuiteTask):
    """A planar two-joint finger beside a body on a hinge."""

    fields: ClassVar = ("sensordata", "ncon")

    def __init__(self) -> None:
        super().__init__("finger.xml", control_period_s=0.02, time_limit_s=20)
        self._randomize = JointRandomizer(self.model)
        self._joints = self.sensors("proximal", "distal")
        self._velocity = self.sensors("proximal_velocity", "distal_velocity", "hinge_velocity")
        self._touch = self.sensors("touchtop", "touchbottom")
        self._tip, self._target, self._spinner = (
            [self.sensor(name).start, self.sensor(name).start + 2]  # x and z
            for name in ("tip", "target", "spinner")
        )

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw every joint uniformly where finger and body do not touch."""
        draw_without_contact(sim, ids, lambda pending: self._randomize(sim, pending, generator))

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return finger angles, tip, velocities and touch ``[num_envs, 9]``."""
        sensor = sim.field("sensordata")
        tip = sensor[:, self._tip] - sensor[:, self._spinner]
        touch = torch.log1p(sensor[:, self._touch])
        return torch.cat([sensor[:, self._joints], tip, sensor[:, self._velocity], touch], -1)


class FingerSpin(_Finger):
    """A finger that must spin the body fast.

    Observation (9): finger joint angles in rad (2), x and z of the body's tip from its hinge in m
    (2), velocities of finger joints and hinge in rad/s (3), ``log(1 + force)`` of the touch sensors
    on top and bottom of the fingertip (2).
    """

    def __init__(self) -> None:
        super().__init__()
        self.model.dof_damping[int(self.model.joint("hinge").dofadr[0])] = _SPIN_DAMPING
        for site in ("target", "tip"):  # shown in the turning tasks only
            self.model.site_rgba[self.model.site(site).id, 3] = 0

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 while the hinge turns at -15 rad/s or faster, else 0."""
        hinge_velocity = sim.field("sensordata")[:, self._velocity[-1]]
        return (hinge_velocity <= -_SPIN_SPEED_RAD_S).double()


class FingerTurn(_Finger):
    """A finger that must turn the body's tip into the target on the circle around its hinge.

    Observation (12): as :class:`FingerSpin` (9), x and z of the target from the hinge in m (2), and
    distance from the tip to the target's surface in m, negative inside (1).
    """

    expanded: ClassVar = ("site_pos",)

    def __init__(self, *, target_radius_m: float) -> None:
        super().__init__()
        self._target_radius = target_radius_m
        self._target_site = self.model.site("target").id
        self.model.site_size[self._target_site, 0] = target_radius_m
        hinge = self.model.body("spinner").pos
        self._hinge = (float(hinge[0]), float(hinge[2]))
        self._circle_radius = float(self.model.geom("cap1").size.sum())

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw the target's angle uniformly, then the joints."""
        angle = uniform(-math.pi, math.pi, (len(ids),), generator)
        position = sim.model_field("site_pos")
        position[ids, self._target_site, 0] = self._hinge[0] + self._circle_radius * angle.sin()
        position[ids, self._target_site, 2] = self._hinge[1] + self._circle_radius * angle.cos()
        super().initialize(sim, ids, generator)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return the finger's entries, target position and distance ``[num_envs, 12]``."""
        sensor = sim.field("sensordata")
        target = sensor[:, self._target] - sensor[:, self._spinner]
        return torch.cat([super().observe(sim), target, self._distance(sim).unsqueeze(-1)], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 with the tip in the target, else 0."""
        return (self._distance(sim) <= 0).double()

    def _distance(self, sim: BatchedSimulation) -> Tensor:
        sensor = sim.field("sensordata")
        target, tip = (sensor[:, x] - sensor[:, self._spinner] for x in (self._target, self._tip))
        return (target - tip).norm(dim=-1) - self._target_radius


TASKS = {
    "FingerSpin": FingerSpin,
    "FingerTurnEasy": partial(FingerTurn, target_radius_m=0.07),
    "FingerTurnHard": partial(FingerTurn, target_radius_m=0.03),
}

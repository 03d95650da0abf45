"""The ball-in-cup of the dm_control suite: catch."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import SuiteTask, draw_without_contact, uniform

_X, _Z = 0, 2


class BallInCup(SuiteTask):
    """A planar cup that must swing the ball hanging from it into itself.

    Observation (8): positions in m (4) and velocities in m/s (4), each of cup x, z and ball x, z.
    """

    fields: ClassVar = ("site_xpos", "xpos", "ncon")

    def __init__(self) -> None:
        super().__init__("ball_in_cup.xml", control_period_s=0.02, time_limit_s=20)
        self._ball, self._target = self.model.body("ball").id, self.model.site("target").id
        self._ball_joints = [
            int(self.model.joint(name).qposadr[0]) for name in ("ball_x", "ball_z")
        ]
        target_size = torch.from_numpy(self.model.site_size[self._target].copy())
        self.constants["reach"] = target_size[[_X, _Z]] - float(self.model.geom("ball").size[0])

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Place the ball uniformly where it touches nothing."""
        x, z = self._ball_joints

        def draw(pending: Tensor) -> None:
            sim.qpos[pending, x] = uniform(-0.2, 0.2, (len(pending),), generator)
            sim.qpos[pending, z] = uniform(0.2, 0.5, (len(pending),), generator)

        draw_without_contact(sim, ids, draw)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions and velocities ``[num_envs, 8]``."""
        return torch.cat([sim.qpos, sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 with the whole ball in the cup, else 0."""
        offset = sim.field("site_xpos")[:, self._target] - sim.field("xpos")[:, self._ball]
        return (offset[:, [_X, _Z]].abs() < self.constants["reach"]).all(-1).double()


TASKS = {"BallInCup": BallInCup}

"""The cart-pole of the dm_control suite: balance and swing-up, dense and sparse."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import SuiteTask, uniform

_CART_RANGE_M = (-0.25, 0.25)
_ANGLE_COSINE_RANGE = (0.995, 1.0)


class Cartpole(SuiteTask):
    """A cart that must hold the pole on its hinge upright.

    Observation (5): cart position in m, cosine and sine of the pole's angle, cart velocity in m/s
    and angular velocity in rad/s.
    """

    fields: ClassVar = ("xmat",)

    def __init__(self, *, swing_up: bool, sparse: bool) -> None:
        super().__init__("cartpole.xml", control_period_s=0.01, time_limit_s=10)
        self._swing_up = swing_up
        self._sparse = sparse
        self._pole = self.model.body("pole_1").id

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Start near the hanging (swing-up) or upright (balance) rest, slightly moving."""
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        count = len(ids)
        if self._swing_up:
            sim.qpos[ids] = 0.01 * randn(count, 2)
            sim.qpos[ids, 1] += math.pi
        else:
            sim.qpos[ids, 0] = uniform(-0.1, 0.1, (count,), generator)
            sim.qpos[ids, 1] = uniform(-0.034, 0.034, (count,), generator)
        sim.qvel[ids] = 0.01 * randn(count, 2)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return the state with the angle as cosine and sine ``[num_envs, 5]``."""
        pole = sim.field("xmat")[:, self._pole]
        return torch.cat([sim.qpos[:, :1], pole[:, [8, 2]], sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return uprightness, shaped by position, control and velocity unless sparse."""
        cart, cosine = sim.qpos[:, 0], sim.field("xmat")[:, self._pole, 8]
        if self._sparse:
            return tolerance(cart, _CART_RANGE_M) * tolerance(cosine, _ANGLE_COSINE_RANGE)
        upright = (cosine + 1) / 2
        centered = (1 + tolerance(cart, margin=2)) / 2
        small_control = tolerance(sim.ctrl[:, 0], margin=1, value_at_margin=0, sigmoid="quadratic")
        small_velocity = (1 + tolerance(sim.qvel[:, 1], margin=5)) / 2
        return upright * ((4 + small_control) / 5) * small_velocity * centered


TASKS = {
    "CartpoleBalance": partial(Cartpole, swing_up=False, sparse=False),
    "CartpoleBalanceSparse": partial(Cartpole, swing_up=False, sparse=True),
    "CartpoleSwingup": partial(Cartpole, swing_up=True, sparse=False),
    "CartpoleSwingupSparse": partial(Cartpole, swing_up=True, sparse=True),
}

"""gymnasium's inverted pendulums, version 5."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.gymnasium_task import GymnasiumTask
from genpol.envs.mujoco.simulation import BatchedSimulation

_MAX_ANGLE_RAD = 0.2
_MIN_TIP_HEIGHT_M = 1.0


class InvertedPendulum(GymnasiumTask):
    """Keep a pole on a cart within 0.2 rad of upright: reward 1 per step.

    Observation (4): cart position, pole angle, and their velocities.
    """

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Start near upright."""
        self.add_noise(sim, ids, generator, scale=0.01)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions and velocities ``[num_envs, 4]``."""
        return torch.cat([sim.qpos, sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 where the pole stands."""
        return (~self.terminated(sim)).double()

    def terminated(self, sim: BatchedSimulation) -> Tensor:
        """Return which poles fell."""
        return sim.qpos[:, 1].abs() > _MAX_ANGLE_RAD


class InvertedDoublePendulum(GymnasiumTask):
    """Keep the tip of two poles on a cart above 1 m and still.

    Observation (9): cart position, sines and cosines of both angles, clipped velocities (3), and
    the clipped constraint force on the cart.
    """

    fields: ClassVar = ("site_xpos", "qfrc_constraint")

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Start near upright."""
        self.add_noise(sim, ids, generator, scale=0.1, normal_velocity=True)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return cart, angles, velocities and constraint force ``[num_envs, 9]``."""
        angles = sim.qpos[:, 1:]
        velocities = sim.qvel.clamp(-10, 10)
        force = sim.field("qfrc_constraint")[:, :1].clamp(-10, 10)
        return torch.cat([sim.qpos[:, :1], angles.sin(), angles.cos(), velocities, force], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 10 while up, minus the tip's distance from (0, 2) m and the angular speeds."""
        x, _, height = sim.field("site_xpos")[:, 0].unbind(-1)
        distance = 0.01 * x**2 + (height - 2) ** 2
        speed = 1e-3 * sim.qvel[:, 1] ** 2 + 5e-3 * sim.qvel[:, 2] ** 2
        return torch.where(self.terminated(sim), 0.0, 10.0) - distance - speed

    def terminated(self, sim: BatchedSimulation) -> Tensor:
        """Return whose tips are too low."""
        return sim.field("site_xpos")[:, 0, 2] <= _MIN_TIP_HEIGHT_M


TASKS = {
    "InvertedDoublePendulum-v5": partial(
        InvertedDoublePendulum, "inverted_double_pendulum.xml", num_substeps=5
    ),
    "InvertedPendulum-v5": partial(InvertedPendulum, "inverted_pendulum.xml", num_substeps=2),
}

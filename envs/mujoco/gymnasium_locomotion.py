"""gymnasium's runners, version 5: Ant, HalfCheetah, Hopper, Humanoid, Swimmer, Walker2d."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.gymnasium_task import ForwardTask
from genpol.envs.mujoco.simulation import BatchedSimulation

_MAX_VELOCITY = 10.0  # of a joint (rad/s, m/s), as Hopper and Walker2d observe it
_CONTACT_COST_MAX = 10.0


class HalfCheetah(ForwardTask):
    """A planar two-legged cheetah that never falls.

    Observation (17): joint positions without x (8), velocities (9).
    """

    noise_scale: ClassVar = 0.1
    normal_velocity: ClassVar = True
    control_weight: ClassVar = 0.1

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions and velocities ``[num_envs, 17]``."""
        return torch.cat([sim.qpos[:, 1:], sim.qvel], -1)


class Swimmer(ForwardTask):
    """A planar swimmer of three links.

    Observation (8): joint positions without x and y (3), velocities (5).
    """

    noise_scale: ClassVar = 0.1
    control_weight: ClassVar = 1e-4

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions and velocities ``[num_envs, 8]``."""
        return torch.cat([sim.qpos[:, 2:], sim.qvel], -1)


class _Planar(ForwardTask):
    """A planar robot that must stay upright; velocities are observed within ±10."""

    noise_scale: ClassVar = 5e-3
    control_weight: ClassVar = 1e-3
    healthy_reward: ClassVar = 1.0

    def observe(self, sim: BatchedSimulation) -> Tensor:
        velocity = sim.qvel.clamp(-_MAX_VELOCITY, _MAX_VELOCITY)
        return torch.cat([sim.qpos[:, 1:], velocity], -1)


class Hopper(_Planar):
    """A planar robot of one leg; healthy above 0.7 m, within 0.2 rad of upright and in bounds.

    Observation (11): joint positions without x (5), clipped velocities (6).
    """

    def healthy(self, sim: BatchedSimulation) -> Tensor:
        """Return which robots stand, with every coordinate but x and z within ±100."""
        bounded = (sim.qpos[:, 2:].abs() < 100).all(-1) & (sim.qvel.abs() < 100).all(-1)
        return bounded & (sim.qpos[:, 1] > 0.7) & (sim.qpos[:, 2].abs() < 0.2)


class Walker2d(_Planar):
    """A planar robot of two legs; healthy between 0.8 m and 2 m and within 1 rad of upright.

    Observation (17): joint positions without x (8), clipped velocities (9).
    """

    def healthy(self, sim: BatchedSimulation) -> Tensor:
        """Return which robots stand."""
        z, angle = sim.qpos[:, 1], sim.qpos[:, 2]
        return (z > 0.8) & (z < 2.0) & (angle.abs() < 1.0)


class _Spatial(ForwardTask):
    """A robot in space that feels the forces on its bodies."""

    persistent: ClassVar = True

    def allocate(self, num_envs: int) -> None:
        super().allocate(num_envs)
        shape = (num_envs, self.model.nbody, 6)
        self.memory["contact_forces"] = torch.zeros(shape, dtype=torch.float64)

    def after_reset(self, sim: BatchedSimulation, ids: Tensor) -> None:
        super().after_reset(sim, ids)
        # gymnasium computes them after a step only, so that a start feels nothing.
        self.memory["contact_forces"][ids] = 0

    def after_step(self, sim: BatchedSimulation) -> None:
        super().after_step(sim)
        self.memory["contact_forces"].copy_(sim.compute_contact_forces())


class Ant(_Spatial):
    """A robot of four legs; healthy while its torso is between 0.2 m and 1 m high.

    Observation (105): positions without x and y (13), velocities (14), and torques and forces on
    each body (13 x 6) within ±1.
    """

    fields: ClassVar = ("xpos",)
    noise_scale: ClassVar = 0.1
    normal_velocity: ClassVar = True
    control_weight: ClassVar = 0.5
    healthy_reward: ClassVar = 1.0

    def x(self, sim: BatchedSimulation) -> Tensor:
        """Return the torso's x."""
        return sim.field("xpos")[:, 1, 0]

    def healthy(self, sim: BatchedSimulation) -> Tensor:
        """Return which torsos are at a good height."""
        return (sim.qpos[:, 2] >= 0.2) & (sim.qpos[:, 2] <= 1.0)

    def cost(self, sim: BatchedSimulation) -> Tensor:
        """Add the squared clipped contact forces, the world's included."""
        return super().cost(sim) + 5e-4 * self._contact_forces().square().flatten(1).sum(-1)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions, velocities and contact forces ``[num_envs, 105]``."""
        return torch.cat([sim.qpos[:, 2:], sim.qvel, self._contact_forces()[:, 1:].flatten(1)], -1)

    def _contact_forces(self) -> Tensor:
        return self.memory["contact_forces"].clamp(-1, 1)


class Humanoid(_Spatial):
    """A humanoid; healthy while its torso is between 1 m and 2 m high.

    Observation (348): positions without x and y (22), velocities (23), and for each of 13 bodies
    inertia and mass about the centre of mass (10), velocities (6), then actuator forces (17) and
    the bodies' external torques and forces (6).
    """

    fields: ClassVar = ("xipos", "cinert", "cvel", "qfrc_actuator")
    noise_scale: ClassVar = 1e-2
    forward_weight: ClassVar = 1.25
    control_weight: ClassVar = 0.1
    healthy_reward: ClassVar = 5.0

    def __init__(self, filename: str, *, num_substeps: int) -> None:
        super().__init__(filename, num_substeps=num_substeps)
        mass = torch.from_numpy(self.model.body_mass.copy())
        self.constants |= {"mass": mass, "total_mass": mass.sum()}

    def x(self, sim: BatchedSimulation) -> Tensor:
        """Return the centre of mass's x."""
        mass, total = self.constants["mass"], self.constants["total_mass"]
        return (mass * sim.field("xipos")[:, :, 0]).sum(-1) / total

    def healthy(self, sim: BatchedSimulation) -> Tensor:
        """Return which torsos are at a good height."""
        return (sim.qpos[:, 2] > 1.0) & (sim.qpos[:, 2] < 2.0)

    def cost(self, sim: BatchedSimulation) -> Tensor:
        """Add the squared contact forces, at most 10."""
        contact = 5e-7 * self.memory["contact_forces"].square().flatten(1).sum(-1)
        return super().cost(sim) + contact.clamp(max=_CONTACT_COST_MAX)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return positions, velocities, inertias and forces ``[num_envs, 348]``."""
        return torch.cat(
            [
                sim.qpos[:, 2:],
                sim.qvel,
                sim.field("cinert")[:, 1:].flatten(1),
                sim.field("cvel")[:, 1:].flatten(1),
                sim.field("qfrc_actuator")[:, 6:],
                self.memory["contact_forces"][:, 1:].flatten(1),
            ],
            -1,
        )


TASKS = {
    "Ant-v5": partial(Ant, "ant.xml", num_substeps=5),
    "HalfCheetah-v5": partial(HalfCheetah, "half_cheetah.xml", num_substeps=5),
    "Hopper-v5": partial(Hopper, "hopper.xml", num_substeps=4),
    "Humanoid-v5": partial(Humanoid, "humanoid.xml", num_substeps=5),
    "Swimmer-v5": partial(Swimmer, "swimmer.xml", num_substeps=4),
    "Walker2d-v5": partial(Walker2d, "walker2d_v5.xml", num_substeps=4),
}

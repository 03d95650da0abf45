"""gymnasium's arms, version 5: Pusher, Reacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.gymnasium_task import GymnasiumTask, uniform
from genpol.envs.mujoco.simulation import BatchedSimulation

_START_VELOCITY = 0.005


def sample_until(
    draw: Callable[[int], Tensor], accept: Callable[[Tensor], Tensor], n: int
) -> Tensor:
    """Draw ``n`` rows, and again those that ``accept`` (rows to bool) refuses."""
    sample = draw(n)
    while (refused := ~accept(sample)).any():
        sample[refused] = draw(int(refused.sum()))
    return sample


class _Arm(GymnasiumTask):
    """Positions of bodies are gymnasium's: those before the last integration."""

    fields: ClassVar = ("xpos",)

    def _position(self, sim: BatchedSimulation, body: str) -> Tensor:
        return sim.field("xpos")[:, self.model.body(body).id]


class Reacher(_Arm):
    """Bring the fingertip of a planar arm of two links to a target.

    Observation (10): cosines and sines of both angles (4), the target's position (2), angular
    velocities (2), and the vector from target to fingertip (2).
    """

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Start near straight, with the target anywhere in the disc of 0.2 m."""
        n, (nq, nv) = len(ids), (self.model.nq, self.model.nv)
        sim.qpos[ids] += uniform((n, nq), 0.1, generator)
        sim.qpos[ids, -2:] = sample_until(
            lambda count: uniform((count, 2), 0.2, generator),
            lambda goal: goal.norm(dim=-1) < 0.2,
            n,
        )
        sim.qvel[ids] += uniform((n, nv), _START_VELOCITY, generator)
        sim.qvel[ids, -2:] = 0

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return angles, target, velocities and difference ``[num_envs, 10]``."""
        angles = sim.qpos[:, :2]
        difference = self._difference(sim)[:, :2]
        return torch.cat(
            [angles.cos(), angles.sin(), sim.qpos[:, 2:], sim.qvel[:, :2], difference], -1
        )

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return minus the distance (m) and the squared controls."""
        return -self._difference(sim).norm(dim=-1) - sim.ctrl.square().sum(-1)

    def _difference(self, sim: BatchedSimulation) -> Tensor:
        return self._position(sim, "fingertip") - self._position(sim, "target")


class Pusher(_Arm):
    """Push a cylinder with an arm of seven joints to a goal.

    Observation (23): the arm's joint positions (7) and velocities (7), and the positions of
    fingertip, cylinder and goal (9).
    """

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Start at the default pose, with the cylinder more than 0.17 m from the goal."""
        n, nv = len(ids), self.model.nv
        centre = torch.tensor([-0.15, 0.0], dtype=torch.float64)
        half_width = torch.tensor([0.15, 0.2], dtype=torch.float64)
        sim.qpos[ids, -4:-2] = sample_until(
            lambda count: centre + half_width * uniform((count, 2), 1.0, generator),
            lambda cylinder: cylinder.norm(dim=-1) > 0.17,
            n,
        )
        sim.qpos[ids, -2:] = 0
        sim.qvel[ids] += uniform((n, nv), _START_VELOCITY, generator)
        sim.qvel[ids, -4:] = 0

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return joints, velocities and positions ``[num_envs, 23]``."""
        bodies = [self._position(sim, body) for body in ("tips_arm", "object", "goal")]
        return torch.cat([sim.qpos[:, :7], sim.qvel[:, :7], *bodies], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return minus both distances (m) and the squared controls, weighted."""
        cylinder = self._position(sim, "object")
        near = (cylinder - self._position(sim, "tips_arm")).norm(dim=-1)
        far = (cylinder - self._position(sim, "goal")).norm(dim=-1)
        return -far - 0.1 * sim.ctrl.square().sum(-1) - 0.5 * near


TASKS = {
    "Pusher-v5": partial(Pusher, "pusher_v5.xml", num_substeps=5, max_episode_steps=100),
    "Reacher-v5": partial(Reacher, "reacher.xml", num_substeps=2, max_episode_steps=50),
}

"""The fish of the dm_control suite: swim."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import SuiteTask, into_frame, random_rotations, uniform

_JOINTS = (
    "tail1",
    "tail_twist",
    "tail2",
    "finright_roll",
    "finright_pitch",
    "finleft_roll",
    "finleft_pitch",
)
_TARGET_RANGE_M = ((-0.4, 0.4), (-0.4, 0.4), (0.1, 0.3))


class FishSwim(SuiteTask):
    """A fish that must swim to a target, preferably upright.

    Observation (24): angles of tail and fins in rad (7), vertical component of the torso's z-axis
    (1), target from the mouth in the mouth's frame in m (3), and all velocities (13).
    """

    fields: ClassVar = ("xmat", "geom_xpos", "geom_xmat")
    expanded: ClassVar = ("geom_pos",)

    def __init__(self) -> None:
        super().__init__("fish.xml", control_period_s=0.04, time_limit_s=40)
        self._joints = [int(self.model.joint(name).qposadr[0]) for name in _JOINTS]
        self._torso = self.model.body("torso").id
        self._mouth, self._target = self.model.geom("mouth").id, self.model.geom("target").id
        self._reach = float(self.model.geom_size[[self._mouth, self._target], 0].sum())

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw rotation, joints (within 0.2 rad) and target uniformly."""
        sim.qpos[ids, 3:7] = random_rotations(len(ids), generator)
        shape = (len(ids), len(self._joints))
        sim.qpos[ids[:, None], torch.tensor(self._joints)] = uniform(-0.2, 0.2, shape, generator)
        position = sim.model_field("geom_pos")
        for axis, (low, high) in enumerate(_TARGET_RANGE_M):
            position[ids, self._target, axis] = uniform(low, high, (len(ids),), generator)

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return joints, uprightness, target and velocities ``[num_envs, 24]``."""
        upright = sim.field("xmat")[:, self._torso, 8:]
        joints = sim.qpos[:, self._joints]
        return torch.cat([joints, upright, self._mouth_to_target(sim), sim.qvel], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return closeness of mouth and target, and a little for uprightness."""
        distance = self._mouth_to_target(sim).norm(dim=-1)
        in_target = tolerance(distance, (0.0, self._reach), margin=2 * self._reach)
        upright = 0.5 * (sim.field("xmat")[:, self._torso, 8] + 1)
        return (7 * in_target + upright) / 8

    def _mouth_to_target(self, sim: BatchedSimulation) -> Tensor:
        position = sim.field("geom_xpos")
        offset = position[:, self._target] - position[:, self._mouth]
        return into_frame(offset, sim.field("geom_xmat")[:, self._mouth])


TASKS = {"FishSwim": FishSwim}

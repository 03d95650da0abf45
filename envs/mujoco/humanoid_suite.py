"""The humanoid of the dm_control suite: stand, walk, run."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import (
    JointRandomizer,
    SuiteTask,
    draw_without_contact,
    into_frame,
)

_STAND_HEIGHT_M = 1.4


class HumanoidSuite(SuiteTask):
    """A humanoid with 21 motors that starts in the air in any pose without contact.

    Observation (67): joint angles in rad (21), head height in m (1), hands and feet in the torso's
    frame in m (12), vertical components of the torso's axes (3), velocity of the centre of mass in
    m/s (3), and all velocities (27).
    """

    fields: ClassVar = ("xmat", "xpos", "sensordata", "ncon")
    reward_terms: ClassVar = ("stand", "upright", "move", "small_control")

    def __init__(self, *, speed_m_s: float) -> None:
        super().__init__("humanoid.xml", control_period_s=0.025, time_limit_s=25)
        self._desired_speed = speed_m_s
        self._randomize = JointRandomizer(self.model)
        self._torso, self._head = self.bodies("torso", "head")
        self._limbs = self.bodies("left_hand", "left_foot", "right_hand", "right_foot")
        self._velocity = self.sensor("torso_subtreelinvel")

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw rotation and joints until no two bodies touch."""
        draw_without_contact(sim, ids, lambda pending: self._randomize(sim, pending, generator))

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return egocentric features and velocities ``[num_envs, 67]``."""
        xpos, torso = sim.field("xpos"), sim.field("xmat")[:, self._torso]
        to_limbs = xpos[:, self._limbs] - xpos[:, self._torso, None]
        return torch.cat(
            [
                sim.qpos[:, 7:],
                xpos[:, self._head, 2:],
                into_frame(to_limbs, torso[:, None]).flatten(1),
                torso[:, 6:],
                sim.field("sensordata")[:, self._velocity],
                sim.qvel,
            ],
            -1,
        )

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return standing upright times small control times rest (stand) or speed (walk, run)."""
        standing, upright, move, small_control = self.reward_by_term(sim).unbind(-1)
        return small_control * (standing * upright) * move

    def reward_by_term(self, sim: BatchedSimulation) -> Tensor:
        """Return each factor of the reward, ``[num_envs, 4]`` in [0, 1]."""
        standing = tolerance(
            sim.field("xpos")[:, self._head, 2],
            (_STAND_HEIGHT_M, float("inf")),
            margin=_STAND_HEIGHT_M / 4,
        )
        upright = tolerance(
            sim.field("xmat")[:, self._torso, 8],
            (0.9, float("inf")),
            margin=1.9,
            value_at_margin=0,
            sigmoid="linear",
        )
        control = tolerance(sim.ctrl, margin=1, value_at_margin=0, sigmoid="quadratic").mean(-1)
        small_control = (4 + control) / 5
        return torch.stack([standing, upright, self._move_reward(sim), small_control], -1)

    def _move_reward(self, sim: BatchedSimulation) -> Tensor:
        horizontal = sim.field("sensordata")[:, self._velocity][:, :2]
        if self._desired_speed == 0:
            return tolerance(horizontal, margin=2).mean(-1)
        move = tolerance(
            horizontal.norm(dim=-1),
            (self._desired_speed, float("inf")),
            margin=self._desired_speed,
            value_at_margin=0,
            sigmoid="linear",
        )
        return (5 * move + 1) / 6


TASKS = {
    "HumanoidStand": partial(HumanoidSuite, speed_m_s=0.0),
    "HumanoidWalk": partial(HumanoidSuite, speed_m_s=1.0),
    "HumanoidRun": partial(HumanoidSuite, speed_m_s=10.0),
}

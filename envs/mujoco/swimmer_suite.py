"""The swimmer of the dm_control suite: six links."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.rewards import tolerance
from genpol.envs.mujoco.simulation import BatchedSimulation
from genpol.envs.mujoco.suite import JointRandomizer, SuiteTask, into_frame, uniform

_CLOSE_TARGET_SHARE = 0.2
_CLOSE_RANGE_M, _FAR_RANGE_M = 0.3, 2.0


def _model(num_links: int) -> mujoco.MjModel:
    from dm_control.suite import swimmer

    return mujoco.MjModel.from_xml_string(*swimmer.get_model_and_assets(num_links))


class SwimmerSuite(SuiteTask):
    """A planar chain of links in a viscous fluid whose nose must reach a target.

    Observation for ``n`` links (4n + 1): joint angles in rad (n - 1), target from the nose in the
    head's frame in m (2), and for each link its velocity along x and y in m/s and its turning rate
    in rad/s, in its own frame (3n).
    """

    fields: ClassVar = ("sensordata", "geom_xpos", "xmat")
    expanded: ClassVar = ("geom_pos", "light_pos")

    def __init__(self, *, num_links: int) -> None:
        super().__init__(_model(num_links), control_period_s=0.03, time_limit_s=30)
        self._randomize = JointRandomizer(self.model)
        self._head = self.model.body("head").id
        self._nose, self._target = self.model.geom("nose").id, self.model.geom("target").id
        self._light = self.model.light("target_light").id
        self._target_radius = float(self.model.geom_size[self._target, 0])
        links = ["head_vel", "head_gyro"]
        for link in range(num_links - 1):
            links += [f"velocimeter_{link}", f"gyro_{link}"]
        columns = self.sensors(*links)
        self._velocity = [c for i, c in enumerate(columns) if i % 6 in (0, 1, 5)]

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Draw heading and joints, and the target from a small or (mostly) a large square."""
        self._randomize(sim, ids, generator)
        close = torch.rand(len(ids), 1, generator=generator) < _CLOSE_TARGET_SHARE
        reach = torch.where(close, _CLOSE_RANGE_M, _FAR_RANGE_M)
        position = reach * uniform(-1, 1, (len(ids), 2), generator)
        sim.model_field("geom_pos")[ids, self._target, :2] = position
        sim.model_field("light_pos")[ids, self._light, :2] = position

    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return joints, target and body velocities ``[num_envs, 4n + 1]``."""
        velocity = sim.field("sensordata")[:, self._velocity]
        return torch.cat([sim.qpos[:, 3:], self._nose_to_target(sim), velocity], -1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return 1 with the nose in the target, with a long tail outside."""
        return tolerance(
            self._nose_to_target(sim).norm(dim=-1),
            (0.0, self._target_radius),
            margin=5 * self._target_radius,
            sigmoid="long_tail",
        )

    def _nose_to_target(self, sim: BatchedSimulation) -> Tensor:
        position = sim.field("geom_xpos")
        offset = position[:, self._target] - position[:, self._nose]
        return into_frame(offset, sim.field("xmat")[:, self._head])[:, :2]


TASKS = {"Swimmer6": partial(SwimmerSuite, num_links=6)}

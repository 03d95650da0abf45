"""Balance a pole on a cart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg
from isaaclab.envs import DirectRLEnvCfg
from isaaclab.scene import InteractiveSceneCfg
from isaaclab.sim import SimulationCfg
from isaaclab.utils import configclass
from torch import Tensor

from genpol.envs.isaaclab.tasks.robot_task import RobotTask, physics, robot, uniform

_FREE = {"stiffness": 0.0, "damping": 0.0}


@configclass
class Scene(InteractiveSceneCfg):
    """A cartpole over nothing."""

    robot: ArticulationCfg = robot(
        "cartpole.usda",
        height=2.0,
        joints={"slider": 0.0, "hinge": 0.0},
        actuators={"all": ImplicitActuatorCfg(joint_names_expr=[".*"], **_FREE)},
    )


@configclass
class CartpoleConfig(DirectRLEnvCfg):
    """Settings of the task, as of Isaac Lab's cartpole; forces of 100 N at an action of 1."""

    decimation: int = 2
    episode_length_s: float = 5.0
    action_space: Any = 1
    observation_space: Any = 4
    state_space: Any = 0
    sim: SimulationCfg = physics(dt=1 / 120, decimation=2, constraints=5, contacts=1)
    scene: Scene = Scene(num_envs=1024, env_spacing=4.0, replicate_physics=True)

    force: float = 100.0
    """Of the cart at an action of 1, in N."""
    max_position: float = 3.0
    """Where the cart's episode ends, in m."""
    max_angle: float = math.pi / 2
    """Where the pole's episode ends, in rad."""
    start_angle: float = math.pi / 4
    """Largest angle at the start, in rad."""


class Cartpole(RobotTask):
    """Reward 1 per step, less the squared angle, 0.01 of the cart's speed and 0.005 of the pole's.

    An episode ends with -2 when the cart leaves its range or the pole falls, and after 300 steps of
    1/60 s without. Observations: position and angle, and their velocities.
    """

    cfg: CartpoleConfig

    def __init__(self, cfg: CartpoleConfig, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(cfg, render_mode, **kwargs)
        self._joints = self.joints("slider", "hinge")

    def _pre_physics_step(self, actions: Tensor) -> None:
        self._force = self.cfg.force * actions

    def _apply_action(self) -> None:
        self.robot.set_joint_effort_target_index(target=self._force, joint_ids=self._joints[:1])

    def _get_observations(self) -> dict[str, Tensor]:
        order = self._joints
        return {"policy": torch.cat([self.joint_pos[:, order], self.joint_vel[:, order]], -1)}

    def _get_rewards(self) -> Tensor:
        angle = self.joint_pos[:, self._joints[1]]
        speed, turning = self.joint_vel[:, self._joints].abs().unbind(-1)
        alive = 1.0 - 3.0 * self.reset_terminated.float()
        return alive - angle.square() - 0.01 * speed - 0.005 * turning

    def _get_dones(self) -> tuple[Tensor, Tensor]:
        position, angle = self.joint_pos[:, self._joints].abs().unbind(-1)
        over = (position > self.cfg.max_position) | (angle > self.cfg.max_angle)
        return over, self.episode_length_buf >= self.max_episode_length

    def _reset_idx(self, env_ids: Sequence[int] | Tensor) -> None:
        super()._reset_idx(env_ids)
        positions = self.default_joints(env_ids)
        slider, hinge = self._joints
        largest = self.cfg.start_angle
        positions[:, slider] = uniform(positions[:, slider], -1.0, 1.0)
        positions[:, hinge] = uniform(positions[:, hinge], -largest, largest)
        self.start(env_ids, positions, uniform(positions, -0.5, 0.5))

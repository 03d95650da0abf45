"""Hop forward on one leg."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg, AssetBaseCfg
from isaaclab.envs import DirectRLEnvCfg
from isaaclab.scene import InteractiveSceneCfg
from isaaclab.sim import SimulationCfg
from isaaclab.utils import configclass
from torch import Tensor

from genpol.envs.isaaclab.tasks.robot_task import RobotTask, ground, physics, robot, uniform

_ROOT = ("root_x", "root_z", "root_pitch")
_LEG = ("hip", "knee", "ankle")
_STANDING_M = 1.21  # height of the torso's middle


@configclass
class Scene(InteractiveSceneCfg):
    """A hopper on level ground."""

    ground: AssetBaseCfg = ground()
    robot: ArticulationCfg = robot(
        "hopper.usda",
        height=_STANDING_M,
        joints={".*": 0.0},
        actuators={
            "root": ImplicitActuatorCfg(
                joint_names_expr=list(_ROOT), stiffness=0.0, damping=0.0, armature=0.0
            ),
            "leg": ImplicitActuatorCfg(
                joint_names_expr=list(_LEG),
                joint_effort_limit=200.0,
                stiffness=0.0,
                damping=1.0,
                armature=1.0,
            ),
        },
    )


@configclass
class HopperConfig(DirectRLEnvCfg):
    """Settings of the task, as of gymnasium's Hopper-v5."""

    decimation: int = 4
    episode_length_s: float = 8.0
    action_space: Any = 3
    observation_space: Any = 11
    state_space: Any = 0
    sim: SimulationCfg = physics(dt=0.002, decimation=4, constraints=40, contacts=12)
    scene: Scene = Scene(num_envs=1024, env_spacing=4.0, replicate_physics=True)

    torque: float = 200.0
    """Of a joint at an action of 1, in Nm."""
    min_height: float = 0.7
    """Of the torso's middle, where an episode ends, in m."""
    max_pitch: float = 0.2
    """Of the torso, where an episode ends, in rad."""
    control_cost: float = 1e-3
    """Of the squared actions."""


class Hopper(RobotTask):
    """Reward 1 per step and the forward speed in m/s, less 0.001 of the squared actions.

    An episode ends when the torso sinks below 0.7 m or leans by 0.2 rad, and after 1000 steps of
    8 ms without. Observations, as gymnasium's: the torso's height and pitch, the leg's angles, the
    velocities of these and of the way forward, clipped to 10.
    """

    cfg: HopperConfig

    def __init__(self, cfg: HopperConfig, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(cfg, render_mode, **kwargs)
        self._root, self._leg = self.joints(*_ROOT), self.joints(*_LEG)
        self._command = torch.zeros(self.num_envs, len(_LEG), device=self.device)

    def _pre_physics_step(self, actions: Tensor) -> None:
        self._command = actions

    def _apply_action(self) -> None:
        self.robot.set_joint_effort_target_index(
            target=self.cfg.torque * self._command, joint_ids=self._leg
        )

    @property
    def _height(self) -> Tensor:
        return _STANDING_M + self.joint_pos[:, self._root[1]]

    def _get_observations(self) -> dict[str, Tensor]:
        place = self.joint_pos[:, torch.cat([self._root[2:], self._leg])]
        speed = self.joint_vel[:, torch.cat([self._root, self._leg])].clamp(-10.0, 10.0)
        return {"policy": torch.cat([self._height.unsqueeze(-1), place, speed], -1)}

    def _get_rewards(self) -> Tensor:
        forward = self.joint_vel[:, self._root[0]]
        alive = 1.0 - self.reset_terminated.float()
        return alive + forward - self.cfg.control_cost * self._command.square().sum(-1)

    def _get_dones(self) -> tuple[Tensor, Tensor]:
        leaning = self.joint_pos[:, self._root[2]].abs() > self.cfg.max_pitch
        fallen = leaning | (self._height < self.cfg.min_height)
        return fallen, self.episode_length_buf >= self.max_episode_length

    def _reset_idx(self, env_ids: Sequence[int] | Tensor) -> None:
        super()._reset_idx(env_ids)
        positions = self.default_joints(env_ids)
        noise = uniform(positions, -5e-3, 5e-3)
        noise[:, self._leg[:2]] = noise[:, self._leg[:2]].abs()  # they bend one way only
        self.start(env_ids, positions + noise, uniform(positions, -5e-3, 5e-3))

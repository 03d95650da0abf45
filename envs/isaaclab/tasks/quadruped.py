"""Walk on four legs at a velocity that is commanded."""

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

_NUM_JOINTS = 12
_POLICY = 6 + 3 + 3 * _NUM_JOINTS  # turning, gravity, command, joints, their velocities, actions


@configclass
class Scene(InteractiveSceneCfg):
    """A quadruped on level ground."""

    ground: AssetBaseCfg = ground()
    robot: ArticulationCfg = robot(
        "quadruped.usda",
        height=0.32,
        joints={".*_hip_joint": 0.0, ".*_thigh_joint": 0.8, ".*_knee_joint": -1.6},
        actuators={
            "legs": ImplicitActuatorCfg(
                joint_names_expr=[".*"],
                joint_effort_limit=24.0,
                stiffness=40.0,
                damping=1.0,
                armature=0.005,
            )
        },
    )


@configclass
class QuadrupedConfig(DirectRLEnvCfg):
    """Settings of the task, with the rewards of Isaac Lab's walk on level ground."""

    decimation: int = 4
    episode_length_s: float = 20.0
    action_space: Any = _NUM_JOINTS
    observation_space: Any = _POLICY
    state_space: Any = _POLICY + 4
    sim: SimulationCfg = physics(dt=0.005, decimation=4, constraints=120, contacts=30)
    scene: Scene = Scene(num_envs=1024, env_spacing=2.5, replicate_physics=True)

    action_scale: float = 0.5
    """Way of a joint's target from its default at an action of 1, in rad."""
    max_speed: float = 1.0
    """Largest commanded velocity along either axis, in m/s, and turning, in rad/s."""
    command_s: float = 10.0
    """Seconds after which another velocity is commanded."""
    min_height: float = 0.15
    """Of the trunk, where an episode ends, in m."""
    max_tilt: float = 0.7
    """Of the trunk's upward axis, as a sine, where an episode ends."""


class Quadruped(RobotTask):
    """Follow a commanded velocity.

    Reward per second: exp(-e^2 / 0.25) of the error e of the horizontal velocity, half as much of
    that of the turning about z, less 2 of the squared vertical speed, 0.05 of the squared rolling
    and pitching, 2e-4 of the squared torques and 0.01 of the squared change of actions. Actions are
    targets of the joints. An episode ends when the trunk sinks or tips over, and after 20 s.

    The policy sees turning, gravity, the command, joints and the last actions. The critic also sees
    the trunk's velocity and height, which a robot cannot measure.
    """

    cfg: QuadrupedConfig

    def __init__(self, cfg: QuadrupedConfig, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(cfg, render_mode, **kwargs)
        shape = (self.num_envs, _NUM_JOINTS)
        self._action = torch.zeros(shape, device=self.device)
        self._before = torch.zeros(shape, device=self.device)
        self._command = torch.zeros(self.num_envs, 3, device=self.device)
        self._default = self.robot.data.default_joint_pos.torch.clone()
        self._command_steps = max(1, round(cfg.command_s / self.step_dt))

    def _pre_physics_step(self, actions: Tensor) -> None:
        self._before, self._action = self._action, actions.clone()

    def _apply_action(self) -> None:
        self.robot.set_joint_position_target_index(
            target=self._default + self.cfg.action_scale * self._action
        )

    def _get_observations(self) -> dict[str, Tensor]:
        data = self.robot.data
        seen = torch.cat(
            [
                data.root_ang_vel_b.torch,
                data.projected_gravity_b.torch,
                self._command,
                self.joint_pos - self._default,
                0.1 * self.joint_vel,
                self._action,
            ],
            -1,
        )
        told = [seen, data.root_lin_vel_b.torch, data.root_pos_w.torch[:, 2:]]
        return {"policy": seen, "critic": torch.cat(told, -1)}

    def _get_rewards(self) -> Tensor:
        data = self.robot.data
        velocity, turning = data.root_lin_vel_b.torch, data.root_ang_vel_b.torch
        error = (self._command[:, :2] - velocity[:, :2]).square().sum(-1)
        turning_error = (self._command[:, 2] - turning[:, 2]).square()
        reward = torch.exp(-error / 0.25) + 0.5 * torch.exp(-turning_error / 0.25)
        reward -= 2.0 * velocity[:, 2].square() + 0.05 * turning[:, :2].square().sum(-1)
        reward -= 2e-4 * data.applied_torque.torch.square().sum(-1)
        reward -= 0.01 * (self._action - self._before).square().sum(-1)
        return reward * self.step_dt

    def _get_dones(self) -> tuple[Tensor, Tensor]:
        renewed = (self.episode_length_buf % self._command_steps == 0).unsqueeze(-1)
        self._command = torch.where(renewed, self._draw(self._command), self._command)
        data = self.robot.data
        tipped = data.projected_gravity_b.torch[:, :2].norm(dim=-1) > self.cfg.max_tilt
        sunk = data.root_pos_w.torch[:, 2] < self.cfg.min_height
        return tipped | sunk, self.episode_length_buf >= self.max_episode_length

    def _draw(self, like: Tensor) -> Tensor:
        return uniform(like, -self.cfg.max_speed, self.cfg.max_speed)

    def _reset_idx(self, env_ids: Sequence[int] | Tensor) -> None:
        super()._reset_idx(env_ids)
        asset = self.scene["robot"]
        pose = asset.data.default_root_pose.torch[env_ids].clone()
        pose[:, :3] += self.scene.env_origins[env_ids]
        asset.write_root_pose_to_sim_index(root_pose=pose, env_ids=env_ids)
        speed = asset.data.default_root_vel.torch[env_ids].clone()
        asset.write_root_velocity_to_sim_index(
            root_velocity=uniform(speed, -0.2, 0.2), env_ids=env_ids
        )
        positions = self.default_joints(env_ids)
        positions += uniform(positions, -0.1, 0.1)
        self.start(env_ids, positions, torch.zeros_like(positions))
        self._action[env_ids] = 0.0
        self._before[env_ids] = 0.0
        self._command[env_ids] = self._draw(self._command[env_ids])

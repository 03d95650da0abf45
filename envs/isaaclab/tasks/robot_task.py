"""What our tasks of Isaac Lab share: physics, ground, and a robot from a USD file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import isaaclab.sim as sim_utils
import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg, AssetBaseCfg
from isaaclab.envs import DirectRLEnv
from isaaclab.sim import SimulationCfg
from isaaclab_newton.physics import MJWarpSolverCfg, NewtonCfg
from isaaclab_newton.sim.schemas import NewtonArticulationCfg
from torch import Tensor

import genpol.assets

_ASSETS = Path(genpol.assets.__path__[0]) / "isaaclab"


def physics(*, dt: float, decimation: int, constraints: int, contacts: int) -> SimulationCfg:
    """Return the settings of MuJoCo Warp.

    Args:
        dt: Seconds of a physics step.
        decimation: Physics steps of a control step.
        constraints: Room for rows of the constraint solver in one environment.
        contacts: Room for contacts in one environment.
    """
    solver = MJWarpSolverCfg(
        njmax=constraints,
        nconmax=contacts,
        cone="pyramidal",
        impratio=1,
        integrator="implicitfast",
    )
    return SimulationCfg(
        dt=dt, render_interval=decimation, physics=NewtonCfg(solver_cfg=solver, num_substeps=1)
    )


def robot(
    file: str,
    *,
    height: float,
    joints: dict[str, float],
    actuators: dict[str, ImplicitActuatorCfg],
) -> ArticulationCfg:
    """Return a robot from a USD file of ours.

    Args:
        file: Name of the file in ``assets/isaaclab``.
        height: Of its root over the ground at the start, in metres.
        joints: Positions of joints at the start, by patterns of their names.
        actuators: Of all joints; those that nothing drives have zero gains.
    """
    return ArticulationCfg(
        prim_path="{ENV_REGEX_NS}/Robot",
        spawn=sim_utils.UsdFileCfg(
            usd_path=str(_ASSETS / file),
            articulation_props=[NewtonArticulationCfg(self_collision_enabled=False)],
        ),
        init_state=ArticulationCfg.InitialStateCfg(pos=(0.0, 0.0, height), joint_pos=joints),
        actuators=actuators,
    )


def ground() -> AssetBaseCfg:
    """Return level ground; Isaac Lab's own would be downloaded."""
    return AssetBaseCfg(
        prim_path="/World/ground", spawn=sim_utils.UsdFileCfg(usd_path=str(_ASSETS / "ground.usda"))
    )


class RobotTask(DirectRLEnv):
    """A task of one robot.

    Attributes:
        robot: The robot.
        action: What was commanded last, in [-1, 1] ``[num_envs, A]``.
    """

    def __init__(self, cfg: Any, render_mode: str | None = None, **kwargs: Any) -> None:
        super().__init__(cfg, render_mode, **kwargs)
        self.robot = self.scene["robot"]

    @property
    def joint_pos(self) -> Tensor:
        """Positions of the joints ``[num_envs, J]``, in rad or m."""
        positions: Tensor = self.robot.data.joint_pos.torch
        return positions

    @property
    def joint_vel(self) -> Tensor:
        """Velocities of the joints ``[num_envs, J]``."""
        velocities: Tensor = self.robot.data.joint_vel.torch
        return velocities

    def joints(self, *names: str) -> Tensor:
        """Return the numbers of joints, as an index on the device."""
        found, _ = self.scene["robot"].find_joints(list(names), preserve_order=True)
        return torch.tensor(found, device=self.device)

    def start(self, env_ids: Sequence[int] | Tensor, positions: Tensor, velocities: Tensor) -> None:
        """Put joints where episodes start, ``[len(env_ids), J]`` each."""
        asset = self.scene["robot"]
        asset.write_joint_position_to_sim_index(position=positions, env_ids=env_ids)
        asset.write_joint_velocity_to_sim_index(velocity=velocities, env_ids=env_ids)

    def default_joints(self, env_ids: Sequence[int] | Tensor) -> Tensor:
        """Return a copy of the joints' default positions ``[len(env_ids), J]``."""
        positions: Tensor = self.scene["robot"].data.default_joint_pos.torch[env_ids].clone()
        return positions


def uniform(like: Tensor, low: float, high: float) -> Tensor:
    """Return uniform numbers in the shape of ``like``, from the process's own generator."""
    return torch.empty_like(like).uniform_(low, high)

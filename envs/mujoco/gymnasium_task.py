"""What gymnasium's MuJoCo tasks (version 5) share: models, start noise and running forward."""

from __future__ import annotations

from importlib import resources
from typing import ClassVar

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.simulation import BatchedSimulation, Stage
from genpol.envs.mujoco.task import Task


def load_model(filename: str) -> mujoco.MjModel:
    """Compile a model of the installed gymnasium package."""
    asset = resources.files("gymnasium") / "envs" / "mujoco" / "assets" / filename
    return mujoco.MjModel.from_xml_path(str(asset))


def uniform(shape: tuple[int, ...], half_width: float, generator: torch.Generator) -> Tensor:
    """Draw from ``[-half_width, half_width)`` (float64)."""
    draw = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (2 * draw - 1) * half_width


class GymnasiumTask(Task):
    """A task of gymnasium: one ``mj_step`` call per control step and nothing computed after it.

    Position-dependent fields (``xpos``, ``site_xpos``, ...) therefore describe the state before the
    last integration, as they do in gymnasium.
    """

    stage: ClassVar = Stage.NONE

    def __init__(self, filename: str, *, num_substeps: int, max_episode_steps: int = 1000) -> None:
        super().__init__(load_model(filename))
        self.num_substeps = num_substeps
        self.max_episode_steps = max_episode_steps
        self.camera = 0 if self.model.ncam else -1  # -1: MuJoCo's free camera

    def add_noise(
        self,
        sim: BatchedSimulation,
        ids: Tensor,
        generator: torch.Generator,
        *,
        scale: float,
        normal_velocity: bool = False,
    ) -> None:
        """Move ``ids`` off the default state: uniform positions, uniform or normal velocities."""
        sim.qpos[ids] += uniform((len(ids), self.model.nq), scale, generator)
        shape = (len(ids), self.model.nv)
        if normal_velocity:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        else:
            noise = uniform(shape, scale, generator)
        sim.qvel[ids] += noise


class ForwardTask(GymnasiumTask):
    """Run along x: speed plus a bonus while healthy, minus the squared controls.

    Attributes:
        noise_scale: Width of the start noise.
        normal_velocity: Whether start velocities are normal instead of uniform.
        forward_weight: Weight of the speed along x (m/s) in the reward.
        control_weight: Weight of the squared controls in the reward.
        healthy_reward: Reward of a step that ends healthy; unhealthy ends the episode.
    """

    noise_scale: ClassVar[float]
    normal_velocity: ClassVar[bool] = False
    forward_weight: ClassVar[float] = 1.0
    control_weight: ClassVar[float]
    healthy_reward: ClassVar[float] = 0.0

    def allocate(self, num_envs: int) -> None:
        """Remember x (m) before and after the step."""
        self.memory["x_before"] = torch.zeros(num_envs, dtype=torch.float64)
        self.memory["x"] = torch.zeros(num_envs, dtype=torch.float64)

    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Add noise to the model's default state."""
        self.add_noise(
            sim, ids, generator, scale=self.noise_scale, normal_velocity=self.normal_velocity
        )

    def after_reset(self, sim: BatchedSimulation, ids: Tensor) -> None:
        """Remember where ``ids`` start."""
        self.memory["x"][ids] = self.x(sim)[ids]

    def before_step(self, sim: BatchedSimulation, action: Tensor) -> None:
        """Write controls and remember x."""
        super().before_step(sim, action)
        self.memory["x_before"].copy_(self.memory["x"])

    def after_step(self, sim: BatchedSimulation) -> None:
        """Remember the x that the step reached."""
        # Not read in before_step: fields other than the state lag, and resuming refreshes them.
        self.memory["x"].copy_(self.x(sim))

    def x(self, sim: BatchedSimulation) -> Tensor:
        """Return the x coordinate ``[num_envs]`` (m) whose speed is rewarded."""
        return sim.qpos[:, 0]

    def healthy(self, sim: BatchedSimulation) -> Tensor:
        """Return which robots ``[num_envs]`` are in a state to go on."""
        return torch.ones(sim.num_envs, dtype=torch.bool)

    def cost(self, sim: BatchedSimulation) -> Tensor:
        """Return what is subtracted from the reward ``[num_envs]``."""
        return self.control_weight * sim.ctrl.square().sum(-1)

    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return speed and health bonus minus cost."""
        speed = (self.memory["x"] - self.memory["x_before"]) / self.control_period_s
        bonus = torch.where(self.healthy(sim), self.healthy_reward, 0.0)
        return self.forward_weight * speed + bonus - self.cost(sim)

    def terminated(self, sim: BatchedSimulation) -> Tensor:
        """Return which robots are no longer healthy."""
        return ~self.healthy(sim)

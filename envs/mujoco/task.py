"""What a MuJoCo task defines: model, start, observation, reward and end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.simulation import BatchedSimulation, Stage


class Task(ABC):
    """One task over a batch of simulations; subclasses are written in vectorised torch.

    A task holds no per-environment state but ``memory``, which is saved with the simulations.

    Attributes:
        fields: Derived ``MjData`` fields that the task reads.
        expanded: ``MjModel`` fields that the task sets per simulation (targets, say).
        persistent: Whether each simulation must keep its own ``MjData``.
        stage: How far derived fields are current after a step. ``VELOCITY`` is what dm_control's
            step leaves; ``NONE`` suffices where only ``qpos`` and ``qvel`` are read.
        actuated_start: Whether actuators act in the forces of the first observation.
        num_substeps: Physics steps per control step.
        max_episode_steps: Control steps until the episode is truncated.
        reward_terms: Names of the R terms that :meth:`reward_by_term` gives; none by default.
        camera: Camera that :meth:`MujocoEnv.render` looks through.
        model: The compiled model.
        memory: Tensors ``[num_envs, ...]`` that the task carries from step to step.
        constants: Tensors that steps, observations and rewards need.
    """

    fields: ClassVar[tuple[str, ...]] = ()
    expanded: ClassVar[tuple[str, ...]] = ()
    persistent: ClassVar[bool] = False
    stage: ClassVar[Stage] = Stage.VELOCITY
    actuated_start: ClassVar[bool] = True
    reward_terms: ClassVar[tuple[str, ...]] = ()
    num_substeps: int
    max_episode_steps: int = 1000
    camera: int | str = 0

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.memory: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        low, high = torch.from_numpy(model.actuator_ctrlrange.copy()).unbind(-1)
        self._control_centre = (high + low) / 2
        self._control_half_range = (high - low) / 2
        self.constants["control_centre"] = self._control_centre
        self.constants["control_half_range"] = self._control_half_range

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move ``memory`` and ``constants`` to a simulation's device and type.

        Other tensors are those of start states, which are drawn on the CPU.
        """
        for tensors in (self.memory, self.constants):
            for name, x in tensors.items():
                tensors[name] = x.to(device, dtype if x.is_floating_point() else x.dtype)

    @property
    def action_dim(self) -> int:
        """Number of actuators."""
        return int(self.model.nu)

    @property
    def control_period_s(self) -> float:
        """Seconds of simulated time per control step."""
        return float(self.model.opt.timestep) * self.num_substeps

    def allocate(self, num_envs: int) -> None:  # noqa: B027 - most tasks remember nothing
        """Create ``memory`` for ``num_envs`` simulations."""

    @abstractmethod
    def initialize(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Write the start state of simulations ``ids``, which stand at the model's default.

        The simulation is one on the CPU, whatever steps the physics. The caller runs
        :meth:`BatchedSimulation.forward` for ``ids`` afterwards.
        """

    def after_reset(self, sim: BatchedSimulation, ids: Tensor) -> None:  # noqa: B027 - optional
        """Set ``memory`` of simulations ``ids``, whose derived fields are current at the start."""

    def before_step(self, sim: BatchedSimulation, action: Tensor) -> None:
        """Write controls from actions ``[num_envs, A]`` in [-1, 1], of the simulation's type."""
        # Centre plus half range is exact where the range is [-1, 1].
        constants = self.constants
        torch.addcmul(
            constants["control_centre"], action, constants["control_half_range"], out=sim.ctrl
        )

    def after_step(self, sim: BatchedSimulation) -> None:  # noqa: B027 - optional hook
        """Update ``memory`` between the physics step and the reward."""

    @abstractmethod
    def observe(self, sim: BatchedSimulation) -> Tensor:
        """Return observations ``[num_envs, d]`` (float64)."""

    @abstractmethod
    def reward(self, sim: BatchedSimulation) -> Tensor:
        """Return rewards ``[num_envs]`` (float64) of the step just made."""

    def reward_by_term(self, sim: BatchedSimulation) -> Tensor:
        """Return the terms of the reward apart, ``[num_envs, R]`` (float64).

        They need not add up to :meth:`reward`, which may be their product.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reward_terms")

    def terminated(self, sim: BatchedSimulation) -> Tensor:
        """Return which episodes ``[num_envs]`` ended in a terminal state. None by default."""
        return torch.zeros(sim.num_envs, dtype=torch.bool, device=sim.device)

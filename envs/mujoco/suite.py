"""What the domains of the dm_control suite share: models, start poses and control costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.simulation import BatchedSimulation, Stage
from genpol.envs.mujoco.task import Task
from genpol.errors import EnvironmentFault


def load_model(filename: str) -> mujoco.MjModel:
    """Compile a model of the suite from the installed dm_control package."""
    from dm_control.suite import common

    return mujoco.MjModel.from_xml_string(common.read_model(filename), common.ASSETS)


def num_substeps(model: mujoco.MjModel, control_period_s: float) -> int:
    """Return the physics steps that make one control step of ``control_period_s``."""
    return round(control_period_s / model.opt.timestep)


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw float64 numbers uniformly from ``[low, high)``."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """Draw unit quaternions ``[count, 4]`` uniformly over all rotations."""
    quaternion = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return quaternion / quaternion.norm(dim=-1, keepdim=True)


def into_frame(vector: Tensor, matrix: Tensor) -> Tensor:
    """Express global vectors ``[..., 3]`` in frames with orientation matrices ``[..., 9]``."""
    return (vector.unsqueeze(-1) * matrix.unflatten(-1, (3, 3))).sum(-2)


def draw_without_contact(
    sim: BatchedSimulation, ids: Tensor, draw: Callable[[Tensor], None], *, max_tries: int = 1000
) -> None:
    """Repeat ``draw`` for the simulations among ``ids`` that have contacts until none has.

    Args:
        sim: The simulations; ``ncon`` must be among their fields.
        ids: Simulations to start.
        draw: Writes a new state to the simulations it is given.
        max_tries: Bound on the repetitions.

    Raises:
        EnvironmentFault: If some simulation is in contact after ``max_tries`` draws.
    """
    pending = ids
    for _ in range(max_tries):
        draw(pending)
        sim.forward(pending, Stage.POSITION)
        pending = pending[sim.field("ncon")[pending] > 0]
        if not len(pending):
            return
    raise EnvironmentFault(
        f"{len(pending)} of {len(ids)} simulations found no start without contact in {max_tries} "
        "tries: the model's default pose or joint ranges make bodies overlap; mend the model"
    )


class JointRandomizer:
    """Draws limited joints in their range and free rotations.

    This is the distribution of dm_control's ``randomize_limited_and_rotational_joints``: hinges and
    slides with limits are uniform in them, hinges without limits uniform in ``[-pi, pi]``, balls
    without limits get a uniform rotation, and other coordinates stay as they are. Rotations of free
    joints are drawn from quaternions with positive entries only, which is not uniform: dm_control
    keeps this for the sake of earlier results, and so do we.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        hinge, ball, free = (
            int(kind)
            for kind in (
                mujoco.mjtJoint.mjJNT_HINGE,
                mujoco.mjtJoint.mjJNT_BALL,
                mujoco.mjtJoint.mjJNT_FREE,
            )
        )
        self._scalar: list[int] = []
        self._free: list[int] = []
        self._quaternion: list[int] = []
        self._ball: list[tuple[int, float]] = []
        low: list[float] = []
        high: list[float] = []
        for joint in range(model.njnt):
            kind, address = int(model.jnt_type[joint]), int(model.jnt_qposadr[joint])
            limited = bool(model.jnt_limited[joint])
            if kind == free:
                self._free.append(address + 3)
            elif kind == ball and limited:
                self._ball.append((address, float(model.jnt_range[joint, 1])))
            elif kind == ball:
                self._quaternion.append(address)
            elif limited or kind == hinge:
                self._scalar.append(address)
                bounds = model.jnt_range[joint] if limited else (-math.pi, math.pi)
                low.append(float(bounds[0]))
                high.append(float(bounds[1]))
        self._low = torch.tensor(low, dtype=torch.float64)
        self._range = torch.tensor(high, dtype=torch.float64) - self._low

    def __call__(self, sim: BatchedSimulation, ids: Tensor, generator: torch.Generator) -> None:
        """Write new joint positions for simulations ``ids``."""
        count = len(ids)
        rand = partial(torch.rand, generator=generator, dtype=torch.float64)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        if self._scalar:
            draw = rand(count, len(self._scalar))
            columns = torch.tensor(self._scalar)
            sim.qpos[ids[:, None], columns] = self._low + draw * self._range
        for address in self._free:
            quaternion = rand(count, 4)
            quaternion /= quaternion.norm(dim=-1, keepdim=True)
            sim.qpos[ids[:, None], torch.arange(address, address + 4)] = quaternion
        for address in self._quaternion:
            quaternion = random_rotations(count, generator)
            sim.qpos[ids[:, None], torch.arange(address, address + 4)] = quaternion
        for address, limit in self._ball:
            axis = randn(count, 3)
            axis /= axis.norm(dim=-1, keepdim=True)
            angle = rand(count, 1) * limit
            quaternion = torch.cat([torch.cos(angle / 2), axis * torch.sin(angle / 2)], -1)
            sim.qpos[ids[:, None], torch.arange(address, address + 4)] = quaternion


class SuiteTask(Task):
    """A task of the dm_control suite.

    Args:
        model: The model, or the name of its file in the suite.
        control_period_s: Seconds per control step, a multiple of the physics step.
        time_limit_s: Seconds until the episode is truncated.
    """

    def __init__(
        self, model: str | mujoco.MjModel, *, control_period_s: float, time_limit_s: float
    ) -> None:
        super().__init__(load_model(model) if isinstance(model, str) else model)
        self.num_substeps = num_substeps(self.model, control_period_s)
        self.max_episode_steps = round(time_limit_s / control_period_s)

    def sensor(self, name: str) -> slice:
        """Return the columns of ``sensordata`` that sensor ``name`` fills."""
        sensor = self.model.sensor(name).id
        start = int(self.model.sensor_adr[sensor])
        return slice(start, start + int(self.model.sensor_dim[sensor]))

    def sensors(self, *names: str) -> list[int]:
        """Return the columns of ``sensordata`` that sensors ``names`` fill, in this order."""
        slices = [self.sensor(name) for name in names]
        return [column for s in slices for column in range(s.start, s.stop)]

    def bodies(self, *names: str) -> list[int]:
        """Return the indices of bodies ``names``."""
        return [int(self.model.body(name).id) for name in names]

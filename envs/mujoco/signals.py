"""What the numbers of a native task's observation and action are called."""

from __future__ import annotations

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.env import MujocoEnv
from genpol.envs.mujoco.simulation import Stage
from genpol.envs.signals import Actuator, Signal, numbered

# Positions and velocities of a joint, by its type: names of the numbers and their units.
_ROTATION = [(f"quaternion_{x}", "1") for x in "wxyz"]
_SPIN = [(f"angular_velocity_{x}", "rad/s") for x in "xyz"]
_POSITIONS = {
    mujoco.mjtJoint.mjJNT_HINGE: [("position", "rad")],
    mujoco.mjtJoint.mjJNT_SLIDE: [("position", "m")],
    mujoco.mjtJoint.mjJNT_BALL: _ROTATION,
    mujoco.mjtJoint.mjJNT_FREE: [*((f"position_{x}", "m") for x in "xyz"), *_ROTATION],
}
_VELOCITIES = {
    mujoco.mjtJoint.mjJNT_HINGE: [("velocity", "rad/s")],
    mujoco.mjtJoint.mjJNT_SLIDE: [("velocity", "m/s")],
    mujoco.mjtJoint.mjJNT_BALL: _SPIN,
    mujoco.mjtJoint.mjJNT_FREE: [*((f"velocity_{x}", "m/s") for x in "xyz"), *_SPIN],
}
# Of joints, in rad/s or m/s.
_SPEEDS = (0.0, 0.0, 1.0, 100.0)


def observation(env: MujocoEnv) -> list[Signal]:
    """Return the names of an observation's numbers.

    Those that are positions or velocities of joints are found by their values in a few states of
    the task, slow and very fast ones, whose episodes this ends. Others, such as velocities that the
    task clips, are numbered.
    """
    seen, state = [], []
    for speed in _SPEEDS:
        env.step(env.reset().set("action", env.action_spec.rand()))
        drawn = torch.randn_like(env.sim.qvel)
        env.sim.qvel.add_(speed * (drawn + drawn.sign()))
        env.sim.forward(stage=Stage.VELOCITY)
        seen.append(env.task.observe(env.sim)[0].float().cpu())
        state.append(torch.cat((env.sim.qpos[0], env.sim.qvel[0])).cpu())
    names = _of_state(env.task.model)
    found = numbered(seen[0].shape[-1])
    free = dict(enumerate(torch.stack(state, -1).to(seen[0].dtype)))
    for place, values in enumerate(torch.stack(seen, -1)):
        index = next((i for i, x in free.items() if _same(values, x)), None)
        if index is not None:
            found[place] = names[index]
            del free[index]
    return found


def actions(env: MujocoEnv) -> list[Actuator]:
    """Return what an action's numbers drive."""
    model = env.task.model
    return [_actuator(model, index) for index in range(model.nu)]


def _same(values: Tensor, others: Tensor) -> bool:
    return bool((values == others).all()) and bool(values.unique().numel() > 1)


def _of_state(model: mujoco.MjModel) -> list[Signal]:
    """Return the names of positions and velocities, in the simulator's order."""
    found = []
    for parts in (_POSITIONS, _VELOCITIES):
        for index, kind in enumerate(model.jnt_type):
            joint = model.joint(index).name or f"joint[{index}]"
            for name, unit in parts[mujoco.mjtJoint(kind)]:
                found.append(Signal(f"{joint}.{name}", unit))
    return found


def _actuator(model: mujoco.MjModel, index: int) -> Actuator:
    low, high = (float(x) for x in model.actuator_ctrlrange[index])
    interface = "effort"
    if model.actuator_biastype[index] == mujoco.mjtBias.mjBIAS_AFFINE:
        stiffness = model.actuator_biasprm[index, 1]
        interface = "velocity" if stiffness == 0 else "position"
    name, unit = model.actuator(index).name, "1"
    if model.actuator_trntype[index] == mujoco.mjtTrn.mjTRN_JOINT:
        joint = model.joint(model.actuator_trnid[index, 0])
        name = name or joint.name
        unit = _unit(int(joint.type[0]), interface)
    return Actuator(name or f"actuator[{index}]", unit, interface, low, high)


def _unit(kind: int, interface: str) -> str:
    """Return the unit of a command; a motor's is a share of what its gear makes of it."""
    if interface == "effort":
        return "1"
    unit = "m" if kind == mujoco.mjtJoint.mjJNT_SLIDE else "rad"
    return unit if interface == "position" else f"{unit}/s"

"""What the numbers of an environment's observation and action are called, for robot controllers."""

from __future__ import annotations

from typing import NamedTuple

from torchrl.envs import EnvBase


class Signal(NamedTuple):
    """One number of an observation.

    Attributes:
        name: What it is.
        unit: Its unit; 1 for none, or one that is not known.
    """

    name: str
    unit: str = "1"


class Actuator(NamedTuple):
    """What one number of an action drives.

    Attributes:
        name: Of the actuator.
        unit: Of its command; 1 for a share, or what is not known.
        interface: What is commanded: position, velocity or effort.
        low: Command at which the action is -1.
        high: Command at which the action is 1.
    """

    name: str
    unit: str
    interface: str
    low: float
    high: float


def numbered(count: int) -> list[Signal]:
    """Return names for numbers of which nothing is known."""
    return [Signal(f"observation[{index}]") for index in range(count)]


def observation(env: EnvBase) -> list[Signal]:
    """Return names and units of an observation's numbers, without a goal and without a history.

    Args:
        env: The environment, whose episodes this may end.
    """
    from genpol.envs.mujoco import signals as native
    from genpol.envs.mujoco.env import MujocoEnv
    from genpol.envs.stacking import StackedEnv

    if isinstance(env, StackedEnv):
        return observation(env.inner)
    if isinstance(env, MujocoEnv):
        return native.observation(env)
    return numbered(env.observation_spec["observation"].shape[-1])


def actions(env: EnvBase) -> list[Actuator]:
    """Return what an action's numbers drive.

    Where that is not known they are taken for velocities: what relative commands, such as those of
    OGBench and Meta-World, are, and what comes to rest at 0.
    """
    from genpol.envs.mujoco import signals as native
    from genpol.envs.mujoco.env import MujocoEnv
    from genpol.envs.stacking import StackedEnv

    if isinstance(env, StackedEnv):
        return actions(env.inner)
    if isinstance(env, MujocoEnv):
        return native.actions(env)
    width = env.action_spec.shape[-1]
    return [Actuator(f"action[{i}]", "1", "velocity", -1.0, 1.0) for i in range(width)]

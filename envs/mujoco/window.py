"""A window on a native task's first simulation, with MuJoCo's own viewer."""

from __future__ import annotations

from collections.abc import Callable

from torchrl.envs import EnvBase

from genpol.envs.mujoco.env import MujocoEnv
from genpol.envs.stacking import StackedEnv
from genpol.errors import ConfigError, EnvironmentFault


def open_window(env: EnvBase) -> Callable[[], None]:
    """Open a window, and return what shows the simulation's present state in it.

    Raises:
        ConfigError: If the environment is of another simulator.
        EnvironmentFault: If there is no display.
    """
    while isinstance(env, StackedEnv):
        env = env.inner
    if not isinstance(env, MujocoEnv):
        raise ConfigError("viewer: only native MuJoCo tasks have a window; leave it out")
    import mujoco.viewer

    native, model = env, env.task.model
    data = mujoco.MjData(model)
    try:
        viewer = mujoco.viewer.launch_passive(model, data, show_left_ui=False, show_right_ui=False)
    except Exception as error:
        raise EnvironmentFault(f"viewer: no window can be opened ({error})") from None

    if model.ncam:
        viewer.cam.type = mujoco.mjtCamera.mjCAMERA_FIXED
        viewer.cam.fixedcamid = model.camera(native.task.camera).id

    def show() -> None:
        data.qpos[:] = native.sim.qpos[0].numpy()
        data.qvel[:] = native.sim.qvel[0].numpy()
        mujoco.mj_forward(model, data)
        viewer.sync()

    show()
    return show

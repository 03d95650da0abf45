"""Meta-World's manipulation tasks (Yu et al., arXiv 1910.10897; v3), through torchrl.

An arm's gripper does one of 50 tasks. Actions ``[4]`` move it by up to 1 cm along each axis and
open or close it. Observations ``[39]`` are the gripper's place and opening and the objects' places,
now and a step before, and the goal's place, which is shown. Where objects and goals lie is drawn
for every episode. Episodes have 500 steps and one of two rewards:

- sparse: -1 a step, but 0 in the step that solves the task, which ends the episode
  (``terminated``).
- dense: Meta-World's own, from 0 to 10. It is highest where the task is solved, so that an end
  there would make agents shun it: the episode goes on.

``success`` says whether the task has been solved by now, in this step or an earlier one: so does
Meta-World count an episode as solved.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl.envs import EnvBase, GymWrapper

from genpol.envs.settings import MetaWorldSettings, label
from genpol.envs.wrapper import Family, TorchrlEnv
from genpol.errors import MissingExtraError, require

_CAMERA = "corner4"


def make_metaworld(
    settings: MetaWorldSettings,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    *,
    stagger: bool = False,
) -> TorchrlEnv:
    """Make ``num_envs`` environments of Meta-World.

    Environment ``i`` of a batch with seed ``s`` starts as environment 0 with seed ``s + i`` does,
    so that an evaluation shows the same episodes however many environments share it.

    Raises:
        MissingExtraError: If Meta-World is not installed.
    """
    family = Family(
        create=partial(_create, settings),
        max_episode_steps=lambda env: env._env.simulation.max_path_length,
        control_period_s=lambda env: env._env.simulation.dt,
        observation_keys=lambda env: ["observation"],
        render=lambda env, height, width: env._env.draw(height, width),
        extras={"success": torch.bool},
        indexed=True,
    )
    return TorchrlEnv(
        label(settings), family, num_envs=num_envs, device=device, seed=seed, stagger=stagger
    )


def package(module: str = "metaworld") -> ModuleType:
    """Import Meta-World, or one of its modules.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        return require(module, "metaworld")
    except MissingExtraError:
        raise MissingExtraError(
            "package 'metaworld' is not installed; it needs MuJoCo 3.3.0 and hence an environment "
            "of its own: run `make metaworld`, and then .venv-metaworld/bin/genpol (or, in a fresh "
            "environment, pip install 'genpol[metaworld]')"
        ) from None


def _create(settings: MetaWorldSettings, index: int) -> EnvBase:
    return GymWrapper(Task(settings, index))


class Task(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One simulation that says with every observation whether its task has been solved.

    Args:
        settings: Which task and reward.
        index: What is added to every seed.
    """

    def __init__(self, settings: MetaWorldSettings, index: int = 0) -> None:
        self.simulation = _make_simulation(settings.name)
        self._is_sparse = settings.reward == "sparse"
        self._index = index
        self._solved = False
        self._renderer: Any = None
        self.action_space = self.simulation.action_space
        shapes = {"observation": self.simulation.observation_space.shape, "success": (1,)}
        self.observation_space: Any = gymnasium.spaces.Dict(
            {key: gymnasium.spaces.Box(-np.inf, np.inf, shape) for key, shape in shapes.items()}
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode with objects and a goal in other places."""
        if seed is not None:
            self.simulation.seed(seed + self._index)  # its `reset` takes a seed and ignores it
        self._solved = False
        observation, _ = self.simulation.reset()
        return self._output(observation), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for one control period."""
        expected_s = self.simulation.data.time + 0.99 * self.simulation.dt
        observation, reward, _, truncated, info = self.simulation.step(action)
        if self.simulation.data.time < expected_s:  # it diverged, and MuJoCo started it anew
            observation = np.full_like(observation, np.nan)
        succeeds = bool(info["success"])
        self._solved |= succeeds
        if self._is_sparse:
            reward = float(succeeds) - 1.0
        terminated = self._is_sparse and succeeds
        return self._output(observation), float(reward), terminated, bool(truncated), {}

    def _output(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        success = np.array([self._solved], np.float32)
        return {"observation": observation.astype(np.float32), "success": success}

    def draw(self, height: int, width: int) -> np.ndarray:
        """Draw it as ``uint8 [height, width, 3]``."""
        import mujoco

        drawn = self._renderer and (self._renderer.height, self._renderer.width)
        if drawn != (height, width):
            self.close()
            visual = self.simulation.model.vis
            visual.global_.offheight = max(visual.global_.offheight, height)
            visual.global_.offwidth = max(visual.global_.offwidth, width)
            # Without a GPU, Meta-World's own quality takes three times as long.
            visual.quality.shadowsize, visual.quality.offsamples = 1024, 0
            self._renderer = mujoco.Renderer(self.simulation.model, height, width)
        self._renderer.update_scene(self.simulation.data, camera=_CAMERA)
        frame: np.ndarray = self._renderer.render()
        return frame[::-1, ::-1].copy()  # the cameras in the corners hang upside down

    def close(self) -> None:
        """Free the renderer; the simulation goes with the object."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _make_simulation(name: str) -> Any:
    """Make one of Meta-World's environments whose places are drawn anew and whose goal shows.

    Meta-World itself hands out lists of fixed places, or one place for good. It keeps what is set
    here for those who set it by hand.
    """
    simulation: Any = package("metaworld.env_dict").ALL_V3_ENVIRONMENTS[name]()
    simulation._set_task_called = True
    simulation._freeze_rand_vec = False
    simulation.seeded_rand_vec = True  # by the simulation's own generator, not NumPy's global one
    simulation._partially_observable = False
    del simulation.sawyer_observation_space  # cached, with bounds that would clip the goal to zero
    simulation.observation_space = simulation.sawyer_observation_space
    return simulation

"""OGBench's manipulation tasks (Park et al., arXiv 2410.20092), through torchrl.

A robot arm moves cubes, presses buttons, and opens and shuts a drawer and a window. There are two
kinds of environments, both of which end an episode (``terminated``) at success:

- A single task rewards every step with minus the number of subtasks (cubes in place, buttons in
  state, ...) that are not solved. Since ogbench 1.2.0 reward, success and termination of a step
  judge the state that the action was taken in, so that the episode ends with the step after the
  one that solved the task. ``success_timing=post`` judges the next state, as versions before 1.2.0
  did, with which FQL (1.1.0) and QC (1.1.2) were published.
- A goal-conditioned environment shows a task as its ``goal``, the oracle representation (positions
  of cubes, states of buttons, ...), that of the present state as ``achieved_goal``, and rewards
  with 1 at success and 0 elsewhere; it judges the next state in all versions. Its tasks can be
  fixed or come in turn.

``success`` says whether the task was solved, by the rule above. The time limits are OGBench's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl.envs import EnvBase, GymWrapper

from genpol.envs.ogbench_simulation import make_simulation, max_episode_steps
from genpol.envs.settings import OGBenchSettings, label
from genpol.envs.wrapper import Family, TorchrlEnv

# The one nearest to what TorchrlEnv.render draws by default; OGBench's own is 200 x 200.
_HEIGHT, _WIDTH = 360, 480


def make_ogbench(
    settings: OGBenchSettings,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    *,
    stagger: bool = False,
) -> TorchrlEnv:
    """Make ``num_envs`` environments of OGBench.

    Environment ``i`` of a batch with seed ``s`` starts as environment 0 with seed ``s + i`` does,
    so that an evaluation shows the same episodes however many environments share it. Where tasks
    come in turn, so do they over neighbouring environments and over each one's episodes.

    Raises:
        MissingExtraError: If OGBench is not installed.
    """
    family = Family(
        create=partial(_create, settings),
        max_episode_steps=lambda env: max_episode_steps(settings.name),
        control_period_s=lambda env: env._env.simulation.control_timestep(),
        observation_keys=lambda env: ["observation"],
        render=lambda env, height, width: env._env.draw(height, width),
        extras={"success": torch.bool}
        | (
            dict.fromkeys(("goal", "achieved_goal"), torch.float32)
            if settings.goal_conditioned
            else {}
        ),
        indexed=True,
    )
    return TorchrlEnv(
        label(settings), family, num_envs=num_envs, device=device, seed=seed, stagger=stagger
    )


def _create(settings: OGBenchSettings, index: int) -> EnvBase:
    return GymWrapper(Task(settings, index))


class Task(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """One simulation that says with every observation whether it is solved and what the goal is.

    Args:
        settings: Which environment and task.
        index: What is added to every seed.
    """

    def __init__(self, settings: OGBenchSettings, index: int = 0) -> None:
        size = {"height": _HEIGHT, "width": _WIDTH}
        if settings.goal_conditioned:
            self.simulation = make_simulation(settings.name, use_oracle_rep=True, **size)
        else:
            timing = {"success_timing": settings.success_timing}
            self.simulation = make_simulation(settings.name, task=settings.task, **timing, **size)
        self._settings = settings
        self._index = index
        self._episode = 0
        self._goal = np.zeros(0, np.float32)
        # Here, for it compiles the model, which workers do at once and their resets one by one.
        example, _ = self.reset(seed=0)
        self.action_space = self.simulation.action_space
        self.observation_space: Any = gymnasium.spaces.Dict(
            {key: gymnasium.spaces.Box(-np.inf, np.inf, x.shape) for key, x in example.items()}
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode of the task whose turn it is."""
        if seed is not None:
            self._episode = seed = seed + self._index
        task = self._settings.task or 1 + self._episode % self.simulation.num_tasks
        self._episode += 1
        # A single task stays what it is, whatever the options say.
        observation, info = self.simulation.reset(seed=seed, options={"task_id": task})
        self._goal = np.asarray(info["goal"], np.float32)
        return self._output(observation, False), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for one control period."""
        expected_s = self.simulation.data.time + 0.99 * self.simulation.control_timestep()
        observation, reward, terminated, truncated, info = self.simulation.step(action)
        if self.simulation.data.time < expected_s:  # it diverged, and MuJoCo started it anew
            observation = np.full_like(observation, np.nan)
        output = self._output(observation, bool(info["success"]))
        return output, float(reward), bool(terminated), bool(truncated), {}

    def _output(self, observation: np.ndarray, success: bool) -> dict[str, np.ndarray]:
        output = {
            "observation": observation.astype(np.float32),
            "success": np.array([success], np.float32),
        }
        if self._settings.goal_conditioned:
            achieved = self.simulation.compute_oracle_observation()
            output |= {"goal": self._goal, "achieved_goal": achieved.astype(np.float32)}
        return output

    def draw(self, height: int, width: int) -> np.ndarray:
        """Draw it as ``uint8 [height, width, 3]``."""
        simulation = self.simulation
        if (simulation._render_height, simulation._render_width) != (height, width):
            screen = simulation.model.vis.global_
            screen.offheight = max(screen.offheight, height)
            screen.offwidth = max(screen.offwidth, width)
            simulation._render_height, simulation._render_width = height, width
            self._free_renderer()
        frame: np.ndarray = simulation.render()
        return frame

    def close(self) -> None:
        """Free the renderer; the simulation goes with the object."""
        self._free_renderer()

    def _free_renderer(self) -> None:
        if self.simulation._renderer is not None:
            self.simulation._renderer.close()
            self.simulation._renderer = None

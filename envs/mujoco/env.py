"""A torchrl environment over a batch of MuJoCo simulations."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from genpol.envs.base import BatchedEnv
from genpol.envs.mujoco.simulation import BatchedSimulation, Stage
from genpol.envs.mujoco.task import Task
from genpol.errors import ConfigError, GenpolError

if TYPE_CHECKING:
    from genpol.envs.mujoco.warp_simulation import WarpSimulation


class MujocoEnv(BatchedEnv):
    """``num_envs`` copies of one task as a batch-locked environment ``[num_envs]``.

    A simulation that diverges (bad state, huge or non-finite observation or an error inside MuJoCo)
    ends its episode with ``truncated`` and ``diverged`` set, reward 0 and its last good
    observation, so that nothing non-finite ever leaves the environment; the next reset starts it
    afresh.

    Attributes:
        name: The task's name.
        max_episode_steps: Control steps until truncation.
        action_repeat: Control steps per call of ``step``.
        num_diverged: Episodes that ended by divergence so far.
        reward_terms: Names of the reward's terms, if it is a vector.
        group_size: Environments that set out from one state together.
        group_steps: Calls of ``step`` after which they do so again.

    Args:
        name: The task's name.
        task: What to simulate.
        num_envs: Number of simulations.
        seed: Seed of the start states.
        num_threads: Threads that step the physics; 0 takes all cores.
        action_repeat: Control steps for which each action is held; rewards add up over them.
        episode_steps: Control steps until truncation; 0 for the task's own limit.
        stagger: Start the first episodes at random clocks, so that ends are spread over time.
        vector_reward: Give the task's reward terms apart, ``[num_envs, R]``.
        group_size: Neighbouring environments that set out from one state, for advantages relative
            to a group; 1 for none. Every ``group_steps`` steps all are truncated and set out
            anew from where the first of each group stands, whose episode goes on.
        group_steps: See ``group_size``.
        backend: What steps the physics: ``batch``, on the CPU, or ``warp``, on ``device``.
        device: Where tensors are given and taken.

    Raises:
        ConfigError: If the settings do not fit the task.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        *,
        num_envs: int,
        seed: int,
        num_threads: int = 0,
        action_repeat: int = 1,
        episode_steps: int = 0,
        stagger: bool = False,
        vector_reward: bool = False,
        group_size: int = 1,
        group_steps: int = 0,
        backend: str = "batch",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_envs, device=device)
        if episode_steps > task.max_episode_steps:
            raise ConfigError(
                f"env.train_episode_steps = {episode_steps}: must be at most the "
                f"{task.max_episode_steps} steps of an episode of {name}"
            )
        episode_steps = episode_steps or task.max_episode_steps
        if episode_steps % action_repeat != 0:
            raise ConfigError(
                f"env.action_repeat = {action_repeat}: must divide the {episode_steps} "
                f"steps of an episode of {name}"
            )
        if vector_reward and not task.reward_terms:
            raise ConfigError(
                f"env.vector_reward = True: the reward of {name} has no terms; those of "
                "HumanoidStand, HumanoidWalk and HumanoidRun have"
            )
        if num_envs % group_size != 0 or (group_size > 1 and group_steps < 1):
            raise ConfigError(
                f"env.group_size = {group_size}, env.group_steps = {group_steps}: the size must "
                f"divide num_envs = {num_envs}, and groups need steps; set env.group_steps to "
                "agent.rollout_steps"
            )
        self.name = name
        self.task = task
        self.reward_terms = task.reward_terms if vector_reward else ()
        self.group_size = group_size
        self.group_steps = group_steps
        self._until_regroup = 0
        self.max_episode_steps = episode_steps
        self.action_repeat = action_repeat
        self.num_diverged = 0
        self.generator = torch.Generator()
        self._stagger = stagger
        self._restored = False
        self._renderer: mujoco.Renderer | None = None
        self.sim = self._simulate(backend, num_envs, num_threads)
        task.allocate(num_envs)
        task.to(self.sim.device, self.sim.dtype)
        home = {"device": self.sim.device}
        self._all = torch.arange(num_envs, **home)
        self._leaders = self._all - self._all % group_size
        self._over = torch.ones(num_envs, dtype=torch.bool, **home)
        self._elapsed = torch.zeros(num_envs, dtype=torch.int64, **home)
        self._is_init = torch.ones(num_envs, 1, dtype=torch.bool, **home)
        self.set_seed(seed)
        self._start(self._all)
        self._observation = self._observe()
        self.declare(
            {"observation": self._observation},
            action_dim=task.action_dim,
            num_rewards=max(1, len(self.reward_terms)),
        )

    def _simulate(
        self, backend: str, num_envs: int, num_threads: int
    ) -> BatchedSimulation | WarpSimulation:
        task = self.task
        options: dict[str, Any] = {
            "fields": task.fields,
            "expanded": task.expanded,
            "num_threads": num_threads,
        }
        if backend == "batch":
            persistent = task.persistent or None
            return BatchedSimulation(task.model, num_envs, persistent=persistent, **options)
        from genpol.envs.mujoco.warp_simulation import WarpSimulation

        return WarpSimulation(task.model, num_envs, device=self.device, **options)

    @property
    def control_period_s(self) -> float:
        """Seconds of simulated time per call of ``step``."""
        return self.task.control_period_s * self.action_repeat

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.generator.manual_seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None or mask.all():
            self._reset_all()
        else:
            mask = mask.to(self.sim.device)
            ids = mask.view(-1).nonzero().view(-1)
            self._start(ids)
            self._elapsed[ids] = 0
            self._is_init = self._is_init | mask.view(-1, 1)
            # Rows of simulations that run on are recomputed from unchanged fields, unless they
            # diverged in a step whose reset was refused; keep those as they were.
            self._observation = torch.where(mask.view(-1, 1), self._observe(), self._observation)
        return self.output({"observation": self._observation}, is_init=self._is_init)

    def _reset_all(self) -> None:
        if self._restored:  # load_simulation() has put everything in place
            self._restored = False
            return
        self._is_init = torch.ones_like(self._is_init)
        # At the end of a group's steps, or before its first: not where all episodes end between.
        regroup = self.group_size > 1 and self._until_regroup in (0, self.group_steps)
        starting = self._all
        if regroup:  # only the leaders whose episodes are over; the others go on or follow
            starting = self._all[(self._leaders == self._all) & self._over]
        if len(starting) > 0:
            self._start(starting)
            self._elapsed[starting] = 0
        if self._stagger:  # once: later full resets are those of small batches
            self._stagger = False
            decisions = self.max_episode_steps // self.action_repeat
            clocks = torch.randint(decisions, self._elapsed.shape, generator=self.generator)
            self._elapsed.copy_(clocks * self.action_repeat)
        begun = torch.zeros_like(self._over).scatter(0, starting, True)
        # Accelerations at a state that is only restored are unknown, so its observation is kept.
        self._observation = torch.where(begun[:, None], self._observe(), self._observation)
        if regroup:
            self._follow_leaders()

    def _follow_leaders(self) -> None:
        """Put every environment where the first of its group stands."""
        self.sim.copy_rows(self._leaders)
        for x in (self._elapsed, *self.task.memory.values()):
            x.copy_(x[self._leaders])
        self._observation = self._observation[self._leaders]
        self._until_regroup = self.group_steps

    def _start(self, ids: Tensor) -> None:
        rows = ids.cpu()
        self.sim.start(ids, lambda sim: self.task.initialize(sim, rows, self.generator))
        self.sim.forward(ids, Stage.ACCELERATION, actuated=self.task.actuated_start)
        self.task.after_reset(self.sim, ids)
        self.sim.pop_diverged()

    def _observe(self) -> Tensor:
        return self.task.observe(self.sim).float()

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"].to(self.sim.device, self.sim.dtype).clamp(-1.0, 1.0)
        observation, reward, terminated, diverged = self._control_step(action)
        for _ in range(self.action_repeat - 1):
            running = ~(terminated | diverged | self._timed_out())
            self._elapsed -= (~running).long()  # clocks of ended episodes stand still
            later = self._control_step(action)
            observation = torch.where(running[:, None], later[0], observation)
            reward += torch.where(running[:, None], later[1], 0.0)
            terminated |= running & later[2]
            diverged |= running & later[3]
        if diverged.any():
            self.num_diverged += int(diverged.sum())
            observation = torch.where(diverged[:, None], self._observation, observation)
            reward = torch.where(diverged[:, None], 0.0, reward)
            terminated &= ~diverged
        truncated = self._timed_out() | diverged
        self._observation = observation
        self._is_init = torch.zeros_like(self._is_init)
        if self.group_size > 1:
            self._over = terminated | truncated
            self._until_regroup -= 1
            truncated |= self._until_regroup == 0
        return self.output(
            {"observation": observation},
            is_init=self._is_init,
            diverged=diverged.unsqueeze(-1),
            terminated=terminated.unsqueeze(-1),
            truncated=truncated.unsqueeze(-1),
            reward=reward,
        )

    def _control_step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Advance one control step; return observation, reward, terminated and diverged.

        The reward is ``[num_envs, R]``, the others ``[num_envs, ...]``.
        """
        sim, task = self.sim, self.task
        task.before_step(sim, action)
        sim.step(task.num_substeps, task.stage)
        task.after_step(sim)
        self._elapsed += 1
        rewards = task.reward_by_term(sim) if self.reward_terms else task.reward(sim)[:, None]
        observation, reward = self._observe(), rewards.float()
        # MuJoCo itself tests the state only when the next step begins. NaN fails both comparisons.
        sane = torch.cat([observation, reward], -1).abs().lt(mujoco.mjMAXVAL).all(-1)
        diverged = sim.pop_diverged() | ~sane
        return observation, reward, task.terminated(sim), diverged

    def _timed_out(self) -> Tensor:
        return self._elapsed >= self.max_episode_steps

    def state_dict_of_simulation(self) -> dict[str, Tensor]:
        """Return all that continuing bit for bit needs: physics, clocks, memory, generator."""
        state = {f"physics.{name}": x for name, x in self.sim.state().items()}
        state |= {f"memory.{name}": x.clone() for name, x in self.task.memory.items()}
        return state | {
            "observation": self._observation.clone(),
            "elapsed": self._elapsed.clone(),
            "is_init": self._is_init.clone(),
            "until_regroup": torch.tensor(self._until_regroup),
            "generator": self.generator.get_state(),
            "num_diverged": torch.tensor(self.num_diverged),
        }

    def load_simulation(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict_of_simulation`; the next full reset returns this state."""
        prefix = "physics."
        self.sim.load_state(
            {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        )
        for name, x in self.task.memory.items():
            x.copy_(state[f"memory.{name}"])
        self._observation = state["observation"].clone()
        self._elapsed.copy_(state["elapsed"])
        # Checkpoints of before the key was kept: an episode that has just begun has no steps yet.
        self._is_init = state.get("is_init", (state["elapsed"] == 0).unsqueeze(-1)).clone()
        self._until_regroup = int(state["until_regroup"])
        self.generator.set_state(state["generator"])
        self.num_diverged = int(state["num_diverged"])
        self._restored = True
        self._stagger = False

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Draw simulation ``index`` as ``uint8 [height, width, 3]``."""
        model = self.sim.model_of(index)
        data = self.sim.data_of(index)
        if self.sim.persistent:  # the data are the simulation's own
            data = copy.copy(data)
        mujoco.mj_forward(model, data)
        renderer = self._renderer
        if renderer is None or (renderer.height, renderer.width) != (height, width):
            self._free_renderer()
            self._renderer = renderer = _make_renderer(model, height, width)
        renderer.update_scene(data, camera=self.task.camera)
        return renderer.render()

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Free the renderer; the simulations go with the object."""
        self._free_renderer()
        super().close(raise_if_closed=raise_if_closed)

    def _free_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _make_renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    try:
        # The largest picture that the model's off-screen buffer holds must hold this one.
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, height)
        return mujoco.Renderer(model, height, width)
    except Exception as error:  # whatever the OpenGL binding raises where there is none
        raise GenpolError(
            f"nothing can be drawn here ({type(error).__name__}); install an OpenGL library "
            "(Debian: apt install libegl1 libgl1-mesa-dri) and set MUJOCO_GL=egl"
        ) from error

"""A torchrl environment over a simulation of Isaac Lab."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from genpol.envs.grouped import GroupedEnv
from genpol.envs.isaaclab.simulation import open_simulation
from genpol.envs.settings import IsaacLabSettings, label


class IsaacLabEnv(GroupedEnv):
    """``num_envs`` copies of a task of Isaac Lab as a batch-locked environment ``[num_envs]``.

    Of the task's observation groups ``policy`` is the ``observation``, and ``critic``, where the
    task has it, comes under ``critic_observation``. Actions in ``[-1, 1]`` are multiplied by
    ``settings.action_bound``. Isaac Lab starts ended episodes anew within the step that ends them;
    here that step's observation is the one that the episode ended with, and :meth:`reset` gives
    the new one. A step that yields something non-finite ends its episode with ``truncated`` and
    ``diverged``, reward 0 and the last good observation.

    All tensors stay on the simulation's device; nothing is read back in a step.

    Attributes:
        name: The task's name.
        max_episode_steps: Steps until truncation.
        action_repeat: 1; the tasks repeat actions as they please.
        control_period_s: Seconds of simulated time per step.

    Args:
        settings: Which task.
        num_envs: Number of environments.
        device: Where physics and tensors are, ``cpu`` or ``cuda``.
        seed: Seed of the start states.
        stagger: Start the first episodes at random clocks, so that ends are spread over time.

    Raises:
        ConfigError: If there is no such task, or observations or actions are not vectors.
        EnvironmentFault: If this process simulates with Isaac Lab already, or Isaac Lab fails.
        MissingExtraError: If Isaac Lab is not installed.
    """

    simulator = "Isaac Lab"
    actor_group = "policy"

    def __init__(
        self,
        settings: IsaacLabSettings,
        *,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int,
        stagger: bool = False,
    ) -> None:
        super().__init__(
            label(settings),
            num_envs=num_envs,
            device=device,
            action_bound=settings.action_bound,
            stagger=stagger,
        )
        self.adopt(
            *open_simulation(settings, num_envs=num_envs, device=torch.device(device), seed=seed)
        )
        # Whose episode Isaac Lab has started anew since they were last reset here.
        self._fresh = torch.zeros(num_envs, 1, dtype=torch.bool, device=self.device)
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self.sim.seed(seed)
            self._fresh.zero_()  # those that began before do not count

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        everything = mask is None or bool(mask.all())
        rows = torch.ones_like(self._fresh) if mask is None else mask.to(self.device).view(-1, 1)
        if everything and not bool(self._fresh.all()):
            self._see(self._groups(self.sim.reset()[0]))
        else:
            self._restart((rows & ~self._fresh).view(-1))
        self._fresh &= ~rows
        if everything:
            self._spread_clocks()
        return self._begun(rows)

    def _restart(self, rows: Tensor) -> None:
        """Start episodes anew in the midst of them, which Isaac Lab itself does only at ends."""
        ids = rows.nonzero().view(-1).int()
        if len(ids) == 0:
            return
        sim = self.sim
        sim._reset_idx(ids)
        sim.scene.write_data_to_sim()
        sim.sim.forward()
        if hasattr(sim, "observation_manager"):
            observation = sim.observation_manager.compute()
        else:
            observation = sim._compute_observations()
        self._see(self._groups(observation), rows.view(-1, 1))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        with self._faults():
            after, reward, terminated, truncated, extras = self.sim.step(
                self._scaled(tensordict["action"])
            )
        shown = self._groups(after)
        self._fresh = (terminated | truncated).view(-1, 1).bool()
        last = shown
        if "final_obs" in extras:
            final = self._groups(extras["final_obs"])
            last = {key: torch.where(self._fresh, final[key], x) for key, x in shown.items()}
        outcome = self._outcome(last, reward, terminated, truncated)
        # What reset() gives where a new episode has begun.
        self._see(shown, self._fresh)
        return outcome

"""Tasks of mjlab, on MuJoCo Warp, through torchrl."""

from __future__ import annotations

import importlib.util
import io
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase

from genpol.envs.grouped import GroupedEnv
from genpol.envs.settings import MjlabSettings, label
from genpol.errors import ConfigError, MissingExtraError, nearest


class MjlabEnv(GroupedEnv):
    """``num_envs`` copies of a task of mjlab as a batch-locked environment ``[num_envs]``.

    Of the task's observation groups ``actor`` is the ``observation``, and ``critic``, where the
    task has it, comes under ``critic_observation``; see
    :class:`~genpol.envs.grouped.GroupedEnv`. mjlab draws from the process's own generators: every
    environment made here has a state of them of its own, so that others neither disturb it nor are
    disturbed.

    Attributes:
        name: The task's name.
        max_episode_steps: Steps until truncation.
        action_repeat: 1; the tasks repeat actions as they please.
        control_period_s: Seconds of simulated time per step.

    Args:
        settings: Which task.
        num_envs: Number of environments.
        device: Where physics and tensors are, ``cpu`` or ``cuda``.
        seed: Seed of the start states, commands and noise.
        stagger: Start the first episodes at random clocks, so that ends are spread over time.

    Raises:
        ConfigError: If there is no such task, or observations or actions are not vectors.
        EnvironmentFault: If mjlab fails, here or later.
        MissingExtraError: If mjlab is not installed.
    """

    simulator = "mjlab"
    actor_group = "actor"

    def __init__(
        self,
        settings: MjlabSettings,
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
        self._randomness = _Randomness(self.device)
        with self._faults(), self._randomness.own():
            self._inner = _open(settings.task, num_envs, self.device, seed)
        cleanup = ExitStack()
        cleanup.callback(self._inner.close, raise_if_closed=False)
        self.adopt(self._inner._env, cleanup)
        self.set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            with self._randomness.own():
                self.sim.seed(seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        everything = mask is None or bool(mask.all())
        rows = torch.ones(*self.batch_size, 1, dtype=torch.bool) if mask is None else mask
        rows = rows.to(self.device).view(-1, 1)
        if bool(rows.any()):
            with self._faults(), self._randomness.own():
                after = self._inner.reset(TensorDict({"_reset": rows}, self.batch_size))
                if everything:
                    self._spread_clocks()
            self._see(self._groups(after), rows)
        return self._begun(rows)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = self._scaled(tensordict["action"])
        with self._faults(), self._randomness.own():
            after = self._inner.step(TensorDict({"action": action}, self.batch_size))["next"]
        return self._outcome(
            self._groups(after), after["reward"], after["terminated"], after["truncated"]
        )


class _Randomness:
    """A state of the process's random generators that is in force within :meth:`own` only."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._state = self._read()

    @contextmanager
    def own(self) -> Iterator[None]:
        outer = self._read()
        self._write(self._state)
        try:
            yield
        finally:
            self._state = self._read()
            self._write(outer)

    def _read(self) -> tuple[Any, ...]:
        on_devices = [torch.cuda.get_rng_state(device) for device in self._devices]
        return torch.get_rng_state(), on_devices, np.random.get_state(), random.getstate()

    def _write(self, state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        for device, own in zip(self._devices, state[1], strict=True):
            torch.cuda.set_rng_state(own, device)
        np.random.set_state(state[2])
        random.setstate(state[3])


def _open(task: str, num_envs: int, device: torch.device, seed: int) -> Any:
    """Return torchrl's environment of a task, which is reset when it is told to."""
    if importlib.util.find_spec("mjlab") is None:
        raise MissingExtraError(
            "mjlab is not installed; it pins an older MuJoCo and wants an environment of its own: "
            "make mjlab, then .venv-mjlab/bin/genpol"
        )
    os.environ.setdefault("MJLAB_WARP_QUIET", "1")
    with redirect_stdout(io.StringIO()):
        import mjlab.tasks  # noqa: F401 - registers them
        from mjlab.tasks import registry
        from torchrl.envs import MJLabEnv

        known = registry.list_tasks()
        if task not in known:
            raise ConfigError(
                f"env.task = {task!r}: mjlab registers no such task.{nearest(task, known)} "
                f"There are {', '.join(known)}"
            )
        config = registry.load_env_cfg(task)
        config.seed = seed
        return MJLabEnv(task, cfg=config, num_envs=num_envs, device=device)

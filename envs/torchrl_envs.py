"""Any gymnasium or dm_control environment, through torchrl.

One environment runs in this process; more run in one worker process each. Native tasks
(:mod:`genpol.envs.mujoco`) are an order of magnitude faster where they exist.
"""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import DMControlWrapper, EnvBase, GymWrapper

from genpol.envs.settings import DMControlSettings, GymSettings, label
from genpol.envs.wrapper import Family, TorchrlEnv, one_line
from genpol.errors import ConfigError, nearest


def make_gym(
    settings: GymSettings,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    *,
    stagger: bool = False,
) -> TorchrlEnv:
    """Make ``num_envs`` gymnasium environments.

    Raises:
        ConfigError: If the id is unknown, or spaces are other than a vector and a bounded box.
    """
    _check_gym_id(settings.id)
    family = Family(
        create=partial(_create_gym, settings.id),
        max_episode_steps=lambda env: env._env.spec.max_episode_steps,
        control_period_s=_gym_control_period_s,
        observation_keys=lambda env: ["observation"],
        render=lambda env, height, width: env._env.render(),
    )
    return TorchrlEnv(
        label(settings), family, num_envs=num_envs, device=device, seed=seed, stagger=stagger
    )


def make_dm_control(
    settings: DMControlSettings,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    *,
    stagger: bool = False,
) -> TorchrlEnv:
    """Make ``num_envs`` environments of the dm_control suite.

    Raises:
        ConfigError: If the domain or the task is unknown.
    """
    _check_dm_control_task(settings.domain, settings.task)
    family = Family(
        create=partial(_create_dm_control, settings.domain, settings.task),
        max_episode_steps=lambda env: env._env._step_limit,
        control_period_s=lambda env: env._env.control_timestep(),
        observation_keys=lambda env: list(env._env.observation_spec()),
        render=lambda env, height, width: env._env.physics.render(height, width, camera_id=0),
    )
    return TorchrlEnv(
        label(settings), family, num_envs=num_envs, device=device, seed=seed, stagger=stagger
    )


def _check_gym_id(env_id: str) -> None:
    import gymnasium

    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"env.id = {env_id!r}: cannot import {module!r}: {error}") from None
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error:
        hint = nearest(name, gymnasium.registry)
        raise ConfigError(f"env.id = {env_id!r}: gymnasium knows no such id.{hint}") from None


def _create_gym(env_id: str) -> EnvBase:
    """Make one gymnasium environment that can be drawn if it knows how."""
    import gymnasium

    name = env_id.rpartition(":")[2]
    if name != env_id:
        importlib.import_module(env_id.rpartition(":")[0])
    try:
        entry: Any = gymnasium.spec(name).entry_point
        if isinstance(entry, str):
            entry = gymnasium.envs.registration.load_env_creator(entry)
        modes = getattr(entry, "metadata", {}).get("render_modes", [])
        drawn: dict[str, Any] = {"render_mode": "rgb_array"} if "rgb_array" in modes else {}
        env = gymnasium.make(name, disable_env_checker=True, **drawn)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"env.id = {env_id!r}: {one_line(error)}") from error
    _check_gym_spaces(env_id, env)
    return GymWrapper(env)


def _gym_control_period_s(env: EnvBase) -> float:
    """Return gymnasium's ``dt`` where an environment has one, else the period of its drawings."""
    period = getattr(env._env.unwrapped, "dt", None)
    return float(period or 1 / env._env.metadata.get("render_fps", 30))


def _check_gym_spaces(env_id: str, env: Any) -> None:
    """Refuse kinds of spaces that torchrl would turn into something else."""
    from gymnasium.spaces import Box

    for what, space in (("actions", env.action_space), ("observations", env.observation_space)):
        if not isinstance(space, Box):
            raise ConfigError(
                f"environment {env_id} has {what} in {space}: only boxes of real numbers are "
                "supported"
            )


def _check_dm_control_task(domain: str, task: str) -> None:
    from dm_control import suite

    domains = suite.TASKS_BY_DOMAIN
    if domain not in domains:
        hint = nearest(domain, domains)
        raise ConfigError(f"env.domain = {domain!r}: dm_control has no such domain.{hint}")
    if task not in domains[domain]:
        known = ", ".join(domains[domain])
        raise ConfigError(
            f"env.task = {task!r}: domain {domain!r} has {known}.{nearest(task, domains[domain])}"
        )


def _create_dm_control(domain: str, task: str) -> EnvBase:
    from dm_control import suite

    # Some domains (lqr) draw their model too: all workers, and all runs, get the same.
    return _DMControl(env=suite.load(domain, task, task_kwargs={"random": 0}))


class _DMControl(DMControlWrapper):
    """Gives NaN where dm_control raises because the physics diverged."""

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        from dm_control.rl.control import PhysicsError

        try:
            return super()._step(tensordict)
        except PhysicsError:
            after = self.output_spec["full_observation_spec"].zero()
            after.apply_(lambda x: x.fill_(math.nan))
            after.set("reward", torch.zeros(1, dtype=self.reward_spec.dtype))
            for key in ("done", "truncated"):
                after.set(key, torch.ones(1, dtype=torch.bool))
            return after.set("terminated", torch.zeros(1, dtype=torch.bool))

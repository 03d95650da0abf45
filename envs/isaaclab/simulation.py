"""Open one simulation of Isaac Lab, of which a process can have one at a time."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import torch

from genpol.envs.settings import IsaacLabSettings
from genpol.errors import ConfigError, EnvironmentFault, GenpolError, MissingExtraError, nearest

_OWN = {"cartpole": "Genpol-Cartpole", "hopper": "Genpol-Hopper", "quadruped": "Genpol-Quadruped"}


def open_simulation(
    settings: IsaacLabSettings, *, num_envs: int, device: torch.device, seed: int
) -> tuple[Any, ExitStack]:
    """Return Isaac Lab's environment, and what closes it.

    Args:
        settings: Which task, and what to change in its configuration.
        num_envs: Number of environments.
        device: Where physics and tensors are.
        seed: Seed of the start states; Isaac Lab draws from the process's own generators.

    Raises:
        ConfigError: If there is no such task, or an override does not fit it.
        EnvironmentFault: If this process simulates already.
        MissingExtraError: If Isaac Lab is not installed.
    """
    require_isaaclab()
    cleanup = ExitStack()
    try:
        with _hushed():
            import gymnasium
            import isaaclab_tasks  # noqa: F401 - registers Isaac Lab's
            from isaaclab.app import launch_simulation
            from isaaclab.sim import SimulationContext

            from genpol.envs.isaaclab import tasks

            tasks.register()
            if SimulationContext.instance() is not None:
                raise EnvironmentFault(
                    "this process simulates with Isaac Lab already, which can be had once: close "
                    "the other environment, or make this one with training=False, which gives it "
                    "a process of its own"
                )
            task = _OWN.get(settings.task, settings.task)
            config = _configure(task, settings, num_envs, device, seed)
            cleanup.enter_context(launch_simulation(config))
            env = gymnasium.make(task, cfg=config, disable_env_checker=True).unwrapped
            cleanup.callback(_close, env)
    except GenpolError:
        cleanup.close()
        raise
    except Exception as error:
        cleanup.close()
        message = " ".join(str(error).split())[:400]
        raise EnvironmentFault(
            f"Isaac Lab cannot simulate {settings.task}: {type(error).__name__}: {message}"
        ) from error
    return env, cleanup


def require_isaaclab() -> None:
    """Refuse where Isaac Lab is not installed.

    Raises:
        MissingExtraError: If it is missing; the message says how to get it.
    """
    import importlib.util

    if importlib.util.find_spec("isaaclab") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise MissingExtraError(
            f"Isaac Lab is not installed in this Python {version}; it needs 3.12 and an "
            "environment of its own: make isaaclab, then .venv-isaaclab/bin/genpol"
        )


def _configure(
    task: str, settings: IsaacLabSettings, num_envs: int, device: torch.device, seed: int
) -> Any:
    """Return the task's configuration with presets and overrides applied."""
    import gymnasium
    from isaaclab_tasks.utils import parse_env_cfg

    known = [name for name in gymnasium.registry if name.startswith(("Isaac", "Genpol"))]
    if task not in gymnasium.registry:
        hint = nearest(settings.task, [*_OWN, *known])
        raise ConfigError(f"env.task = {settings.task!r}: Isaac Lab registers no such task.{hint}")
    presets = [text for text in settings.overrides if not text.startswith("env.")]
    try:
        _check_fields(parse_env_cfg(task, overrides=presets), settings.overrides)
        config: Any = parse_env_cfg(task, overrides=list(settings.overrides))
    except ConfigError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())[:400]
        raise ConfigError(f"env.overrides = {list(settings.overrides)}: {message}") from error
    config.sim.device = str(device)
    config.scene.num_envs = num_envs
    config.seed = seed
    # Without these the observation that an episode ended with would be lost.
    config.compute_final_obs = True
    return config


def _check_fields(config: Any, overrides: Sequence[str]) -> None:
    """Refuse values for fields that there are not, which Isaac Lab would leave out in silence."""
    for text in overrides:
        if not text.startswith("env."):
            continue
        place = config
        for name in text.partition("=")[0].split(".")[1:]:
            fields = place if isinstance(place, dict) else getattr(place, "__dict__", {})
            if name not in fields:
                hint = nearest(name, fields)
                raise ConfigError(f"env.overrides: {text!r}: there is no {name!r} to set.{hint}")
            place = fields[name]


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep from the terminal what is written while a scene is built, unless it fails."""
    os.environ.setdefault("OMNI_KIT_ACCEPT_EULA", "YES")
    logger = logging.getLogger("isaaclab")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _close(env: Any) -> None:
    with _hushed():
        env.close()

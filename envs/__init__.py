"""Simulators: native MuJoCo tasks, OGBench, Meta-World, Isaac Lab, mjlab, gymnasium, dm_control.

Every environment made here is a torchrl ``EnvBase`` of batch size ``[num_envs]``: actions in
``[-1, 1]``, one ``observation`` vector, ``terminated`` apart from ``truncated``, and ``diverged``
where the physics failed. Importing this package imports no simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from genpol.envs.mujoco.names import NAMES
from genpol.envs.settings import (
    DMControlSettings,
    GymSettings,
    IsaacLabSettings,
    MetaWorldSettings,
    MjlabSettings,
    MujocoSettings,
    MultiTaskSettings,
    OGBenchSettings,
    Settings,
    label,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torchrl.envs import EnvBase

    from genpol.data.dataset import OfflineDataset

__all__ = [
    "DMControlSettings",
    "GymSettings",
    "IsaacLabSettings",
    "MetaWorldSettings",
    "MjlabSettings",
    "MujocoSettings",
    "MultiTaskSettings",
    "OGBenchSettings",
    "Settings",
    "family",
    "label",
    "make",
    "make_chunked",
    "names",
    "open_data",
    "relabel",
    "settings_classes",
]


def names() -> list[str]:
    """Return the names of the native tasks."""
    return list(NAMES)


def settings_classes() -> dict[str, type]:
    """Return the settings dataclass of every simulator family by the family's name."""
    return {
        "mujoco": MujocoSettings,
        "multitask": MultiTaskSettings,
        "gym": GymSettings,
        "dm_control": DMControlSettings,
        "ogbench": OGBenchSettings,
        "metaworld": MetaWorldSettings,
        "isaaclab": IsaacLabSettings,
        "mjlab": MjlabSettings,
    }


def family(settings: Settings) -> str:
    """Return the name of a simulator family, from its settings."""
    return next(name for name, kind in settings_classes().items() if type(settings) is kind)


def make_chunked(
    make_env: Callable[..., EnvBase], horizon: int, steps: int, **options: Any
) -> EnvBase:
    """Make environments one step of which is a chunk; see :class:`genpol.envs.chunking.ChunkedEnv`.

    Args:
        make_env: Makes the environments within.
        horizon: Actions of a chunk.
        steps: How many of them are carried out.
        options: For ``make_env``.
    """
    from genpol.envs.chunking import ChunkedEnv

    return ChunkedEnv(make_env(**options), horizon=horizon, steps=steps)


def make(
    settings: Settings,
    *,
    num_envs: int,
    device: torch.device | str = "cpu",
    seed: int,
    training: bool = False,
) -> EnvBase:
    """Make ``num_envs`` environments in one, of batch size ``[num_envs]``.

    Args:
        settings: Which simulator and task.
        num_envs: Number of environments.
        device: Where tensors are given and taken.
        seed: Seed of the start states.
        training: Make them to learn in: the first episodes start at random clocks, so that ends are
            spread over time, and settings that only concern training apply.

    Raises:
        ConfigError: If there is no such task, or it is not one of vectors in and out.
    """
    from genpol.settings import at_least

    at_least("num_envs", num_envs, 1)
    at_least("env.observation_steps", settings.observation_steps, 1)
    if settings.observation_steps > 1:
        from genpol.envs.stacking import StackedEnv

        single = replace(settings, observation_steps=1)
        env = make(single, num_envs=num_envs, device=device, seed=seed, training=training)
        return StackedEnv(env, settings.observation_steps)
    match settings:
        case MujocoSettings():
            from genpol.envs.mujoco import registry
            from genpol.envs.mujoco.env import MujocoEnv

            return MujocoEnv(
                settings.name,
                registry.tasks()[settings.name](),
                num_envs=num_envs,
                seed=seed,
                num_threads=settings.num_threads,
                action_repeat=settings.action_repeat,
                episode_steps=settings.train_episode_steps if training else 0,
                stagger=training,
                vector_reward=settings.vector_reward and training,
                group_size=settings.group_size if training else 1,
                group_steps=settings.group_steps,
                backend=settings.backend,
                device=device,
            )
        case MultiTaskSettings():
            from genpol.envs.multitask import make_multitask

            return make_multitask(settings, num_envs, device, seed, training=training)
        case GymSettings():
            from genpol.envs.torchrl_envs import make_gym

            return make_gym(settings, num_envs, device, seed, stagger=training)
        case DMControlSettings():
            from genpol.envs.torchrl_envs import make_dm_control

            return make_dm_control(settings, num_envs, device, seed, stagger=training)
        case OGBenchSettings():
            from genpol.envs.ogbench import make_ogbench

            return make_ogbench(settings, num_envs, device, seed, stagger=training)
        case MetaWorldSettings():
            from genpol.envs.metaworld import make_metaworld

            return make_metaworld(settings, num_envs, device, seed, stagger=training)
        case IsaacLabSettings():
            return _make_isaaclab(settings, num_envs, device, seed, training=training)
        case MjlabSettings():
            from genpol.envs.mjlab import MjlabEnv

            return MjlabEnv(settings, num_envs=num_envs, device=device, seed=seed, stagger=training)
    raise TypeError(f"no simulator family has settings of type {type(settings).__name__}")


def _make_isaaclab(
    settings: IsaacLabSettings,
    num_envs: int,
    device: torch.device | str,
    seed: int,
    *,
    training: bool,
) -> EnvBase:
    """Make the environments to learn in here, others in a process of their own.

    A process can simulate one scene of Isaac Lab only.
    """
    from genpol.envs.isaaclab.env import IsaacLabEnv
    from genpol.envs.isaaclab.simulation import require_isaaclab
    from genpol.envs.isaaclab.worker import WorkerEnv

    if training:
        return IsaacLabEnv(settings, num_envs=num_envs, device=device, seed=seed, stagger=True)
    require_isaaclab()
    create = partial(IsaacLabEnv, settings, num_envs=num_envs, device=device, seed=seed)
    return WorkerEnv(create, name=label(settings), num_envs=num_envs, device=device, seed=seed)


def open_data(
    path: Path, settings: Settings, observation_dim: int, action_dim: int
) -> OfflineDataset:
    """Open a data set as an environment's task sees it, or the folder of those of several tasks.

    Args:
        path: A data set of any format.
        settings: The environment's.
        observation_dim: Width of the environment's observations.
        action_dim: Width of its actions.

    Raises:
        DatasetError: If it cannot be read, or does not suit the environment.
    """
    if isinstance(settings, MultiTaskSettings):
        from genpol.envs import multitask_data

        return multitask_data.open_folder(path, settings, observation_dim, action_dim)
    from genpol.data.formats import open_dataset

    return relabel(open_dataset(path), settings)


def relabel(dataset: OfflineDataset, settings: Settings) -> OfflineDataset:
    """Return a data set as an environment's task sees it.

    OGBench's data were recorded without a task: rewards, ends and goals are made here. Data of
    other simulators hold their own.

    Raises:
        DatasetError: If a column is missing or belongs to another environment, or the rewards are
            others than the task's.
    """
    if isinstance(settings, OGBenchSettings):
        from genpol.envs import ogbench_relabel

        return ogbench_relabel.relabel(dataset, settings)
    if isinstance(settings, MetaWorldSettings):
        from genpol.envs import metaworld_data

        metaworld_data.check_rewards(dataset, settings)
    return dataset

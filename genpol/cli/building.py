"""What settings describe: an agent, its environments, and the data that it learns from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genpol.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from genpol.agent import Agent
    from genpol.data.dataset import OfflineDataset
    from genpol.training.loop import EnvFactory
    from genpol.training.settings import TrainSettings


def build(settings: TrainSettings) -> tuple[Agent, EnvFactory]:
    """Return the agent and the environment factory that ``settings`` describe."""
    import torch

    _check_device(settings.device)
    if settings.num_threads > 0:
        torch.set_num_threads(settings.num_threads)
    make_env = env_factory(settings)
    return make_agent(settings), make_env


def env_factory(settings: TrainSettings) -> EnvFactory:
    """Return what makes the environments that ``settings`` describe."""
    from genpol.envs import make, make_chunked

    make_env: EnvFactory = partial(make, settings.env, device=settings.device)
    if (chunking := getattr(settings.agent, "chunking", None)) is not None:
        make_env = partial(make_chunked, make_env, *chunking)
    return make_env


def make_agent(settings: TrainSettings) -> Agent:
    """Return the agent that ``settings`` describe, as it is before any training."""
    from genpol.agent import Specs
    from genpol.agents import make
    from genpol.seeding import derive

    smallest = getattr(settings.env, "group_size", 1)
    probe = env_factory(settings)(num_envs=smallest, seed=settings.seed, training=True)
    specs = Specs.from_env(probe, num_envs=settings.num_envs)
    probe.close()
    return make(
        settings.choices.agent,
        settings.agent,
        specs,
        device=settings.device,
        seed=derive(settings.seed, "agent"),
    )


def open_data(settings: TrainSettings, agent: Agent) -> OfflineDataset | None:
    """Open what the agent learns from, as the environment's task sees it.

    Raises:
        ConfigError: If agent and settings do not go together.
        DatasetError: If the data are damaged or belong to another environment.
    """
    from genpol.agent import DatasetAgent

    name = settings.choices.agent
    if not isinstance(agent, DatasetAgent):
        for key, value in (("data", settings.data), ("online_steps", settings.online_steps)):
            if value:
                raise ConfigError(f"{key} = {value!r}: agent={name} does not learn from data sets")
        return None
    if settings.data is None and not agent.needs_data:
        if settings.online_steps:
            raise ConfigError(
                f"online_steps = {settings.online_steps}: these follow updates on data; without "
                "data= all steps are online, and total_steps says how many"
            )
        return None
    if settings.data is None:
        raise ConfigError(
            f"agent={name} learns from data: add data=<data set>; `genpol data --help` says how to "
            "make one"
        )
    from genpol.cli.data import warn_of_action_repeat
    from genpol.envs import open_data as open_for

    widths = (agent.specs.observation_dim, agent.specs.action_dim)
    dataset = open_for(Path(settings.data).expanduser(), settings.env, *widths)
    for what, found, wanted in (
        ("observations", dataset.observation_dim, agent.specs.observation_dim),
        ("actions", dataset.action_dim, agent.specs.action_dim),
    ):
        if found != wanted:
            raise DatasetError(
                f"{settings.data}: has {what} of width {found}, the environment has {wanted}; take "
                "the environment that the data come from"
            )
    warn_of_action_repeat(dataset, settings.data, agent.specs.action_repeat)
    return dataset


def _check_device(device: str) -> None:
    import torch

    name, _, index = device.partition(":")
    if name == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device = {device!r}: this machine has {torch.cuda.device_count()} CUDA devices that "
            "torch can use; see `genpol info`, or leave device=cpu"
        )

"""Trained runs, as commands find them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genpol.agent import Agent
    from genpol.training.loop import EnvFactory
    from genpol.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainedRun:
    """A run with the weights of one checkpoint.

    Attributes:
        checkpoint: The checkpoint.
        agent: The agent that it was, ready to act.
        make_env: Makes its environments.
        settings: Its settings.
    """

    checkpoint: Path
    agent: Agent
    make_env: EnvFactory
    settings: TrainSettings


def load_run(path: Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Load the last checkpoint of a run, or the one that ``path`` names; or a policy folder.

    Args:
        path: Run folder or checkpoint; or a policy folder, which is loaded as behaviour cloning.
        overrides: Settings to change, as on the command line; of a policy folder with ``env=``.

    Raises:
        CheckpointError: If there is none, or it is damaged.
        ConfigError: If an override is wrong.
    """
    from genpol.cli import configuration
    from genpol.cli.building import build
    from genpol.cli.start import Start
    from genpol.training import checkpoint
    from genpol.training.loop import load_weights
    from genpol.training.policy_folder import is_policy_folder, read

    if is_policy_folder(path):
        start = Start(str(path), "bc", policy=read(path))
        composed = configuration.compose(
            ["agent=bc", *overrides], model=start.settings(), defaults=start.defaults()
        )
        settings = configuration.to_settings(composed)
        agent, make_env = build(settings)
        start.give(agent, settings)
        return TrainedRun(path, agent, make_env, settings)
    found = checkpoint.resolve(path)
    config = checkpoint.run_folder(found) / "config.yaml"
    settings = configuration.to_settings(configuration.load(config, overrides))
    agent, make_env = build(settings)
    load_weights(agent, checkpoint.load(found)["weights"], found)
    return TrainedRun(found, agent, make_env, settings)

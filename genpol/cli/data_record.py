"""`genpol data record`: let trained policies act, and keep what they did as a data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, nearest

if TYPE_CHECKING:
    from genpol.cli.runs import TrainedRun

USAGE = """
usage: genpol data record RUN [RUN ...] output=<data set> [episodes=100] [format=minari]
                          [stochastic=true] [seed=30000] [key=value ...]

Lets the policy of each run (its last checkpoint, or the one named) act for so many episodes and
writes all of them as one data set: a good run alone makes an expert set, an early checkpoint a
medium one, several checkpoints of one run a replay, and different ones a mix.

  episodes     of each RUN
  format       minari (default; output must be named NAME-v0), genpol or ogbench
  stochastic   explore, as in training, or take the policy's mode
  seed         of start states and actions; other than those of training and evaluation

examples:
  genpol data record runs/HopperStand/gorl/20261122-101500-s0 output=data/hopper-expert-v0
  genpol data record RUN/checkpoints/step-000002000000 RUN output=data/hopper-mix-v0
"""

_OPTIONS = ("output", "episodes", "format", "stochastic", "seed")


def run(arguments: list[str]) -> int:
    """Record a data set and return 0.

    Raises:
        ConfigError: If an argument is wrong.
        CheckpointError: If a run has no sound checkpoint.
        DatasetError: If the data set exists or cannot be written.
    """
    paths, options, overrides = _parse(arguments)
    target = Path(options["output"]).expanduser()
    episodes, seed = _whole(options, "episodes", 100), _whole(options, "seed", 30_000)
    stochastic = options.get("stochastic", "true")
    if stochastic not in ("true", "false"):
        raise ConfigError(f"stochastic = {stochastic!r}: must be true or false")
    from genpol.data import formats

    name = options.get("format", "minari")
    formats.check_writable(name)
    if target.exists():
        raise ConfigError(f"output = {str(target)!r}: exists; nothing is overwritten")
    from genpol.cli.runs import load_run
    from genpol.training.display import TerminalReport

    runs = [load_run(path, overrides) for path in paths]
    with ExitStack() as stack:
        report = stack.enter_context(TerminalReport(len(runs) * episodes, unit="episodes"))
        trajectories: list[dict[str, Any]] = []
        for index, trained in enumerate(runs):
            found = _episodes(trained, episodes, seed + index, stochastic == "true")
            for trajectory in found:
                trajectories.append(trajectory)
                report.update(len(trajectories))
    _write(trajectories, runs, target, name)
    steps = sum(len(trajectory["action"]) for trajectory in trajectories)
    sys.stdout.write(f"{target}: {len(trajectories)} episodes, {steps:,} transitions\n")
    return 0


def _episodes(trained: TrainedRun, number: int, seed: int, stochastic: bool) -> Any:
    """Yield trajectories of complete episodes, without those whose physics diverged."""
    from genpol.seeding import derive
    from genpol.training.evaluation import trajectories

    own = derive(seed, "recording")
    trained.agent.generator.manual_seed(own)
    env = trained.make_env(num_envs=min(number, trained.settings.num_envs, 64), seed=own)
    try:
        yield from trajectories(
            trained.agent.policy, env, episodes=number, seed=own, deterministic=not stochastic
        )
    finally:
        env.close()


def _write(
    trajectories: Sequence[dict[str, Any]], runs: Sequence[TrainedRun], target: Path, name: str
) -> None:
    from genpol.data import formats
    from genpol.data.dataset import OfflineDataset
    from genpol.envs import label

    metadata = {
        "env": label(runs[0].settings.env),
        "source": "genpol data record",
        "checkpoints": [str(trained.checkpoint) for trained in runs],
    }
    dataset = OfflineDataset.from_trajectories(trajectories, metadata)
    formats.write(dataset, target, name)


def _parse(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str], list[str]]:
    """Divide the arguments into runs, options and settings of the runs."""
    paths: list[Path] = []
    options: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            paths.append(Path(argument).expanduser())
        elif key in _OPTIONS:
            options[key] = value
        elif "." in key or key in ("num_envs", "device", "num_threads"):
            overrides.append(argument)
        else:
            known = ", ".join(_OPTIONS)
            raise ConfigError(
                f"unknown option {key!r} of `genpol data record`.{nearest(key, _OPTIONS)} "
                f"There are {known}"
            )
    if not paths:
        raise ConfigError("no run given; write: genpol data record RUN output=<data set>")
    if "output" not in options:
        raise ConfigError("no output given: add output=<data set>, such as output=data/medium-v0")
    return paths, options, overrides


def _whole(options: dict[str, str], key: str, default: int) -> int:
    text = options.get(key, str(default))
    if not text.isdigit() or (int(text) == 0 and key != "seed"):
        raise ConfigError(f"{key} = {text!r}: must be a whole number > 0")
    return int(text)

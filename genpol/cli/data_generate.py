"""`genpol data generate`: make the data set of an OGBench environment, without downloading it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from genpol.cli.data import interrupted, whole_number
from genpol.cli.list import names
from genpol.envs.settings import OGBENCH_NAMES
from genpol.errors import ConfigError, nearest
from genpol.provenance import usable_cores
from genpol.settings import at_least

if TYPE_CHECKING:
    from genpol.envs.ogbench_generation import Generation

USAGE = """
usage: genpol data generate env=<name> [num_transitions=1000000] [output=<file.npz>] [seed=0]
                            [num_workers=0] [kind=play|noisy]

Makes a data set of an OGBench manipulation environment (those that `genpol list envs` names
<name>-play) by OGBench's own recipe: scripted oracles that go for one random target after the
other. Needs the extra genpol[ogbench] and no network. The result is OGBench's format: a file of
episodes of 1000 transitions, and one with a tenth as many for validation, whose name ends in -val.

  num_transitions  transitions to train on, rounded up to whole episodes; OGBench's own sets have
                   1M (cube-single, cube-double, scene, puzzle-3x3, puzzle-4x4), 3M (cube-triple,
                   puzzle-4x5) and 5M (cube-quadruple, puzzle-4x6)
  output           file to write, datasets/<name>-<kind>-v0.npz by default
  seed             of all episodes
  num_workers      processes; 0 takes all cores. The data do not depend on it.
  kind             play: plans with smooth noise; noisy: closed-loop oracles with more of it

Ctrl-C keeps the finished episodes, and the same command goes on where it stopped.

examples:
  genpol data generate env=cube-single-play
  genpol data generate env=puzzle-3x3-play num_transitions=5e4 output=small.npz
"""


@dataclass(frozen=True, kw_only=True)
class _Options:
    env: str
    num_transitions: int = 1_000_000
    output: Path | None = None
    seed: int = 0
    num_workers: int = 0
    kind: str = "play"


def run(arguments: list[str]) -> int:
    """Generate a data set; return 0, or 130 or 143 if a signal stopped it.

    Raises:
        ConfigError: If an argument is wrong, or an interrupted generation was another one.
        DatasetError: If the result exists, is being made, or cannot be written.
        EnvironmentFault: If a worker dies.
        MissingExtraError: If OGBench is not installed.
    """
    options = _parse(arguments)
    from genpol.envs.ogbench_data import Recipe
    from genpol.envs.ogbench_generation import Generation, Plan

    recipe = Recipe(name=options.env, kind=options.kind, seed=options.seed)
    plan = Plan.of_size(recipe, options.num_transitions)
    output = options.output or Path("datasets", f"{recipe.dataset_name}.npz")
    generation = Generation(plan, output)
    try:
        return _generate(generation, options.num_workers or usable_cores())
    finally:
        generation.close()


def _generate(generation: Generation, num_workers: int) -> int:
    from genpol.training.display import TerminalReport
    from genpol.training.signals import SignalWatch

    plan = generation.plan
    length = plan.recipe.episode_rows - 1
    finished = plan.num_episodes - len(generation.missing())
    if finished > 0:
        sys.stdout.write(f"going on after {finished} of {plan.num_episodes} episodes\n")
    total, start = length * plan.num_episodes, length * finished
    with (
        SignalWatch() as signals,
        TerminalReport(total, start_steps=start, unit="transitions") as report,
    ):

        def count_episode() -> None:
            nonlocal finished
            finished += 1
            report.update(length * finished, episodes=f"{finished}/{plan.num_episodes}")

        complete = False
        with suppress(KeyboardInterrupt):  # a second Ctrl-C, which does not wait
            if generation.run(
                num_workers, on_episode=count_episode, stop=lambda: signals.stop_requested
            ):
                generation.finish()
                complete = True
    if not complete:
        return interrupted(signals.stop_signal, finished, plan.num_episodes, generation.folder)
    for split, path in (("train", generation.output), ("val", generation.validation_output)):
        sys.stdout.write(f"{path}: {length * plan.episodes[split]:,} transitions\n")
    return 0


def _parse(arguments: Sequence[str]) -> _Options:
    known = [field.name for field in fields(_Options)]
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in known or not equals:
            hint = nearest(key.lstrip("-"), known)
            raise ConfigError(f"cannot read {argument!r}.{hint} Settings are {', '.join(known)}")
        if key in given:
            raise ConfigError(f"{key} is given twice; keep one")
        given[key] = value
    if "env" not in given:
        raise ConfigError("no environment given: add env=<name>, for example env=cube-single-play")
    options = _Options(
        env=_environment(given["env"]),
        num_transitions=whole_number(given, "num_transitions", 1_000_000),
        output=_file(given["output"]) if "output" in given else None,
        seed=whole_number(given, "seed", 0),
        num_workers=whole_number(given, "num_workers", 0),
        kind=given.get("kind", "play"),
    )
    at_least("num_transitions", options.num_transitions, 1)
    at_least("num_workers", options.num_workers, 0)
    return options


def _environment(name: str) -> str:
    """Return OGBench's name of the environment that a configuration names."""
    with_data = [f"{known}-play" for known in OGBENCH_NAMES]
    if name in with_data:
        return name.removesuffix("-play")
    what = "has no recipe for data" if name in names("env") else "unknown environment"
    hint = nearest(name, with_data)
    raise ConfigError(f"env = {name!r}: {what}.{hint} Those that have are {', '.join(with_data)}")


def _file(name: str) -> Path:
    if not name.endswith(".npz"):
        raise ConfigError(f"output = {name!r}: must end in .npz")
    return Path(name).expanduser()

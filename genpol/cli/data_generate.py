"""`genpol data generate`: let scripted experts make the data set of an environment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from genpol.cli.data import interrupted, whole_number
from genpol.cli.list import names
from genpol.envs.settings import (
    METAWORLD_NAMES,
    METAWORLD_REWARDS,
    OGBENCH_NAMES,
    MetaWorldSettings,
    OGBenchSettings,
)
from genpol.errors import ConfigError, nearest
from genpol.provenance import usable_cores
from genpol.settings import at_least, one_of, within

if TYPE_CHECKING:
    from genpol.envs.generation import Generation, Plan

USAGE = """
usage: genpol data generate env=<name>-play [num_transitions=1000000] [kind=play|noisy]
                            [output=<file.npz>] [seed=0] [num_workers=0]
       genpol data generate env=<name>-play kind=demos [task=1] [episodes=200] [noise=0]
                            [output=<file.npz>] [seed=0] [num_workers=0]
       genpol data generate env=<name>-v3 [episodes=200] [noise=0] [reward=sparse|dense]
                            [output=<file.npz>] [seed=0] [num_workers=0]

Makes a data set of a manipulation environment of OGBench (those that `genpol list envs` names
<name>-play) or Meta-World (<name>-v3) with its own scripted experts, and no network. The result is
a file of OGBench's format, and one with a tenth as many episodes for validation, whose name ends in
-val.

  output           file to write; by default datasets/<name>-<kind>-v0.npz of OGBench's recipe,
                   datasets/<name>-task<task>-demos.npz or -noise<noise>.npz of a task of it, and
                   datasets/<name>-expert.npz or datasets/<name>-noise<noise>.npz of Meta-World
  seed             of all episodes
  num_workers      processes; 0 takes all cores. The data do not depend on it.

OGBench, by its own recipe: oracles that go for one random target after the other, in episodes of
1000 transitions without rewards. Needs the extra genpol[ogbench].

  num_transitions  transitions to train on, rounded up to whole episodes; OGBench's own sets have
                   1M (cube-single, cube-double, scene, puzzle-3x3, puzzle-4x4), 3M (cube-triple,
                   puzzle-4x5) and 5M (cube-quadruple, puzzle-4x6)
  kind             play: plans with smooth noise; noisy: closed-loop oracles with more of it;
                   demos: demonstrations of one task, as below

Demonstrations of a task of OGBench: its oracles go for the task's own targets, one after the other,
with the rewards, success and end that the environment gives. Needs the extra genpol[ogbench].

  task             of the environment, 1 to 5
  episodes         episodes to train on, which end with success or the environment's limit of steps
  noise            greatest standard deviation of Gaussian noise on the actions, which lie in
                   [-1, 1]; each episode draws its own between 0 and this

Meta-World: the task's expert, with rewards and success. Needs an environment of its own, which
`make metaworld` makes.

  episodes         episodes to train on, of at most 500 transitions
  noise            greatest standard deviation of Gaussian noise on the actions, which lie in
                   [-1, 1]; each episode draws its own between 0 and this. The expert of
                   peg-insert-side-v3 succeeds in 9 of 10 episodes with 0, 8 with 1, 6 with 2.
  reward           sparse: -1 a step until success, which ends the episode; dense: Meta-World's, for
                   500 steps. As env.reward of what learns from the data.

Ctrl-C keeps the finished episodes, and the same command goes on where it stopped.

examples:
  genpol data generate env=cube-single-play
  genpol data generate env=puzzle-3x3-play num_transitions=5e4 output=small.npz
  genpol data generate env=scene-play kind=demos task=2 episodes=300 noise=1
  genpol data generate env=peg-insert-side-v3 episodes=500 noise=1
"""

_PLAY = "-play"
_COMMON = ("env", "output", "seed", "num_workers")
_OGBENCH = ("num_transitions", "kind")
_DEMONSTRATIONS = ("kind", "task", "episodes", "noise")
_METAWORLD = ("episodes", "noise", "reward")


def run(arguments: list[str]) -> int:
    """Generate a data set; return 0, or 130 or 143 if a signal stopped it.

    Raises:
        ConfigError: If an argument is wrong, or an interrupted generation was another one.
        DatasetError: If the result exists, is being made, or cannot be written.
        EnvironmentFault: If a worker dies.
        MissingExtraError: If the environment's package is not installed.
    """
    given = _parse(arguments)
    num_workers = whole_number(given, "num_workers", 0)
    at_least("num_workers", num_workers, 0)
    output = _file(given["output"]) if "output" in given else None
    plan, name = _planner(given)[0](given)
    from genpol.envs.generation import Generation

    generation = Generation(plan, output or Path("datasets", f"{name}.npz"))
    try:
        return _generate(generation, num_workers or usable_cores())
    finally:
        generation.close()


def _planner(
    given: Mapping[str, str],
) -> tuple[Callable[[Mapping[str, str]], tuple[Plan, str]], tuple[str, ...]]:
    """Return what plans such a data set, and the settings that it knows."""
    if given["env"] in METAWORLD_NAMES:
        return _plan_metaworld, (*_COMMON, *_METAWORLD)
    one_of("kind", given.get("kind", "play"), ("play", "noisy", "demos"))
    if given.get("kind") == "demos":
        return _plan_demonstrations, (*_COMMON, *_DEMONSTRATIONS)
    return _plan_ogbench, (*_COMMON, *_OGBENCH)


def _plan_ogbench(given: Mapping[str, str]) -> tuple[Plan, str]:
    """Return what is to be made, and a name for it."""
    num_transitions = whole_number(given, "num_transitions", 1_000_000)
    at_least("num_transitions", num_transitions, 1)
    seed = whole_number(given, "seed", 0)
    from genpol.envs.generation import Plan
    from genpol.envs.ogbench_data import Recipe

    name = given["env"].removesuffix(_PLAY)
    recipe = Recipe(name=name, kind=given.get("kind", "play"), seed=seed)
    return Plan.of_size(recipe, recipe.episodes(num_transitions)), recipe.dataset_name


def _plan_demonstrations(given: Mapping[str, str]) -> tuple[Plan, str]:
    """Return what is to be made, and a name for it."""
    episodes = whole_number(given, "episodes", 200)
    at_least("episodes", episodes, 1)
    noise = _number(given, "noise", 0.0)
    seed = whole_number(given, "seed", 0)
    task = whole_number(given, "task", 1)
    within("task", task, 1, 5)
    from genpol.envs.generation import Plan
    from genpol.envs.ogbench_demos import Recipe

    settings = OGBenchSettings(name=given["env"].removesuffix(_PLAY), task=task)
    recipe = Recipe(settings=settings, noise=noise, seed=seed)
    return Plan.of_size(recipe, episodes), recipe.dataset_name


def _plan_metaworld(given: Mapping[str, str]) -> tuple[Plan, str]:
    """Return what is to be made, and a name for it."""
    episodes = whole_number(given, "episodes", 200)
    at_least("episodes", episodes, 1)
    noise = _number(given, "noise", 0.0)
    seed = whole_number(given, "seed", 0)
    reward = given.get("reward", "sparse")
    one_of("reward", reward, METAWORLD_REWARDS)
    from genpol.envs.generation import Plan
    from genpol.envs.metaworld_data import Recipe

    settings = MetaWorldSettings(name=given["env"], reward=reward)
    recipe = Recipe(settings=settings, noise=noise, seed=seed)
    return Plan.of_size(recipe, episodes), recipe.dataset_name


def _generate(generation: Generation, num_workers: int) -> int:
    from genpol.training.display import TerminalReport
    from genpol.training.signals import SignalWatch

    total = generation.plan.num_episodes
    finished = total - len(generation.missing())
    if finished > 0:
        sys.stdout.write(f"going on after {finished} of {total} episodes\n")
    written: dict[Path, int] = {}
    with (
        SignalWatch() as signals,
        TerminalReport(total, start_steps=finished, unit="episodes") as report,
    ):

        def count_episode() -> None:
            nonlocal finished
            finished += 1
            report.update(finished)

        with suppress(KeyboardInterrupt):  # a second Ctrl-C, which does not wait
            if generation.run(
                num_workers, on_episode=count_episode, stop=lambda: signals.stop_requested
            ):
                written = generation.finish()
    if not written:
        return interrupted(signals.stop_signal, finished, total, generation.folder)
    for path, transitions in written.items():
        sys.stdout.write(f"{path}: {transitions:,} transitions\n")
    return 0


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    """Return the settings that are given, all of which the environment has."""
    every = dict.fromkeys((*_COMMON, *_OGBENCH, *_DEMONSTRATIONS, *_METAWORLD))
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in every or not equals:
            hint = nearest(key.lstrip("-"), every)
            raise ConfigError(f"cannot read {argument!r}.{hint} Settings are {', '.join(every)}")
        if key in given:
            raise ConfigError(f"{key} is given twice; keep one")
        given[key] = value
    if "env" not in given:
        raise ConfigError("no environment given: add env=<name>, for example env=cube-single-play")
    env = given["env"]
    _check_environment(env)
    _, known = _planner(given)
    what = f"{env} with kind=demos" if given.get("kind") == "demos" else env
    for key in given:
        if key not in known:
            raise ConfigError(f"{key}: is no setting of {what}, which has {', '.join(known[1:])}")
    return given


def _check_environment(name: str) -> None:
    with_data = [*(f"{known}{_PLAY}" for known in OGBENCH_NAMES), *METAWORLD_NAMES]
    if name in with_data:
        return
    what = "has no recipe for data" if name in names("env") else "unknown environment"
    raise ConfigError(
        f"env = {name!r}: {what}.{nearest(name, with_data)} Those that have one are OGBench's and "
        "Meta-World's in `genpol list envs`, named <name>-play and <name>-v3"
    )


def _number(given: Mapping[str, str], key: str, default: float) -> float:
    try:
        return float(given.get(key, default))
    except ValueError:
        raise ConfigError(f"{key} = {given[key]!r}: must be a number") from None


def _file(name: str) -> Path:
    if not name.endswith(".npz"):
        raise ConfigError(f"output = {name!r}: must end in .npz")
    return Path(name).expanduser()

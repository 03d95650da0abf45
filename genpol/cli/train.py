"""`genpol train`: train a policy, or go on with a run that stopped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from genpol.errors import ConfigError, GenpolError

if TYPE_CHECKING:
    from genpol.agent import Agent
    from genpol.training.loop import EnvFactory, Training
    from genpol.training.run import Run
    from genpol.training.settings import TrainSettings

SUMMARY = "train a policy, or resume a run"
USAGE = """
usage: genpol train env=<name> [agent=<name>] [data=<data set>] [key=value ...]
       genpol train resume=<run folder> [total_steps=<more>]
       genpol train --multirun env=<name> seed=0,1,2 [hydra/launcher=<launcher>] [key=value ...]

Trains an agent (gorl by default) and leaves a run folder
runs/<env>/<agent>/<time>-s<seed>/ with config.yaml, metrics.csv, evals.csv, checkpoints,
TensorBoard events, learning_curve.png and videos/final.mp4. With init=<run folder> the weights
are those of a trained run of the same agent; with init=<policy folder>, or a run of another, the
agents that finetune begin from its flow or diffusion model. Everything else starts afresh.

Agents that learn from data (bc, iql, fql, qc, dqc, qgf, fisher_decorator, cdsa) need data=<data
set>, in any format that `genpol data` reads; tdmpc2 and mbdpo may have it. total_steps are then
updates, after which online_steps=<n> goes on in the environment. env=multitask takes a folder with
a data set for each of its tasks, called like the task; recipe=world-model-pretraining suits that,
and recipe=world-model-finetuning what follows online on one task.

examples:
  genpol train env=HopperStand
  genpol train env=WalkerWalk agent=ppo seed=1 total_steps=5e6
  genpol train env=cube-single-play env.task=1 agent=fql data=cube-single-play-v0.npz
  genpol train env=cube-single-play env.task=1 agent=ogpo init=runs/cube-single-play/bc/<run>
  genpol train env=gym env.id=Pendulum-v1 num_envs=4 agent=ppo
  genpol train env=CheetahRun agent=mbdpo recipe=world-model-online
  genpol train resume=runs/HopperStand/gorl/20261122-101500-s0

More than one process or machine:
  collector=distributed num_collectors=2   collects in two processes of this machine
  collector=ray num_collectors=8           in actors of Ray, in the cluster of RAY_ADDRESS or here
  torchrun --nproc-per-node 2 -m genpol.cli.main train ...
                                           on-policy agents: each rank collects and learns a share
  --multirun hydra/launcher=basic|ray|submitit_local|submitit_slurm hydra.launcher.<option>=<value>
                                           a run for each combination of values with commas
What a checkpoint of k collectors or ranks holds, k of either go on from. When a collector dies, the
run stops with a checkpoint. ray and submitit need the extra `distributed`.

Ctrl-C and SIGTERM write a checkpoint and exit; SIGUSR1 writes one and goes on.
`genpol list agents|envs|recipes` shows what there is.
"""


def run(arguments: list[str]) -> int:
    """Train as the overrides say; return 0, or 130 or 143 if a signal stopped the run."""
    if "--multirun" in arguments or "-m" in arguments:
        from genpol.cli import multirun

        return multirun.run([text for text in arguments if text not in ("--multirun", "-m")])
    from genpol import parallel

    if not parallel.started_by_torchrun():
        return _run(arguments)
    with parallel.join():
        try:
            return _run(arguments)
        except ConfigError as error:
            if parallel.is_first():
                raise
            return error.exit_code  # the first rank says it


def _run(arguments: list[str]) -> int:
    resume = _value_of("resume", arguments)
    if resume is None:
        return _train(arguments)
    for key in ("init", "output"):
        if _value_of(key, arguments) is not None:
            raise ConfigError(f"{key}= and resume= exclude each other: a run goes on where it lies")
    return _resume(Path(resume), [text for text in arguments if not text.startswith("resume=")])


def _train(arguments: Sequence[str]) -> int:
    from omegaconf import OmegaConf

    from genpol import parallel
    from genpol.cli import configuration, initial
    from genpol.cli.building import build, make_agent, open_data
    from genpol.envs import label
    from genpol.training.loop import Training
    from genpol.training.run import Run
    from genpol.training.silent_run import SilentRun

    start = None
    if (init := _value_of("init", arguments)) is not None:
        start = initial.find(init, configuration.chosen_agent(arguments))
    config = configuration.compose(
        arguments,
        model=start.settings() if start else None,
        defaults=start.defaults() if start else None,
    )
    settings = _of_rank(configuration.to_settings(config))
    agent, make_env = build(settings)
    if parallel.size() > 1:
        agent.check_ranks()
    dataset = open_data(settings, agent)
    if start is not None:
        start.give(agent, settings)
    agent.check_ready()
    run: Run | None = None
    if parallel.is_first():
        run = Run.create(
            Path(settings.output),
            label(settings.env),
            settings.choices.agent,
            settings.seed,
            cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True)),
            ["genpol", "train", *arguments],
            tensorboard=settings.tensorboard,
            wandb_project="genpol" if settings.wandb else None,
        )
    folder = parallel.from_first(None if run is None else run.path)
    run = run or SilentRun(cast("Path", folder))
    try:
        training = Training(agent, make_env, settings, run, dataset, partial(make_agent, settings))
    except BaseException:
        run.finish("failed")
        raise
    return _go(training, make_env, settings, run)


def _resume(path: Path, overrides: list[str]) -> int:
    from omegaconf import OmegaConf

    from genpol import parallel
    from genpol.cli import configuration
    from genpol.cli.building import build, make_agent, open_data
    from genpol.training import checkpoint
    from genpol.training.loop import Training
    from genpol.training.run import Run
    from genpol.training.silent_run import SilentRun

    found = checkpoint.resolve(path)
    folder = checkpoint.run_folder(found)
    config = configuration.load(folder / "config.yaml", overrides)
    settings = _of_rank(configuration.to_settings(config))
    agent, make_env = build(settings)
    if parallel.size() > 1:
        agent.check_ranks()
    dataset = open_data(settings, agent)
    run: Run = SilentRun(folder)
    if parallel.is_first():
        run = Run.open(
            folder,
            tensorboard=settings.tensorboard,
            wandb_project="genpol" if settings.wandb else None,
        )
    training = Training(agent, make_env, settings, run, dataset, partial(make_agent, settings))
    training.resume(found)  # refuses what does not fit before anything is written
    run.resume(
        ["genpol", "train", f"resume={path}", *overrides],
        cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True)),
    )
    return _go(training, make_env, settings, run)


def _of_rank(settings: TrainSettings) -> TrainSettings:
    """Return settings with the device of this rank."""
    from genpol import parallel

    return replace(settings, device=parallel.own_device(settings.device))


def _go(training: Training, make_env: EnvFactory, settings: TrainSettings, run: Run) -> int:
    from genpol import parallel

    if parallel.is_first():
        sys.stdout.write(f"run folder: {run.path}\n")
    status: Literal["finished", "interrupted", "failed"] = "failed"
    try:
        training.start()
        status = "interrupted" if training.interrupted else "finished"
    finally:
        training.close()
        run.finish(status)
    if training.interrupted:
        if parallel.is_first():
            sys.stdout.write(
                f"stopped by {training.interrupted}; go on with: genpol train resume={run.path}\n"
            )
        return 130 if training.interrupted == "SIGINT" else 143
    if parallel.is_first():
        _finish(training, make_env, settings, run)
    return 0


def _finish(training: Training, make_env: EnvFactory, settings: TrainSettings, run: Run) -> None:
    """Draw the learning curve, record the final policy and say how it went."""
    import pandas as pd

    from genpol.report.figures import learning_curve

    evaluations = pd.read_csv(run.path / "evals.csv")
    learning_curve(evaluations, run.path / "learning_curve.png")
    if settings.video:
        try:
            record_video(training.agent, make_env, run.videos / "final.mp4", settings.seed)
        except GenpolError as error:  # the training is none the worse for it
            sys.stderr.write(f"no video: {error}\n")
    last = evaluations.iloc[-1]
    sys.stdout.write(
        f"return {last.return_mean:.1f} over {int(last.episodes)} episodes after "
        f"{training.steps:,} steps in {training.wall_clock_s / 60:.1f} minutes\n"
        f"evaluate with: genpol eval {run.path}\n"
    )


def record_video(agent: Agent, make_env: EnvFactory, path: Path, seed: int) -> None:
    """Write one episode as MP4.

    Raises:
        GenpolError: If nothing can be drawn here or the file cannot be written.
    """
    from genpol.seeding import derive
    from genpol.training.evaluation import record
    from genpol.training.video import write_mp4

    seed = derive(seed, "video")
    env = make_env(num_envs=1, seed=seed)
    try:
        frame_rate = 1.0 / env.control_period_s
        skip = max(1, round(frame_rate / 30))
        frames = record(agent.policy, env, seed=seed, frame_period=skip)
        write_mp4(path, frames, frame_rate / skip)
    finally:
        env.close()


def _value_of(key: str, arguments: Sequence[str]) -> str | None:
    values = [text.partition("=")[2] for text in arguments if text.startswith(f"{key}=")]
    if len(values) > 1:
        raise ConfigError(f"{key} is given {len(values)} times; keep one")
    return values[0] if values and values[0] not in ("", "null", "none") else None

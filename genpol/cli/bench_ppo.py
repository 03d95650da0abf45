"""What `genpol bench agent=ppo` measures: PPO beside the PPO of others on the same task.

Its module :mod:`genpol.report.ppo_yardsticks` says what is equal between the contenders and what
is not. Updates are measured on one rollout that stays the same, in rows learned from per second;
collection and update together, each as in its library's training, in environment steps per second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError

if TYPE_CHECKING:
    from tensordict import TensorDict

    from genpol.agent import Agent
    from genpol.report.benchmark import Chunk, Contender
    from genpol.report.ppo_yardsticks import Workload
    from genpol.training.settings import TrainSettings

KEYS = (
    *("genpol-update", "sb3-update", "cleanrl-update", "genpol-end-to-end", "sb3-end-to-end"),
    *("sb3-subproc", "sb3-few-envs", "cleanrl-end-to-end"),
)
# What is asked of the library: (first, second, name, wanted).
RATIOS = (
    ("genpol-end-to-end", "sb3-end-to-end", "end to end / stable-baselines3", ">= 1.5"),
    ("genpol-end-to-end", "sb3-subproc", "end to end / stable-baselines3 in processes", ">= 1.5"),
    ("genpol-end-to-end", "cleanrl-end-to-end", "end to end / cleanrl-style", ""),
    ("genpol-update", "sb3-update", "update / stable-baselines3", ""),
    ("genpol-update", "cleanrl-update", "update / cleanrl-style", ""),
)
# stable-baselines3 is faster with so many environments than with 8 or 64 of them, or with processes
# on two cores; at the usual 1024 each of its rollouts would take more than ten seconds.
DEFAULTS = {"agent": "ppo", "env": "HalfCheetah-v5", "num_envs": "256"}


def metric(key: str) -> str:
    """Return what is measured of a contender."""
    return f"{'samples' if key.endswith('-update') else 'env_steps'}_per_s/{key}"


def baseline(key: str) -> str:
    """Return to whom a contender is compared in the table."""
    return "sb3-update" if key.endswith("-update") else "sb3-end-to-end"


def title(settings: TrainSettings) -> str:
    """Return the sizes in words."""
    agent = settings.agent
    return (
        f"rollouts of {agent.rollout_steps} steps, {agent.epochs} passes of {agent.minibatches} "
        "minibatches; samples/s of updates, environment steps/s end to end"
    )


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders, those that are compared side by side.

    Raises:
        ConfigError: If the settings are not comparable with the PPO of others.
    """
    _check(settings)
    from genpol.report import ppo_yardsticks
    from genpol.report.benchmark import Contender

    table: list[tuple[str, str, Callable[[TrainSettings, ExitStack], Chunk]]] = [
        ("genpol-update", "agent.update()", _update),
        ("genpol-end-to-end", "batched environment, Collector, update", _end_to_end),
    ]
    own = [
        Contender(key=key, what=what, build=partial(build, settings)) for key, what, build in table
    ]
    others = ppo_yardsticks.yardsticks(_workload(settings))
    return sorted([*own, *others], key=lambda contender: KEYS.index(contender.key))


def _check(settings: TrainSettings) -> None:
    agent = settings.agent
    if agent.surrogate != "ppo":
        raise ConfigError(
            f"agent.surrogate = {agent.surrogate!r}: --learning compares PPO with PPO only; "
            "set agent.surrogate=ppo"
        )
    if agent.critic_minibatches not in (0, agent.minibatches):
        raise ConfigError(
            f"agent.critic_minibatches = {agent.critic_minibatches}: others have one step for "
            "actor and critic; set agent.critic_minibatches=0"
        )
    rows = agent.rollout_steps * settings.num_envs
    if rows % agent.minibatches != 0:
        raise ConfigError(
            f"agent.minibatches = {agent.minibatches}: must divide the {rows} rows of a rollout "
            "(agent.rollout_steps x num_envs), so that all make the same number of steps"
        )
    if getattr(settings.env, "action_repeat", 1) != 1:
        raise ConfigError("env.action_repeat: must be 1, as others act at every step")
    if settings.device != "cpu":
        raise ConfigError(f"device = {settings.device!r}: must be cpu, to compare the same cores")


def _workload(settings: TrainSettings) -> Workload:
    from genpol.report.benchmark import reference
    from genpol.report.ppo_yardsticks import Workload

    env, agent = settings.env, settings.agent
    known = reference(env.name) if hasattr(env, "name") else None
    return Workload(
        task=getattr(env, "id", "") or (known.id if known else ""),
        num_envs=settings.num_envs,
        seed=settings.seed,
        **{
            name: getattr(agent, name)
            for name in (
                *("rollout_steps", "epochs", "minibatches", "actor_hidden", "critic_hidden"),
                *("learning_rate", "clip", "gamma", "gae_lambda", "max_grad_norm"),
            )
        },
    )


def _training(settings: TrainSettings, cleanup: ExitStack) -> tuple[Agent, Iterator[TensorDict]]:
    """Return an agent and its rollouts, as the training loop makes them."""
    from genpol.cli.building import build
    from genpol.training.collection import make_collector

    agent, make_env = build(settings)
    env = make_env(num_envs=settings.num_envs, seed=settings.seed, training=True)
    cleanup.callback(env.close, raise_if_closed=False)
    collector = make_collector(env, agent.policy, agent.frames_per_batch)
    cleanup.callback(collector.shutdown, close_env=False)
    return agent, iter(collector)


def _update(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    agent, batches = _training(settings, cleanup)
    batch = next(batches).clone()
    return _warm(lambda: agent.update(batch), batch.numel())


def _end_to_end(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    agent, batches = _training(settings, cleanup)
    return _warm(lambda: agent.update(next(batches)), agent.frames_per_batch)


def _warm(work: Callable[[], Any], rows: int) -> Chunk:
    def chunk() -> int:
        work()
        return rows

    chunk()
    return chunk

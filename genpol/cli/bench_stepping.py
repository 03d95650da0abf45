"""What `genpol bench` measures by default: the environment, alone and with what is around it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from genpol.provenance import usable_cores

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

    from genpol.agent import Agent
    from genpol.report.benchmark import Chunk, Contender
    from genpol.training.settings import TrainSettings

KEYS = (
    *("genpol-physics", "genpol-env", "genpol-policy", "genpol-collector", "genpol-learning"),
    *("mj_step", "envpool", "gymnasium-async-8", "torchrl-parallel-2", "torchrl-parallel-8"),
)
# What is asked of the library: (first, second, name, wanted).
RATIOS = (
    ("genpol-env", "mj_step", "environment / bare mj_step loop", ">= 0.9"),
    ("genpol-env", "envpool", "environment / EnvPool", ">= 1.1"),
)
COLLECTOR = ("genpol-policy", "genpol-collector")

_ROLLOUT_STEPS = 32
_BARE_ENVS = 64


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders for one configuration."""
    from genpol.report import benchmark

    num_threads = getattr(settings.env, "num_threads", 0) or usable_cores()
    open_env = partial(_make_env, settings)
    physics = benchmark.Contender(
        key="genpol-physics",
        what="physics alone: no observation, reward or reset",
        build=partial(_physics, settings),
    )
    environment, *rest = own(settings, open_env)
    bare_loop = benchmark.Contender(
        key="mj_step",
        what=f"bare C loop over mj_step, {num_threads} threads",
        build=partial(_bare_loop, settings, num_threads),
    )
    envpool, *pools = benchmark.yardsticks(_reference(settings), settings.num_envs, num_threads)
    # Those that are compared stand side by side: a machine drifts within one round, too.
    return [physics, environment, bare_loop, envpool, *rest, *pools]


def own(settings: TrainSettings, open_env: Callable[[ExitStack], EnvBase]) -> list[Contender]:
    """Return the library's environment as a contender: alone, with a policy, and with learning.

    Args:
        settings: Of environment and agent.
        open_env: Makes the environment.
    """
    from genpol.report.benchmark import Contender

    agent = settings.choices.agent
    table: list[tuple[str, str, Callable[[TrainSettings, EnvBase, ExitStack], Chunk]]] = [
        ("genpol-env", "environment with resets, random actions", _environment),
        ("genpol-policy", f"with {agent}'s policy, hand-written loop", _hand_loop),
        ("genpol-collector", f"with {agent}'s policy, torchrl Collector", _collector),
        ("genpol-learning", f"with {agent}'s updates", _learning),
    ]

    def contender(key: str, what: str, build: Callable[..., Chunk]) -> Contender:
        return Contender(
            key=key, what=what, build=lambda cleanup: build(settings, open_env(cleanup), cleanup)
        )

    return [contender(*row) for row in table]


def _make_env(settings: TrainSettings, cleanup: ExitStack, num_envs: int | None = None) -> EnvBase:
    env: EnvBase = importlib.import_module("genpol.envs").make(
        settings.env,
        num_envs=settings.num_envs if num_envs is None else num_envs,
        device="cpu",
        seed=settings.seed,
    )
    cleanup.callback(env.close, raise_if_closed=False)
    return env


def _make_agent(settings: TrainSettings, env: EnvBase) -> Agent:
    from genpol.agent import Specs

    agent: Agent = importlib.import_module("genpol.agents").make(
        settings.choices.agent,
        settings.agent,
        Specs.from_env(env, num_envs=settings.num_envs),
        device=settings.device,
        seed=settings.seed,
    )
    make_decoder = getattr(agent, "make_decoder", None)
    if make_decoder is not None:  # as in all stages of GoRL but the first
        agent.policy.decoder = make_decoder().requires_grad_(False)
    return agent


def _environment(settings: TrainSettings, env: EnvBase, cleanup: ExitStack) -> Chunk:
    from genpol.report import benchmark

    return benchmark.stepping(env, _action_repeat(env))


def _native(settings: TrainSettings, cleanup: ExitStack, num_envs: int | None = None) -> Any:
    """Return a native environment in mid-motion."""
    from genpol.report import benchmark

    env = _make_env(settings, cleanup, num_envs)
    if not hasattr(env, "sim"):
        raise benchmark.SkippedError("only for the native MuJoCo tasks")
    benchmark.stepping(env)
    return env


def _physics(settings: TrainSettings, cleanup: ExitStack) -> Chunk:
    env = _native(settings, cleanup)
    actions = [env.full_action_spec.rand()["action"].double() for _ in range(16)]
    index = 0

    def chunk() -> int:
        nonlocal index
        env.task.before_step(env.sim, actions[index % len(actions)])
        env.sim.step(env.task.num_substeps, env.task.stage)
        index += 1
        return settings.num_envs

    return chunk


def _bare_loop(settings: TrainSettings, num_threads: int, cleanup: ExitStack) -> Chunk:
    from genpol.report import benchmark

    env = _native(settings, cleanup, _BARE_ENVS)
    states = tuple(x.numpy().copy() for x in (env.sim.qpos, env.sim.qvel, env.sim.act))
    assert len(states) == 3
    return benchmark.bare_loop(env.task.model, states, env.task.num_substeps, num_threads, cleanup)


def _hand_loop(settings: TrainSettings, env: EnvBase, cleanup: ExitStack) -> Chunk:
    """Return rollouts as one would write them by hand, into storage made once."""
    import torch
    from torchrl.envs import ExplorationType, set_exploration_type

    policy = _make_agent(settings, env).policy
    data = env.reset()
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        first, _ = env.step_and_maybe_reset(policy(data.clone()))
    storage = first.unsqueeze(1).expand(settings.num_envs, _ROLLOUT_STEPS).clone()
    columns = storage.unbind(1)

    def chunk() -> int:
        nonlocal data
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            for column in columns:
                step, data = env.step_and_maybe_reset(policy(data))
                column.update_(step)
        return storage.numel() * _action_repeat(env)

    return _burnt_in(chunk)


def _collector(settings: TrainSettings, env: EnvBase, cleanup: ExitStack) -> Chunk:
    frames = _ROLLOUT_STEPS * settings.num_envs
    batches = _batches(env, _make_agent(settings, env), frames, cleanup)
    return _burnt_in(lambda: int(next(batches).numel()) * _action_repeat(env))


def _learning(settings: TrainSettings, env: EnvBase, cleanup: ExitStack) -> Chunk:
    agent = _make_agent(settings, env)
    batches = _batches(env, agent, agent.frames_per_batch, cleanup)

    def chunk() -> int:
        batch = next(batches)
        agent.update(batch)
        return int(batch.numel()) * _action_repeat(env)

    chunk()
    return chunk


def _action_repeat(env: EnvBase) -> int:
    """Return the control steps that one step of the environment makes."""
    return int(cast(Any, env).action_repeat)


def _batches(env: EnvBase, agent: Agent, frames: int, cleanup: ExitStack) -> Any:
    """Collect as the training loop does."""
    from genpol.training.collection import make_collector

    collector = make_collector(env, agent.policy, frames)
    cleanup.callback(collector.shutdown, close_env=False)
    return iter(collector)


def _burnt_in(chunk: Chunk) -> Chunk:
    from genpol.report.benchmark import BURN_IN

    for _ in range(-(-BURN_IN // _ROLLOUT_STEPS)):
        chunk()
    return chunk


def _reference(settings: TrainSettings) -> Any:
    """Return the task's original: of native tasks by name, of others as configured."""
    from genpol.report import benchmark

    env = settings.env
    if hasattr(env, "id"):
        return benchmark.Reference(id=env.id)
    if hasattr(env, "domain"):
        return benchmark.Reference(domain=env.domain, task=env.task)
    return benchmark.reference(env.name)

"""Throughput of environments: contenders take turns inside one run, so that ratios can be trusted.

Rates of a shared machine drift by tens of percent within minutes. Every contender is therefore
built first, then all are measured in each round, in an order that is reversed from round to round;
a ratio of two contenders is the median of their ratios round by round.

This module knows the yardsticks (MuJoCo's bare C loop, EnvPool, gymnasium, torchrl); what the
library itself puts into the race is handed in.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import gymnasium
    import mujoco

# Batched steps under random actions before the clock runs: robots fall and make contacts, and
# physics with contacts costs more than the flight after a reset.
BURN_IN = 60

Chunk = Callable[[], int]
"""Does a piece of work and returns how many steps, of the environment say, it was."""


class SkippedError(Exception):
    """A contender cannot take part; the message says why and what to install."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of stepping environments."""

    key: str
    """Name in the results, behind what is counted: ``env_steps_per_s/KEY``."""
    what: str
    """What is measured, in a few words."""
    build: Callable[[ExitStack], Chunk]
    """Set up, warm up and return the work; what must be closed goes onto the stack.

    Raises ``SkippedError`` if it cannot take part."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One contender in one round."""

    work: int
    """What its chunks returned."""
    seconds: float

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds


@dataclass
class Measurements:
    """What a benchmark found."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """One sample per round, by contender."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Reasons by contender."""

    def rates(self, key: str) -> np.ndarray:
        """Return the rates ``[rounds]`` of a contender."""
        return np.array([sample.rate for sample in self.samples[key]])

    def ratio(self, key: str, baseline: str) -> float | None:
        """Return the median over rounds of ``key``'s rate over ``baseline``'s, if both ran."""
        if key not in self.samples or baseline not in self.samples:
            return None
        return float(np.median(self.rates(key) / self.rates(baseline)))


def measure(
    contenders: Sequence[Contender],
    *,
    seconds: float,
    rounds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Measurements:
    """Build all contenders, then measure each in every round.

    Args:
        contenders: Who takes part.
        seconds: Least time per contender and round.
        rounds: Times that each is measured.
        progress: Told in words what is under way.
    """
    found = Measurements()
    with ExitStack() as cleanup:
        chunks = _build(contenders, found.skipped, cleanup, progress)
        found.samples = {key: [] for key in chunks}
        for key in _turns(list(chunks), rounds, progress):
            found.samples[key].append(_sample(chunks[key], seconds))
    return found


def measure_calls(
    contenders: Sequence[Contender],
    *,
    seconds: float,
    rounds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, list[np.ndarray]], dict[str, str]]:
    """Measure how long each call of a contender's work takes.

    The arguments are those of :func:`measure`.

    Returns:
        By contender, the seconds of the calls ``[calls]`` in each round; and why others were
        skipped.
    """
    skipped: dict[str, str] = {}
    with ExitStack() as cleanup:
        chunks = _build(contenders, skipped, cleanup, progress)
        found: dict[str, list[np.ndarray]] = {key: [] for key in chunks}
        for key in _turns(list(chunks), rounds, progress):
            found[key].append(_calls(chunks[key], seconds))
    return found, skipped


def _build(
    contenders: Sequence[Contender],
    skipped: dict[str, str],
    cleanup: ExitStack,
    progress: Callable[[str], None],
) -> dict[str, Chunk]:
    chunks: dict[str, Chunk] = {}
    for contender in contenders:
        progress(f"setting up {contender.key}")
        try:
            chunks[contender.key] = contender.build(cleanup)
        except SkippedError as reason:
            skipped[contender.key] = str(reason)
    return chunks


def _turns(keys: Sequence[str], rounds: int, progress: Callable[[str], None]) -> Iterator[str]:
    """Yield whose turn it is."""
    for index in range(rounds):
        # Reversed every other time, a steady drift of the machine cancels out of the ratios.
        for key in keys if index % 2 == 0 else reversed(keys):
            progress(f"round {index + 1} of {rounds}: {key}")
            yield key


def _calls(chunk: Chunk, seconds: float) -> np.ndarray:
    times, left = [], seconds
    while left > 0:
        start = time.perf_counter()
        chunk()
        times.append(time.perf_counter() - start)
        left -= times[-1]
    return np.array(times)


def _sample(chunk: Chunk, seconds: float) -> Sample:
    steps, start = 0, time.perf_counter()
    while True:
        steps += chunk()
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return Sample(work=steps, seconds=elapsed)


def yardsticks(reference: Reference | None, num_envs: int, num_threads: int) -> list[Contender]:
    """Return the contenders from other libraries, running the same task.

    Args:
        reference: The task there; ``None`` if it is unknown.
        num_envs: Batch size of EnvPool; the process pools have a size of their own, as workers
            beyond the cores only slow them down.
        num_threads: Threads of EnvPool.
    """

    def contender(key: str, what: str, build: Callable[..., Chunk], *sizes: int) -> Contender:
        return Contender(
            key=key, what=what, build=lambda cleanup: build(_known(reference), *sizes, cleanup)
        )

    return [
        contender("envpool", f"EnvPool, {num_envs} envs", _envpool, num_envs, num_threads),
        contender("gymnasium-async-8", "gymnasium AsyncVectorEnv, 8 workers", _gymnasium, 8),
        contender("torchrl-parallel-2", "torchrl ParallelEnv, 2 workers", _torchrl, 2),
        contender("torchrl-parallel-8", "torchrl ParallelEnv, 8 workers", _torchrl, 8),
    ]


def bare_loop(
    model: mujoco.MjModel,
    states: tuple[np.ndarray, np.ndarray, np.ndarray],
    num_substeps: int,
    num_threads: int,
    cleanup: ExitStack,
    *,
    control_steps: int = 200,
) -> Chunk:
    """Return MuJoCo's own C loop over ``mj_step``: what the machine can give at most.

    ``mujoco.rollout`` steps each simulation ``control_steps * num_substeps`` times without coming
    back to Python, under random controls, with neither observations nor rewards nor resets.

    Args:
        model: The model.
        states: Positions, velocities and activations to start from, ``[n, nq]``, ``[n, nv]`` and
            ``[n, na]``; contacts should be as in the environment, see :data:`BURN_IN`.
        num_substeps: ``mj_step`` calls per control step.
        num_threads: Threads of the pool.
        cleanup: Where the pool's end is registered.
        control_steps: Control steps per call.
    """
    import mujoco
    from mujoco import rollout

    start = _physics_states(model, states)
    n, horizon = len(start), control_steps * num_substeps
    limited = model.actuator_ctrllimited.astype(bool)
    low = np.where(limited, model.actuator_ctrlrange[:, 0], -1.0)
    high = np.where(limited, model.actuator_ctrlrange[:, 1], 1.0)
    generator = np.random.default_rng(0)
    control = generator.uniform(low, high, (n, control_steps, model.nu))
    control = np.repeat(control, num_substeps, axis=1)
    state = np.zeros((n, horizon, start.shape[1]))
    sensors = np.zeros((n, horizon, model.nsensordata))
    pool = cleanup.enter_context(rollout.Rollout(nthread=num_threads))
    data = [mujoco.MjData(model) for _ in range(max(1, num_threads))]

    def chunk() -> int:
        pool.rollout(
            [model] * n,
            data,
            start,
            control,
            skip_checks=True,
            nstep=horizon,
            state=state,
            sensordata=sensors,
            chunk_size=1,
        )
        return n * control_steps

    chunk()
    return chunk


def _physics_states(
    model: mujoco.MjModel, states: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return full physics states ``[n, size]`` as ``mujoco.rollout`` takes them."""
    import mujoco

    kind = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)
    data = mujoco.MjData(model)
    rows = np.zeros((len(states[0]), mujoco.mj_stateSize(model, kind)))
    for row, qpos, qvel, act in zip(rows, *states, strict=True):
        data.qpos[:], data.qvel[:], data.act[:] = qpos, qvel, act
        mujoco.mj_getState(model, data, row, kind)
    return rows


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The original of a task: dm_control's (domain, task) or gymnasium's id."""

    domain: str = ""
    task: str = ""
    id: str = ""

    @property
    def envpool_ids(self) -> list[str]:
        """EnvPool's names for it, best first; older versions of a task step at the same cost."""
        if self.id:
            name = self.id.rpartition("-v")[0]
            return [self.id, *(f"{name}-v{version}" for version in (5, 4, 3))]
        return [f"{_camel(self.domain)}{_camel(self.task)}-v1"]


# Names that leave the task out, or repeat nothing of the domain.
_IRREGULAR = {"BallInCup": ("ball_in_cup", "catch"), "Swimmer6": ("swimmer", "swimmer6")}


def reference(name: str) -> Reference | None:
    """Return the original of the native task ``name``, or ``None`` if none is known.

    ``HopperStand`` is dm_control's hopper and stand, ``Ant-v5`` is gymnasium's.
    """
    if re.search(r"-v\d+$", name):
        return Reference(id=name)
    if name in _IRREGULAR:
        domain, task = _IRREGULAR[name]
        return Reference(domain=domain, task=task)
    from dm_control import suite

    for domain, task in suite.ALL_TASKS:
        if f"{_camel(domain)}{_camel(task)}" == name:
            return Reference(domain=domain, task=task)
    return None


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _known(task: Reference | None) -> Reference:
    if task is None:
        raise SkippedError("the task is in neither dm_control nor gymnasium")
    return task


def _envpool(task: Reference, num_envs: int, num_threads: int, cleanup: ExitStack) -> Chunk:
    try:
        import envpool
    except ImportError:
        raise SkippedError("EnvPool is not installed: pip install 'genpol[bench]'") from None
    known = set(envpool.list_all_envs())
    name = next((name for name in task.envpool_ids if name in known), None)
    if name is None:
        raise SkippedError(f"EnvPool has no {task.envpool_ids[0]}")
    env = envpool.make(
        name, env_type="gymnasium", num_envs=num_envs, num_threads=num_threads, seed=0
    )
    cleanup.callback(env.close)
    env.reset()
    return _cycle(env.step, num_envs, env.action_space)


def _gymnasium(task: Reference, num_envs: int, cleanup: ExitStack) -> Chunk:
    from gymnasium.vector import AsyncVectorEnv

    make = partial(_make_gymnasium, task)
    env = AsyncVectorEnv([make] * num_envs, context="spawn")
    cleanup.callback(env.close)
    env.reset(seed=0)
    return _cycle(env.step, num_envs, env.single_action_space)


def _make_gymnasium(task: Reference) -> gymnasium.Env[Any, Any]:
    import gymnasium

    return gymnasium.make(task.id) if task.id else _suite_env(task)


def _suite_env(task: Reference) -> gymnasium.Env[Any, Any]:
    """Return dm_control's task behind gymnasium's interface, as thinly as can be."""
    import gymnasium
    from dm_control import suite

    class SuiteEnv(gymnasium.Env[np.ndarray, np.ndarray]):
        def __init__(self) -> None:
            self._env = suite.load(task.domain, task.task)
            action = self._env.action_spec()
            self.action_space = gymnasium.spaces.Box(
                action.minimum, action.maximum, dtype=np.float64
            )
            size = len(self._flat(self._env.reset()))
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

        def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
            return self._flat(self._env.reset()), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            step = self._env.step(action)
            return self._flat(step), float(step.reward), False, step.last(), {}

        @staticmethod
        def _flat(step: Any) -> np.ndarray:
            return np.concatenate([np.ravel(part) for part in step.observation.values()])

    return SuiteEnv()


def _torchrl(task: Reference, num_envs: int, cleanup: ExitStack) -> Chunk:
    from torchrl.envs import ParallelEnv

    env = ParallelEnv(num_envs, partial(_make_torchrl, task))
    cleanup.callback(env.close, raise_if_closed=False)
    return stepping(env)


def _make_torchrl(task: Reference) -> Any:
    from torchrl.envs import DMControlEnv, GymEnv

    return GymEnv(task.id) if task.id else DMControlEnv(task.domain, task.task)


def stepping(env: Any, action_repeat: int = 1) -> Chunk:
    """Return the work of one batched step of a torchrl environment, under random actions.

    Episodes that end are reset within the step. Actions are drawn in advance: drawing them is no
    work of the environment. A step counts as ``action_repeat`` environment steps.
    """
    actions = [env.full_action_spec.rand()["action"] for _ in range(16)]
    data, index = env.reset(), 0
    steps = env.batch_size.numel() * action_repeat

    def chunk() -> int:
        nonlocal data, index
        data["action"] = actions[index % len(actions)]
        index += 1
        _, data = env.step_and_maybe_reset(data)
        return steps

    for _ in range(BURN_IN):
        chunk()
    return chunk


def _cycle(step: Callable[[np.ndarray], Any], num_envs: int, space: Any) -> Chunk:
    """Return the work of one batched step under random actions ``[num_envs, ...]``."""
    generator = np.random.default_rng(0)
    low, high = np.maximum(space.low, -1e3), np.minimum(space.high, 1e3)
    actions = [
        generator.uniform(low, high, (num_envs, *space.shape)).astype(space.dtype)
        for _ in range(16)
    ]
    index = 0

    def chunk() -> int:
        nonlocal index
        step(actions[index % len(actions)])
        index += 1
        return num_envs

    for _ in range(BURN_IN):
        chunk()
    return chunk

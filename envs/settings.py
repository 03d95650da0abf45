"""Settings of the simulator families; imports neither torch nor a simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from genpol.envs.mujoco.names import NAMES
from genpol.errors import ConfigError, nearest
from genpol.settings import at_least, one_of, within

OGBENCH_NAMES = (
    *("cube-single", "cube-double", "cube-triple", "cube-quadruple", "cube-octuple"),
    *("scene", "puzzle-3x3", "puzzle-4x4", "puzzle-4x5", "puzzle-4x6"),
)
SUCCESS_TIMINGS = ("pre", "post")


@dataclass(frozen=True, kw_only=True)
class MujocoSettings:
    """A native task: all environments in one batch of MuJoCo simulations."""

    batched: ClassVar[bool] = True  # many cost little more than one

    name: str = "HopperStand"
    """Native task, as `genpol list envs` shows them: HopperStand, Ant-v5, ..."""
    num_threads: int = 0
    """Threads that step the physics; 0 takes all cores."""
    action_repeat: int = 1
    """Control steps for which each action is held; rewards add up over them."""
    train_episode_steps: int = 0
    """Control steps after which training cuts an episode, which then counts as truncated; 0 for the
    task's own limit, which evaluation always keeps."""

    vector_reward: bool = False
    """Whether training sees the reward's terms apart; evaluation sees the task's own reward."""
    group_size: int = 1
    """Environments that set out from one state together in training, for agent.advantage=group."""
    group_steps: int = 0
    """Actions after which they do so again: agent.rollout_steps."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(
                f"env.name = {self.name!r}: not a native task.{nearest(self.name, NAMES)} For "
                "another simulator's own names use env=gym env.id=... or env=dm_control"
            )
        at_least("env.num_threads", self.num_threads, 0)
        at_least("env.action_repeat", self.action_repeat, 1)
        at_least("env.train_episode_steps", self.train_episode_steps, 0)
        at_least("env.group_size", self.group_size, 1)
        at_least("env.group_steps", self.group_steps, 0)


@dataclass(frozen=True, kw_only=True)
class GymSettings:
    """Any gymnasium environment with vector observations and a bounded box of actions."""

    default_num_envs: ClassVar[int] = 8  # of processes, one for each environment

    id: str = "Pendulum-v1"
    """Registered id; `module:id` imports the module that registers it first."""

    def __post_init__(self) -> None:
        _not_empty("env.id", self.id)


@dataclass(frozen=True, kw_only=True)
class DMControlSettings:
    """Any task of the dm_control suite, simulated by dm_control itself."""

    default_num_envs: ClassVar[int] = 8  # of processes, one for each environment

    domain: str = "cartpole"
    """Domain of the suite: cartpole, stacker, ..."""
    task: str = "swingup"
    """Task of the domain: swingup, stack_2, ..."""

    def __post_init__(self) -> None:
        _not_empty("env.domain", self.domain)
        _not_empty("env.task", self.task)


@dataclass(frozen=True, kw_only=True)
class OGBenchSettings:
    """A manipulation task of OGBench, to be learnt from data such as `genpol data generate` makes.

    Task 0 of a single-task environment is OGBench's default one: task 2, or task 4 of puzzle-3x3
    and puzzle-4x4.
    """

    default_num_envs: ClassVar[int] = 8  # of processes, one for each environment

    name: str = "cube-single"
    """Environment: cube-single, scene, puzzle-3x3, ..."""
    task: int = 0
    """Task 1 to 5; 0 for the default one, or for all in turn where goals are given."""
    goal_conditioned: bool = False
    """Whether the goal is observed, under `goal`, and the reward is 1 on reaching it, else 0."""
    success_timing: str = "pre"
    """State that a single task judges: pre, that acted in, as ogbench does since 1.2.0; or post,
    the next, as before."""

    def __post_init__(self) -> None:
        one_of("env.name", self.name, OGBENCH_NAMES)
        within("env.task", self.task, 0, 5)
        one_of("env.success_timing", self.success_timing, SUCCESS_TIMINGS)


Settings = MujocoSettings | GymSettings | DMControlSettings | OGBenchSettings


def label(settings: Settings) -> str:
    """Return a short name without slashes: HopperStand, Pendulum-v1, cube-single-play-task2."""
    match settings:
        case MujocoSettings():
            return settings.name
        case GymSettings():
            return settings.id.rpartition(":")[2].replace("/", "-")
        case DMControlSettings():
            return f"{settings.domain}-{settings.task}"
        case OGBenchSettings():
            goal = "-goal" if settings.goal_conditioned else ""
            task = f"-task{settings.task}" if settings.task else ""
            return f"{settings.name}-play{goal}{task}"
    raise TypeError(f"no simulator family has settings of type {type(settings).__name__}")


def _not_empty(field: str, value: str) -> None:
    if not value:
        raise ConfigError(f"{field} is empty: give a name")

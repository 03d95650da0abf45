"""Settings of the simulator families; imports neither torch nor a simulator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from genpol.envs.mujoco.names import NAMES
from genpol.errors import ConfigError, nearest
from genpol.settings import at_least, one_of, positive, within

OGBENCH_NAMES = (
    *("cube-single", "cube-double", "cube-triple", "cube-quadruple", "cube-octuple"),
    *("scene", "puzzle-3x3", "puzzle-4x4", "puzzle-4x5", "puzzle-4x6"),
)
MULTITASK_NAMES = (
    *("CartpoleSwingup", "PendulumSwingup", "ReacherEasy", "FingerSpin", "BallInCup"),
)
SUCCESS_TIMINGS = ("pre", "post")
METAWORLD_NAMES = (
    *("assembly-v3", "basketball-v3", "bin-picking-v3", "box-close-v3"),
    *("button-press-topdown-v3", "button-press-topdown-wall-v3", "button-press-v3"),
    *("button-press-wall-v3", "coffee-button-v3", "coffee-pull-v3", "coffee-push-v3"),
    *("dial-turn-v3", "disassemble-v3", "door-close-v3", "door-lock-v3", "door-open-v3"),
    *("door-unlock-v3", "drawer-close-v3", "drawer-open-v3", "faucet-close-v3"),
    *("faucet-open-v3", "hammer-v3", "hand-insert-v3", "handle-press-side-v3"),
    *("handle-press-v3", "handle-pull-side-v3", "handle-pull-v3", "lever-pull-v3"),
    *("peg-insert-side-v3", "peg-unplug-side-v3", "pick-out-of-hole-v3", "pick-place-v3"),
    *("pick-place-wall-v3", "plate-slide-back-side-v3", "plate-slide-back-v3"),
    *("plate-slide-side-v3", "plate-slide-v3", "push-back-v3", "push-v3", "push-wall-v3"),
    *("reach-v3", "reach-wall-v3", "shelf-place-v3", "soccer-v3", "stick-pull-v3"),
    *("stick-push-v3", "sweep-into-v3", "sweep-v3", "window-close-v3", "window-open-v3"),
)
BACKENDS = ("batch", "warp")
METAWORLD_REWARDS = ("sparse", "dense")


@dataclass(frozen=True, kw_only=True)
class HistorySettings:
    """What every family has."""

    observation_steps: int = 1
    """Observations that are shown side by side, the last ones, for policies with a history."""


@dataclass(frozen=True, kw_only=True)
class MujocoSettings(HistorySettings):
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
    backend: str = "batch"
    """What steps the physics: `batch`, MuJoCo on the CPU in float64, or `warp`, MuJoCo Warp in
    float32 on the run's device."""

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
        one_of("env.backend", self.backend, BACKENDS)


@dataclass(frozen=True, kw_only=True)
class MultiTaskSettings(HistorySettings):
    """Several native tasks in one environment: what the widest lacks is zero."""

    batched: ClassVar[bool] = True

    tasks: list[str] = field(default_factory=lambda: list(MULTITASK_NAMES))
    """Native tasks; their order is that of the numbers that tell them in the observation."""
    only: str = ""
    """The one of them that is played; all in turn if empty, so that their number divides
    num_envs."""
    observation_width: int = 0
    """Width to fill up observations to; 0 for that of the widest task."""
    action_width: int = 0
    """Width to fill up actions to; 0 for that of the widest task."""
    num_threads: int = 0
    """Threads that step the physics; 0 takes all cores."""
    action_repeat: int = 2
    """Control steps for which each action is held; rewards add up over them."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"env.tasks = {list(self.tasks)}: give each of some tasks once")
        if self.only and self.only not in self.tasks:
            raise ConfigError(
                f"env.only = {self.only!r}: not one of env.tasks.{nearest(self.only, self.tasks)}"
            )
        at_least("env.observation_width", self.observation_width, 0)
        at_least("env.action_width", self.action_width, 0)
        for name in self.tasks:
            self.of(name)

    @property
    def played(self) -> list[str]:
        """The tasks that are played."""
        return [self.only] if self.only else list(self.tasks)

    @property
    def group_size(self) -> int:
        """Environments that belong together in training: one of each task."""
        return len(self.played)

    def of(self, name: str) -> MujocoSettings:
        """Return the settings of one task by itself."""
        return MujocoSettings(
            name=name, num_threads=self.num_threads, action_repeat=self.action_repeat
        )


@dataclass(frozen=True, kw_only=True)
class GymSettings(HistorySettings):
    """Any gymnasium environment with vector observations and a bounded box of actions."""

    default_num_envs: ClassVar[int] = 8  # of processes, one for each environment

    id: str = "Pendulum-v1"
    """Registered id; `module:id` imports the module that registers it first."""

    def __post_init__(self) -> None:
        _not_empty("env.id", self.id)


@dataclass(frozen=True, kw_only=True)
class DMControlSettings(HistorySettings):
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
class OGBenchSettings(HistorySettings):
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


@dataclass(frozen=True, kw_only=True)
class MetaWorldSettings(HistorySettings):
    """A manipulation task of Meta-World v3, whose objects and goals lie elsewhere each episode."""

    default_num_envs: ClassVar[int] = 8  # of processes, one for each environment

    name: str = "reach-v3"
    """Task: reach-v3, peg-insert-side-v3, ..."""
    reward: str = "sparse"
    """sparse: -1 a step until success, which ends the episode; dense: Meta-World's own, from 0 to
    10 a step, in episodes of 500 steps whatever happens."""

    def __post_init__(self) -> None:
        one_of("env.name", self.name, METAWORLD_NAMES)
        one_of("env.reward", self.reward, METAWORLD_REWARDS)


@dataclass(frozen=True, kw_only=True)
class IsaacLabSettings(HistorySettings):
    """A task of Isaac Lab, without Isaac Sim, simulated on the run's device."""

    batched: ClassVar[bool] = True

    task: str = "cartpole"
    """cartpole, hopper or quadruped, which need no download, or any that Isaac Lab registers:
    Isaac-Velocity-Flat-G1, ..."""
    action_bound: float = 1.0
    """What an action of 1 is to the task, whose own actions have no bounds."""
    overrides: list[str] = field(default_factory=list)
    """Presets and values for the task's own configuration, in Isaac Lab's words:
    [physics=newton_mjwarp, env.episode_length_s=10]."""

    def __post_init__(self) -> None:
        _not_empty("env.task", self.task)
        positive("env.action_bound", self.action_bound)


@dataclass(frozen=True, kw_only=True)
class MjlabSettings(HistorySettings):
    """A task of mjlab, simulated by MuJoCo Warp on the run's device."""

    batched: ClassVar[bool] = True

    task: str = "Mjlab-Velocity-Flat-Unitree-Go1"
    """Any that mjlab, or a package that extends it, registers: Mjlab-Cartpole-Swingup, ..."""
    action_bound: float = 1.0
    """What an action of 1 is to the task, whose own actions have no bounds."""

    def __post_init__(self) -> None:
        _not_empty("env.task", self.task)
        positive("env.action_bound", self.action_bound)


Settings = (
    MujocoSettings
    | MultiTaskSettings
    | GymSettings
    | DMControlSettings
    | OGBenchSettings
    | MetaWorldSettings
    | IsaacLabSettings
    | MjlabSettings
)


def label(settings: Settings) -> str:
    """Return a short name without slashes: HopperStand, Pendulum-v1, cube-single-play-task2."""
    match settings:
        case MujocoSettings():
            return settings.name
        case MultiTaskSettings():
            return f"multitask-{settings.only}" if settings.only else "multitask"
        case GymSettings():
            return settings.id.rpartition(":")[2].replace("/", "-")
        case DMControlSettings():
            return f"{settings.domain}-{settings.task}"
        case OGBenchSettings():
            goal = "-goal" if settings.goal_conditioned else ""
            task = f"-task{settings.task}" if settings.task else ""
            return f"{settings.name}-play{goal}{task}"
        case MetaWorldSettings():
            return settings.name + ("-dense" if settings.reward == "dense" else "")
        case IsaacLabSettings():
            return f"isaaclab-{settings.task.rpartition(':')[2]}"
        case MjlabSettings():
            return settings.task
    raise TypeError(f"no simulator family has settings of type {type(settings).__name__}")


def _not_empty(field: str, value: str) -> None:
    if not value:
        raise ConfigError(f"{field} is empty: give a name")

"""Settings of one training run: everything that belongs neither to the agent nor to the env."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from genpol.errors import ConfigError
from genpol.settings import at_least, one_of, positive, within

MISSING: Any = (
    "???"  # OmegaConf's mark for a mandatory value, written out to keep it off this floor
)


DEFAULT_NUM_ENVS = 1024


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Which files of the configuration groups were composed; filled in, never set by hand."""

    agent: str = ""
    """Name of the algorithm, as in `genpol list agents`."""
    env: str = ""
    """Name of the environment's configuration, as in `genpol list envs`."""
    recipe: str = ""
    """Specialisation of the agent to the environment; empty where there is none."""


_BATCHED_EVALUATION = 100  # of environments of which many cost little more than one


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When and how the policy is evaluated."""

    interval_steps: int = 1_000_000
    """Steps between two evaluations; the last one is always after the last step."""
    episodes: int = 100
    """Complete episodes per evaluation; with several tasks (env=multitask) rounded up to as many of
    each."""
    episodes_per_task: int = 0
    """Of each of several tasks, in place of `episodes`; 0 shares those out."""
    seed: int = 10_000
    """Seed of the evaluation episodes: the same starts every time, never those of training."""
    num_envs: int = 0
    """Environments stepped together, with several tasks rounded up to as many of each; 0 takes as
    many as in training, of native tasks at least 100."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        positive("evaluation.interval_steps", self.interval_steps)
        at_least("evaluation.num_envs", self.num_envs, 0)
        at_least("evaluation.episodes", self.episodes, 1)
        at_least("evaluation.episodes_per_task", self.episodes_per_task, 0)
        within("evaluation.seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """When the run is saved."""

    interval_steps: int = 1_000_000
    """Steps between two checkpoints; the end of the run always writes one."""
    keep: int = 3
    """How many of the latest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        positive("checkpoint.interval_steps", self.interval_steps)
        at_least("checkpoint.keep", self.keep, 1)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training run.

    Raises:
        ConfigError: If a value is out of bounds; the message names the field.
    """

    seed: int = 0
    """Seed of the networks, the environments and the exploration."""
    total_steps: int = 10_000_000
    """Steps to train for: those of the environments, all together; of agents that learn from a data
    set, updates on it."""
    data: str | None = None
    """Data set to learn from, for agents that do: see `genpol data --help`."""
    online_steps: int = 0
    """Environment steps that follow the updates on a data set."""
    device: str = "cpu"
    """Where the networks live: cpu, cuda or cuda:<index>."""
    num_threads: int = 0
    """Threads for torch; 0 takes all cores."""
    num_envs: int = DEFAULT_NUM_ENVS
    """Environments stepped at once; 8 by default where each is a process of its own."""
    collector: str = "direct"
    """Where rollouts are collected: `direct` in this process, `distributed` in others of this
    machine, `ray` in others here or in a cluster (extra `distributed`)."""
    num_collectors: int = 1
    """Groups that the environments are shared out to, each with seeds of its own; a process each,
    but for `direct`."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Fixed-episode evaluation."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Saving."""
    output: str = "runs"
    """Folder under which the run folder <env>/<agent>/<time>-s<seed> is made."""
    resume: str | None = None
    """Run folder or checkpoint to continue exactly where it stopped."""
    init: str | None = None
    """Checkpoint whose policy the run starts from; everything else starts afresh."""
    video: bool = True
    """Record a video of the final policy."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases as well."""
    choices: Choices = field(default_factory=Choices)
    """Names of the configurations that were composed."""
    env: Any = MISSING
    """The environment's own settings."""
    agent: Any = MISSING
    """The algorithm's own settings."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        within("seed", self.seed, 0, 2**63 - 1)
        at_least("total_steps", self.total_steps, 0 if self.online_steps > 0 else 1)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device = {self.device!r}: must be cpu, cuda or cuda:<index>")
        at_least("online_steps", self.online_steps, 0)
        at_least("num_threads", self.num_threads, 0)
        within("num_threads", self.num_threads, 0, 4096)
        at_least("num_envs", self.num_envs, 1)
        one_of("collector", self.collector, ("direct", "distributed", "ray"))
        at_least("num_collectors", self.num_collectors, 1)
        if self.num_envs % self.num_collectors != 0:
            raise ConfigError(
                f"num_collectors = {self.num_collectors}: does not divide num_envs = "
                f"{self.num_envs}, which collectors share equally; change one of them"
            )
        if self.collector != "direct" and self.num_collectors == 1:
            raise ConfigError(
                f"collector = {self.collector!r}: a single one is better played in this process; "
                "set num_collectors=2 or more, or collector=direct"
            )
        if not self.output:
            raise ConfigError("output = '': must be a folder.")
        if self.resume is not None and self.init is not None:
            raise ConfigError("resume and init exclude each other: resume continues, init begins.")

    def evaluation_envs(self, episodes: int) -> int:
        """Return how many environments an evaluation of so many episodes steps together."""
        together = self.evaluation.num_envs or self.num_envs
        if self.evaluation.num_envs == 0 and getattr(self.env, "batched", False):
            together = max(together, _BATCHED_EVALUATION)
        return self.shared_out(min(episodes, together))

    @property
    def evaluation_episodes(self) -> int:
        """Complete episodes per evaluation, as many of each task."""
        each = self.evaluation.episodes_per_task
        return each * self._num_tasks if each > 0 else self.shared_out(self.evaluation.episodes)

    def shared_out(self, number: int) -> int:
        """Return a number of episodes or environments, rounded up to as many of each task."""
        return -(-number // self._num_tasks) * self._num_tasks

    @property
    def _num_tasks(self) -> int:
        return len(getattr(self.env, "played", ())) or 1

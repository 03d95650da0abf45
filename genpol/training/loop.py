"""The training loop: collect, update, evaluate, checkpoint, log; the same for every agent."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import EnvBase

from genpol import parallel
from genpol.agent import Agent, DatasetAgent, ReplayAgent
from genpol.data.dataset import OfflineDataset
from genpol.data.episodes import EpisodeTracker
from genpol.data.replay import Replay
from genpol.data.sequences import SequenceReplay
from genpol.data.windows import WindowSampler
from genpol.errors import CheckpointError, NonFiniteError
from genpol.seeding import derive
from genpol.training import checkpoint
from genpol.training.collection import Collector, make_collector
from genpol.training.display import TerminalReport
from genpol.training.dump import write_dump
from genpol.training.evaluation import evaluate
from genpol.training.groups import CollectorDied
from genpol.training.replay_store import ReplayStore
from genpol.training.rollouts import GroupRollouts, number_of_groups, refuse_groups
from genpol.training.run import Run
from genpol.training.settings import TrainSettings
from genpol.training.signals import SignalWatch


class EnvFactory(Protocol):
    """Makes batched environments of the task that is trained."""

    def __call__(self, *, num_envs: int, seed: int, training: bool = False) -> EnvBase:
        """Return an environment ``[num_envs]``."""
        ...


# Updates on a data set whose metrics make one row, and after which signals are heeded.
_UPDATES_PER_ROW = 100


class _CutShort(Exception):  # noqa: N818 - a stop, not an error
    """An evaluation is given up because a signal asks the run to stop."""


class Training:
    """One run of the loop, from a start or from a checkpoint to its end.

    The clock of a run, by which it evaluates, saves and stops, counts environment steps; of a run
    on a data set, updates on it, and then environment steps.

    Attributes:
        env_steps: Environment steps so far, over all environments.
        wall_clock_s: Seconds of training so far, over all resumptions.
        interrupted: Name of the signal that stopped the run, if one did.

    Args:
        agent: What learns.
        make_env: Makes the environments of training and evaluation.
        settings: When to evaluate, save and stop.
        run: Where everything is written.
        dataset: What a :class:`~genpol.agent.DatasetAgent` learns from; ``None`` if it need not.
        make_agent: Makes agents like ``agent``, in any state, which act for it where there are
            several collectors or ranks.
    """

    def __init__(
        self,
        agent: Agent,
        make_env: EnvFactory,
        settings: TrainSettings,
        run: Run,
        dataset: OfflineDataset | None = None,
        make_agent: Callable[[], Agent] | None = None,
    ) -> None:
        self.agent = agent
        self.settings = settings
        self.run = run
        self.env_steps = 0
        self.interrupted: str | None = None
        self._offline_updates = 0
        self._dataset = dataset
        self._windows = _make_windows(agent, settings, dataset)
        self._evaluation_seed = derive(settings.evaluation.seed, "evaluation")
        self._evaluation_env = make_env(
            num_envs=settings.evaluation_envs(settings.evaluation_episodes),
            seed=self._evaluation_seed,
        )
        self._env = self._evaluation_env  # where nothing is collected, or groups do
        self._groups: GroupRollouts | None = None
        if self._windows is None or settings.online_steps > 0:
            if number_of_groups(settings) > 1:
                assert make_agent is not None
                self._groups = GroupRollouts(agent, make_env, make_agent, settings)
            else:
                seed = derive(settings.seed, "training")
                self._env = make_env(num_envs=settings.num_envs, seed=seed, training=True)
        self._replay = _make_replay(agent, settings, self._windows)
        self._stored = ReplayStore(run.path / "replay")
        self._reward_terms: tuple[str, ...] = getattr(self._groups or self._env, "reward_terms", ())
        num_envs = settings.num_envs if self._groups is None else self._groups.num_envs
        self._episodes = EpisodeTracker(num_envs, max(1, len(self._reward_terms)))
        self._evaluated_at = self._saved_at = -1
        self._evaluated = (-1, -1)
        self._started = time.monotonic()

    @property
    def steps(self) -> int:
        """The run's clock."""
        return self._offline_updates + self.env_steps

    @property
    def _end(self) -> int:
        """What the clock shows at the end."""
        offline = self._windows is not None
        return self.settings.total_steps + (self.settings.online_steps if offline else 0)

    @property
    def wall_clock_s(self) -> float:
        """Seconds of training so far."""
        return time.monotonic() - self._started

    def start(self) -> None:
        """Train from where it stands until the last step, a signal, or a failure."""
        console = Console(quiet=True) if not parallel.is_first() else None
        report = TerminalReport(self._end, start_steps=self.steps, console=console)
        with SignalWatch() as signals, report:
            # The evaluation before training, or one that a signal cut short before a resumption.
            if self._evaluation_due() and self._pause(signals, report):
                return
            if self._dataset is not None and self.steps == 0:
                assert isinstance(self.agent, DatasetAgent)
                self.agent.prepare(self._dataset)
            while self._offline_updates < self._offline_end:
                self._update_offline(report)
                if self._pause(signals, report):
                    return
            for batch in self._batches():
                self._update(batch, report)
                if self._pause(signals, report):
                    return

    def _pause(self, signals: SignalWatch, report: TerminalReport) -> bool:
        """Evaluate and save if it is time to, and return whether a signal stops the run here."""
        last = self.steps >= self._end
        if self._evaluation_due():
            self._evaluate(signals, report)
        finished = last and not self._evaluation_due()
        heard = parallel.gather((signals.checkpoint_requested(), signals.stop_signal))
        asked = any(checkpoint for checkpoint, _ in heard)
        stop_signal = next((name for _, name in heard if name is not None), None)
        stop = stop_signal is not None and not finished
        due = self._due(self.settings.checkpoint.interval_steps, self._saved_at)
        if finished or asked or stop or due:
            self.save()
        if stop:
            self.interrupted = stop_signal
        return stop

    def _batches(self) -> Iterator[TensorDict]:
        """Yield rollouts ``[num_envs, time]`` until the budget of steps is spent."""
        if self.steps >= self._end:
            return
        if self._groups is not None:
            yield from self._batches_of(self._groups)
            return
        collector = self._make_collector()
        try:
            for batch in collector:
                yield batch
                if self.steps >= self._end:
                    return
        finally:
            collector.shutdown(close_env=False)

    def _batches_of(self, groups: GroupRollouts) -> Iterator[TensorDict]:
        """Yield rollouts of groups; where one dies, save what there was before."""
        try:
            for batch in groups.batches():
                yield batch
                if self.steps >= self._end:
                    return
        except CollectorDied as error:
            if self.steps == 0:
                raise
            saved = self.save()
            raise CollectorDied(
                f"{error}; {saved.name} is saved, go on with: genpol train resume={self.run.path}"
            ) from None

    def _make_collector(self) -> Collector:
        # The constructor tries the policy out, which draws noise; a resumed run must not.
        state = self.agent.training_state()
        with torch.random.fork_rng():
            collector = make_collector(self._env, self.agent.policy, self.agent.frames_per_batch)
        self.agent.load_training_state(state)
        return collector

    @property
    def _offline_end(self) -> int:
        return 0 if self._windows is None else self.settings.total_steps

    def _update_offline(self, report: TerminalReport) -> None:
        """Make updates on the data set up to the next row of metrics or the next event."""
        assert self._windows is not None
        assert isinstance(self.agent, DatasetAgent)
        intervals = (
            _UPDATES_PER_ROW,
            self.settings.evaluation.interval_steps,
            self.settings.checkpoint.interval_steps,
        )
        done = self._offline_updates
        until = min(self._offline_end, *((done // each + 1) * each for each in intervals))
        history = []
        for _ in range(done, until):
            batch = self._windows.sample(self.agent.batch_size)
            with self._dumping(batch):
                history.append(self.agent.update(batch))
        self._offline_updates = until
        self._log(_average(history))
        report.update(self.steps)

    @contextmanager
    def _dumping(self, batch: TensorDict) -> Iterator[None]:
        """Keep the batch whose loss is not finite once too often."""
        try:
            yield
        except NonFiniteError as error:
            if not parallel.is_first():
                raise
            folder = write_dump(
                self.run.path / f"dump-{self.steps}", {"batch": batch, "env_steps": self.env_steps}
            )
            raise NonFiniteError(f"{error}; the batch lies in {folder}") from None

    def _log(self, metrics: Mapping[str, Tensor]) -> None:
        self.run.log_metrics(*self._position, self.wall_clock_s, _numbers(metrics), step=self.steps)

    def _update(self, batch: TensorDict, report: TerminalReport) -> None:
        terms = torch.cat(parallel.gather(self._episodes.update(batch).terms))
        returns = terms.sum(-1)
        with self._dumping(batch):
            metrics = self._learn(batch)
        if parallel.size() > 1:
            metrics = _average(parallel.gather(metrics))
        self.env_steps += batch.numel() * self._env.action_repeat * parallel.size()
        if len(returns) > 0:
            metrics["train/return"] = returns.mean()
            for name, term in zip(self._reward_terms, terms.mean(0), strict=False):
                metrics[f"train/return/{name}"] = term
        metrics["train/episodes"] = torch.tensor(float(len(returns)))
        metrics["train/diverged"] = parallel.total(batch["next", "diverged"].sum())
        self._log(metrics)
        shown = {"train_return": float(returns.mean())} if len(returns) > 0 else {}
        if "stage" in metrics:
            shown["stage"] = float(metrics["stage"])
        report.update(self.steps, **shown)

    def _learn(self, rollout: TensorDict) -> dict[str, Tensor]:
        """Update the agent on the rollout itself, or on what the replay then holds."""
        if not isinstance(self.agent, ReplayAgent | DatasetAgent):
            return self.agent.update(rollout)
        assert self._replay is not None
        self._replay.extend(rollout)
        updates = self.agent.observe(rollout) if len(self._replay) > 0 else 0
        size = self.agent.batch_size
        return _average([self.agent.update(self._replay.sample(size)) for _ in range(updates)])

    def _evaluate(self, signals: SignalWatch, report: TerminalReport) -> None:
        """Evaluate the policy, on the first rank; the others wait for it."""
        if parallel.is_first():
            self._evaluate_here(signals, report)
        self._evaluated_at, self._evaluated = parallel.from_first(
            (self._evaluated_at, self._evaluated)
        )

    def _evaluate_here(self, signals: SignalWatch, report: TerminalReport) -> None:
        """Evaluate the policy; a stop signal cuts it short, and nothing of it is kept."""

        def heed_signals() -> None:
            if signals.stop_requested:
                raise _CutShort

        try:
            summary = evaluate(
                self.agent.policy,
                self._evaluation_env,
                episodes=self.settings.evaluation_episodes,
                seed=self._evaluation_seed,
                on_step=heed_signals,
            ).summary()
        except _CutShort:
            return
        self.run.log_evaluation(*self._position, self.wall_clock_s, summary, step=self.steps)
        shown = {"eval_return": summary["return_mean"]}
        if "success_mean" in summary:
            shown["eval_success"] = summary["success_mean"]
        report.update(self.steps, **shown)
        self._evaluated_at, self._evaluated = self.steps, self._position

    @property
    def _position(self) -> tuple[int, int]:
        return self.env_steps, self.agent.gradient_steps

    def _evaluation_due(self) -> bool:
        if self._evaluated_at == self.steps:
            return False
        ends = self.steps == 0 or self.steps >= self._end
        return ends or self._due(self.settings.evaluation.interval_steps, self._evaluated_at)

    def _due(self, interval: int, last: int) -> bool:
        return self.steps // interval > max(last, 0) // interval

    def save(self) -> Path:
        """Write a checkpoint from which :meth:`resume` continues bit for bit."""
        self._check_ranks()
        state = {
            "weights": dict(self.agent.state_dict()),
            "training": self.agent.training_state(),
            # Before the first step, the collector has yet to reset: there is nothing to restore.
            "simulation": self._simulation() if self.env_steps > 0 else None,
            "episodes": _stacked(parallel.gather(self._episodes.state())),
            "replay": None if self._replay is None else self._stored.save(self._replay),
            "torch_generator": torch.get_rng_state(),
            "windows": None if self._windows is None else self._windows.state(),
            "env_steps": self.env_steps,
            "offline_updates": self._offline_updates,
            "evaluated_at": self._evaluated_at,
            "evaluated": list(self._evaluated),
            "wall_clock_s": self.wall_clock_s,
        }
        self._saved_at = self.steps
        if not parallel.is_first():
            return self.run.checkpoints / checkpoint.step_name(self.steps)
        oldest = 0 if self._replay is None else self._replay.span[0]
        path = checkpoint.save(
            self.run.checkpoints,
            checkpoint.step_name(self.steps),
            state,
            metadata={
                "env_steps": self.env_steps,
                "gradient_steps": self.agent.gradient_steps,
                "env": self.run.record["env"],
                "agent": self.run.record["agent"],
                "replay_from": oldest,
            },
            keep=self.settings.checkpoint.keep,
        )
        if self._replay is not None:
            kept = map(checkpoint.read_metadata, checkpoint.kept(self.run.checkpoints))
            self._stored.prune(min(int(metadata.get("replay_from", 0)) for metadata in kept))
        return path

    def _simulation(self) -> dict[str, Any] | None:
        """Return what :meth:`_restore` lets the environments go on from."""
        if self._groups is not None:
            return self._groups.state()
        simulation: dict[str, Any] | None = self._env.state_dict_of_simulation()
        return simulation

    def _check_ranks(self) -> None:
        """Refuse to save what differs from rank to rank, for it would be another run's.

        Raises:
            RankError: If weights or generators differ.
        """
        if parallel.size() == 1:
            return
        digest = hashlib.sha256(self.agent.generator.get_state().cpu().numpy().tobytes())
        for x in self.agent.state_dict().values():
            digest.update(x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        if len(set(parallel.gather(digest.hexdigest()))) > 1:
            raise parallel.RankError(
                f"after {self.steps} steps the ranks have different weights, which they must not: "
                "the machines compute differently; go on in one process with "
                f"num_collectors={parallel.size()} from the last checkpoint"
            )

    def resume(self, path: Path) -> None:
        """Put everything where it stood at checkpoint ``path``.

        Environments whose simulator cannot be restored start new episodes.

        Raises:
            CheckpointError: If the checkpoint is damaged or belongs to other settings.
        """
        state = checkpoint.load(path)
        self.run.check_tables()
        try:
            self._restore(state, path)
        except KeyError as error:
            raise CheckpointError(
                f"{path}: has no {error}, which this version keeps; resume with the version it was "
                "saved with (run.json names its commit), or start anew"
            ) from None
        if parallel.is_first():
            checkpoint.discard_after(path)
        self.run.truncate_to(*self._position, evaluated=self._evaluated, step=self.steps)

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        num_envs = len(state["episodes"]["return"])
        if num_envs != self.settings.num_envs:
            raise CheckpointError(
                f"{path}: was saved with num_envs={num_envs}, not {self.settings.num_envs}; leave "
                "num_envs as it was"
            )
        load_weights(self.agent, state["weights"], path)
        self.agent.load_training_state(state["training"])
        if state["simulation"] is not None and self._restore_simulation(state["simulation"], path):
            own = len(self._episodes.state()["whole"])
            rows = slice(parallel.rank() * own, (parallel.rank() + 1) * own)
            self._episodes.load_state({name: x[rows] for name, x in state["episodes"].items()})
        if self._replay is not None and state["replay"] is not None:  # none in an offline phase
            self._stored.load(self._replay, state["replay"], path)
        if self._windows is not None:
            self._windows.load_state(state["windows"])
        torch.set_rng_state(state["torch_generator"])
        self.env_steps = state["env_steps"]
        self._offline_updates = state["offline_updates"]
        self._saved_at = self.steps
        self._evaluated_at = state["evaluated_at"]
        env_steps, gradient_steps = state["evaluated"]
        self._evaluated = (env_steps, gradient_steps)
        self._started = time.monotonic() - state["wall_clock_s"]

    def _restore_simulation(self, simulation: Mapping[str, Any], path: Path) -> bool:
        """Let the environments go on, and return whether they do not begin new episodes."""
        if self._groups is not None:
            return self._groups.load(simulation, path)
        refuse_groups(simulation, path)
        self._env.load_simulation(simulation)
        return True

    def close(self) -> None:
        """Close the environments."""
        if self._groups is not None:
            self._groups.close()
        for env in (self._env, self._evaluation_env):
            if not env.is_closed:
                env.close()


def _make_windows(
    agent: Agent, settings: TrainSettings, dataset: OfflineDataset | None
) -> WindowSampler | None:
    if not isinstance(agent, DatasetAgent) or (dataset is None and not agent.needs_data):
        return None
    assert dataset is not None
    return WindowSampler(dataset, agent.window, seed=derive(settings.seed, "windows"))


def _make_replay(
    agent: Agent, settings: TrainSettings, windows: WindowSampler | None
) -> Replay | SequenceReplay | None:
    seed = derive(settings.seed, "replay")
    if isinstance(agent, ReplayAgent) and agent.window is None:
        return Replay(agent.replay_capacity, seed=seed)
    if not isinstance(agent, ReplayAgent | DatasetAgent) or agent.window is None:
        return None
    if windows is not None and settings.online_steps == 0:
        return None
    return SequenceReplay(
        agent.window,
        capacity=agent.replay_capacity,
        num_envs=settings.num_envs,
        seed=seed,
        offline=windows,
        successes=agent.successes if isinstance(agent, ReplayAgent) else 0,
        offline_share=agent.offline_share if isinstance(agent, DatasetAgent) else None,
    )


def load_weights(agent: Agent, weights: Mapping[str, Any], path: Path) -> None:
    """Load the weights of checkpoint ``path`` into ``agent``.

    Raises:
        CheckpointError: If names or shapes do not fit; the message names the first that does not.
    """
    try:
        agent.load_state_dict(dict(weights))
    except RuntimeError as error:
        details = str(error).splitlines()
        first = details[1].strip() if len(details) > 1 else details[0]
        raise CheckpointError(
            f"{path}: its weights do not fit the agent of these settings ({first}); use the "
            "environment and agent settings it was trained with"
        ) from None


def _stacked(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the states of all ranks' trackers as that of one."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def _average(history: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of every metric over the updates that tell it; nothing of none."""
    names = dict.fromkeys(name for metrics in history for name in metrics)
    return {
        name: torch.stack([metrics[name] for metrics in history if name in metrics]).mean()
        for name in names
    }


def _numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}

"""Evaluation on a fixed number of complete episodes with seeds of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

from genpol.agent import StatefulPolicy
from genpol.errors import EnvironmentFault
from genpol.training.run import OF_TASK

_ATTEMPTS = 10  # at an episode whose physics do not diverge


@dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Attributes:
        returns: Undiscounted return of each valid episode ``[E]``.
        lengths: Steps of each valid episode ``[E]``.
        successes: Whether the last step of each solved the task, ``[E]``; empty where the
            environment does not say.
        diverged: Episodes left out because their physics diverged.
        task_returns: Of each task by its name, the returns of its episodes among these; empty
            where there is one task.
    """

    returns: Tensor
    lengths: Tensor
    successes: Tensor
    diverged: int
    task_returns: Mapping[str, Tensor] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """Return the statistics that ``evals.csv`` holds, under its column names."""
        returns, lengths = self.returns.double(), self.lengths.double()
        empty = len(returns) == 0
        return {
            "episodes": len(returns),
            "return_mean": float("nan") if empty else float(returns.mean()),
            "return_std": float("nan") if empty else float(returns.std(correction=0)),
            "return_min": float("nan") if empty else float(returns.min()),
            "return_max": float("nan") if empty else float(returns.max()),
            "length_mean": float("nan") if empty else float(lengths.mean()),
            "diverged": self.diverged,
            **({"success_mean": float(self.successes.double().mean())} if self._judged else {}),
            **{f"{OF_TASK}{name}": float(x.mean()) for name, x in self.task_returns.items()},
        }

    @property
    def _judged(self) -> bool:
        return len(self.successes) > 0


@torch.no_grad()
def evaluate(
    policy: TensorDictModuleBase,
    env: EnvBase,
    *,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    on_step: Callable[[], None] | None = None,
) -> Evaluation:
    """Run complete episodes and return their returns.

    Every environment contributes the same number of episodes (up to the last round), so that short
    episodes are not over-represented.

    Args:
        policy: Maps ``observation`` to ``action``.
        env: Batched environment ``[num_envs]``; it is seeded and reset.
        episodes: Number of episodes.
        seed: Seed of the start states: equal seeds give equal starts.
        deterministic: Take the policy's mode and do not sample.
        on_step: Called after every step, to draw frames for instance.
    """
    num_envs = env.batch_size[0]
    returns: list[Tensor] = []
    lengths: list[Tensor] = []
    successes: list[Tensor] = []
    row_tasks: tuple[str, ...] = getattr(env, "row_tasks", ())
    played: list[str] = []
    diverged = 0
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with set_exploration_type(kind), _apart(policy, seed):
        for first in range(0, episodes, num_envs):
            # Anew in every round: a policy that falls early has drawn more starts by then.
            env.set_seed(seed + first)
            wanted = torch.arange(num_envs) < episodes - first
            total, length, success, bad = _run_round(policy, env, wanted, on_step)
            valid = wanted & ~bad
            diverged += int((wanted & bad).sum())
            returns.append(total[valid])
            lengths.append(length[valid])
            played += (
                [row_tasks[row] for row in valid.nonzero()[:, 0].tolist()] if row_tasks else []
            )
            if success is not None:
                successes.append(success[valid])
    judged = torch.cat(successes) if successes else torch.zeros(0, dtype=torch.bool)
    every = torch.cat(returns)
    task_returns = {
        name: every[torch.tensor([task == name for task in played], dtype=torch.bool)]
        for name in dict.fromkeys(row_tasks)
    }
    return Evaluation(every, torch.cat(lengths), judged, diverged, task_returns)


@contextmanager
def _apart(policy: TensorDictModuleBase, seed: int) -> Iterator[None]:
    """Let a policy that remembers begin anew, and give it back what it was in the midst of."""
    if not isinstance(policy, StatefulPolicy):
        yield
        return
    kept = policy.acting_state()
    policy.start(seed)
    try:
        yield
    finally:
        policy.load_acting_state(kept)


def _run_round(
    policy: TensorDictModuleBase,
    env: EnvBase,
    wanted: Tensor,
    on_step: Callable[[], None] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Run one episode in every environment.

    Returns:
        Totals, lengths, success in the last step (``None`` where it is not told) and divergence,
        ``[N]`` each.
    """
    num_envs = len(wanted)
    total = torch.zeros(num_envs, dtype=torch.float64)
    length = torch.zeros(num_envs, dtype=torch.int64)
    bad = torch.zeros(num_envs, dtype=torch.bool)
    success: Tensor | None = None
    running = wanted.clone()
    tensordict = env.reset()
    while True:
        tensordict = env.step(policy(tensordict))
        if on_step is not None:
            on_step()
        after = tensordict["next"]
        reward = after["reward"].squeeze(-1).double().cpu()
        total += torch.where(running, reward, 0.0)
        length += running
        bad |= running & after["diverged"].squeeze(-1).cpu()
        solved = after.get("success", None)
        if solved is not None:
            solved = solved.squeeze(-1).cpu()
            success = solved if success is None else torch.where(running, solved, success)
        running &= ~after["done"].squeeze(-1).cpu()
        if not running.any():
            return total, length, success, bad
        tensordict = env.maybe_reset(env.step_mdp(tensordict))


@torch.no_grad()
def trajectories(
    policy: TensorDictModuleBase,
    env: EnvBase,
    *,
    episodes: int,
    seed: int,
    deterministic: bool,
    on_step: Callable[[], None] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Run complete episodes and yield each as a trajectory, as data sets hold them.

    Every environment contributes the same number of them (up to a rest), so that short ones are not
    over-represented. They come in rounds, each seeded by itself, and in the order of the
    environments within a round, whichever ends first. One whose physics diverged is left out, and
    the same environment makes up for it.

    Args:
        policy: See :func:`evaluate`.
        env: See :func:`evaluate`.
        episodes: Number of episodes.
        seed: See :func:`evaluate`.
        deterministic: See :func:`evaluate`.
        on_step: Called after every step; an exception that it raises ends the episodes.

    Yields:
        ``observation`` ``[T + 1, d]``, ``action`` ``[T, A]``, ``reward`` and ``terminated``
        ``[T]``, and ``success`` where the environment tells.

    Raises:
        EnvironmentFault: If the physics of one environment diverge time and again.
    """
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    num_envs = env.batch_size[0]
    with set_exploration_type(kind), _apart(policy, seed):
        for first in range(0, episodes, num_envs):
            env.set_seed(seed + first)
            yield from _record_round(policy, env, min(num_envs, episodes - first), on_step)


def _record_round(
    policy: TensorDictModuleBase,
    env: EnvBase,
    wanted: int,
    on_step: Callable[[], None] | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield one trajectory from each of the first ``wanted`` environments, in their order."""
    begun: dict[int, list[dict[str, np.ndarray]]] = {index: [] for index in range(wanted)}
    ended: dict[int, dict[str, np.ndarray]] = {}
    diverged = [0] * wanted
    yielded = 0
    tensordict = env.reset()
    while begun:
        tensordict = env.step(policy(tensordict))
        if on_step is not None:
            on_step()
        rows = _arrays(tensordict)
        done = tensordict["next", "done"].squeeze(-1).tolist()
        for index, steps in list(begun.items()):
            steps.append({name: values[index] for name, values in rows.items()})
            if not done[index]:
                continue
            if any(step["diverged"] for step in steps):
                diverged[index] += 1
                _check_divergence(env, diverged[index])
                begun[index] = []
            else:
                ended[index] = _trajectory(begun.pop(index))
        while yielded in ended:
            yield ended.pop(yielded)
            yielded += 1
        tensordict = env.maybe_reset(env.step_mdp(tensordict))


def _check_divergence(env: EnvBase, diverged: int) -> None:
    if diverged == _ATTEMPTS:
        raise EnvironmentFault(
            f"environment {env.name}: the physics diverged in {diverged} episodes, one after the "
            "other, with this policy; take another checkpoint"
        )


def _arrays(tensordict: TensorDictBase) -> dict[str, np.ndarray]:
    """Return one step of all environments, ``[num_envs, ...]`` each."""
    after = tensordict["next"]
    rows = {
        "observation": tensordict["observation"],
        "action": tensordict["action"].clamp(-1.0, 1.0),
        "reward": after["reward"].sum(-1),
        "terminated": after["terminated"].squeeze(-1),
        "diverged": after["diverged"].squeeze(-1),
        "following": after["observation"],
    }
    success = after.get("success", None)
    if success is not None:
        rows["success"] = success.squeeze(-1)
    return {name: x.cpu().numpy().copy() for name, x in rows.items()}


def _trajectory(steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = [name for name in steps[0] if name not in ("following", "diverged")]
    columns = {name: np.stack([step[name] for step in steps]) for name in names}
    last = steps[-1]["following"][None]
    columns["observation"] = np.concatenate([columns["observation"], last])
    return columns


def record(
    policy: TensorDictModuleBase,
    env: EnvBase,
    *,
    seed: int,
    frame_period: int = 1,
    height: int = 360,
    width: int = 480,
) -> list[np.ndarray]:
    """Run one episode of environment 0 and return every ``frame_period``-th frame."""
    frames: list[np.ndarray] = []
    count = 0

    def draw() -> None:
        nonlocal count
        if count % frame_period == 0:
            frames.append(env.render(0, height=height, width=width))
        count += 1

    evaluate(policy, env, episodes=1, seed=seed, on_step=draw)
    return frames

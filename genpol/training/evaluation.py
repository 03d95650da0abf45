"""Evaluation on a fixed number of complete episodes with seeds of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type


@dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Attributes:
        returns: Undiscounted return of each valid episode ``[E]``.
        lengths: Steps of each valid episode ``[E]``.
        diverged: Episodes left out because their physics diverged.
    """

    returns: Tensor
    lengths: Tensor
    diverged: int

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
        }


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
    diverged = 0
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with set_exploration_type(kind):
        for first in range(0, episodes, num_envs):
            # Anew in every round: a policy that falls early has drawn more starts by then.
            env.set_seed(seed + first)
            wanted = torch.arange(num_envs) < episodes - first
            total, length, bad = _run_round(policy, env, wanted, on_step)
            valid = wanted & ~bad
            diverged += int((wanted & bad).sum())
            returns.append(total[valid])
            lengths.append(length[valid])
    return Evaluation(torch.cat(returns), torch.cat(lengths), diverged)


def _run_round(
    policy: TensorDictModuleBase,
    env: EnvBase,
    wanted: Tensor,
    on_step: Callable[[], None] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one episode in every environment; return totals, lengths and divergence ``[N]``."""
    num_envs = len(wanted)
    total = torch.zeros(num_envs, dtype=torch.float64)
    length = torch.zeros(num_envs, dtype=torch.int64)
    bad = torch.zeros(num_envs, dtype=torch.bool)
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
        running &= ~after["done"].squeeze(-1).cpu()
        if not running.any():
            return total, length, bad
        tensordict = env.maybe_reset(env.step_mdp(tensordict))


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

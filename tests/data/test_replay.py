"""The ring of transitions."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from genpol.data.replay import Replay


def rollout(start: int, num_envs: int = 2, time: int = 3) -> TensorDict:
    """Number the steps in the order in which they happen."""
    step = torch.arange(start, start + num_envs * time).float().view(time, num_envs).T
    flag = torch.zeros(num_envs, time, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": step.unsqueeze(-1),
            "action": -step.unsqueeze(-1),
            "latent": step.unsqueeze(-1),
            "next": {
                "observation": step.unsqueeze(-1) + 0.5,
                "reward": 10 * step.unsqueeze(-1),
                "terminated": step.unsqueeze(-1) % 2 == 0,
                "done": flag.clone(),
                "diverged": flag.clone(),
            },
        },
        [num_envs, time],
    )


def held(replay: Replay) -> list[float]:
    return sorted(replay.rows(*replay.span)["observation"].flatten().tolist())


def test_transitions_stay_whole() -> None:
    replay = Replay(100, seed=0)
    replay.extend(rollout(0))
    rows = replay.sample(64)
    step = rows["observation"]
    assert torch.equal(rows["action"], -step)
    assert torch.equal(rows["next", "observation"], step + 0.5)
    assert torch.equal(rows["next", "reward"], 10 * step)
    assert torch.equal(rows["next", "terminated"], step % 2 == 0)
    assert len(step.unique()) == 6


def test_the_oldest_steps_are_overwritten() -> None:
    replay = Replay(8, seed=0)
    for start in (0, 6, 12):
        replay.extend(rollout(start))
    assert len(replay) == 8
    assert held(replay) == [10, 11, 12, 13, 14, 15, 16, 17]


def test_diverged_steps_are_left_out() -> None:
    replay = Replay(100, seed=0)
    bad = rollout(0)
    bad["next", "diverged"][1, 2] = True  # step 5
    replay.extend(bad)
    assert held(replay) == [0, 1, 2, 3, 4]
    bad["next", "diverged"][:] = True
    replay.extend(bad)
    assert len(replay) == 5


@pytest.mark.parametrize("rollouts", [0, 1, 3])
def test_it_continues_bit_for_bit(rollouts: int) -> None:
    replay = Replay(8, seed=0)
    for index in range(rollouts):
        replay.extend(rollout(6 * index))
    if rollouts:
        replay.sample(3)
    other = Replay(8, seed=1)
    other.restore(replay.rows(*replay.span) if rollouts else {}, replay.position())
    for each in (replay, other):
        each.extend(rollout(100, num_envs=1))
    assert held(other) == held(replay)
    assert torch.equal(other.sample(32)["observation"], replay.sample(32)["observation"])

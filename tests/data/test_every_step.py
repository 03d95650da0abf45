"""Windows of which every transition is told, from data and from what was collected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from genpol.data.dataset import OfflineDataset
from genpol.data.goals import GoalSettings
from genpol.data.sequences import SequenceReplay
from genpol.data.windows import WindowSampler, WindowSpec
from genpol.errors import ConfigError

SPEC = WindowSpec(steps=3, gamma=0.5, every_step=True)


def walk(first, length, *, terminated=False):
    """Return a trajectory whose observations and rewards are the time."""
    time = np.arange(first, first + length + 1, dtype=np.float32)
    return {
        "observation": time[:, None],
        "action": time[:-1, None] / 1000,
        "reward": time[:-1],
        "terminated": np.arange(length) == (length - 1 if terminated else -1),
    }


def collected():
    """Return a replay of one environment whose episodes are those of :func:`data`."""
    replay = SequenceReplay(SPEC, capacity=50, num_envs=1, seed=0)
    for first, length, terminated in ((0, 4, True), (10, 5, False)):
        parts = walk(first, length, terminated=terminated)
        state = torch.from_numpy(parts["observation"])[None]
        ends = torch.from_numpy(parts["terminated"])[None, :, None]
        last = (torch.arange(length) == length - 1)[None, :, None]
        after = {
            "observation": state[:, 1:],
            "reward": torch.from_numpy(parts["reward"])[None, :, None],
            "terminated": ends,
            "done": last,
            "diverged": torch.zeros(1, length, 1, dtype=torch.bool),
        }
        fields = {
            "observation": state[:, :-1],
            "action": torch.from_numpy(parts["action"])[None],
            "is_init": torch.zeros(1, length, 1, dtype=torch.bool),
            "next": TensorDict(after, [1, length]),
        }
        replay.extend(TensorDict(fields, [1, length]))
    return replay


def data():
    return OfflineDataset.from_trajectories([walk(0, 4, terminated=True), walk(10, 5)])


def windows(source):
    """Return all windows by the time of their start."""
    if source == "replay":
        replay = collected()
        batch = replay._at(torch.arange(replay.num_starts))
    else:
        sampler = WindowSampler(data(), SPEC, seed=0)
        batch = sampler.at(torch.arange(sampler.num_starts))
    return {int(row["observation"]): row for row in batch}


@pytest.mark.parametrize("source", ["data", "replay"])
def test_a_whole_window_tells_every_state_and_reward(source):
    row = windows(source)[11]
    assert row["observations"].flatten().tolist() == [11.0, 12.0, 13.0, 14.0]
    assert row["rewards"].tolist() == [11.0, 12.0, 13.0]
    assert row["valid"].all()
    assert not row["terminated"].any()
    assert row["reward"] == 11 + 6 + 13 / 4


@pytest.mark.parametrize("source", ["data", "replay"])
def test_a_window_ends_with_its_episode_whose_last_state_is_told(source):
    row = windows(source)[2]
    assert row["valid"].tolist() == [True, True, False]
    assert row["observations"].flatten().tolist()[:3] == [2.0, 3.0, 4.0]
    assert row["rewards"].tolist()[:2] == [2.0, 3.0]
    assert row["terminated"].tolist()[:2] == [False, True]


def test_both_sources_tell_the_same():
    a, b = windows("data"), windows("replay")
    assert a[0].keys() == b[0].keys()
    for start in b:
        for name in ("observations", "rewards", "terminated", "action"):
            counts = a[start]["valid"]
            assert counts.equal(b[start]["valid"])
            one, other = (x[start][name] for x in (a, b))
            if name == "observations":
                counts = torch.cat((torch.tensor([True]), counts))
            assert one[counts].equal(other[counts])


def test_it_goes_without_goals_and_not_without_rewards():
    for options in ({"rewards": False}, {"goals": GoalSettings(), "edges": "whole"}):
        with pytest.raises(ConfigError, match="every_step needs the rewards"):
            WindowSpec(steps=3, every_step=True, **options)

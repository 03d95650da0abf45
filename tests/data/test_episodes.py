"""The tracker reports the returns of whole episodes, wherever batches are cut."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from genpol.data.episodes import EpisodeTracker


def batch(reward, done, diverged=None):
    """Return a batch from rows ``[num_envs, time]``."""
    reward = torch.tensor(reward, dtype=torch.float32)
    done = torch.tensor(done, dtype=torch.bool)
    diverged = torch.zeros_like(done) if diverged is None else torch.tensor(diverged).bool()
    fields = {"reward": reward, "done": done, "diverged": diverged}
    after = {name: value.unsqueeze(-1) for name, value in fields.items()}
    return TensorDict({"next": TensorDict(after, reward.shape)}, reward.shape)


@pytest.fixture
def tracker():
    """Return a tracker of two environments whose first episodes are over."""
    made = EpisodeTracker(2)
    made.update(batch([[7], [7]], [[1], [1]]))
    return made


def test_the_first_episode_of_every_environment_is_not_reported():
    tracker = EpisodeTracker(2)
    assert tracker.update(batch([[1, 2], [4, 8]], [[0, 1], [0, 0]])).returns.tolist() == []
    # The second of environment 0 and the first of environment 1.
    assert tracker.update(batch([[1, 2], [4, 8]], [[0, 1], [0, 1]])).returns.tolist() == [3]
    assert tracker.update(batch([[1, 2], [4, 8]], [[0, 0], [0, 1]])).returns.tolist() == [12]


def test_the_first_episode_is_left_out_of_the_next_return():
    tracker = EpisodeTracker(1)
    assert tracker.update(batch([[100, 1, 2]], [[1, 0, 1]])).returns.tolist() == [3]


def test_an_end_in_the_first_batch_makes_no_other_environment_whole():
    tracker = EpisodeTracker(2)
    assert tracker.update(batch([[1, 1], [5, 5]], [[1, 0], [0, 1]])).returns.tolist() == []


def test_a_return_is_the_sum_of_its_own_rewards(tracker):
    returns = tracker.update(batch([[1, 2, 4], [8, 16, 32]], [[0, 0, 1], [0, 0, 1]])).returns
    assert sorted(returns.tolist()) == [7, 56]
    assert returns.dtype == torch.float64


def test_an_episode_may_span_batches(tracker):
    assert tracker.update(batch([[1, 2], [0, 0]], [[0, 0], [0, 0]])).returns.tolist() == []
    assert tracker.update(batch([[4, 8], [0, 0]], [[0, 0], [0, 0]])).returns.tolist() == []
    assert tracker.update(batch([[16, 32], [0, 0]], [[1, 0], [0, 0]])).returns.tolist() == [31]


def test_two_ends_in_one_batch_are_two_episodes(tracker):
    assert tracker.update(batch([[1, 2, 4], [0] * 3], [[0, 1, 1], [0] * 3])).returns.tolist() == [
        3,
        4,
    ]


def test_what_follows_an_end_belongs_to_the_next_episode(tracker):
    assert tracker.update(batch([[1, 2], [0, 0]], [[1, 0], [0, 0]])).returns.tolist() == [1]
    assert tracker.update(batch([[4], [0]], [[1], [0]])).returns.tolist() == [6]


def test_a_diverged_episode_is_not_reported(tracker):
    ends = [[0, 1], [0, 1]]
    assert tracker.update(batch([[1, 2], [4, 8]], ends, [[0, 1], [0, 0]])).returns.tolist() == [12]


def test_the_episode_after_a_diverged_one_is_whole_and_starts_at_zero(tracker):
    rewards, ends, diverged = [[50, 0, 3], [0] * 3], [[0, 1, 1], [0] * 3], [[0, 1, 0], [0] * 3]
    assert tracker.update(batch(rewards, ends, diverged)).returns.tolist() == [3]


def test_a_first_episode_may_end_by_divergence():
    tracker = EpisodeTracker(1)
    assert tracker.update(batch([[9, 1, 2]], [[1, 0, 1]], [[1, 0, 0]])).returns.tolist() == [3]


def test_long_sums_lose_nothing(tracker):
    tracker.update(batch([[2.0**24], [0]], [[0], [0]]))
    for _ in range(3):  # each would vanish in single precision
        tracker.update(batch([[1.0], [0]], [[0], [0]]))
    assert tracker.update(batch([[1.0], [0]], [[1], [0]])).returns.tolist() == [2.0**24 + 4]


def test_a_restored_tracker_goes_on_as_the_saved_one():
    tracker = EpisodeTracker(3)
    tracker.update(batch([[7, 1], [7, 2], [7, 4]], [[1, 0], [1, 0], [0, 0]]))
    restored = EpisodeTracker(3)
    restored.update(batch([[90], [90], [90]], [[0], [0], [1]]))  # forgotten
    restored.load_state(tracker.state())
    following = batch([[8, 16], [32, 64], [128, 0]], [[0, 1], [1, 0], [1, 0]])
    expected = [34, 25]  # in the order of their ends; the third is a first episode
    for each in (restored, tracker):
        assert each.update(following).returns.tolist() == expected


def test_a_saved_state_does_not_change_afterwards(tracker):
    tracker.update(batch([[1], [2]], [[0], [0]]))
    state = tracker.state()
    tracker.update(batch([[5], [5]], [[0], [1]]))
    assert state["return"].flatten().tolist() == [1, 2]
    fresh = EpisodeTracker(2)
    untouched = fresh.state()
    fresh.update(batch([[0], [0]], [[1], [1]]))
    assert untouched["whole"].tolist() == [False, False]


def test_a_loaded_state_is_not_shared(tracker):
    state = tracker.state()
    other = EpisodeTracker(2)
    other.load_state(state)
    other.update(batch([[5], [5]], [[0], [1]]))
    assert state["return"].flatten().tolist() == [0, 0]


def test_each_reward_term_has_a_return_of_its_own():
    tracker = EpisodeTracker(1, num_rewards=2)
    first = batch([[0, 0]], [[1, 0]])
    first["next", "reward"] = torch.tensor([[[9.0, 9.0], [1.0, 10.0]]])
    second = batch([[0, 0]], [[1, 0]])
    second["next", "reward"] = torch.tensor([[[2.0, 20.0], [4.0, 40.0]]])
    tracker.update(first)
    finished = tracker.update(second)
    assert finished.terms.tolist() == [[3.0, 30.0]]
    assert finished.returns.tolist() == [33.0]


def test_each_step_knows_the_return_of_the_episode_it_belongs_to(tracker):
    tracker.update(batch([[1], [5]], [[0], [0]]))
    finished = tracker.update(batch([[2, 4, 8], [1, 1, 1]], [[0, 1, 0], [0, 0, 0]]))
    assert finished.of_step[0, :2].tolist() == [7, 7]
    assert finished.of_step[0, 2].isnan()
    assert finished.of_step[1].isnan().all()

"""Replays on disk: what each checkpoint adds, what it needs, and what happens when that is gone."""

from __future__ import annotations

import shutil

import pytest
import torch
from tensordict import TensorDict

from genpol.data.replay import Replay
from genpol.errors import CheckpointError
from genpol.training import checkpoint
from genpol.training.replay_store import ReplayStore

CAPACITY = 8


def rollout(first, number):
    step = torch.arange(first, first + number).float().view(1, number, 1)
    flag = torch.zeros(1, number, 1, dtype=torch.bool)
    after = {"observation": step + 1, "reward": step, "terminated": flag, "diverged": flag}
    return TensorDict({"observation": step, "action": step, "next": after}, [1, number])


def filled(number, seed=0):
    replay = Replay(CAPACITY, seed=seed)
    for first in range(0, number, 2):
        replay.extend(rollout(first, min(2, number - first)))
    return replay


def names(store):
    return sorted(path.name for path in store.folder.glob("*"))


def observations(replay):
    return replay.rows(*replay.span)["observation"].flatten().tolist()


def loaded(store, state):
    replay = Replay(CAPACITY, seed=5)
    ReplayStore(store.folder).load(replay, state, store.folder.parent / "step-1")
    return replay


def test_each_save_writes_only_what_is_new(tmp_path):
    store, replay = ReplayStore(tmp_path / "replay"), filled(3)
    store.save(replay)
    replay.extend(rollout(3, 2))
    state = store.save(replay)
    assert names(store) == ["rows-000000000000-000000000003", "rows-000000000003-000000000005"]
    again = store.save(replay)
    assert len(names(store)) == 2
    assert again["segments"] == state["segments"]
    found = loaded(store, state)
    assert observations(found) == [0, 1, 2, 3, 4]
    assert (found.sample(30) == replay.sample(30)).all()


def test_an_empty_replay_has_no_segment(tmp_path):
    store = ReplayStore(tmp_path / "replay")
    state = store.save(Replay(CAPACITY, seed=0))
    assert not store.folder.exists()
    assert len(loaded(store, state)) == 0


def test_a_replay_that_runs_over_needs_only_what_it_still_holds(tmp_path):
    store, replay = ReplayStore(tmp_path / "replay"), filled(6)
    store.save(replay)
    replay.extend(rollout(6, 7))
    state = store.save(replay)
    assert [segment["first"] for segment in state["segments"]] == [0, 6]
    found = loaded(store, state)
    assert observations(found) == [5, 6, 7, 8, 9, 10, 11, 12]
    assert (found.sample(30) == replay.sample(30)).all()
    replay.extend(rollout(13, 2))
    assert [segment["first"] for segment in store.save(replay)["segments"]] == [6, 13]
    store.prune(5)
    assert len(names(store)) == 3, "another checkpoint may need the first"
    store.prune(6)
    assert [name[:17] for name in names(store)] == ["rows-000000000006", "rows-000000000013"]


def test_more_new_rows_than_are_held_are_no_gap(tmp_path):
    store, replay = ReplayStore(tmp_path / "replay"), filled(2)
    store.save(replay)
    for first in range(2, 30, 2):
        replay.extend(rollout(first, 2))
    state = store.save(replay)
    assert [segment["first"] for segment in state["segments"]] == [22]
    assert observations(loaded(store, state)) == [22, 23, 24, 25, 26, 27, 28, 29]


def test_going_back_forgets_what_was_saved_later(tmp_path):
    store, replay = ReplayStore(tmp_path / "replay"), filled(3)
    early = store.save(replay)
    replay.extend(rollout(3, 2))
    store.save(replay)
    back, second = Replay(CAPACITY, seed=0), ReplayStore(store.folder)
    second.load(back, early, tmp_path / "step-1")
    assert names(store) == ["rows-000000000000-000000000003"]
    back.extend(rollout(50, 2))
    state = second.save(back)
    assert observations(loaded(store, state)) == [0, 1, 2, 50, 51]


def test_a_missing_segment_is_named(tmp_path):
    store = ReplayStore(tmp_path / "replay")
    state = store.save(filled(3))
    shutil.rmtree(store.folder)
    with pytest.raises(CheckpointError, match=r"rows-0+-0+3.*step-1 needs it for its replay"):
        loaded(store, state)


def test_a_segment_of_another_run_is_refused(tmp_path):
    store = ReplayStore(tmp_path / "replay")
    state = store.save(filled(3))
    other = ReplayStore(tmp_path / "other")
    replay = Replay(CAPACITY, seed=0)
    replay.extend(rollout(70, 3))
    other.save(replay)
    shutil.rmtree(store.folder)
    shutil.copytree(other.folder, store.folder)
    with pytest.raises(CheckpointError, match="is not what was written with"):
        loaded(store, state)


def test_a_damaged_segment_is_refused(tmp_path):
    store = ReplayStore(tmp_path / "replay")
    state = store.save(filled(3))
    file = store.folder / names(store)[0] / checkpoint.TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        loaded(store, state)

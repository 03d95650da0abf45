"""Windows over what was collected, alone and beside a data set."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from genpol.data.dataset import OfflineDataset
from genpol.data.goals import GoalSettings
from genpol.data.sequences import SequenceReplay
from genpol.data.windows import WindowSampler, WindowSpec
from genpol.errors import ConfigError

ENVS = 2


def rollout(first, steps, *, done=(), terminated=(), diverged=(), begins=(), success=None):
    """Return steps whose observations are their time, plus a hundred for each environment."""
    time = torch.arange(first, first + steps).float().expand(ENVS, steps)
    state = (time + 100 * torch.arange(ENVS)[:, None]).unsqueeze(-1)

    def flags(places):
        flag = torch.zeros(ENVS, steps, 1, dtype=torch.bool)
        for env, at in places:
            flag[env, at - first] = True
        return flag

    after = {
        "observation": state + 1,
        "reward": torch.ones(ENVS, steps, 1),
        "terminated": flags(terminated),
        "done": flags([*done, *terminated, *diverged]),
        "diverged": flags(diverged),
        **({} if success is None else {"success": flags(success)}),
    }
    fields = {
        "observation": state,
        "action": state / 1000,
        "achieved_goal": state,
        "is_init": flags(begins),
        "next": TensorDict(after, [ENVS, steps]),
    }
    return TensorDict(fields, [ENVS, steps])


def replay(steps=3, capacity=40, gamma=0.5, **options):
    return SequenceReplay(
        WindowSpec(steps=steps, gamma=gamma), capacity=capacity, num_envs=ENVS, seed=0, **options
    )


def copy_of(buffer, **options):
    other = replay(**options)
    other.restore(buffer.rows(*buffer.span), buffer.position())
    return other


def all_windows(buffer):
    batch = buffer._at(torch.arange(buffer.num_starts))
    return {int(batch["observation"][i].item()): batch[i] for i in range(len(batch))}


def test_windows_run_along_one_environment_over_the_seams_of_rollouts():
    buffer = replay()
    buffer.extend(rollout(0, 4))
    buffer.extend(rollout(4, 3))
    found = all_windows(buffer)
    assert sorted(found) == [*range(5), *range(100, 105)]
    window = found[102]
    torch.testing.assert_close(window["action"].squeeze(-1), torch.tensor([0.102, 0.103, 0.104]))
    assert window["next", "observation"].item() == 105
    assert window["reward"].item() == 1.75
    assert window["discount"].item() == 0.125
    assert window["weight"].item() == 1.0


@pytest.mark.parametrize(("kind", "discount"), [("done", 0.25), ("terminated", 0.0)])
def test_windows_end_with_their_episode(kind, discount):
    buffer = replay()
    buffer.extend(rollout(0, 8, **{kind: [(0, 3)]}))
    window = all_windows(buffer)[2]
    assert window["valid"].tolist() == [True, True, False]
    assert window["weight"].item() == 0.0
    assert window["next", "observation"].item() == 4
    assert window["reward"].item() == 1.5
    assert window["discount"].item() == discount


def test_a_step_that_diverged_is_not_valid():
    buffer = replay()
    buffer.extend(rollout(0, 8, diverged=[(1, 3)]))
    found = all_windows(buffer)
    assert found[101]["valid"].tolist() == [True, True, False]
    assert found[101]["next", "observation"].item() == 103
    assert not found[103]["valid"].any()
    assert found[103]["reward"].item() == 0.0


def test_old_steps_are_overwritten():
    buffer = replay(capacity=10)
    for first in range(0, 12, 3):
        buffer.extend(rollout(first, 3))
    assert len(buffer) == 10
    assert sorted(all_windows(buffer)) == [7, 8, 9, 107, 108, 109]
    buffer.extend(rollout(12, 30))  # longer than the buffer
    assert sorted(all_windows(buffer)) == [37, 38, 39, 137, 138, 139]


def dataset(length):
    trajectory = {
        "observation": -1.0 - torch.arange(length + 1).float()[:, None].numpy(),
        "action": torch.zeros(length, 1).numpy(),
        "reward": torch.zeros(length).numpy(),
        "terminated": torch.zeros(length, dtype=torch.bool).numpy(),
    }
    return OfflineDataset.from_trajectories([trajectory])


def test_offline_and_collected_windows_are_equally_likely():
    spec = WindowSpec(steps=3, gamma=0.5)
    buffer = replay(offline=WindowSampler(dataset(30), spec, seed=1))
    before = buffer.sample(1000)["observation"]
    assert (before < 0).all()
    buffer.extend(rollout(0, 7))  # 10 windows beside 30
    batch = buffer.sample(40_000)
    share = (batch["observation"] >= 0).double().mean().item()
    assert share == pytest.approx(0.25, abs=0.01)
    assert set(batch.keys()) == set(buffer._offline.sample(1).keys())


def test_a_fixed_share_of_a_batch_comes_from_the_data():
    spec = WindowSpec(steps=3, gamma=0.5)
    offline = WindowSampler(dataset(30), spec, seed=1)
    buffer = replay(offline=offline, offline_share=0.25)
    assert (buffer.sample(8)["observation"] < 0).all()
    buffer.extend(rollout(0, 7))
    batch = buffer.sample(8)
    assert (batch["observation"] < 0).flatten().tolist() == [True] * 2 + [False] * 6
    starts = torch.cat([buffer.sample(64)["observation"][16:] for _ in range(20)])
    assert len(starts.unique()) == 10  # every collected window


def test_a_saved_buffer_goes_on_with_the_same_windows():
    first = replay(capacity=10)
    for start in (0, 4):
        first.extend(rollout(start, 4))
    first.sample(3)
    second = replay(capacity=10)
    second.restore(first.rows(*first.span), first.position())
    for buffer in (first, second):
        buffer.extend(rollout(8, 3))
    a, b = first.sample(50), second.sample(50)
    assert all(torch.equal(a[key], b[key]) for key in a.keys(True, True))


def test_a_buffer_too_small_for_a_window_is_refused():
    with pytest.raises(ConfigError, match="replay_capacity = 5: must hold 3 steps of 2 env"):
        SequenceReplay(WindowSpec(steps=3), capacity=5, num_envs=ENVS, seed=0)


def test_windows_do_not_run_on_into_an_episode_that_a_resumption_began():
    buffer = replay()
    buffer.extend(rollout(0, 4))
    buffer.extend(rollout(4, 4, begins=[(1, 4)]))  # the simulation of environment 1 was lost
    found = all_windows(buffer)
    assert found[2]["valid"].all()
    assert found[102]["valid"].tolist() == [True, True, False]
    assert found[102]["next", "observation"].item() == 104
    assert found[102]["discount"].item() == 0.25  # cut, not terminated


# --- goals -------------------------------------------------------------------------------------


def goal_replay(goals, *, steps=2, capacity=40, length=12, gamma=0.5):
    """Return a buffer beside a data set whose states are negative, and are their own goals."""
    spec = WindowSpec(steps=steps, gamma=gamma, edges="whole", goals=goals)
    data = dataset(length)
    data = OfflineDataset({**data.columns, "goal": data.columns["observation"]}, data.ends, {})
    windows = WindowSampler(data, spec, seed=1)
    return SequenceReplay(spec, capacity=capacity, num_envs=ENVS, seed=0, offline=windows)


def test_future_goals_are_what_the_same_episode_achieved_later_on():
    buffer = goal_replay(GoalSettings(current=0.0, future=1.0, random=0.0))
    buffer.extend(rollout(0, 7, done=[(0, 4)]))
    buffer.extend(rollout(7, 6))
    batch = buffer.sample(20_000)
    own = batch[batch["observation"].squeeze(-1) >= 0]
    state, goal = (own[name].squeeze(-1) for name in ("observation", "goal"))
    # More than two steps of the episode are left where a window begins.
    starts = {*range(3), *range(5, 11), *range(100, 111)}
    assert set(state.int().tolist()) == starts
    last = torch.where(state < 5, 4.0, torch.where(state < 100, 12.0, 112.0))
    assert ((goal > state) & (goal <= last)).all()
    distance = goal - state
    near = distance < 2
    torch.testing.assert_close(own["reward"], torch.where(near, 0.5**distance, 0.0))
    torch.testing.assert_close(own["discount"], torch.where(near, 0.0, 0.25))
    following = own["next", "observation"].squeeze(-1)
    torch.testing.assert_close(following, state + torch.where(near, distance, 2.0))


def test_random_goals_come_from_the_data_and_from_what_was_collected():
    buffer = goal_replay(GoalSettings(current=0.0, future=0.0, random=1.0), length=21)
    offline = buffer._offline.num_starts
    buffer.extend(rollout(0, 12))  # ten starts each
    batch = buffer.sample(60_000)
    state, goal = (batch[name].squeeze(-1) for name in ("observation", "goal"))
    share = 20 / (20 + offline)
    for mine in (state < 0, state >= 0):
        assert (goal[mine] >= 0).double().mean().item() == pytest.approx(share, abs=0.02)
    # Only states of the same trajectory, ahead and near enough, are reached.
    distance = torch.where(state < 0, state - goal, goal - state)
    reached = ((state < 0) == (goal < 0)) & (distance >= 0) & (distance < 2)
    torch.testing.assert_close(batch["reward"], torch.where(reached, 0.5**distance, 0.0))
    assert reached.any()
    assert "elsewhere" not in batch.keys()  # noqa: SIM118 - a TensorDict


def test_windows_with_goals_go_on_after_old_steps_are_overwritten():
    buffer = goal_replay(GoalSettings(current=0.0, future=1.0, random=0.0), capacity=10)
    for first in range(0, 24, 4):
        buffer.extend(rollout(first, 4, done=[(0, first + 1)] if first == 20 else ()))
    batch = buffer.sample(2000)
    own = batch["observation"].squeeze(-1)
    assert set(own[own >= 0].int().tolist()) == {19, 119, 120, 121}
    batch.set("end", torch.where(batch["observation"] < 100, 21.0, 123.0))
    mine = own >= 0
    assert (batch["goal"] <= batch["end"])[mine].all()


def test_a_saved_buffer_with_goals_goes_on_with_the_same_windows():
    goals = GoalSettings()
    first, second = goal_replay(goals), goal_replay(goals)
    first.extend(rollout(0, 8, done=[(1, 5)]))
    second.restore(first.rows(*first.span), first.position())
    second._offline.load_state(first._offline.state())
    for buffer in (first, second):
        buffer.extend(rollout(8, 4))
    a, b = first.sample(50), second.sample(50)
    assert all(torch.equal(a[key], b[key]) for key in a.keys(True, True))


# --- successes ---------------------------------------------------------------------------------


def successful_starts(buffer):
    batch = buffer._at(buffer._successful())
    return sorted(batch["observation"].squeeze(-1).int().tolist())


def test_windows_of_success_begin_in_episodes_that_ended_well():
    buffer = replay(steps=2, successes=3)
    # Environment 0: solved at 3, not at 7; environment 1: solved for a while at 102, lost at 104.
    buffer.extend(rollout(0, 5, terminated=[(0, 3)], done=[(1, 4)], success=[(0, 3), (1, 2)]))
    buffer.extend(rollout(5, 5, done=[(0, 7)], success=[]))
    assert successful_starts(buffer) == [0, 1, 2, 3]
    assert buffer.num_successful == 4
    drawn = torch.cat([buffer.sample(5) for _ in range(50)])
    assert len(drawn) == 50 * 8
    batch = drawn[drawn["successful"]]
    assert len(batch) == 50 * 3
    assert set(batch["observation"].squeeze(-1).int().tolist()) == {0, 1, 2, 3}
    anywhere = drawn[~drawn["successful"]]["observation"].squeeze(-1)
    assert (anywhere > 3).any()
    last = batch["observation"].squeeze(-1) == 3
    assert not batch["valid"][last, 1].any(), "a window ends with its episode"
    assert batch["valid"][~last].all()


def test_an_episode_under_way_is_no_success_and_one_that_spans_rollouts_is():
    buffer = replay(steps=1, successes=3)
    buffer.extend(rollout(0, 3, success=[(0, 2)]))
    assert buffer.num_successful == 0
    buffer.extend(rollout(3, 2, terminated=[(0, 4)], success=[(0, 4)]))
    assert successful_starts(buffer) == [0, 1, 2, 3, 4]


def test_overwritten_successes_are_forgotten():
    buffer = replay(steps=1, capacity=6 * ENVS, successes=3)
    buffer.extend(rollout(0, 4, terminated=[(0, 3)], success=[(0, 3)]))
    buffer.extend(rollout(4, 4, success=[]))
    assert successful_starts(buffer) == [2, 3]
    buffer.extend(rollout(8, 4, success=[]))
    assert buffer.num_successful == 0
    assert buffer.sample(5)["successful"].tolist() == [False] * 5


def test_successes_survive_a_checkpoint():
    buffer = replay(steps=2, successes=3)
    buffer.extend(rollout(0, 6, terminated=[(1, 3)], success=[(1, 3)]))
    other = replay(steps=2, successes=3)
    other.restore(buffer.rows(*buffer.span), buffer.position())
    assert successful_starts(other) == successful_starts(buffer) == [100, 101, 102, 103]
    first, second = buffer.sample(20), other.sample(20)
    assert len(first) == 23
    assert torch.equal(first["action"], second["action"])


def test_windows_of_success_wait_until_there_are_enough():
    buffer = replay(steps=1, successes=5)
    buffer.extend(rollout(0, 4, terminated=[(0, 3)], success=[(0, 3)]))
    assert buffer.num_successful == 4
    assert len(buffer.sample(6)) == 6
    buffer.extend(rollout(4, 1, terminated=[(0, 4)], success=[(0, 4)]))
    assert len(buffer.sample(6)) == 11


def test_goals_and_successes_exclude_each_other():
    spec = WindowSpec(steps=2, edges="whole", goals=GoalSettings())
    with pytest.raises(ConfigError, match="goals"):
        SequenceReplay(spec, capacity=40, num_envs=ENVS, seed=0, successes=3)


# --- what a checkpoint holds -------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 9, 30])
def test_a_restored_replay_draws_what_the_first_would_have(steps):
    """Not yet full, just full, and long since overwritten; with a cut episode among the others."""
    options = {"steps": 2, "capacity": 10 * ENVS, "successes": 2}
    buffer = replay(**options)
    for first in range(0, steps, 3):
        number = min(3, steps - first)
        ends = [(0, first)] if first % 2 else []
        begins = [(1, first)] if first in (3, 27) else []
        buffer.extend(rollout(first, number, terminated=ends, begins=begins, success=ends))
    other = copy_of(buffer, **options)
    for _ in range(3):
        first, second = buffer.sample(20), other.sample(20)
        assert (first == second).all()
    more = rollout(steps, 4, terminated=[(0, steps + 1)], success=[(0, steps + 1)])
    for each in (buffer, other):
        each.extend(more)
    assert torch.equal(buffer._ends, other._ends)
    assert torch.equal(buffer._won, other._won)
    assert (buffer.sample(20) == other.sample(20)).all()


def test_an_episode_that_was_cut_stays_cut():
    buffer = replay(steps=2)
    buffer.extend(rollout(0, 4))
    written = buffer.rows(0, 4)  # as a checkpoint has it, before the cut is known
    buffer.extend(rollout(4, 3, begins=[(0, 4)]))
    later = buffer.rows(4, 7)
    other = replay(steps=2)
    rows = {name: torch.cat((x, later[name])) for name, x in written.items()}
    other.restore(rows, buffer.position())
    assert all_windows(other)[3]["valid"].tolist() == [True, False]
    assert all_windows(other)[103]["valid"].tolist() == [True, True]

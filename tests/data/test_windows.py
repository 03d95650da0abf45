"""Windows against a slow reference, and the goals that are drawn for them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.data.dataset import OfflineDataset
from genpol.data.goals import GoalSettings, draw_goals, relabel
from genpol.data.windows import WindowSampler, WindowSpec, training_trajectories
from genpol.errors import ConfigError, DatasetError


def dataset(lengths, *, terminated=(), seed=0):
    """Return trajectories whose observations are their own row numbers."""
    generator = torch.Generator().manual_seed(seed)
    trajectories, row = [], 0
    for number, length in enumerate(lengths):
        ends = torch.zeros(length, dtype=torch.bool)
        for trajectory, step in terminated:
            if trajectory == number:
                ends[step] = True
        state = torch.arange(row, row + length + 1).float()[:, None]
        trajectories.append(
            {
                "observation": state.numpy(),
                "action": (2 * torch.rand(length, 2, generator=generator) - 1).numpy(),
                "reward": torch.randn(length, generator=generator).numpy(),
                "terminated": ends.numpy(),
                "goal": -state.numpy(),
            }
        )
        row += length + 1
    return OfflineDataset.from_trajectories(trajectories)


def reference(data, row, steps, gamma):
    """Return one window by walking along its trajectory."""
    end = int(data.ends[data.ends > row].min() if (data.ends > row).any() else data.ends[-1])
    total, discount, valid, at = 0.0, 1.0, [], row
    for k in range(steps):
        valid.append(at < end)
        if at < end:
            total += gamma**k * float(data.columns["reward"][at])
            discount *= 0.0 if data.columns["terminated"][at] else gamma
            at += 1
    return total, discount, valid, at


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    steps=st.integers(1, 5),
    gamma=st.sampled_from([1.0, 0.9]),
    data=st.data(),
)
def test_windows_equal_a_walk_along_the_trajectory(lengths, steps, gamma, data):
    ends = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=3))
    ends = [(i, t) for i, t in ends if i < len(lengths) and t < lengths[i]]
    offline = dataset(lengths, terminated=ends)
    sampler = WindowSampler(offline, WindowSpec(steps=steps, gamma=gamma), seed=0)
    batch = sampler.at(torch.arange(sampler.num_starts))
    rows = [int(x) for x in batch["observation"].squeeze(-1)]
    assert rows == offline.transition_row(range(offline.num_transitions)).tolist()
    for index, row in enumerate(rows):
        total, discount, valid, at = reference(offline, row, steps, gamma)
        window = batch[index]
        assert window["reward"].item() == pytest.approx(total, abs=1e-5)
        assert window["discount"].item() == pytest.approx(discount, abs=1e-6)
        assert window["valid"].tolist() == valid
        assert window["weight"].item() == float(valid[-1])
        assert window["next", "observation"].item() == at
        for k in range(sum(valid)):
            expected = torch.from_numpy(offline.columns["action"][row + k])
            assert torch.equal(window["action"][k], expected)


def test_whole_windows_never_leave_their_trajectory_and_leave_out_the_last_state():
    data = dataset([1000, 30, 25])
    sampler = WindowSampler(data, WindowSpec(steps=25, edges="whole"), seed=0)
    assert sampler.num_starts == 975 + 5
    batch = sampler.at(torch.arange(sampler.num_starts))
    assert batch["valid"].all()
    starts = batch["observation"].squeeze(-1)
    assert starts[:975].tolist() == list(range(975))
    assert starts[975:].tolist() == [1001.0 + i for i in range(5)]
    assert (batch["next", "observation"].squeeze(-1) == starts + 25).all()


@pytest.mark.parametrize(
    ("number", "holdout", "kept"),
    [(40, 0.0, 40), (40, 0.05, 38), (3, 0.05, 2), (2, 0.5, 1), (1, 0.05, 1)],
)
def test_the_last_trajectories_are_held_out_but_never_the_only_one(number, holdout, kept):
    assert training_trajectories(number, holdout) == kept
    data = dataset([3] * number)
    spec = WindowSpec(steps=2, edges="whole", holdout=holdout)
    sampler = WindowSampler(data, spec, seed=0)
    assert sampler.num_starts == kept
    batch = sampler.at(torch.arange(kept))
    assert batch["observation"].squeeze(-1).tolist() == data.starts[:kept].tolist()
    assert batch["next", "observation"].max() <= data.ends[kept - 1]


def test_more_than_half_is_not_held_out():
    with pytest.raises(ConfigError, match=r"holdout = 0\.6: must lie in \[0\.0, 0\.5\]"):
        WindowSpec(holdout=0.6)


def test_draws_are_uniform_and_repeat_with_the_seed():
    data = dataset([3, 5, 2])
    draw = WindowSampler(data, WindowSpec(), seed=1).sample(60_000)["observation"].squeeze(-1)
    counts = torch.bincount(draw.long(), minlength=13)
    assert (counts[[3, 9, 12]] == 0).all()  # final states
    rest = counts[[0, 1, 2, 4, 5, 6, 7, 8, 10, 11]]
    assert ((rest - 6000).abs() < 5 * math.sqrt(6000)).all()
    again = WindowSampler(data, WindowSpec(), seed=1).sample(60_000)["observation"].squeeze(-1)
    assert torch.equal(draw, again)


def test_a_saved_sampler_goes_on_with_the_same_draws():
    first = WindowSampler(dataset([9, 9]), WindowSpec(), seed=1)
    first.sample(5)
    second = WindowSampler(dataset([9, 9]), WindowSpec(), seed=2)
    second.load_state(first.state())
    assert torch.equal(first.sample(50)["observation"], second.sample(50)["observation"])


def test_rewards_behind_a_terminated_transition_still_count():
    data = dataset([4], terminated=[(0, 1)])
    window = WindowSampler(data, WindowSpec(steps=3, gamma=1.0), seed=0).at(torch.tensor([0]))
    assert window["reward"].item() == pytest.approx(data.columns["reward"][:3].sum(), abs=1e-6)
    assert window["discount"].item() == 0.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (WindowSpec(steps=8, edges="whole"), "windows of 8 transitions need .* longest has 5"),
        (WindowSpec(goals=GoalSettings(), edges="whole"), "no column 'goal'"),
    ],
)
def test_data_that_do_not_serve_are_refused(spec, message):
    data = dataset([5, 3])
    columns = {name: x for name, x in data.columns.items() if name != "goal"}
    with pytest.raises(DatasetError, match=message):
        WindowSampler(OfflineDataset(columns, data.ends), spec, seed=0)


def test_goals_need_whole_windows():
    with pytest.raises(ConfigError, match="goals need edges=whole"):
        WindowSpec(goals=GoalSettings())


# --- goals -------------------------------------------------------------------------------------


def test_relabelling_gives_the_published_targets():
    rows = torch.zeros(4, dtype=torch.int64)
    goals = torch.tensor([0, 24, 25, -3])
    reward, discount, steps = relabel(rows, goals, steps=25, gamma=0.999, rule="reach")
    value = torch.tensor([7.0, 7.0, 1.0, 0.5])  # that of a reached goal is never asked for
    target = reward + discount * value
    assert target.tolist() == pytest.approx([1.0, 0.976274, 0.975298, 0.487649], abs=1e-6)
    assert steps.tolist() == [0, 24, 25, 25]


@pytest.mark.parametrize(("horizon", "sweeps"), [(1, 100), (5, 20), (25, 4)])
def test_a_table_of_a_long_chain_is_exact_after_the_published_number_of_sweeps(horizon, sweeps):
    """They carry the goal's own value, 1, back to the start; what that is takes one more."""
    length, gamma = 100, 0.99
    rows = torch.arange(length + 1)
    reward, discount, steps = relabel(
        rows, torch.full_like(rows, length), steps=horizon, gamma=gamma, rule="reach"
    )
    exact = gamma ** (length - rows)
    for known in (1.0, 0.0):
        value = torch.zeros(length + 1)
        value[length] = known
        needed = 0
        while (value - exact).abs().max() > 1e-5 and needed <= length + 1:
            value = reward + discount * value[rows + steps]
            needed += 1
        assert needed == sweeps + (known == 0.0)


@pytest.mark.parametrize(
    ("gamma", "expected"), [(0.9, [0.0, -1.9, -2.71]), (1.0, [0.0, -2.0, -3.0])]
)
def test_the_step_rule_counts_steps_until_the_goal(gamma, expected):
    goals = torch.tensor([0, 2, 7])
    reward, discount, _ = relabel(
        torch.zeros(3, dtype=torch.int64), goals, steps=3, gamma=gamma, rule="step"
    )
    assert reward.tolist() == pytest.approx(expected)
    assert discount.tolist() == pytest.approx([0.0, 0.0, gamma**3])


def test_goals_come_from_where_the_shares_say():
    number = 1_000_000
    rows = torch.full((number,), 10)
    anywhere = torch.full((number,), 500)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_goals(rows, torch.full((number,), 110), anywhere, GoalSettings(), generator)
    assert (drawn == 10).double().mean().item() == pytest.approx(0.2, abs=2e-3)
    assert (drawn == 500).double().mean().item() == pytest.approx(0.3, abs=2e-3)
    ahead = drawn[(drawn > 10) & (drawn <= 110)]
    assert len(ahead) / number == pytest.approx(0.5, abs=2e-3)
    share = torch.bincount(ahead, minlength=111)[11:].double() / len(ahead)
    assert share[1:-1].mean().item() == pytest.approx(1 / 99, rel=1e-2)
    for end in (share[0], share[-1]):  # rounding halves them
        assert end.item() == pytest.approx(0.5 / 99, rel=0.1)


def test_geometric_goals_have_their_mean_distance_and_end_with_the_trajectory():
    rows = torch.zeros(200_000, dtype=torch.int64)
    settings = GoalSettings(current=0, future=1, random=0, sampling="geometric", discount=0.8)
    generator = torch.Generator().manual_seed(0)
    far = draw_goals(rows, rows + 10_000, rows, settings, generator)
    assert far.min() == 1
    assert far.double().mean().item() == pytest.approx(5.0, abs=0.05)
    assert (far == 1).double().mean().item() == pytest.approx(0.2, abs=5e-3)
    near = draw_goals(rows, rows + 3, rows, settings, generator)
    assert near.max() == 3


def test_windows_with_goals_agree_with_their_rows():
    data = dataset([40, 30])
    spec = WindowSpec(steps=5, gamma=0.9, edges="whole", goals=GoalSettings())
    batch = WindowSampler(data, spec, seed=0).sample(2000)
    row, goal = batch["observation"].squeeze(-1), -batch["goal"].squeeze(-1)
    reached = (goal >= row) & (goal < row + 5)
    assert 0.2 < reached.double().mean().item() < 0.6
    power = 0.9 ** (goal - row)
    torch.testing.assert_close(batch["reward"], torch.where(reached, power, 0.0))
    expected = torch.where(reached, 0.0, 0.9**5)
    torch.testing.assert_close(batch["discount"], expected)
    end = torch.where(reached, goal, row + 5)
    assert torch.equal(batch["next", "observation"].squeeze(-1), end)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"current": 0.5}, r"add up to 1\.3: must be 1"),
        ({"sampling": "uniformly"}, r"agent\.goals\.sampling.*Did you mean 'uniform'"),
        ({"rule": "sparse"}, r"agent\.goals\.rule = 'sparse': must be one of"),
        ({"random": -0.3}, r"agent\.goals\.random = -0\.3: must lie in"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GoalSettings(**options)

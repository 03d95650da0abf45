"""Acting by search: plans are kept for each environment, and begin anew with its episodes."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol.objectives.plan_search import shifted
from genpol.world_model.acting import SearchPolicy
from genpol.world_model.planning import Planned


class Recorder:
    """Remembers where searches began, and finds plans of rising numbers."""

    def __init__(self):
        self.starts = []

    def search(self, observation, start, generator):
        self.starts.append(start)
        plan = torch.arange(float(start.numel())).view_as(start) + 100.0 * len(self.starts)
        one = torch.ones(len(start))
        return Planned(plan, plan[:, 0], -plan[:, 0], 3.0 * one, 0.5 * one)

    def hide(self, observation, action):
        return torch.where(observation > 0, action, 0.0)


def make():
    searcher = Recorder()
    policy = SearchPolicy(
        searcher, horizon=3, action_dim=2, generator=torch.Generator().manual_seed(0)
    )
    return searcher, policy


def step(policy, *begins, observation=None, kind=ExplorationType.DETERMINISTIC):
    seen = torch.ones(len(begins), 2) if observation is None else observation
    given = {"observation": seen, "is_init": torch.tensor(begins)[:, None]}
    with set_exploration_type(kind):
        return policy(TensorDict(given, [len(begins)]))["action"]


def test_searches_begin_where_the_last_plan_is_left():
    searcher, policy = make()
    step(policy, True, True)
    assert (searcher.starts[0] == 0).all()
    last = torch.arange(12.0).view(2, 3, 2) + 100.0
    step(policy, False, False)
    assert searcher.starts[1].equal(shifted(last))


def test_an_episode_begins_with_an_empty_plan_and_the_others_go_on():
    searcher, policy = make()
    step(policy, True, True)
    step(policy, False, True)
    assert (searcher.starts[1][0] != 0).any()
    assert (searcher.starts[1][1] == 0).all()


def test_exploring_takes_the_other_action():
    _, policy = make()
    assert (step(policy, True) >= 0).all()
    assert (step(policy, False, kind=ExplorationType.RANDOM) < 0).all()


def test_the_warm_up_is_uniform_hidden_and_only_where_it_explores():
    searcher, policy = make()
    policy.warming_up = True
    observation = torch.tensor([[1.0, -1.0]]).expand(1000, 2)
    actions = step(policy, *[True] * 1000, observation=observation, kind=ExplorationType.RANDOM)
    assert not searcher.starts
    assert (actions[:, 1] == 0).all()
    assert -1 <= actions[:, 0].min() < -0.95
    assert 0.95 < actions[:, 0].max() <= 1
    step(policy, True)
    assert len(searcher.starts) == 1


def test_an_evaluation_gives_back_what_was_planned():
    searcher, policy = make()
    step(policy, True, True)
    kept = policy.acting_state()
    policy.start(7)
    step(policy, True, True, True)
    assert policy.acting_state()["generator"].equal(torch.Generator().manual_seed(7).get_state())
    policy.load_acting_state(kept)
    step(policy, False, False)
    assert searcher.starts[-1].equal(shifted(torch.arange(12.0).view(2, 3, 2) + 100.0))


def test_it_tells_what_the_search_found():
    _, policy = make()
    step(policy, True, True)
    assert {k: float(x) for k, x in policy.statistics.items()} == {
        "plan/return": 3.0,
        "plan/spread": 0.5,
    }

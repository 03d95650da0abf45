"""Evaluation counts whole, valid episodes, as many of every environment, on fixed starts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, ExplorationType, exploration_type

from genpol import agents, envs
from genpol.agent import Specs
from genpol.envs import MujocoSettings
from genpol.errors import EnvironmentFault
from genpol.training.evaluation import evaluate, record, trajectories


class ScriptedEnv(EnvBase):
    """Environments that play ``[num_envs, steps]`` arrays after every full reset.

    The script runs on through resets of single environments, so that rows say what comes after an
    end as well; past its last column the last column repeats. The observation is the number drawn
    at the start of the episode.
    """

    batch_locked = True

    def __init__(self, reward, end, diverged=None):
        self.script = {
            "reward": torch.tensor(reward, dtype=torch.float32),
            "terminated": torch.tensor(end, dtype=torch.bool),
        }
        never = torch.zeros_like(self.script["terminated"])
        given = never if diverged is None else torch.tensor(diverged, dtype=torch.bool)
        self.script["diverged"] = given
        n = len(reward)
        super().__init__(device="cpu", batch_size=torch.Size([n]))
        flag = {"shape": (n, 1), "dtype": torch.bool}
        self.observation_spec = Composite(
            observation=Unbounded((n, 1)), diverged=Binary(1, **flag), shape=(n,)
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, 1))
        self.reward_spec = Unbounded((n, 1))
        self.full_done_spec = Composite(
            done=Binary(1, **flag),
            terminated=Binary(1, **flag),
            truncated=Binary(1, **flag),
            shape=(n,),
        )
        self.generator = torch.Generator().manual_seed(77)
        self.start = torch.zeros(n, 1)
        self.starts = []  # of every full reset
        self.actions = []
        self.clock = 0

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)

    def _draw(self):
        return torch.rand(self.start.shape, generator=self.generator)

    def _reset(self, tensordict=None, **kwargs):
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self.clock = 0
            self.start = self._draw()
            self.starts.append(self.start)
        else:
            self.start = torch.where(mask, self._draw(), self.start)
        no = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        flags = {name: no.clone() for name in ("diverged", "done", "terminated", "truncated")}
        return TensorDict({"observation": self.start, **flags}, self.batch_size)

    def _step(self, tensordict):
        assert self.clock < 100, "the evaluation does not end"
        self.actions.append(tensordict["action"].clone())
        column = min(self.clock, self.script["reward"].shape[1] - 1)
        now = {name: values[:, column, None] for name, values in self.script.items()}
        self.clock += 1
        truncated = now["diverged"]
        terminated = now["terminated"] & ~truncated
        return TensorDict(
            {
                "observation": self.start.clone(),
                "reward": now["reward"].clone(),
                "diverged": now["diverged"].clone(),
                "truncated": truncated.clone(),
                "terminated": terminated,
                "done": terminated | truncated,
            },
            self.batch_size,
        )

    def render(self, index, *, height, width):
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        frame[:] = (index, self.clock, 0)
        return frame


@pytest.fixture
def still():
    """Return a policy that does nothing."""
    return TensorDictModule(torch.zeros_like, ["observation"], ["action"])


BAD = 1000.0  # no reward of an episode that counts


# --- one round ----------------------------------------------------------------------------------


def test_return_is_the_sum_up_to_the_end_and_nothing_after_it(still):
    env = ScriptedEnv(
        reward=[[1, 2, BAD, BAD], [1, 2, 4, 8], [16, BAD, BAD, BAD]],
        end=[[0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1]],
    )
    assert evaluate(still, env, episodes=3, seed=0).returns.tolist() == [3, 15, 16]


def test_nonfinite_rewards_after_the_end_do_not_reach_the_return(still):
    env = ScriptedEnv(reward=[[1, math.nan], [2, 3]], end=[[1, 0], [0, 1]])
    assert evaluate(still, env, episodes=2, seed=0).returns.tolist() == [1, 5]


def test_returns_are_told_apart_by_the_tasks_of_the_environments(still):
    script = [[1], [2], [BAD], [4]]
    env = ScriptedEnv(reward=script, end=[[1]] * 4, diverged=[[0], [0], [1], [0]])
    assert evaluate(still, env, episodes=4, seed=0).summary().keys().isdisjoint({"return_mean/a"})
    env.row_tasks = ("a", "b", "a", "b")
    found = evaluate(still, env, episodes=7, seed=0)  # the second round is of three
    assert {name: x.tolist() for name, x in found.task_returns.items()} == {
        "a": [1, 1],
        "b": [2, 4, 2],
    }
    told = found.summary()
    assert (told["return_mean/a"], told["return_mean/b"]) == (1, pytest.approx(8 / 3))


def test_tasks_without_a_valid_episode_have_no_mean(still):
    env = ScriptedEnv(reward=[[BAD], [BAD]], end=[[0], [0]], diverged=[[1], [1]])
    env.row_tasks = ("a", "b")
    told = evaluate(still, env, episodes=2, seed=0).summary()
    assert all(math.isnan(told[f"return_mean/{task}"]) for task in env.row_tasks)


def test_lengths_count_the_steps_up_to_the_end(still):
    env = ScriptedEnv(reward=[[0] * 4] * 3, end=[[0, 1, 0, 1], [0, 0, 0, 1], [1, 0, 1, 1]])
    assert evaluate(still, env, episodes=3, seed=0).lengths.tolist() == [2, 4, 1]


def test_lengths_count_decisions_where_actions_repeat(still):
    settings = MujocoSettings(name="Reacher-v5", action_repeat=5, num_threads=1)
    env = envs.make(settings, num_envs=1, seed=0)
    policy = TensorDictModule(lambda x: x[:, :2] * 0, ["observation"], ["action"])
    assert env.max_episode_steps == 50
    assert evaluate(policy, env, episodes=1, seed=0).lengths.tolist() == [10]


def test_diverged_episodes_are_left_out_and_counted(still):
    env = ScriptedEnv(
        reward=[[BAD, BAD], [1, 2], [BAD, BAD]],
        end=[[0, 0], [0, 1], [0, 0]],
        diverged=[[0, 1], [0, 0], [1, 0]],
    )
    result = evaluate(still, env, episodes=3, seed=0)
    assert result.returns.tolist() == [3]
    assert result.lengths.tolist() == [2]
    assert result.diverged == 2


def test_divergence_after_the_end_is_not_that_episodes(still):
    env = ScriptedEnv(reward=[[1, 0], [2, 3]], end=[[1, 0], [0, 1]], diverged=[[0, 1], [0, 0]])
    result = evaluate(still, env, episodes=2, seed=0)
    assert result.returns.tolist() == [1, 5]
    assert result.diverged == 0


def test_environments_beyond_the_last_episode_do_not_count(still):
    env = ScriptedEnv(reward=[[1], [BAD], [BAD]], end=[[1], [1], [0]], diverged=[[0], [1], [0]])
    result = evaluate(still, env, episodes=1, seed=0)
    assert result.returns.tolist() == [1]
    assert result.diverged == 0


def test_the_summary_is_that_of_the_valid_episodes(still):
    env = ScriptedEnv(
        reward=[[1, 1], [5, 0], [BAD, 0]],
        end=[[0, 1], [1, 0], [0, 0]],
        diverged=[[0, 0], [0, 0], [1, 0]],
    )
    assert evaluate(still, env, episodes=3, seed=0).summary() == {
        "episodes": 2,
        "return_mean": 3.5,
        "return_std": 1.5,
        "return_min": 2.0,
        "return_max": 5.0,
        "length_mean": 1.5,
        "diverged": 1,
    }


def test_without_a_valid_episode_there_is_no_mean(still):
    env = ScriptedEnv(reward=[[1]], end=[[0]], diverged=[[1]])
    summary = evaluate(still, env, episodes=1, seed=0).summary()
    assert summary["episodes"] == 0
    assert summary["diverged"] == 1
    assert math.isnan(summary["return_mean"])


# --- several rounds -----------------------------------------------------------------------------


@pytest.mark.parametrize(("episodes", "counts"), [(2, [1, 1, 0]), (6, [2, 2, 2]), (7, [3, 2, 2])])
def test_every_environment_contributes_as_many_episodes(still, episodes, counts):
    short, long = [1], [0, 0, 0, 0, 1]
    env = ScriptedEnv(
        reward=[[10] + [0] * 4, [20] + [0] * 4, [30] + [0] * 4],
        end=[short * 5, long, long],  # the first could finish five in the time of one
    )
    result = evaluate(still, env, episodes=episodes, seed=0)
    assert [int((result.returns == 10 * i).sum()) for i in (1, 2, 3)] == counts
    assert len(result.returns) == len(result.lengths) == episodes


def test_divergence_adds_up_over_rounds_and_is_not_made_good(still):
    env = ScriptedEnv(reward=[[1], [BAD]], end=[[1], [0]], diverged=[[0], [1]])
    result = evaluate(still, env, episodes=5, seed=0)
    assert result.returns.tolist() == [1, 1, 1]
    assert result.diverged == 2


def starts(policy, *, end=((1,), (1,)), episodes=6, seed=0):
    """Return the start states ``[rounds, num_envs]`` of one evaluation."""
    env = ScriptedEnv(reward=[[0.0] * len(row) for row in end], end=end)
    evaluate(policy, env, episodes=episodes, seed=seed)
    return torch.stack(env.starts).squeeze(-1)


def test_every_round_has_starts_of_its_own(still):
    drawn = starts(still)
    assert drawn.shape == (3, 2)
    assert len(drawn.unique()) == 6


def test_equal_seeds_give_equal_starts_and_others_do_not(still):
    assert torch.equal(starts(still, seed=3), starts(still, seed=3))
    assert not torch.isin(starts(still, seed=3), starts(still, seed=1000)).any()


def test_one_environment_evaluated_twice_gives_the_same(still):
    env = ScriptedEnv(reward=[[0], [0]], end=[[1], [1]])
    for _ in range(2):
        evaluate(still, env, episodes=4, seed=5)
    first, again = env.starts[:2], env.starts[2:]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_starts_do_not_depend_on_how_long_the_policy_lasts(still):
    assert torch.equal(starts(still, end=[[1, 1], [0, 1]]), starts(still, end=[[0, 1], [0, 1]]))


# --- the policy ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_flag_chooses_between_mode_and_sample(deterministic):
    def act(observation):
        sampling = exploration_type() is ExplorationType.RANDOM
        mode = exploration_type() is ExplorationType.DETERMINISTIC
        return torch.full_like(observation, 0.5 * sampling - 0.5 * mode)

    env = ScriptedEnv(reward=[[0, 0]] * 2, end=[[0, 1]] * 2)
    policy = TensorDictModule(act, ["observation"], ["action"])
    evaluate(policy, env, episodes=4, seed=0, deterministic=deterministic)
    expected = -0.5 if deterministic else 0.5
    assert len(env.actions) == 4
    assert (torch.stack(env.actions) == expected).all()


def test_the_mode_is_the_default():
    seen = []

    def act(observation):
        seen.append(exploration_type())
        return torch.zeros_like(observation)

    before = exploration_type()
    env = ScriptedEnv(reward=[[0]], end=[[1]])
    evaluate(TensorDictModule(act, ["observation"], ["action"]), env, episodes=1, seed=0)
    assert seen == [ExplorationType.DETERMINISTIC]
    assert exploration_type() is before


def make_agent(name, **options):
    tiny = {"actor_hidden": [8], "critic_hidden": [8]} | options
    specs = Specs(observation_dim=1, action_dim=1, num_envs=2)
    return agents.make(name, agents.settings_class(name)(**tiny), specs, seed=0)


@pytest.mark.parametrize("name", ["ppo", "gorl", "sac"])
def test_the_mode_draws_nothing_from_the_agents_generators(name):
    # A run that is evaluated more often must train the same.
    agent = make_agent(name, **({} if name == "sac" else {"noise_correlation": 0.5}))
    state, globally = agent.generator.get_state(), torch.get_rng_state()
    env = ScriptedEnv(reward=[[0, 0]] * 2, end=[[0, 1]] * 2)
    evaluate(agent.policy, env, episodes=4, seed=0)
    assert torch.equal(agent.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), globally)


@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_samples_are_drawn_from_the_agents_generator(name):
    agent = make_agent(name)
    state = agent.generator.get_state()
    env = ScriptedEnv(reward=[[0, 0]] * 2, end=[[0, 1]] * 2)
    evaluate(agent.policy, env, episodes=2, seed=0, deterministic=False)
    assert not torch.equal(agent.generator.get_state(), state)
    assert len(torch.stack(env.actions).unique()) == 4


def test_evaluation_leaves_correlated_exploration_where_it_was():
    agent = make_agent("ppo", noise_correlation=0.5)
    agent.policy.noise = noise = torch.tensor([[3.0], [-3.0]])
    evaluate(agent.policy, ScriptedEnv(reward=[[0]] * 2, end=[[1]] * 2), episodes=2, seed=0)
    assert agent.policy.noise is noise
    assert noise.tolist() == [[3.0], [-3.0]]


# --- frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("period", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5])])
def test_frames_are_those_of_one_episode_of_environment_0(still, period, steps):
    env = ScriptedEnv(reward=[[0] * 6] * 2, end=[[0, 0, 0, 0, 1, 0], [0] * 6])
    frames = record(still, env, seed=0, frame_period=period, height=4, width=6)
    assert [frame.shape for frame in frames] == [(4, 6, 3)] * len(steps)
    assert [frame[0, 0].tolist() for frame in frames] == [[0, step, 0] for step in steps]


def test_trajectories_are_whole_episodes_with_their_final_state(point_mass):
    class Right(TensorDictModuleBase):
        in_keys = ("observation",)
        out_keys = ("action",)

        def forward(self, tensordict):
            return tensordict.set("action", torch.full_like(tensordict["observation"], 0.1))

    env = point_mass(num_envs=4)
    found = list(trajectories(Right(), env, episodes=6, seed=3, deterministic=True))
    assert len(found) == 6
    for trajectory in found:
        assert trajectory["observation"].shape == (11, 1)
        assert trajectory["action"].shape == (10, 1)
        steps = np.diff(trajectory["observation"][:, 0])
        np.testing.assert_allclose(steps, 0.03, atol=1e-6)
        expected = -np.abs(trajectory["observation"][1:, 0] - 0.5)
        np.testing.assert_allclose(trajectory["reward"], expected, atol=1e-6)
    starts = {float(trajectory["observation"][0, 0]) for trajectory in found}
    assert len(starts) == 6


def lengths(found):
    return [len(trajectory["action"]) for trajectory in found]


def test_trajectories_come_in_the_order_of_the_environments(still):
    """Whichever ends first: what a recording holds says which episodes are missing."""
    env = ScriptedEnv(reward=[[0] * 4] * 3, end=[[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
    found = list(trajectories(still, env, episodes=3, seed=0, deterministic=True))
    assert lengths(found) == [4, 2, 3]
    starts = [float(trajectory["observation"][0, 0]) for trajectory in found]
    assert starts == env.starts[0].squeeze(-1).tolist()


def test_a_rest_of_trajectories_is_that_of_the_first_environments(still):
    env = ScriptedEnv(reward=[[0] * 4] * 3, end=[[0, 0, 0, 1], [0, 1, 0, 0], [1, 0, 0, 0]])
    found = list(trajectories(still, env, episodes=5, seed=0, deterministic=True))
    assert lengths(found) == [4, 2, 1, 4, 2]
    assert len(env.starts) == 2


def test_every_round_of_trajectories_can_be_had_by_itself(still):
    env = ScriptedEnv(reward=[[0]] * 3, end=[[1]] * 3)
    found = list(trajectories(still, env, episodes=6, seed=5, deterministic=True))
    alone = list(trajectories(still, env, episodes=3, seed=8, deterministic=True))
    for one, other in zip(found[3:], alone, strict=True):
        assert np.array_equal(one["observation"], other["observation"])


def test_a_trajectory_that_diverged_is_made_up_for_by_its_environment(still):
    env = ScriptedEnv(
        reward=[[1, 2, 3, 4, 5]] * 2,
        end=[[0, 0, 0, 0, 1], [0, 1, 0, 0, 0]],
        diverged=[[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    )
    found = list(trajectories(still, env, episodes=2, seed=0, deterministic=True))
    assert [trajectory["reward"].tolist() for trajectory in found] == [[3, 4, 5], [1, 2]]
    assert float(found[0]["observation"][0, 0]) != float(env.starts[0][0])


def test_an_environment_that_always_diverges_is_no_endless_loop(still):
    env = ScriptedEnv(reward=[[0]] * 2, end=[[0], [1]], diverged=[[1], [0]])
    env.name = "scripted"
    with pytest.raises(EnvironmentFault, match="environment scripted: the physics diverged in 10 "):
        list(trajectories(still, env, episodes=2, seed=0, deterministic=True))
    assert len(env.actions) == 10


def test_trajectories_are_given_as_soon_as_they_are_whole(still):
    env = ScriptedEnv(reward=[[0] * 3] * 2, end=[[1, 0, 0], [0, 0, 1]])
    found = trajectories(still, env, episodes=2, seed=0, deterministic=True)
    assert len(next(found)["action"]) == 1
    assert len(env.actions) == 1


def test_trajectories_can_be_stopped_after_any_step(still):
    env = ScriptedEnv(reward=[[0] * 3] * 2, end=[[0, 0, 1]] * 2)

    def stop():
        if len(env.actions) == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(trajectories(still, env, episodes=2, seed=0, deterministic=True, on_step=stop))
    assert len(env.actions) == 2

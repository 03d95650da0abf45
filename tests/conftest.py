"""Toy environments that train in seconds, behind the same interface as the real ones."""

from __future__ import annotations

import os

from genpol.cli.main import prepare_process

prepare_process(os.environ)  # as the command does, before anything imports MuJoCo

# ruff: noqa: E402
import mujoco
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase


@pytest.fixture(autouse=True)
def _same_every_time():
    """Run every test with one thread and the same global random state, in whatever order."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def opengl() -> None:
    """Skip where MuJoCo itself can draw nothing."""
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    except Exception as error:
        pytest.skip(f"no OpenGL here: {error or type(error).__name__}")


class ToyEnv(EnvBase):
    """A point ``x`` that an action moves; the reward is a function of where it comes to lie.

    With ``episode_steps=1`` it is a bandit over actions, since ``x`` starts at 0 and moves by the
    action itself. With a ``goal`` it tells where that is, and whether the point is there.
    """

    batch_locked = True
    name = "toy"
    action_repeat = 1
    control_period_s = 0.05

    def __init__(
        self, reward, *, num_envs, seed, episode_steps=1, step_size=1.0, action_dim=1, goal=None
    ):
        super().__init__(device="cpu", batch_size=torch.Size([num_envs]))
        self._reward = reward
        self._step_size = step_size
        self._goal = goal
        self.max_episode_steps = episode_steps
        self.generator = torch.Generator()
        n = num_envs
        flag = {"shape": (n, 1), "dtype": torch.bool}
        self.observation_spec = Composite(
            observation=Unbounded((n, action_dim)),
            diverged=Binary(1, **flag),
            is_init=Binary(1, **flag),
            shape=(n,),
        )
        if goal is not None:
            self.observation_spec["goal"] = Unbounded((n, action_dim))
            self.observation_spec["achieved_goal"] = Unbounded((n, action_dim))
            self.observation_spec["success"] = Binary(1, **flag)
        self.action_spec = Bounded(-1.0, 1.0, (n, action_dim))
        self.reward_spec = Unbounded((n, 1))
        self.full_done_spec = Composite(
            done=Binary(1, **flag),
            terminated=Binary(1, **flag),
            truncated=Binary(1, **flag),
            shape=(n,),
        )
        self.x = torch.zeros(n, action_dim)
        self.clock = torch.zeros(n, dtype=torch.int64)
        self._restored = False
        self.set_seed(seed)

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)

    def _start(self, mask):
        start = 0.1 * torch.randn(self.x.shape, generator=self.generator)
        if self.max_episode_steps == 1:
            start = torch.zeros_like(start)
        self.x = torch.where(mask[:, None], start, self.x)
        self.clock = torch.where(mask, 0, self.clock)

    def _reset(self, tensordict=None, **kwargs):
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None and self._restored:
            self._restored = False
        else:
            everything = torch.ones(*self.batch_size, dtype=torch.bool)
            self._start(everything if mask is None else mask.view(-1))
        no = torch.zeros(*self.batch_size, 1, dtype=torch.bool)
        return TensorDict(
            {
                **self._seen(),
                "is_init": (self.clock == 0)[:, None],
                "diverged": no,
                "done": no.clone(),
                "terminated": no.clone(),
                "truncated": no.clone(),
            },
            self.batch_size,
        )

    def _step(self, tensordict):
        self.x = self.x + self._step_size * tensordict["action"]
        self.clock = self.clock + 1
        done = (self.clock >= self.max_episode_steps)[:, None]
        no = torch.zeros_like(done)
        return TensorDict(
            {
                **self._seen(),
                "is_init": no,
                "reward": self._reward(self.x),
                "diverged": no,
                "done": done,
                "truncated": done.clone(),
                "terminated": no.clone(),
            },
            self.batch_size,
        )

    def _seen(self):
        seen = {"observation": self.x.clone()}
        if self._goal is not None:
            seen["goal"] = torch.full_like(self.x, self._goal)
            seen["achieved_goal"] = self.x.clone()
            seen["success"] = ((self.x - self._goal).abs() < 0.1).all(-1, keepdim=True)
        return seen

    def state_dict_of_simulation(self):
        return {
            "x": self.x.clone(),
            "clock": self.clock.clone(),
            "generator": self.generator.get_state(),
        }

    def load_simulation(self, state):
        self.x = state["x"].clone()
        self.clock = state["clock"].clone()
        self.generator.set_state(state["generator"])
        self._restored = True


def negative_distance(x):
    """Reward of the point mass: minus the distance to 0.5."""
    return -(x - 0.5).abs().sum(-1, keepdim=True)


@pytest.fixture
def bandit():
    """Return a maker of one-step environments with the given reward of the action."""

    def make(reward, *, num_envs=64, seed=0, training=False):
        return ToyEnv(reward, num_envs=num_envs, seed=seed)

    return make


@pytest.fixture
def point_mass_to_goal():
    """Return a maker of point masses that tell their goal, which is 0.5."""

    def make(*, num_envs=16, seed=0, training=False):
        return ToyEnv(
            negative_distance,
            num_envs=num_envs,
            seed=seed,
            episode_steps=10,
            step_size=0.3,
            goal=0.5,
        )

    return make


@pytest.fixture
def point_mass():
    """Return a maker of point masses that should move to 0.5 and stay there."""

    def make(*, num_envs=16, seed=0, training=False):
        return ToyEnv(
            negative_distance, num_envs=num_envs, seed=seed, episode_steps=10, step_size=0.3
        )

    return make

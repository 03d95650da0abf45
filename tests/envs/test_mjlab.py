"""What is particular to the tasks of mjlab."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from genpol import envs
from genpol.agent import Specs
from genpol.envs import MjlabSettings
from genpol.errors import CheckpointError, ConfigError, EnvironmentFault

pytest.importorskip("mjlab", reason="needs mjlab: make test-mjlab")

from genpol.envs.mjlab import MjlabEnv

pytestmark = pytest.mark.mjlab


@contextmanager
def opened(
    task: str = "Mjlab-Cartpole-Balance", num_envs: int = 3, *, training: bool = False, **settings
) -> Iterator[MjlabEnv]:
    chosen = MjlabSettings(task=task, **settings)
    env = envs.make(chosen, num_envs=num_envs, seed=0, training=training)
    assert isinstance(env, MjlabEnv)
    try:
        yield env
    finally:
        env.close()


def act(env: MjlabEnv, action: Tensor | float) -> TensorDict:
    rows = torch.as_tensor(action, dtype=torch.float32).expand(env.action_spec.shape)
    return env.step(TensorDict({"action": rows}, env.batch_size))["next"]


def test_actors_and_critics_see_their_groups() -> None:
    with opened() as env:
        specs = Specs.from_env(env, num_envs=3)
        assert (specs.observation_dim, specs.action_dim, specs.critic_observation_dim) == (5, 1, 5)
        assert env.max_episode_steps == 1000
        assert env.control_period_s == pytest.approx(0.05)


def test_the_bound_scales_actions() -> None:
    seen = []
    for bound, action in ((1.0, 0.8), (0.5, 1.0), (0.4, 3.0)):  # the last is clipped to 1
        with opened(action_bound=bound) as env:
            env.reset()
            seen.append(act(env, action)["observation"][:, 3])
    near = seen[0] / 0.8
    torch.testing.assert_close(seen[1] / 0.5, near, rtol=0.05, atol=0.02)
    torch.testing.assert_close(seen[2] / 0.4, near, rtol=0.05, atol=0.02)


def test_an_environment_draws_from_a_state_of_its_own() -> None:
    def start_states(*, disturbed: bool) -> list[Tensor]:
        with opened() as env, opened() as other:
            seen = []
            for _ in range(3):
                seen.append(env.reset()["observation"])
                if disturbed:
                    torch.rand(5)
                    other.set_seed(7)
                    other.reset()
            return seen

    torch.manual_seed(3)
    before = torch.get_rng_state()
    alone = start_states(disturbed=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(alone[0], alone[1])
    for a, b in zip(alone, start_states(disturbed=True), strict=True):
        assert torch.equal(a, b)


def test_divergence_is_contained() -> None:
    with opened() as env:
        env.reset()
        before = act(env, 0.1)["observation"]
        env.sim.sim.data.qvel[1] = math.nan
        outcome = act(env, 0.1)
        assert outcome["diverged"].view(-1).tolist() == [False, True, False]
        assert outcome["truncated"][1]
        assert not outcome["terminated"][1]
        assert outcome["reward"][1] == 0
        assert torch.equal(outcome["observation"][1], before[1])
        assert env.num_diverged == 1
        root = env.reset(TensorDict({"_reset": outcome["done"]}, env.batch_size))
        assert root["observation"].isfinite().all()
        assert act(env, 0.1)["observation"].isfinite().all()


def test_episodes_begin_at_random_clocks_in_training() -> None:
    with opened(num_envs=64, training=True) as env:
        env.reset()
        assert len(env._elapsed.unique()) > 20
        assert env._elapsed.max() < env.max_episode_steps


def test_a_robot_falls_and_its_episode_ends() -> None:
    with opened("Mjlab-Velocity-Flat-Unitree-Go1", num_envs=2) as env:
        assert env.observation_spec["critic_observation"].shape[1] > 0
        env.reset()
        for _ in range(200):
            outcome = act(env, 1.0)
            if outcome["terminated"].any():
                break
        assert outcome["terminated"].any()
        assert not outcome["diverged"].any()


def test_unknown_tasks_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'Mjlab-Cartpole-Balance'") as caught:
        envs.make(MjlabSettings(task="Mjlab-Cartpole-Balanse"), num_envs=1, seed=0)
    assert "\n" not in str(caught.value)


def test_it_can_neither_be_saved_nor_drawn() -> None:
    with opened() as env:
        assert env.state_dict_of_simulation() is None
        with pytest.raises(CheckpointError, match="cannot restore a simulation"):
            env.load_simulation({})
        with pytest.raises(EnvironmentFault, match="cannot be drawn"):
            env.render()

"""Critics that see more than the actor."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs

ENVS, STEPS, SEEN, TOLD = 8, 16, 3, 5
SPECS = Specs(observation_dim=SEEN, critic_observation_dim=TOLD, action_dim=2, num_envs=ENVS)
NAMES = ("ppo", "bpo", "mdpo", "gorl", "fpo", "harpg", "npg_igt")


def make(name: str, specs: Specs = SPECS):
    return agents.make(name, agents.settings_class(name)(), specs, seed=0)


def rollout(agent, seed: int = 0) -> TensorDict:
    """Return steps of episodes that end in the middle, told apart by what only critics see."""
    draw = torch.Generator().manual_seed(seed)

    def told() -> torch.Tensor:
        return 3.0 + 2.0 * torch.randn(ENVS, STEPS, TOLD, generator=draw)

    seen = {"observation": torch.randn(ENVS, STEPS, SEEN, generator=draw)}
    batch = TensorDict(seen | {"critic_observation": told()}, [ENVS, STEPS])
    with set_exploration_type(ExplorationType.RANDOM):
        agent.policy(batch)
    flag = torch.zeros(ENVS, STEPS, 1, dtype=torch.bool)
    truncated = flag.clone()
    truncated[:, STEPS // 2] = True
    batch["is_init"] = flag
    batch["next"] = TensorDict(
        {
            "observation": torch.randn(ENVS, STEPS, SEEN, generator=draw),
            "critic_observation": told(),
            "reward": torch.randn(ENVS, STEPS, 1, generator=draw),
            "terminated": flag,
            "truncated": truncated,
            "done": truncated,
            "diverged": flag,
        },
        [ENVS, STEPS],
    )
    return batch


@pytest.mark.parametrize("name", NAMES)
def test_every_on_policy_agent_learns_with_it(name: str) -> None:
    agent = make(name)
    assert agent.learner.actor_critic.critic.linears[0].in_features == TOLD
    for seed in range(2):
        metrics = agent.update(rollout(agent, seed))
    assert all(torch.as_tensor(x).isfinite().all() for x in metrics.values())


def test_the_actor_does_not_see_it() -> None:
    agent = make("ppo")
    batch = rollout(agent)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        here = agent.policy(batch.clone())["action"]
        there = agent.policy(batch.exclude("critic_observation"))["action"]
    assert torch.equal(here, there)


def test_values_come_from_it_where_an_episode_is_cut_too() -> None:
    agent = make("ppo")
    learner = agent.learner
    torch.nn.init.normal_(learner.actor_critic.critic.linears[-1].weight)
    batch = rollout(agent)
    target = learner._prepare(batch)[0]["target"]
    told, seen = batch.clone(), batch.clone()
    told["next", "critic_observation"] += 1.0  # counts where the episode or the rollout ends
    seen["next", "observation"] += 1.0  # counts nowhere
    assert not torch.allclose(learner._prepare(told)[0]["target"], target)
    assert torch.equal(learner._prepare(seen)[0]["target"], target)


def test_it_has_statistics_of_its_own() -> None:
    agent = make("ppo")
    batch = rollout(agent)
    agent.update(batch)
    view = agent.learner.actor_critic.critic_view(batch["critic_observation"])
    torch.testing.assert_close(view.mean((0, 1)), torch.zeros(TOLD), rtol=0, atol=1e-4)
    torch.testing.assert_close(view.std((0, 1)), torch.ones(TOLD), rtol=0, atol=2e-2)
    seen = agent.learner.actor_critic.normalizer(batch["observation"])
    torch.testing.assert_close(seen.mean((0, 1)), torch.zeros(SEEN), rtol=0, atol=1e-4)


def test_without_it_critics_see_what_the_actor_sees() -> None:
    agent = make("ppo", Specs(observation_dim=SEEN, action_dim=2, num_envs=ENVS))
    actor_critic = agent.learner.actor_critic
    assert actor_critic.critic_key == "observation"
    assert actor_critic.critic_normalizer is None
    assert actor_critic.critic.linears[0].in_features == SEEN

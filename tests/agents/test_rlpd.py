"""RLPD: its losses written out, what hears them, and how it acts."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.offline import NetworkSettings

ROWS, WIDTH, ACTIONS, HORIZON = 6, 3, 2, 2
SMALL = {
    "horizon": HORIZON,
    "num_critics": 4,
    "actor": NetworkSettings(hidden=[16]),
    "critic": NetworkSettings(hidden=[16]),
}


def make(**options):
    specs = Specs(observation_dim=WIDTH, action_dim=ACTIONS, num_envs=4)
    return agents.make("rlpd", agents.settings_class("rlpd")(**(SMALL | options)), specs, seed=0)


def windows(seed=0):
    draw = torch.Generator().manual_seed(seed)
    after = torch.randn(ROWS, WIDTH, generator=draw)
    fields = {
        "observation": torch.randn(ROWS, WIDTH, generator=draw),
        "action": 2 * torch.rand(ROWS, HORIZON, ACTIONS, generator=draw) - 1,
        "weight": torch.ones(ROWS),
        "reward": torch.randn(ROWS, generator=draw),
        "discount": torch.full((ROWS,), 0.9),
        "next": {"observation": after},
    }
    return TensorDict(fields, [ROWS])


@pytest.mark.parametrize("entropy_backup", [True, False])
def test_the_losses_are_those_of_the_paper(entropy_backup):
    agent, batch = make(entropy_backup=entropy_backup, temperature=0.3), windows()
    draws = agent.draw(ROWS)
    loss, _ = agent.loss(batch, draws)
    after = agent.actor.draw(batch["next", "observation"], draws["next"])
    chunk = after.action.unflatten(-1, (HORIZON, ACTIONS))
    values = agent.averaged(batch["next", "observation"], chunk)
    following = torch.minimum(*values[draws["members"]])
    if entropy_backup:
        following = following - 0.3 * after.log_prob.sum(-1)
    target = (batch["reward"] + 0.9 * following).detach()
    critics = (agent.critic(batch["observation"], batch["action"]) - target).square().mean()
    drawn = agent.actor.draw(batch["observation"], draws["policy"])
    chunk = drawn.action.unflatten(-1, (HORIZON, ACTIONS))
    density = drawn.log_prob.sum(-1)
    actor = (0.3 * density - agent.critic(batch["observation"], chunk).mean(0)).mean()
    wanted = -0.5 * HORIZON * ACTIONS
    temperature = -(agent.log_temperature * (density.detach() + wanted)).mean()
    torch.testing.assert_close(loss, critics + actor + temperature)


def test_the_actor_teaches_the_critics_nothing():
    agent, batch = make(), windows()
    draws = agent.draw(ROWS)
    parameters = list(agent.critic.parameters())
    both = torch.autograd.grad(agent.loss(batch, draws)[0], parameters)
    alone = torch.autograd.grad(
        agent._critic_loss(batch, batch["observation"], draws)[0], parameters
    )
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


def test_the_members_asked_change_from_update_to_update():
    agent = make()
    drawn = {tuple(sorted(agent.draw(ROWS)["members"].tolist())) for _ in range(50)}
    assert len(drawn) == 6  # pairs of four


def test_it_explores_by_chance_and_is_judged_by_its_mode():
    agent = make()
    seen = torch.randn(5, WIDTH)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        chunks = [agent.act(seen, torch.Generator().manual_seed(k)) for k in range(2)]
    assert torch.equal(*chunks)
    torch.testing.assert_close(chunks[0].flatten(-2), agent.actor.mode(seen))
    with set_exploration_type(ExplorationType.RANDOM):
        chunks = [agent.act(seen, torch.Generator().manual_seed(k)) for k in range(2)]
    assert not torch.equal(*chunks)


@pytest.mark.parametrize(("name", "value"), [("offline_share", 1.5), ("target_critics", 5)])
def test_settings_out_of_bounds_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"agent.{name}"):
        make(**{name: value})

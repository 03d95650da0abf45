"""Agents that learn from data: what each loss reads, which networks hear of it, how they act."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict

from genpol import agents
from genpol.agent import Specs
from genpol.data.goals import GoalSettings
from genpol.errors import ConfigError
from genpol.offline import NetworkSettings
from genpol.policies.guidance import BestOf, GuidanceSettings, GuidedPolicy

BATCH, WIDTH, ACTIONS = 6, 3, 2
SPECS = Specs(observation_dim=WIDTH, action_dim=ACTIONS, num_envs=4, goal_dim=2)
SMALL = {"actor": NetworkSettings(hidden=[16]), "critic": NetworkSettings(hidden=[16])}
OFFLINE = ("bc", "iql", "fql", "qc", "dqc", "qgf", "fisher_decorator")


def make(name, seed=0, **options):
    settings = agents.settings_class(name)(**(SMALL | options))
    return agents.make(name, settings, SPECS, seed=seed)


def windows(horizon, seed=0, **given):
    draw = torch.Generator().manual_seed(seed)
    fields = {
        "observation": torch.randn(BATCH, WIDTH, generator=draw),
        "action": 2 * torch.rand(BATCH, horizon, ACTIONS, generator=draw) - 1,
        "valid": torch.ones(BATCH, horizon, dtype=torch.bool),
        "weight": torch.ones(BATCH),
        "reward": torch.randn(BATCH, generator=draw),
        "discount": torch.full((BATCH,), 0.9),
        "goal": torch.randn(BATCH, 2, generator=draw),
    }
    after = torch.randn(BATCH, WIDTH, generator=draw)
    return TensorDict(fields | given | {"next": {"observation": after}}, [BATCH])


def parameters_of(agent, *names):
    modules = [agent.get_submodule(name) for name in names]
    return [parameter for module in modules for parameter in module.parameters()]


def heard(agent, loss):
    """Return the names of the networks that a loss has a gradient for."""
    named = [(name, x) for name, x in agent.named_parameters() if x.requires_grad]
    gradients = torch.autograd.grad(loss, [x for _, x in named], allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return {name.split(".")[0] for (name, _), g in pairs if g is not None and (g != 0).any()}


def loss_of(agent, batch):
    """Return an agent's loss and metrics, with what it draws."""
    return agent.loss(batch, agent.draw(len(batch)))


def horizon_of(name):
    return {"qc": 5, "dqc": 25, "qgf": 5}.get(name, 1)


# --- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFLINE)
def test_an_update_changes_every_network(name):
    agent = make(name)
    before = {key: x.clone() for key, x in agent.named_parameters() if x.requires_grad}
    metrics = agent.update(windows(horizon_of(name)))
    assert all(torch.isfinite(x).all() for x in metrics.values())
    after = dict(agent.named_parameters())
    changed = {key.split(".")[0] for key, x in before.items() if not torch.equal(x, after[key])}
    assert changed == {key.split(".")[0] for key in before}


@pytest.mark.parametrize("name", OFFLINE)
def test_the_step_size_falls_along_half_a_cosine(name):
    agent = make(name, learning_rate=1.0e-3, final_learning_rate=1e-5, decay_updates=4)
    found = []
    for _ in range(6):
        agent.update(windows(horizon_of(name)))
        found.append(agent._optimizer.learning_rate)
    middle, side = 0.505e-3, 0.495e-3 * math.cos(math.pi / 4)
    expected = [1e-3, middle + side, middle, middle - side, 1e-5, 1e-5]
    assert found == pytest.approx(expected)


def test_the_step_size_goes_on_falling_after_a_resumption():
    first, second = (make("bc", decay_updates=4) for _ in range(2))
    for seed in range(2):
        first.update(windows(1, seed))
    second.load_state_dict(first.state_dict())
    second.load_training_state(first.training_state())
    for agent in (first, second):
        agent.update(windows(1, 2))
    assert second._optimizer.learning_rate == first._optimizer.learning_rate
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize(
    ("name", "average", "live"),
    [
        ("fql", "averaged", "critic"),
        ("fisher_decorator", "averaged", "critic"),
        ("dqc", "averaged", "partial"),
        ("qgf", "values.averaged", "values.critic"),
        ("iql", "values.averaged", "values.critic"),
    ],
)
def test_averages_take_in_the_parameters_from_before_the_step(name, average, live):
    agent = make(name, polyak=0.5)
    start = copy.deepcopy(parameters_of(agent, live))
    agent.update(windows(horizon_of(name)))
    assert all(map(torch.equal, parameters_of(agent, average), start))
    once = copy.deepcopy(parameters_of(agent, live))
    agent.update(windows(horizon_of(name)))
    halves = [(a + b) / 2 for a, b in zip(start, once, strict=True)]
    for found, expected in zip(parameters_of(agent, average), halves, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name in OFFLINE if name != "dqc"])  # has whole windows
def test_masked_actions_may_be_anything(name):
    horizon = max(2, horizon_of(name))
    agent = make(name, horizon=horizon)
    valid = torch.ones(BATCH, horizon, dtype=torch.bool)
    valid[1, 1:] = False
    batch = windows(horizon, valid=valid, weight=valid[:, -1].float())
    other = batch.clone()
    other["action"][1, 1:] = 0.123
    losses = []
    for rows in (batch, other):
        again = copy.deepcopy(agent)
        again.generator = torch.Generator().manual_seed(3)
        losses.append(loss_of(again, rows)[0])
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", [name for name in OFFLINE if name != "iql"])
def test_cloning_never_reads_masked_actions(name):
    """They are left out before any arithmetic: NaN in them reaches neither loss nor gradient."""
    agent = make(name, horizon=4, **({"chunk": 4} if name == "dqc" else {}))
    valid = torch.ones(BATCH, 4, dtype=torch.bool)
    valid[1, 1:] = False
    batch = windows(4, valid=valid, weight=valid[:, -1].float())
    batch["action"][1, 1:] = float("nan")
    draws = agent.draw(BATCH)
    total, metrics = agent.loss(batch, draws)
    gradients = torch.autograd.grad(total, list(agent.flow.parameters()))
    assert all(x.isfinite().all() for x in gradients)
    action = batch["action"].nan_to_num()  # the network sees a zero in their place
    between = torch.lerp(draws["imitation"], action, draws["time"][..., None])
    velocity = agent.flow.velocity(batch["observation"], between, draws["time"])
    error = (velocity - (action - draws["imitation"])).square().mean(-1)
    torch.testing.assert_close(metrics["loss/bc"], error[valid].mean().detach())


@pytest.mark.parametrize("name", OFFLINE)
def test_plans_are_within_bounds_and_repeat_with_their_noise(name):
    agent = make(name, horizon=4, **({"chunk": 4} if name == "dqc" else {}))
    width = WIDTH + (2 if name == "dqc" else 0)
    observation = 3 * torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    chunk = agent.act(observation, torch.Generator().manual_seed(1))
    assert chunk.shape == (5, 4, ACTIONS)
    assert (chunk.abs() <= 1).all()
    assert not chunk.requires_grad
    assert torch.equal(chunk, agent.act(observation, torch.Generator().manual_seed(1)))


def step(policy, observation, is_init):
    data = TensorDict({"observation": observation, "is_init": is_init[:, None]}, [len(is_init)])
    return policy(data)["action"]


def test_a_plan_is_carried_out_and_made_anew_where_an_episode_begins():
    agent = make("bc", horizon=3)
    made = []
    plan = agent.act
    agent.act = lambda observation, noise: made.append(len(observation)) or plan(observation, noise)
    no, observation = torch.zeros(2, dtype=torch.bool), torch.randn(2, WIDTH)
    first = step(agent.policy, observation, ~no)
    chunk = agent.policy.acting_state()["queue"]
    assert torch.equal(first, chunk[:, 0])
    assert torch.equal(step(agent.policy, observation, no), chunk[:, 1])
    began = torch.tensor([False, True])
    third = step(agent.policy, observation, began)
    assert torch.equal(third[0], chunk[0, 2])
    assert not torch.equal(third[1], chunk[1, 2])
    step(agent.policy, observation, no)
    assert made == [2, 1, 1]  # all; the one that began; the one whose plan was used up


def test_only_part_of_a_plan_is_carried_out():
    agent = make("bc", horizon=4, action_steps=2)
    no, observation = torch.zeros(1, dtype=torch.bool), torch.randn(1, WIDTH)
    chunks = []
    for index in range(4):
        step(agent.policy, observation, ~no if index == 0 else no)
        chunks.append(agent.policy.acting_state()["queue"])
    assert torch.equal(chunks[0], chunks[1])
    assert not torch.equal(chunks[1], chunks[2])
    assert torch.equal(chunks[2], chunks[3])


def test_observations_are_standardised_for_all_networks_alike():
    agent = make("qgf", normalize_observations=True, guidance=GuidanceSettings(weight=0.5))
    data = 5 + 3 * torch.randn(500, WIDTH)
    agent.normalizer.update(data)
    plain = make("qgf", guidance=GuidanceSettings(weight=0.5))
    raw = data[:4]
    standard = (raw - data.mean(0)) / data.std(0, correction=0)
    found = agent.act(raw, torch.Generator().manual_seed(0))
    expected = plain.act(standard, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fql", {"action_steps": 2}, r"agent\.action_steps = 2: must lie in \[0, 1\]"),
        ("dqc", {"horizon": 5, "chunk": 6}, r"agent\.chunk = 6: must lie in \[1, 5\]"),
        ("dqc", {"goals": GoalSettings(rule="step")}, "set agent.goals.rule=reach"),
        ("bc", {"goal_weight": 2.0, "goal_dropout": 0.0}, "agent.goal_dropout=0.1"),
        ("qc", {"policy": "one_stp"}, "Did you mean 'one_step'"),
        ("bc", {"decay_updates": -1}, r"agent\.decay_updates = -1: must be >= 0"),
        ("iql", {"final_learning_rate": 0.0}, r"agent\.final_learning_rate = 0\.0: must be"),
        ("dsrl", {"decay_updates": 10}, "step sizes of this agent are constant; leave it 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        agents.settings_class(name)(**options)


@pytest.mark.parametrize(("name", "options"), [("dqc", {}), ("bc", {"goal_conditioned": True})])
def test_goals_must_come_from_the_environment(name, options):
    settings = agents.settings_class(name)(**options)
    with pytest.raises(ConfigError, match=r"env\.goal_conditioned=true"):
        agents.make(name, settings, Specs(observation_dim=3, action_dim=2, num_envs=1), seed=0)


@pytest.mark.parametrize(
    "name",
    [name if name == "fql" else pytest.param(name, marks=pytest.mark.slow) for name in OFFLINE],
)
def test_a_compiled_loss_is_the_loss(name):
    agent, batch = make(name), windows(horizon_of(name))
    draws = agent.draw(BATCH)
    fast = torch.compile(agent.loss, fullgraph=True, backend="aot_eager", dynamic=False)
    rows = dict(batch.items(include_nested=True, leaves_only=True))
    parameters = [x for x in agent.parameters() if x.requires_grad]
    results = []
    for loss in (agent.loss, fast):
        total, _ = loss(rows, draws)
        gradients = torch.autograd.grad(total, parameters, materialize_grads=True)
        results.append((total, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


# --- IQL and QGF -------------------------------------------------------------------------------


def test_each_loss_of_implicit_q_is_heard_by_its_own_network():
    agent, batch = make("iql"), windows(1)
    observation, after = batch["observation"], batch["next", "observation"]
    critic, value = agent.values.critic, agent.values.value
    total, _ = agent.values.loss(observation, after, batch)
    for part in (critic, value):
        gradients = torch.autograd.grad(total, list(part.parameters()), retain_graph=True)
        assert any((g != 0).any() for g in gradients)
    assert heard(agent, total) == {"values"}
    whole, _ = loss_of(agent, batch)
    assert heard(agent, whole) == {"values", "actor"}


def test_the_value_is_an_expectile_of_the_averaged_ensembles_least():
    agent, batch = make("iql", expectile=0.8), windows(1)
    agent.values.averaged.load_state_dict(make("iql", seed=9).values.critic.state_dict())
    observation = batch["observation"]
    best = agent.values.averaged(observation, batch["action"]).min(0).values
    u = best - agent.values.value(observation)
    expected = (torch.where(u > 0, 0.8, 0.2) * u.square()).mean()
    _, metrics = agent.values.loss(observation, batch["next", "observation"], batch)
    torch.testing.assert_close(metrics["loss/value"], expected.detach())


def test_better_actions_are_cloned_with_more_weight():
    agent, batch = make("iql", inverse_temperature=2.0), windows(1)
    advantage = agent.values.advantage(batch["observation"], batch["action"])
    error = (agent.actor(batch["observation"]) - batch["action"]).square().sum((1, 2)) / 2
    expected = ((2.0 * advantage).exp().clamp(max=100.0) * error).mean()
    torch.testing.assert_close(loss_of(agent, batch)[1]["loss/policy"], expected.detach())


def test_cloning_never_hears_of_the_critic():
    batch = windows(5)
    gradients = []
    for reward in (batch["reward"], batch["reward"] * 100):
        agent = make("qgf")
        total, _ = loss_of(agent, windows(5, reward=reward))
        gradients.append(torch.autograd.grad(total, list(agent.flow.parameters())))
    assert all(map(torch.equal, *gradients))


def test_guidance_of_weight_zero_is_the_cloned_flow():
    agent = make("qgf", guidance=GuidanceSettings(weight=0.0))
    bc = make("bc", horizon=5)
    observation = torch.randn(4, WIDTH)
    bc.flow.load_state_dict(agent.flow.state_dict())
    a, b = (x.act(observation, torch.Generator().manual_seed(2)) for x in (agent, bc))
    assert torch.equal(a, b)


@pytest.mark.parametrize("aggregate", ["min", "mean"])
def test_the_averaged_critics_guide_and_choose(aggregate):
    guidance = GuidanceSettings(weight=0.5, best_of=4)
    agent = make("qgf", guidance=guidance, aggregate=aggregate)
    values = agent.values
    values.averaged.load_state_dict(make("qgf", seed=9).values.critic.state_dict())
    observation = torch.randn(16, WIDTH)
    noise = agent.plan_noise(16, torch.Generator().manual_seed(2))

    def plan(critic, how):
        def value(state, action):
            members = critic(state, action)
            return members.min(0).values if how == "min" else members.mean(0)

        return BestOf(GuidedPolicy(agent.flow, value, weight=0.5), value).sample(observation, noise)

    found = agent.plan(observation, noise)
    torch.testing.assert_close(found, plan(values.averaged, aggregate))
    other = "mean" if aggregate == "min" else "min"
    for rival in (plan(values.critic, aggregate), plan(values.averaged, other)):
        assert not torch.allclose(found, rival, atol=1e-3)


def test_guidance_and_choice_raise_the_value():
    agent = make("qgf")
    observation = torch.randn(64, WIDTH)

    def worth(**options):
        agent.guide(GuidanceSettings(**options))
        chunk = agent.act(observation, torch.Generator().manual_seed(2))
        return agent.values.chunk_value(observation, chunk).mean()

    plain = worth(weight=0.0)
    assert worth(weight=1.0) > plain
    assert worth(weight=0.0, best_of=8) > plain
    assert worth(weight=1.0, best_of=8) > max(worth(weight=1.0), worth(weight=0.0, best_of=8))


def test_a_clone_wears_the_guidance_of_another_agents_critic():
    qgf = make("qgf", normalize_observations=True)
    qgf.normalizer.update(2 + torch.randn(100, WIDTH))
    bc = make("bc", horizon=5)
    observation = 2 + torch.randn(64, WIDTH)

    def worth():
        chunk = bc.act(observation, torch.Generator().manual_seed(2))
        return qgf.value(qgf.encode(observation), chunk).mean()

    plain = worth()
    bc.guide(GuidanceSettings(weight=0.0), qgf)
    assert worth() == plain
    bc.guide(GuidanceSettings(weight=2.0, best_of=4), qgf)
    assert worth() > plain
    assert not any(name.startswith("_guides") for name in bc.state_dict())


@pytest.mark.parametrize(
    ("name", "critic", "message"),
    [
        ("bc", None, r"add guidance\.critic=<run"),
        ("bc", "iql", "values chunks of 1 actions .* makes chunks of 5"),
        ("iql", None, "does not act"),
        ("fql", None, "does not act"),
        ("qgf", "qgf", r"guidance\.critic: is for agent=bc"),
    ],
)
def test_guidance_that_does_not_fit_is_refused(name, critic, message):
    agent = make(name, **({"horizon": 5} if name == "bc" else {}))
    with pytest.raises(ConfigError, match=message):
        agent.guide(GuidanceSettings(weight=1.0), make(critic) if critic else None)


# --- cloning -----------------------------------------------------------------------------------


def test_goals_are_left_out_of_their_share_of_rows():
    agent = make("bc", goal_conditioned=True, goal_dropout=0.25, horizon=1)
    seen = []
    loss = agent.flow.bc_loss
    agent.flow.bc_loss = lambda s, *rest, **more: seen.append(s) or loss(s, *rest, **more)
    for seed in range(300):
        loss_of(agent, windows(1, seed))
    rows = torch.cat(seen)
    given, goal = rows[:, -1], rows[:, WIDTH:-1]
    assert given.mean().item() == pytest.approx(0.75, abs=0.03)
    assert (goal[given == 0] == 0).all()
    assert (goal[given == 1] != 0).all()


def test_the_weight_of_a_goal_interpolates_and_exaggerates():
    settings = {"goal_conditioned": True, "horizon": 1, "solver_steps": 1}
    agents_by_weight = {w: make("bc", goal_weight=w, **settings) for w in (0.0, 1.0, 2.0)}
    observation = 0.1 * torch.randn(256, WIDTH + 2)
    found = {
        w: agent.act(observation, torch.Generator().manual_seed(1))
        for w, agent in agents_by_weight.items()
    }
    inside = torch.stack([x.abs() for x in found.values()]).max(0).values < 1
    assert inside.any()
    expected = 2 * found[1.0] - found[0.0]
    torch.testing.assert_close(found[2.0][inside], expected[inside], atol=1e-5, rtol=1e-4)

"""MBDPO as an agent (MBDPO specification, oracles 12, 16 and 18), and its search step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.envs import ExplorationType, set_exploration_type

from genpol import agents
from genpol.agent import Specs, TaskSpecs
from genpol.data.dataset import OfflineDataset
from genpol.data.sequences import SequenceReplay
from genpol.data.windows import WindowSampler
from genpol.errors import ConfigError
from genpol.world_model import DiffusionPlanner, PolicyPlanner, ScorePlanner, WorldModelAgent
from genpol.world_model.amortised import denoise

SPECS = Specs(observation_dim=3, action_dim=2, num_envs=1)
TASKS = Specs(
    observation_dim=5,
    action_dim=2,
    num_envs=1,
    tasks=(TaskSpecs("a", 2, 1000), TaskSpecs("b", 1, 200)),
)
SMALL = {
    "encoder_dim": 16,
    "mlp_dim": 16,
    "latent_dim": 16,
    "num_critics": 3,
    "batch_size": 8,
    "num_plans": 32,
    "num_elites": 8,
    "diffusion_steps": 4,
    "target_plans": 16,
    "target_steps": 3,
    "score_samples": 8,
    "dropout": 0.0,
    "warmup_steps": 0,
    "energy_warmup": 0,
    "diagnostics_interval": 0,
    "task_dim": 4,
}
SCORE = {"score_network": True, "score_rows": 4}


def make(*, specs=SPECS, **settings) -> WorldModelAgent:
    options = agents.settings_class("mbdpo")(**(SMALL | settings))
    agent = agents.make("mbdpo", options, specs, seed=0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in agent.model.parameters():
            x.add_(0.3 * torch.randn(x.shape, generator=draw))
    return agent


def batch(rows=8, specs=SPECS, horizon=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(rows, horizon + 1, specs.observation_dim, generator=draw)
    if specs.tasks:
        tasks = torch.arange(rows) % len(specs.tasks)
        one_hot = F.one_hot(tasks, len(specs.tasks)).float()
        observations[..., -len(specs.tasks) :] = one_hot[:, None]
    return TensorDict(
        {
            "observation": observations[:, 0],
            "observations": observations,
            "action": 2 * torch.rand(rows, horizon, specs.action_dim, generator=draw) - 1,
            "rewards": torch.randn(rows, horizon, generator=draw),
            "terminated": torch.zeros(rows, horizon, dtype=torch.bool),
            "valid": torch.ones(rows, horizon, dtype=torch.bool),
        },
        [rows],
    )


def prepared(agent, windows=None):
    """Return window, draws, open-loop latents and next ones of a batch."""
    window = agent.unfold(batch(specs=agent.specs) if windows is None else windows)
    draws = agent.draw(window)
    made = agent.model_loss(window, draws)
    return window, draws, made.latents, made.encoded


def reached(loss, module):
    """Return whether the gradient of a loss reaches any parameter of a module."""
    parameters = [x for x in module.parameters() if x.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return any(g is not None and (g != 0).any() for g in found)


# -- energy --------------------------------------------------------------------------------------


def spied(agent):
    """Return the list to which every input of the classifier is added."""
    seen = []
    own = agent.model.energy.forward
    agent.model.energy.forward = lambda x: seen.append(x.detach()) or own(x)
    return seen


@pytest.mark.parametrize("legacy", [False, True])
def test_positives_are_actions_beside_the_states_they_were_taken_in(legacy):
    """Oracle 12 on what the classifier sees: fault 1 of the released code."""
    agent = make(legacy_pairing=legacy)
    window, draws, latents, _ = prepared(agent)
    seen = spied(agent)
    agent.energy_loss(latents[:-1], window, draws, agent.model.task())
    positives = seen[1][0]
    expected = torch.cat((latents[:-1], window.actions), -1).flatten(0, 1)
    right = (positives == expected).all(-1)
    assert positives[:, :16].equal(expected[:, :16])
    assert right.all() if not legacy else right.sum() == 2


def test_negatives_are_the_hardest_of_three():
    agent = make()
    window, draws, latents, _ = prepared(agent)
    seen = spied(agent)
    agent.energy_loss(latents[:-1], window, draws, agent.model.task())
    candidates, chosen = seen[0][..., 16:], seen[1][1, :, 16:]
    model, task, latent = agent.model, agent.model.task(), latents[:-1].flatten(0, 1)
    own = model.act(latent, draws["negative_policy"], task).action
    torch.testing.assert_close(candidates[0], own)
    noisy = (own + 0.5 * draws["negative_noise"]).clamp(-1, 1)
    torch.testing.assert_close(candidates[1], noisy)
    assert candidates[2].equal(draws["negative_uniform"])
    assert draws["negative_uniform"].abs().max() <= 1.0
    logits = torch.stack(
        [model.energy(model.pair(latent, x, task)).squeeze(-1) for x in candidates]
    )
    best = logits.argmax(0)
    assert chosen.equal(candidates[best, torch.arange(24)])
    assert len(best.unique()) == 3


def test_negatives_are_zero_where_a_task_has_no_dimension():
    """Oracle 16 for what the classifier learns from."""
    agent = make(specs=TASKS)
    window, draws, latents, _ = prepared(agent)
    seen = spied(agent)
    agent.energy_loss(latents[:-1], window, draws, agent.model.task(window.tasks))
    alone = window.tasks.repeat(3) == 1
    for candidates in (seen[0], seen[1][1:]):
        assert (candidates[:, alone, -1] == 0).all()
        assert (candidates[:, ~alone, -1] != 0).all()


def test_the_loss_of_the_energy_by_hand():
    agent = make()
    window, draws, latents, _ = prepared(agent)
    seen = spied(agent)
    loss, metrics = agent.energy_loss(latents[:-1], window, draws, agent.model.task())
    positive, negative = agent.model.energy(seen[1]).squeeze(-1)
    one, zero = torch.ones(24), torch.zeros(24)
    entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(loss, 0.5 * entropy(positive, one) + 0.5 * entropy(negative, zero))
    pooled = torch.cat((positive, negative))
    torch.testing.assert_close(metrics["energy/mean"], pooled.mean())
    torch.testing.assert_close(metrics["energy/std"], pooled.std(correction=0))


def test_the_energy_shapes_nothing_but_itself_and_tasks():
    """Oracle 18."""
    agent = make(specs=TASKS)
    window, draws, latents, _ = prepared(agent)
    model = agent.model
    loss, _ = agent.energy_loss(latents[:-1], window, draws, model.task(window.tasks))
    assert reached(loss, model.energy)
    for part in (model.encoder, model.dynamics, model.policy, model.critics):
        assert not reached(loss, part)
    (slope,) = torch.autograd.grad(loss, model.tasks)
    assert (slope != 0).any(1).all()


def test_the_encoder_s_gradient_does_not_depend_on_energy_and_score():
    """Oracle 18 for the whole loss: latents are constants for both."""
    slopes = []
    for weight in (1.0, 100.0):
        agent = make(energy_loss_weight=weight, score_loss_weight=weight, **SCORE)
        window = agent.unfold(batch())
        loss = agent.model_loss(window, agent.draw(window)).loss
        model = agent.model
        parts = [*model.encoder.parameters(), *model.dynamics.parameters()]
        slopes.append(torch.autograd.grad(loss, parts, retain_graph=True))
        assert reached(loss, model.energy)
        assert reached(loss, model.score)
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)


def test_the_scale_of_the_energy_takes_in_every_update_and_is_saved():
    agent = make()
    metrics = agent.update(batch())
    expected = 0.01 * metrics["energy/mean"]
    torch.testing.assert_close(agent.energy_scale.mean, expected)
    other = make()
    other.load_state_dict(agent.state_dict())
    assert other.energy_scale.mean.equal(agent.energy_scale.mean)
    assert other.energy_scale.batches == 1


def test_steps_that_do_not_count_teach_the_energy_nothing():
    windows = batch()
    windows["valid"][:3, 1:] = False
    agent = make()
    window, draws, latents, _ = prepared(agent, windows)
    task = agent.model.task()
    loss, metrics = agent.energy_loss(latents[:-1], window, draws, task)
    spoilt = latents.clone()
    spoilt[1:3, :3] = float("nan")
    again, others = agent.energy_loss(spoilt[:-1], window, draws, task)
    assert again == loss
    assert all(metrics[name] == others[name] for name in metrics)


def test_the_search_wants_what_the_energy_favours():
    agent = make(num_policy_plans=0, diffusion_steps=20, num_plans=128, energy_weight=50.0)
    model = agent.model
    with torch.no_grad():
        for net in (model.reward, model.critics):
            net.weights[-1].zero_()
            net.biases[-1].zero_()
        for x in model.energy.parameters():
            x.zero_()
    model.energy.forward = lambda x: -(x[..., -2:] - 0.4).square().sum(-1, keepdim=True)
    assert act(agent).mean().item() == pytest.approx(0.4, abs=0.05)
    agent.energy_scale.warmup = 10**6
    assert act(agent).mean().item() == pytest.approx(0.0, abs=0.1)


def test_without_weight_there_is_no_energy():
    agent = make(energy_weight=0.0)
    assert agent.model.energy is None
    assert agent.energy_scale is None
    assert not any("energy" in name for name in agent.update(batch()))


# -- value targets -------------------------------------------------------------------------------


def next_actions(agent, windows=None):
    window, draws, _, encoded = prepared(agent, windows)
    with torch.no_grad():
        found = agent.next_action(encoded, window, draws, agent.model.task(window.tasks))
    return window, draws, encoded, found


def test_targets_ask_about_the_policy():
    agent = make()
    _, draws, encoded, found = next_actions(agent)
    own = agent.model.act(encoded, draws["target"], agent.model.task()).action
    torch.testing.assert_close(found, own)


def test_targets_ask_about_the_replay_and_behind_it_about_the_policy():
    agent = make(value_target="replay")
    windows = batch()
    windows["valid"][0, 2] = False  # the episode of window 0 ends behind step 1
    window, draws, encoded, found = next_actions(agent, windows)
    own = agent.model.act(encoded, draws["target"], agent.model.task()).action
    assert found[:2, 1:].equal(window.actions[1:, 1:])
    torch.testing.assert_close(found[2], own[2])
    assert found[0, 0].equal(window.actions[1, 0])
    torch.testing.assert_close(found[1, 0], own[1, 0])


def test_targets_ask_about_the_score_network_from_what_was_done():
    agent = make(value_target="score", **SCORE)
    window, _, encoded, found = next_actions(agent)
    task, steps = agent.model.task(), agent.settings.score_steps
    taken, nothing = window.actions, torch.zeros(2)
    for t, b in ((0, 3), (1, 0), (2, 5)):
        left = [*taken[t + 1 :, b], *[nothing] * (t + 1)]
        start = torch.stack(left)[None]
        state = agent.model.state(encoded[t, b][None], task)
        plan = denoise(agent.model.score, state, start, agent.schedule, steps, task)
        torch.testing.assert_close(found[t, b], plan[0, 0], rtol=1e-4, atol=1e-5)


def test_targets_ask_about_a_search():
    agent = make(value_target="search", num_policy_plans=2)
    window, draws, encoded, found = next_actions(agent)
    own = {k.removeprefix("search_"): x for k, x in draws.items() if k.startswith("search_")}
    planner = agent._target_planner
    assert (planner.schedule.steps, planner.number) == (3, 16)
    plan = planner.plan(
        encoded.flatten(0, 1), window.following().flatten(0, 1), own, agent.model.task()
    )
    torch.testing.assert_close(found, plan.action.view(3, 8, 2))


@pytest.mark.parametrize("target", ["pi", "replay", "score", "search"])
def test_every_target_makes_updates_with_tasks(target):
    """Oracle 16 for next actions."""
    agent = make(specs=TASKS, value_target=target, **SCORE)
    windows = batch(specs=TASKS)
    windows["action"][1::2, :, 1] = 0.0  # task b has one dimension
    window, _, _, found = next_actions(agent, windows)
    assert (found[:, window.tasks == 1, 1] == 0).all()
    assert (found[:, window.tasks == 0] != 0).all()
    metrics = agent.update(windows)
    assert all(x.isfinite().all() for x in metrics.values())


# -- score network -------------------------------------------------------------------------------


def test_the_score_s_loss_shapes_nothing_but_its_network():
    agent = make(**SCORE)
    window, draws, latents, _ = prepared(agent)
    loss = agent.score_loss(latents[0], window, draws, agent.model.task())
    assert reached(loss, agent.model.score)
    model = agent.model
    for part in (model.encoder, model.dynamics, model.reward, model.critics, model.policy):
        assert not reached(loss, part)
    assert draws["score_level"].min() >= 1
    assert draws["score_level"].max() <= 3


def test_the_score_learns_from_replayed_plans_and_from_its_own():
    agent = make(**SCORE)
    window, draws, latents, _ = prepared(agent)
    draws["score_own"] = torch.zeros(4, 1, 1, dtype=torch.bool)
    seen = []
    own = agent.model.score.forward
    agent.model.score.forward = lambda *x: seen.append(x) or own(*x)
    agent.score_loss(latents[0], window, draws, agent.model.task())
    state, x, levels = seen[-1]
    power = torch.tensor(agent.schedule.alpha_bar)[levels].view(-1, 1, 1)
    rows = draws["score_rows"]
    taken = window.actions[:, rows].transpose(0, 1)
    torch.testing.assert_close(x, power.sqrt() * taken + (1 - power).sqrt() * draws["score_noise"])
    assert state.equal(latents[0, rows])
    assert len(rows.unique()) == 4
    draws["score_own"] = ~draws["score_own"]
    agent.score_loss(latents[0], window, draws, agent.model.task())
    plan = denoise(agent.model.score, state, 0 * taken, agent.schedule, 4, agent.model.task())
    mixed = power.sqrt() * plan + (1 - power).sqrt() * draws["score_noise"]
    torch.testing.assert_close(seen[-4][1], mixed)


def searched_by_hand(agent, window, draws, latent, index):
    """Return noisy plan, level, and the mean that the network should predict, of one row."""
    model, row = agent.model, draws["score_rows"][index]
    task = model.task(None if window.tasks is None else window.tasks[row][None])
    used = 1.0 if task.mask is None else task.mask.float()
    level, z = int(draws["score_level"][index]), latent[row][None]
    power = agent.schedule.alpha_bar[level]
    state = model.state(z, task)
    clean = window.actions[:, row]
    if draws["score_own"][index]:
        clean = denoise(model.score, state, torch.zeros(1, 3, 2), agent.schedule, 4, task)[0]
    x = used * (math.sqrt(power) * clean + math.sqrt(1 - power) * draws["score_noise"][index])
    noise = torch.cat((draws["score_candidates"], -draws["score_candidates"]))
    plans = used * (x / math.sqrt(power) + agent.schedule.sigma(level) * noise).clamp(-1, 1)
    gained = torch.stack(
        [
            imagined_by_hand(agent, z, plan, tail, draws["score_critics"], task)
            for plan, tail in zip(plans, draws["score_tails"], strict=True)
        ]
    )
    weights = ((gained - gained.mean()) / gained.std() / 0.5).softmax(0)
    predicted = used * model.score(state, x[None], draws["score_level"][index][None])[0]
    return predicted, (weights[:, None, None] * plans).sum(0)


def imagined_by_hand(agent, z, plan, tail, critics, task):
    """Return J of one plan ``[H, A]``, with the energy, from a latent ``[1, L]``."""
    model, scale, gamma = agent.model, agent.energy_scale, float(task.gamma)
    total = torch.zeros(())
    for t, action in enumerate(plan):
        pair = model.pair(z, action[None], task)
        energy = ((model.energy(pair)[0, 0] - scale.mean) / scale.std).clamp(-5, 5)
        total = total + gamma**t * (model.scalar.decode(model.reward(pair))[0])
        total = total + gamma**t * agent.settings.energy_weight * energy
        z = model.dynamics(pair)
    last = model.act(z, tail[None], task).action
    values = model.scalar.decode(model.critics(model.pair(z, last, task)))[critics, 0]
    return total + gamma ** len(plan) * values.mean()


@pytest.mark.parametrize("specs", [SPECS, TASKS])
def test_the_score_s_target_is_the_search_s_mean_step_by_step(specs):
    agent = make(specs=specs, energy_weight=0.7, **SCORE)
    agent.energy_scale.mean.fill_(0.3)
    agent.energy_scale.std.fill_(0.6)
    window, draws, latents, _ = prepared(agent)
    loss = agent.score_loss(latents[0], window, draws, agent.model.task(window.tasks))
    with torch.no_grad():
        pairs = [searched_by_hand(agent, window, draws, latents[0], i) for i in range(4)]
    errors = torch.stack([(found - wanted).square().mean() for found, wanted in pairs])
    torch.testing.assert_close(loss, errors.mean(), rtol=1e-4, atol=1e-6)


# -- rows of a batch -----------------------------------------------------------------------------


def half_collected(agent):
    """Return a replay whose batches begin with data, at -7, and end with what was collected."""
    action = np.zeros((40, 2), np.float32)
    trajectory = {
        "observation": np.full((41, 3), -7.0, np.float32),
        "action": action,
        "reward": np.zeros(40, np.float32),
        "terminated": np.zeros(40, bool),
    }
    offline = WindowSampler(OfflineDataset.from_trajectories([trajectory]), agent.window, seed=0)
    replay = SequenceReplay(
        agent.window, capacity=100, num_envs=1, seed=0, offline=offline, offline_share=0.5
    )
    seen, flag = torch.full((1, 40, 3), 7.0), torch.zeros(1, 40, 1, dtype=torch.bool)
    after = {"observation": seen, "reward": torch.zeros(1, 40, 1)}
    after |= dict.fromkeys(("terminated", "done", "diverged"), flag)
    steps = {"observation": seen, "action": torch.zeros(1, 40, 2), "is_init": flag, "next": after}
    replay.extend(TensorDict(steps, [1, 40]))
    return replay


def test_collected_steps_teach_the_score_and_are_diagnosed_beside_data():
    agent = make(diagnostics_interval=1, diagnostics_rows=4, **SCORE)
    replay = half_collected(agent)
    rows = {"score": [], "diagnose": []}
    own, plan = agent.score_loss, agent.planner.plan

    def score_loss(latent, window, draws, task):
        rows["score"].append(window.observations[0, draws["score_rows"], 0] > 0)
        return own(latent, window, draws, task)

    def planned(latent, start, draws, task):
        collected = agent.model.encode(torch.full((4, 3), 7.0), task)
        rows["diagnose"].append((latent - collected).abs().amax(-1) < 1e-3)
        return plan(latent, start, draws, task)

    agent.score_loss, agent.planner.plan = score_loss, planned
    for _ in range(20):
        window = agent.unfold(replay.sample(32))
        made = agent.model_loss(window, agent.draw(window))
        agent.diagnose(window, made.encoded)
    for seen in rows.values():
        assert 0.3 < torch.cat(seen).float().mean() < 0.7


# -- acting --------------------------------------------------------------------------------------


def act(agent, kind=ExplorationType.DETERMINISTIC, specs=SPECS, rows=4):
    observation = batch(rows, specs)["observation"]
    given = {"observation": observation, "is_init": torch.ones(rows, 1, dtype=torch.bool)}
    with set_exploration_type(kind):
        return agent.policy(TensorDict(given, [rows]))["action"]


def test_what_acts_is_the_search_the_score_or_the_policy():
    planners = {"search": DiffusionPlanner, "score": ScorePlanner, "policy": PolicyPlanner}
    for name, planner in planners.items():
        assert isinstance(make(act=name, **SCORE).planner, planner)


def test_the_score_acts_without_imagining_anything():
    agent = make(act="score", **SCORE)
    calls = []
    agent.model.dynamics.forward = lambda x: calls.append("dynamics")
    own = agent.model.score.forward
    agent.model.score.forward = lambda *x: calls.append("score") or own(*x)
    act(agent)
    assert calls == ["score"] * 3  # as many as there are rounds, at most score_steps


@pytest.mark.parametrize("name", ["search", "score", "policy"])
def test_actions_are_zero_where_a_task_has_none(name):
    """Oracle 16."""
    for kind in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM):
        actions = act(make(specs=TASKS, act=name, **SCORE), kind, TASKS)
        assert (actions[1::2, 1] == 0).all()
        assert (actions[0::2] != 0).all()


def test_the_widest_round_is_the_same_for_any_number_of_levels():
    for steps in (2, 5, 20):
        schedule = make(diffusion_steps=steps).schedule
        assert schedule.steps == steps
        assert schedule.sigma(steps - 1) == pytest.approx(0.3266, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act": "score"}, "needs agent.score_network=true"),
        ({"value_target": "score"}, "needs agent.score_network=true"),
        ({"value_target": "q"}, "agent.value_target"),
        ({"num_plans": 4, "num_elites": 0}, "agent.num_plans"),
        ({"num_elites": 65}, "agent.num_elites"),
        ({"score_samples": 7}, "must be even"),
        ({"diffusion_steps": 1}, "agent.diffusion_steps"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        agents.settings_class("mbdpo")(**settings)


# -- the search step by step ---------------------------------------------------------------------


def searched_plan(agent, z, start, draws, task, e):
    """Return what reverse diffusion finds for one of several environments, as specified."""
    model, schedule = agent.model, agent.schedule
    used = task.mask.float()
    x = math.sqrt(schedule.alpha_bar[-1]) * start * used
    for index, level in enumerate(range(schedule.steps - 1, 0, -1)):
        power = schedule.alpha_bar[level]
        sigma = math.sqrt((1 - power) / power)
        fresh = (x / math.sqrt(power) + sigma * draws["candidates"][index, e]).clamp(-1, 1)
        rolled = []
        for noise in draws["policy"][index, e]:
            latent, plan = z, []
            for step in noise:
                plan.append(model.act(latent, step[None], task).action)
                latent = model.dynamics(model.pair(latent, plan[-1], task))
            rolled.append(torch.cat(plan))
        plans = used * torch.cat((torch.stack(rolled), fresh))
        gained = torch.stack(
            [
                imagined_by_hand(agent, z, plan, tail, draws["critics"][index], task)
                for plan, tail in zip(plans, draws["tails"][index, e], strict=True)
            ]
        )
        best = gained.topk(agent.settings.num_elites).indices
        logits = (gained - gained.mean()) / gained.std() / agent.settings.temperature
        mean = (logits[best].softmax(0)[:, None, None] * plans[best]).sum(0)
        score = (math.sqrt(power) * mean - x) / (1 - power + 1e-8)
        x = used * (x + (1 - power) * score) / math.sqrt(schedule.alpha[level])
    return x.clamp(-1, 1)


@torch.no_grad()
def test_reverse_diffusion_step_by_step_for_every_task():
    """The search of the official code in plain loops, with energy, masks and discounts."""
    agent = make(specs=TASKS, num_plans=24, num_policy_plans=4, energy_weight=0.3)
    observation, tasks = agent.divide(batch(2, TASKS)["observation"])
    task = agent.model.task(tasks)
    assert task.gamma[0] != task.gamma[1]
    draw = torch.Generator().manual_seed(3)
    z, start = agent.model.encode(observation, task), 2 * torch.rand(2, 3, 2, generator=draw) - 1
    draws = agent.planner.draw(2, draw)
    found = agent.planner.plan(z, start, draws, task)
    for e in range(2):
        alone = agent.model.task(tasks[e : e + 1])
        plan = searched_plan(agent, z[e : e + 1], start[e], draws, alone, e)
        torch.testing.assert_close(found.plan[e], plan, rtol=0, atol=1e-4)
        explored = (found.plan[e, 0] + 0.05 * draws["explore"][e]).clamp(-1, 1)
        torch.testing.assert_close(found.explored[e], alone.mask[0] * explored)

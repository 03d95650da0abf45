"""Runs on a data set, and then online, go on bit for bit."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from genpol import agents
from genpol.agent import Specs
from genpol.data.dataset import OfflineDataset
from genpol.errors import DatasetError
from genpol.offline import NetworkSettings
from genpol.training import checkpoint
from genpol.training.groups import CollectorDied, DirectCollection
from genpol.training.loop import Training
from genpol.training.run import Run
from genpol.training.settings import CheckpointSettings, EvaluationSettings, TrainSettings

SMALL = {
    "batch_size": 16,
    "horizon": 2,
    "online_warmup_steps": 64,
    "updates_per_step": 0.2,
    "actor": NetworkSettings(hidden=[8]),
    "critic": NetworkSettings(hidden=[8]),
    "normalize_observations": True,
}
FLOW = SMALL | {"solver_steps": 2}
WORLD_MODEL = {
    "batch_size": 8,
    "horizon": 2,
    "warmup_steps": 64,
    "catch_up": False,
    "updates_per_step": 0.2,
    "encoder_dim": 8,
    "mlp_dim": 8,
    "latent_dim": 8,
    "num_critics": 3,
    "act": "policy",
    "offline_share": 0.5,
}
SETTINGS = {
    "bc": FLOW,
    "iql": SMALL,
    "fql": FLOW,
    "qc": FLOW | {"best_of": 3, "action_steps": 1},
    "dqc": FLOW | {"horizon": 4, "chunk": 2},
    "qgf": FLOW,
    "fisher_decorator": FLOW | {"num_scores": 2, "zero_init": False},
    "rlpd": SMALL | {"num_critics": 3},
    "cdsa": SMALL | {"horizon": 1, "normalize_observations": False},
    "tdmpc2": WORLD_MODEL,
}


@pytest.fixture
def dataset():
    """Return walks of the point mass under random actions."""
    generator = torch.Generator().manual_seed(0)
    trajectories = []
    for _ in range(10):
        action = 2 * torch.rand(10, 1, generator=generator) - 1
        x = torch.cat((torch.zeros(1, 1), 0.3 * action.cumsum(0)))
        trajectories.append(
            {
                "observation": x.numpy(),
                "action": action.numpy(),
                "reward": -(x[1:, 0] - 0.5).abs().numpy(),
                "terminated": torch.zeros(10, dtype=torch.bool).numpy(),
                "goal": x.numpy(),
            }
        )
    return OfflineDataset.from_trajectories(trajectories)


def start(folder, make_env, dataset, updates, online, *, agent, run=None, collectors=1):
    settings = TrainSettings(
        num_envs=4,
        num_collectors=collectors,
        total_steps=updates,
        online_steps=online,
        evaluation=EvaluationSettings(interval_steps=20, episodes=4),
        checkpoint=CheckpointSettings(interval_steps=10**9, keep=3),
        tensorboard=False,
        env=None,
        agent=None,
    )
    options = agents.settings_class(agent)(**SETTINGS[agent])
    specs = Specs.from_env(make_env(num_envs=1), num_envs=4)
    make_agent = partial(agents.make, agent, options, specs, seed=0)
    if run is None:
        run = Run.create(folder, "toy", agent, 0, {}, ["test"], tensorboard=False)
    return Training(make_agent(), make_env, settings, run, dataset, make_agent)


def rows(training, name):
    lines = (training.run.path / name).read_text().splitlines()
    clock = lines[0].split(",").index("wall_clock_s")
    return [[x for i, x in enumerate(line.split(",")) if i != clock] for line in lines]


def maker(agent, point_mass, point_mass_to_goal):
    return point_mass_to_goal if agent == "dqc" else point_mass


def assert_equal(straight, stopped):
    a, b = straight.agent.state_dict(), stopped.agent.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert straight.steps == stopped.steps
    assert all(row in rows(stopped, "evals.csv") for row in rows(straight, "evals.csv"))


@pytest.mark.parametrize("agent", SETTINGS)
def test_resume_on_data_is_exact(tmp_path, point_mass, point_mass_to_goal, dataset, agent):
    make_env = maker(agent, point_mass, point_mass_to_goal)
    straight = start(tmp_path / "a", make_env, dataset, 60, 0, agent=agent)
    straight.start()
    first = start(tmp_path / "b", make_env, dataset, 30, 0, agent=agent)
    first.start()
    torch.manual_seed(12345)
    second = start(
        tmp_path / "b", make_env, dataset, 60, 0, agent=agent, run=Run.open(first.run.path)
    )
    second.resume(checkpoint.latest(first.run.checkpoints))
    second.start()
    assert_equal(straight, second)
    assert second.env_steps == 0
    assert second.agent.gradient_steps == 60


@pytest.mark.parametrize("agent", SETTINGS)
@pytest.mark.parametrize("half", [40, 136])
def test_resume_online_is_exact(tmp_path, point_mass, point_mass_to_goal, dataset, agent, half):
    make_env = maker(agent, point_mass, point_mass_to_goal)
    straight = start(tmp_path / "a", make_env, dataset, 30, 240, agent=agent)
    straight.start()
    assert straight.agent.gradient_steps == 30 + int((240 - 64) * 0.2)
    first = start(tmp_path / "b", make_env, dataset, 30, half, agent=agent)
    first.start()
    torch.manual_seed(12345)
    second = start(
        tmp_path / "b", make_env, dataset, 30, 240, agent=agent, run=Run.open(first.run.path)
    )
    second.resume(checkpoint.latest(first.run.checkpoints))
    second.start()
    assert_equal(straight, second)
    assert rows(straight, "metrics.csv") == rows(second, "metrics.csv")


def test_a_run_on_data_goes_on_online_when_resumed(tmp_path, point_mass, dataset):
    first = start(tmp_path, point_mass, dataset, 30, 0, agent="fql")
    first.start()
    run = Run.open(first.run.path)
    second = start(tmp_path, point_mass, dataset, 30, 200, agent="fql", run=run)
    second.resume(checkpoint.latest(run.checkpoints))
    second.start()
    assert second.env_steps == 200
    assert second.agent.gradient_steps == 30 + int((200 - 64) * 0.2)


def test_a_collector_that_dies_at_once_costs_no_updates_on_data(
    tmp_path, point_mass, dataset, monkeypatch
):
    def die(*arguments):
        raise CollectorDied("collector 0 of 2 died")

    first = start(tmp_path, point_mass, dataset, 30, 200, agent="fql", collectors=2)
    with monkeypatch.context() as patch:
        patch.setattr(DirectCollection, "collect", die)
        with pytest.raises(CollectorDied, match="died; step-000000000030 is saved"):
            first.start()
    run = Run.open(first.run.path)
    second = start(tmp_path, point_mass, dataset, 30, 200, agent="fql", run=run, collectors=2)
    second.resume(checkpoint.latest(run.checkpoints))
    second.start()
    assert second.env_steps == 200
    assert second.agent.gradient_steps == 30 + int((200 - 64) * 0.2)


def test_another_data_set_is_not_resumed_on(tmp_path, point_mass, dataset):
    first = start(tmp_path, point_mass, dataset, 30, 0, agent="fql")
    first.start()
    columns = {**dataset.columns, "action": dataset.columns["action"] * 0.5}
    other = OfflineDataset(columns, dataset.ends, {})
    run = Run.open(first.run.path)
    second = start(tmp_path, point_mass, other, 60, 0, agent="fql", run=run)
    with pytest.raises(DatasetError, match="not the data set of the run"):
        second.resume(checkpoint.latest(run.checkpoints))


def test_evaluations_leave_no_trace_in_what_is_collected(tmp_path, point_mass, dataset):
    quiet = start(tmp_path / "a", point_mass, dataset, 10, 200, agent="qc")
    quiet._evaluate = lambda *arguments: setattr(quiet, "_evaluated_at", quiet.steps)
    quiet.start()
    loud = start(tmp_path / "b", point_mass, dataset, 10, 200, agent="qc")
    loud.start()
    a, b = quiet.agent.state_dict(), loud.agent.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_success_is_evaluated_where_the_environment_tells(tmp_path, point_mass_to_goal, dataset):
    training = start(tmp_path, point_mass_to_goal, dataset, 5, 0, agent="dqc")
    training.start()
    header, *cells = rows(training, "evals.csv")
    column = header.index("success_mean")
    assert all(0.0 <= float(row[column]) <= 1.0 for row in cells)

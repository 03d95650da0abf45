"""N steps straight equal N/2, a stop and N/2 more, bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from genpol import agents
from genpol.agent import Specs
from genpol.errors import CheckpointError, NonFiniteError
from genpol.offline.settings import NetworkSettings
from genpol.on_policy.masks import CAPOSettings
from genpol.on_policy.pipo import PIPOSettings
from genpol.on_policy.settings import RiskSettings
from genpol.training import checkpoint
from genpol.training.loop import Training
from genpol.training.run import Run
from genpol.training.settings import CheckpointSettings, EvaluationSettings, TrainSettings

SMALL = {
    "rollout_steps": 7,
    "epochs": 2,
    "minibatches": 2,
    "actor_hidden": [16],
    "critic_hidden": [16],
    "noise_correlation": 0.5,
}
STAGES = {
    "stage_steps": [300],
    "refinement_steps": 300,
    "decoder_hidden": [16],
    "fit_steps": 10,
    "fit_batch_size": 64,
}
REPLAY = {
    "rollout_steps": 7,
    "warmup_steps": 150,
    "updates_per_step": 0.1,
    "batch_size": 32,
    "replay_capacity": 500,
    "actor_hidden": [16],
    "critic_hidden": [16],
}
ONE_GRADIENT = {
    "rollout_steps": 7,
    "critic_epochs": 2,
    "critic_minibatches": 2,
    "actor_hidden": [16],
    "critic_hidden": [16],
}
DENOISING = {name: x for name, x in SMALL.items() if name != "noise_correlation"}
FINETUNING = {
    "horizon": 3,
    "action_steps": 2,
    "solver_steps": 2,
    "batch_size": 16,
    "num_critics": 2,
    "online_warmup_steps": 200,
    "updates_per_step": 0.1,
    "replay_capacity": 500,
    "actor": NetworkSettings(hidden=[16], layer_norm="none"),
    "critic": NetworkSettings(hidden=[16]),
}
CHAINS = {"preset": "ogpo", "policy_batch_size": 8, "group_size": 2, "policy_period": 2}
WORLD_MODEL = {
    "rollout_steps": 7,
    "warmup_steps": 150,
    "updates_per_step": 0.02,
    "batch_size": 8,
    "replay_capacity": 500,
    "encoder_dim": 8,
    "mlp_dim": 8,
    "latent_dim": 8,
    "num_critics": 3,
    "num_plans": 8,
    "num_elites": 4,
    "num_policy_plans": 2,
    "diagnostics_interval": 10,
    "horizon": 2,
}
SEARCHES = {
    "diffusion_steps": 3,
    "energy_warmup": 5,
    "score_network": True,
    "score_rows": 4,
    "score_samples": 4,
    "value_target": "score",
}
SETTINGS = {
    "ogpo": FINETUNING | CHAINS,
    "best_of_n": FINETUNING | {"best_of": 2},
    "dsrl": FINETUNING | {"small_hidden": [16]},
    "residual": FINETUNING | {"small_hidden": [16], "progress_steps": 900},
    "ppo": SMALL,
    "fpo": DENOISING | {"solver_steps": 3, "pairs": 2},
    "dppo": DENOISING | {"solver_steps": 3},
    "reinflow": DENOISING | {"solver_steps": 3, "wasserstein_coefficient": 0.1},
    "bpo": SMALL,
    "mdpo": SMALL | {"critic_minibatches": 4},
    "gorl": SMALL | STAGES,
    "npg_igt": ONE_GRADIENT,
    "harpg": ONE_GRADIENT,
    "sac": REPLAY,
    "mdpo_off_policy": REPLAY | {"critic": "v", "reference_period": 200},
    "tdmpc2": WORLD_MODEL | {"iterations": 2},
    "mbdpo": WORLD_MODEL | SEARCHES,
}
FROM_POLICY = {"actor": NetworkSettings(hidden=[16], layer_norm="none")}
REMEMBERING = {
    "surrogate": "r2vpo",
    "pipo": PIPOSettings(enabled=True, window=2, min_episodes=1, gate=0.0),
    "capo": CAPOSettings(enabled=True, calibration_rollouts=2),
    "risk": RiskSettings(coefficient=0.5),
}


def start(folder, make_env, total_steps, *, agent="ppo", run=None, seed=0, num_envs=16, **extra):
    settings = TrainSettings(
        seed=seed,
        num_envs=num_envs,
        total_steps=total_steps,
        evaluation=EvaluationSettings(interval_steps=500, episodes=8),
        checkpoint=CheckpointSettings(interval_steps=10**9, keep=3),
        tensorboard=False,
        env=None,
        agent=None,
    )
    options = agents.settings_class(agent)(**(SETTINGS[agent] | extra))
    specs = Specs.from_env(make_env(num_envs=1), num_envs=num_envs)
    made = agents.make(agent, options, specs, seed=seed)
    if run is None:
        run = Run.create(folder, "toy", agent, seed, {}, ["test"], tensorboard=False)
    return Training(made, make_env, settings, run)


def weights_of(training):
    return {name: x.clone() for name, x in training.agent.state_dict().items()}


def rows(training, name):
    """Return the cells of a table without those that tell the time."""
    lines = (training.run.path / name).read_text().splitlines()
    clock = lines[0].split(",").index("wall_clock_s")
    return [[x for i, x in enumerate(line.split(",")) if i != clock] for line in lines]


# 112 steps per update; GoRL's stages change after 3 updates, data come for 3 more.
@pytest.mark.parametrize(
    ("agent", "half", "extra"),
    [
        *[("ppo", 448, {}), ("gorl", 224, {}), ("gorl", 448, {}), ("gorl", 896, {})],
        # in the warm-up; with a replay that has begun to overwrite
        *[("bpo", 448, {}), ("mdpo", 448, {}), ("fpo", 448, {}), ("dppo", 448, {})],
        *[(name, 448, FROM_POLICY) for name in ("dppo", "reinflow")],
        *[("sac", 112, {}), ("sac", 672, {}), ("mdpo_off_policy", 672, {})],
        # in the warm-up; in the midst of episodes, whose plans go on
        *[("tdmpc2", 112, {}), ("mbdpo", 672, {})],
        ("ppo", 672, REMEMBERING),
        # in the midst of chunks, of which two of three actions are carried out
        *[(name, 688, {}) for name in ("ogpo", "best_of_n", "dsrl", "residual")],
        # after the first step; before a rollout for the gradient, and before one for the Hessian
        *[("npg_igt", 112, {}), ("npg_igt", 448, {})],
        *[("harpg", half, {"normalized": half > 112}) for half in (112, 448, 560)],
    ],
)
def test_resume_is_exact(tmp_path, point_mass, agent, half, extra):
    straight = start(tmp_path / "a", point_mass, 1344, agent=agent, **extra)
    straight.start()
    first = start(tmp_path / "b", point_mass, half, agent=agent, **extra)
    first.start()
    torch.manual_seed(12345)  # another process would have another global generator
    run = Run.open(first.run.path)
    second = start(tmp_path / "b", point_mass, 1344, agent=agent, run=run, **extra)
    second.resume(checkpoint.latest(first.run.checkpoints))
    second.start()
    a, b = weights_of(straight), weights_of(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert second.env_steps == straight.env_steps == 1344

    assert rows(straight, "metrics.csv") == rows(second, "metrics.csv")
    # The first half ended with an evaluation that the straight run has not.
    assert all(row in rows(second, "evals.csv") for row in rows(straight, "evals.csv"))


def test_another_seed_gives_other_weights(tmp_path, point_mass):
    runs = [start(tmp_path, point_mass, 224, seed=seed) for seed in (0, 1)]
    for run in runs:
        run.start()
    a, b = (weights_of(run) for run in runs)
    assert not all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_checkpoint_and_stop(tmp_path, point_mass, number):
    training = start(tmp_path, point_mass, 10**7)
    update = training.agent.update

    def interrupted(batch):
        os.kill(os.getpid(), number)
        return update(batch)

    training.agent.update = interrupted
    training.start()
    assert training.interrupted == signal.Signals(number).name
    saved = checkpoint.load(checkpoint.latest(training.run.checkpoints))
    assert saved["env_steps"] == training.env_steps == 112


def terminate_in_evaluation(training, env_steps):
    """Let a SIGTERM come in the third step of the evaluation at ``env_steps``; list its steps."""
    env, steps = training._evaluation_env, []
    step = env.step

    def signalled(tensordict):
        if training.env_steps == env_steps:
            steps.append(None)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return step(tensordict)

    env.step = signalled
    return steps


# One under way, the last, and the first, before which each agent has another state to save.
@pytest.mark.parametrize(
    ("agent", "at", "total"),
    [("ppo", 560, 784), ("ppo", 560, 560), *[(x, 0, 224) for x in ("ppo", "gorl", "sac")]],
)
def test_a_signal_cuts_an_evaluation_short_which_resume_repeats(
    tmp_path, point_mass, agent, at, total
):
    straight = start(tmp_path / "a", point_mass, total, agent=agent)
    straight.start()
    first = start(tmp_path / "b", point_mass, total, agent=agent)
    steps = terminate_in_evaluation(first, at)
    first.start()
    assert first.interrupted == "SIGTERM"
    assert first.env_steps == at
    assert len(steps) == 3
    torch.manual_seed(12345)  # another process would have another global generator
    second = start(tmp_path / "b", point_mass, total, agent=agent, run=Run.open(first.run.path))
    second.resume(checkpoint.latest(first.run.checkpoints))
    second.start()
    assert second.interrupted is None
    a, b = weights_of(straight), weights_of(second)
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("metrics.csv", "evals.csv"):
        assert rows(straight, name) == rows(second, name)
    # The evaluation that was repeated is part of the last checkpoint: it is not made a third time.
    third = start(tmp_path / "b", point_mass, total, agent=agent, run=Run.open(first.run.path))
    third.resume(checkpoint.latest(first.run.checkpoints))
    third.start()
    assert rows(third, "evals.csv") == rows(straight, "evals.csv")


def test_sigusr1_checkpoints_and_goes_on(tmp_path, point_mass):
    training = start(tmp_path, point_mass, 336)
    update, calls = training.agent.update, []

    def signalled(batch):
        if not calls:
            os.kill(os.getpid(), signal.SIGUSR1)
        calls.append(None)
        return update(batch)

    training.agent.update = signalled
    training.start()
    names = sorted(path.name for path in training.run.checkpoints.iterdir())
    assert names == [checkpoint.step_name(112), checkpoint.step_name(336)]


def test_nonfinite_losses_stop_the_run_with_a_dump_and_no_checkpoint(tmp_path, point_mass):
    training = start(tmp_path, point_mass, 10**6, nonfinite_patience=3)
    critic = training.agent.policy.encoder.critic
    with torch.no_grad():
        next(iter(critic.parameters()))[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="in a row"):
        training.start()
    assert (
        not training.run.checkpoints.exists() or checkpoint.latest(training.run.checkpoints) is None
    )
    assert [path.name for path in training.run.path.glob("dump-*")] == ["dump-0"]


def test_a_checkpoint_of_other_networks_is_refused_and_nothing_is_lost(tmp_path, point_mass):
    first = start(tmp_path, point_mass, 112)
    first.start()
    saved = checkpoint.latest(first.run.checkpoints)
    metrics = (first.run.path / "metrics.csv").read_text()
    wider = start(tmp_path, point_mass, 224, run=Run.open(first.run.path), actor_hidden=[32])
    with pytest.raises(CheckpointError, match="do not fit the agent"):
        wider.resume(saved)
    assert checkpoint.load(saved)["env_steps"] == 112
    assert (first.run.path / "metrics.csv").read_text() == metrics


def test_another_number_of_environments_is_refused(tmp_path, point_mass):
    first = start(tmp_path, point_mass, 112)
    first.start()
    other = start(tmp_path, point_mass, 224, run=Run.open(first.run.path), num_envs=8)
    with pytest.raises(CheckpointError, match="num_envs=16, not 8"):
        other.resume(checkpoint.latest(first.run.checkpoints))


def test_a_checkpoint_of_a_version_that_kept_less_is_refused(tmp_path, point_mass):
    first = start(tmp_path, point_mass, 112)
    first.start()
    saved = checkpoint.latest(first.run.checkpoints)
    state = checkpoint.load(saved)
    del state["training"]["learner"]["likelihood"]
    older = checkpoint.save(first.run.checkpoints, "step-113", state, metadata={}, keep=3)
    with pytest.raises(CheckpointError, match="has no 'likelihood', which this version keeps"):
        start(tmp_path, point_mass, 224, run=Run.open(first.run.path)).resume(older)

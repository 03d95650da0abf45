from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from genpol.cli import bench, bench_ppo
from genpol.cli.configuration import compose, to_settings
from genpol.errors import ConfigError
from genpol.report import ppo_yardsticks, results
from genpol.report.ppo_yardsticks import OneFilePPO, Rollout, Workload

TINY = ("num_envs=4", "agent.rollout_steps=8", "agent.minibatches=2", "seconds=0.01", "rounds=1")
WORK = Workload(
    task="Pendulum-v1",
    num_envs=16,
    rollout_steps=8,
    epochs=3,
    minibatches=4,
    actor_hidden=[16],
    critic_hidden=[16],
    learning_rate=1e-2,
    clip=0.2,
    gamma=0.99,
    gae_lambda=0.95,
    max_grad_norm=0.5,
    seed=0,
)


def test_ppo_without_an_environment_is_measured_beside_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [key for key in bench_ppo.KEYS if key.startswith(("genpol", "cleanrl"))]
    arguments = ["agent=ppo", *TINY, "--only", ",".join(keys), "--save", "--results", str(tmp_path)]
    assert bench.run(arguments) == 0
    out = capsys.readouterr().out
    assert "end to end / cleanrl-style: " in out
    assert "update / cleanrl-style: " in out
    frame = results.read(tmp_path / "bench-ppo-HalfCheetah-v5.csv")
    assert (frame["value"] > 0).all()
    assert set(frame["metric"]) == {
        "samples_per_s/genpol-update",
        "samples_per_s/cleanrl-update",
        "env_steps_per_s/genpol-end-to-end",
        "env_steps_per_s/cleanrl-end-to-end",
        "ratio/genpol-update:cleanrl-update",
        "ratio/genpol-end-to-end:cleanrl-end-to-end",
    }


def test_the_ratio_to_stable_baselines3_is_told_with_what_is_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("stable_baselines3")
    only = "genpol-update,sb3-update,genpol-end-to-end,sb3-end-to-end"
    assert bench.run(["--learning", "env=HalfCheetah-v5", *TINY, "--only", only]) == 0
    lines = capsys.readouterr().out.splitlines()
    ratio = next(x for x in lines if x.startswith("end to end / stable-baselines3: "))
    assert ratio.endswith("(wanted >= 1.5)")
    assert any(x.startswith("update / stable-baselines3: ") for x in lines)


def test_without_stable_baselines3_its_contenders_are_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    assert bench.run(["agent=ppo", *TINY, "--only", "sb3-update,cleanrl-update"]) == 0
    out = capsys.readouterr().out
    assert "skipped" in out
    assert "pip install 'genpol[bench]'" in out
    assert "wanted" not in out


def test_a_task_that_gymnasium_lacks_is_for_the_library_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    only = "genpol-update,cleanrl-update"
    assert bench.run(["env=HopperStand", "recipe=none", "--learning", *TINY, "--only", only]) == 0
    assert "the task is not one of gymnasium's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["agent=sac"], "agent=sac: --learning measures ppo, fql, qgf"),
        (["agent=gorl"], "agent=gorl: --learning measures"),
        (["agent.surrogate=bpo"], "set agent.surrogate=ppo"),
        (["agent.critic_minibatches=32"], "set agent.critic_minibatches=0"),
        (["num_envs=3", "agent.rollout_steps=6"], "must divide the 18 rows"),
        (["env.action_repeat=2"], "env.action_repeat"),
        (["device=cuda"], "must be cpu"),
        (["--only", "sb3-updat"], "Did you mean 'sb3-update'"),
        (["--only", "mj_step"], "unknown contender"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        bench.run(["--learning", *arguments])
    assert "\n" not in str(error.value)


def test_stepping_is_still_what_an_environment_means() -> None:
    assert not bench._parse(["env=HopperStand", "agent=ppo"]).learning
    assert not bench._parse(["agent=sac"]).learning
    options = bench._parse(["agent=ppo", "num_envs=8"])
    assert options.learning == "ppo"
    assert options.overrides == ["agent=ppo", "num_envs=8", "env=HalfCheetah-v5"]


def test_all_make_the_same_number_of_optimiser_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3")
    overrides = ["num_envs=4", "agent.rollout_steps=8", "agent.minibatches=2", "agent.epochs=3"]
    settings = to_settings(compose(bench.complete(overrides, "ppo")))
    work = bench_ppo._workload(settings)
    sizes: list[int] = []
    step = OneFilePPO._step
    monkeypatch.setattr(
        OneFilePPO, "_step", lambda self, rows: sizes.append(len(rows["value"])) or step(self, rows)
    )
    with ExitStack() as cleanup:
        agent, batches = bench_ppo._training(settings, cleanup)
        agent.update(next(batches))
        one_file, collector = ppo_yardsticks._one_file_parts(work, cleanup)
        one_file.update(collector.collect(one_file))
        other = ppo_yardsticks._sb3_model(work, cleanup)
        steps = {int(x["step"]) for x in other.policy.optimizer.state.values()}
    assert sizes == 6 * [16]
    assert agent.gradient_steps == 6
    assert steps == {6}


def test_all_have_networks_of_the_same_widths() -> None:
    pytest.importorskip("stable_baselines3")
    settings = to_settings(compose(bench.complete([*TINY[:3], "agent.actor_hidden=[8,5]"], "ppo")))
    work = bench_ppo._workload(settings)
    with ExitStack() as cleanup:
        agent, _ = bench_ppo._training(settings, cleanup)
        one_file, _ = ppo_yardsticks._one_file_parts(work, cleanup)
        other = ppo_yardsticks._sb3_model(work, cleanup)
    shapes = [
        sorted(tuple(x.shape) for x in module.parameters() if x.ndim == 2 and x.shape[0] > 1)
        for module in (agent, one_file, other.policy)
    ]
    assert shapes[1] == shapes[2] == sorted([(8, 17), (5, 8), (6, 5), (64, 17), (64, 64)])
    assert shapes[0] == sorted([(8, 17), (5, 8), (12, 5), (64, 17), (64, 64)])


def test_few_environments_fill_as_many_rows() -> None:
    pytest.importorskip("stable_baselines3")
    with ExitStack() as cleanup:
        model = ppo_yardsticks._sb3_model(WORK, cleanup, num_envs=2)
    assert model.n_steps * model.n_envs == WORK.rows


@pytest.mark.slow
def test_environments_in_processes_fill_as_many_rows() -> None:
    pytest.importorskip("stable_baselines3")
    with ExitStack() as cleanup:
        assert ppo_yardsticks._sb3(WORK, cleanup, num_envs=2, processes=True)() == WORK.rows


def test_one_file_ppo_moves_towards_what_was_better_than_expected() -> None:
    torch.manual_seed(0)
    agent = OneFilePPO(3, 1, WORK)
    observation = torch.ones(8, 16, 3)
    before = agent.distribution(observation[0]).mean.mean().item()
    for _ in range(10):
        action, log_prob, value = agent.act(observation.flatten(0, 1))
        rollout = Rollout(
            observation=observation,
            action=action.view(8, 16, 1),
            log_prob=log_prob.view(8, 16),
            value=value.view(8, 16),
            reward=-(action.view(8, 16) - 1.0).square(),
            done=torch.ones(8, 16),
            last_observation=observation[0],
        )
        agent.update(rollout)
    after = agent.distribution(observation[0]).mean.mean().item()
    assert abs(before) < 0.1
    assert 0.5 < after < 1.5


def test_advantages_of_one_file_ppo_stop_at_the_end_of_an_episode() -> None:
    agent = OneFilePPO(1, 1, WORK)
    zeros = torch.zeros(3, 1)
    done = torch.tensor([[0.0], [1.0], [0.0]])
    reward = torch.tensor([[1.0], [2.0], [4.0]])
    torch.nn.init.zeros_(agent.critic[-1].weight)
    rollout = Rollout(
        observation=torch.zeros(3, 1, 1),
        action=torch.zeros(3, 1, 1),
        log_prob=zeros,
        value=zeros,
        reward=reward,
        done=done,
        last_observation=torch.zeros(1, 1),
    )
    decay = WORK.gamma * WORK.gae_lambda
    expected = torch.tensor([[1.0 + decay * 2.0], [2.0], [4.0]])
    torch.testing.assert_close(agent._advantage(rollout), expected)

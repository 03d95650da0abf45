"""`genpol policies` and `init=`: a cloned policy is packed, shown, shared and begun from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from genpol.cli import initial
from genpol.cli.main import main
from genpol.cli.runs import load_run
from genpol.errors import ConfigError
from genpol.training import policy_folder

ENV = ["env=Reacher-v5", "env.num_threads=1", "num_threads=1", "num_envs=1"]
QUIET = [*ENV, "evaluation.episodes=1", "tensorboard=false", "video=false"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a run of behaviour cloning and its policy, on made-up trajectories."""
    folder = tmp_path_factory.mktemp("policies")
    draw = np.random.default_rng(0)
    ends = np.zeros(60, dtype=bool)
    ends[19::20] = True
    data = folder / "reach.npz"
    np.savez(
        data,
        observations=draw.normal(size=(60, 10)).astype(np.float32),
        actions=draw.uniform(-1, 1, (60, 2)).astype(np.float32),
        terminals=ends,
    )
    options = ["agent=bc", "agent.actor.hidden=[8]", "agent.horizon=2", "agent.solver_steps=3"]
    options += ["agent.normalize_observations=true"]
    options += ["agent.batch_size=8", "total_steps=4", f"data={data}", f"output={folder}/runs"]
    assert main(["train", *QUIET, *options]) == 0
    run = next((folder / "runs").glob("*/bc/*"))
    assert main(["policies", "pack", str(run), f"output={folder}/packed/reach"]) == 0
    return {"run": run, "policy": folder / "packed" / "reach"}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["policies", *arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_packed_policy_is_the_run_s_model(made: dict[str, Path]) -> None:
    policy = policy_folder.read(made["policy"])
    own = load_run(made["run"]).agent.behaviour.state_dict()
    assert own.keys() == policy.weights.keys()
    assert all(torch.equal(own[name], x) for name, x in policy.weights.items())
    assert (policy.observation_dim, policy.action_dim, policy.action_steps) == (10, 2, 2)
    assert (policy.env, policy.control_period_s) == ("Reacher-v5", 0.02)
    assert policy.data["name"] == "reach.npz"
    assert policy.success["episodes"] == 1


def test_folder_of_policies_is_listed(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    row = said(capsys, "list", str(made["policy"].parent))
    assert row.split("\t")[:3] == ["reach", "Reacher-v5", "flow, chunks of 2, 3 steps"]


def test_policy_is_shown_without_its_statistics(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(said(capsys, "show", str(made["policy"])))
    assert record["statistics"] == "of 10 numbers"
    weights = policy_folder.read(made["policy"]).weights
    assert record["parameters"] == sum(x.numel() for x in weights.values())


@pytest.mark.parametrize("source", ["run", "policy"])
def test_finetuning_begins_from_a_run_or_its_policy(
    made: dict[str, Path], tmp_path: Path, source: str
) -> None:
    options = ["agent=best_of_n", "agent.critic.hidden=[8]", "agent.batch_size=8"]
    options += ["total_steps=8", f"output={tmp_path}", f"init={made[source]}"]
    assert main(["train", *QUIET, *options]) == 0
    trained = load_run(next(tmp_path.glob("*/best_of_n/*")))
    settings = trained.settings.agent
    assert (settings.horizon, settings.solver_steps, settings.actor.hidden) == (2, 3, [8])
    policy = policy_folder.read(made["policy"])
    found = trained.agent.behaviour.state_dict()
    assert all(torch.equal(found[name], x) for name, x in policy.weights.items())
    mean = trained.agent.observation_normalizer.mean
    torch.testing.assert_close(mean, policy.statistics["mean"], check_dtype=False)


def test_setting_against_the_policy_s_is_refused(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["agent=best_of_n", "agent.horizon=5", f"output={tmp_path}", f"init={made['policy']}"]
    assert "horizon" in refusal(capsys, "train", *QUIET, *options)
    assert not list(tmp_path.iterdir())


def test_other_environment_is_refused_with_the_difference(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["env=InvertedPendulum-v5", *QUIET[1:], f"output={tmp_path}"]
    message = refusal(capsys, "train", *where, "agent=best_of_n", f"init={made['policy']}")
    assert "is a policy for Reacher-v5" in message
    assert "observations of width 10 (the environment: 4)" in message
    assert "actions of width 2 (the environment: 1)" in message


def test_agent_without_a_model_cannot_begin_from_one(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"output={tmp_path}", "agent=ppo", f"init={made['policy']}"]
    message = refusal(capsys, "train", *QUIET, *options)
    assert "with which agent=ppo cannot begin" in message
    assert "ogpo" in message


def test_what_is_nowhere_is_refused_with_the_nearest(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "policies", "show", str(made["policy"].with_name("reech")))
    assert "no such run or policy" in message
    assert "reach" in message


def test_policies_that_come_with_genpol_are_sound_and_small(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = initial.shipped_policies()
    assert len(found) >= 3
    total = 0
    rates = []
    for folder in found.values():
        policy = policy_folder.read(folder)  # its weights are those of its record
        assert policy.data["updates"] > 0
        assert policy.success["episodes"] >= 100
        rates.append(policy.success["success_mean"])
        total += sum(file.stat().st_size for file in folder.iterdir())
    assert total < 5e6
    assert min(rates) < 0.2
    assert any(0.2 <= rate <= 0.5 for rate in rates)
    assert max(rates) > 0.9
    assert main(["policies", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in found)


def test_shipped_policies_are_named_by_their_folder(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(initial, "shipped_policies", lambda: {"reach-poor": made["policy"]})
    assert initial.locate("reach-poor") == made["policy"]
    assert said(capsys, "list").startswith("reach-poor\t")


@pytest.mark.parametrize("text", ["hf://name", "hf://a/b/c", "hf:///name", "a/b"])
def test_address_on_the_hub_has_owner_and_name(text: str) -> None:
    with pytest.raises(ConfigError, match="hf://owner/name"):
        initial.parse_hub(text)


def test_revision_is_part_of_the_address() -> None:
    assert initial.parse_hub("hf://owner/name@v2") == ("owner/name", "v2")
    assert initial.parse_hub("hf://owner/name") == ("owner/name", None)


def test_policy_is_fetched_from_the_hub(
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.update(options, repository=repository)
        return str(made["policy"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    said(capsys, "pull", "hf://owner/name@v2", f"output={tmp_path}/got")
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v2")
    assert sorted(asked["allow_patterns"]) == ["README.md", "policy.json", "weights.safetensors"]
    assert policy_folder.read(tmp_path / "got").env == "Reacher-v5"


def test_hub_out_of_reach_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise OSError("cannot resolve\nmany lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal(capsys, "policies", "pull", "hf://owner/name")
    assert "hf://owner/name" in message
    assert "offline" in message
    assert "many lines" not in message


def test_whole_policies_alone_are_shared(
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    client = SimpleNamespace(
        create_repo=lambda repository, **_: calls.append((repository, {})),
        upload_folder=lambda **options: calls.append((options["repo_id"], options)),
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client)
    damaged = tmp_path / "damaged"
    shutil.copytree(made["policy"], damaged)
    (damaged / "weights.safetensors").write_bytes(b"")
    refusal(capsys, "policies", "push", str(damaged), "hf://owner/name")
    assert calls == []
    said(capsys, "push", str(made["policy"]), "hf://owner/name")
    assert [name for name, _ in calls] == ["owner/name"] * 2
    assert calls[1][1]["folder_path"] == made["policy"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["liszt"], "list"),
        (["pack", "runs/x"], "output=FOLDER"),
        (["show", "a", "b"], "show POLICY"),
        (["list", "output=x"], "takes no output="),
        (["pull", "hf://a/b", "outptu=x"], "output"),
    ],
)
def test_misspelt_commands_are_told(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refusal(capsys, "policies", *arguments)

"""`genpol policies import` as people use it: a file, a folder, its card, and a run from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from genpol.cli import configuration, initial
from genpol.cli.building import build
from genpol.cli.main import main
from genpol.cli.runs import load_run
from genpol.errors import ConfigError
from genpol.pretrained import PolicyHolder
from genpol.training import policy_folder

# Reacher-v5, with a history of two observations.
OBSERVATION, ACTION, HISTORY, HORIZON, TIME, WIDTH = 10, 2, 2, 4, 8, 16


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write a small flow in the layout of ReinFlow; tests/foreign has all layouts."""
    generator = torch.Generator().manual_seed(0)
    chunk = HORIZON * ACTION
    sizes = {
        "time_embedding.1": (TIME, 2 * TIME),
        "time_embedding.3": (2 * TIME, TIME),
        "mlp_mean.moduleList.0.linear_1": (chunk + TIME + HISTORY * OBSERVATION, WIDTH),
        "mlp_mean.moduleList.1.linear_1": (WIDTH, chunk),
    }
    weights = {}
    for name, (fan_in, fan_out) in sizes.items():
        x = torch.randn(fan_out, fan_in, generator=generator) / math.sqrt(fan_in)
        weights |= {f"network.{name}.weight": x, f"network.{name}.bias": torch.zeros(fan_out)}
    config = {
        "env": "reacher",
        "obs_dim": OBSERVATION,
        "action_dim": ACTION,
        "cond_steps": HISTORY,
        "horizon_steps": HORIZON,
        "act_steps": 2,
        "denoising_steps": 3,
        "model": {
            "_target_": "model.flow.reflow.ReFlow",
            "network": {
                "_target_": "model.flow.mlp_flow.FlowMLP",
                "time_dim": TIME,
                "mlp_dims": [WIDTH],
                "activation_type": "ReLU",
                "residual_style": False,
            },
        },
    }
    folder = tmp_path / "seed=0"  # as Hydra names folders
    folder.mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    statistics = {"obs_min": -np.ones(OBSERVATION), "obs_max": np.ones(OBSERVATION)}
    statistics |= {"action_min": -np.ones(ACTION) / 2, "action_max": np.ones(ACTION) / 2}
    np.savez(folder / "normalization.npz", **statistics)
    torch.save({"model": weights, "ema": weights, "epoch": 1}, folder / "state_1.pt")
    return folder / "state_1.pt"


@pytest.fixture
def policy(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    target = tmp_path / "policy"
    command = ["policies", "import", "--format", "reinflow", str(file), f"output={target}"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{target}\n"
    return target


def test_an_imported_policy_has_a_card(policy: Path) -> None:
    assert {x.name for x in policy.iterdir()} == {"weights.safetensors", "policy.json", "README.md"}
    card = (policy / "README.md").read_text()
    assert "20 numbers, of 2 steps, standardised" in card
    assert "4 actions, 2 carried out" in card
    assert "env=<name> env.observation_steps=2 agent=ogpo init=policy" in card


def test_an_imported_policy_is_shown(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "show", str(policy)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["env"], shown["observation_steps"], shown["action_steps"]) == ("reacher", 2, 2)
    assert shown["model"]["network"] == "embedded_mlp"
    assert shown["action_high"] == [0.5, 0.5]
    assert shown["data"] == {"file": "state_1.pt", "format": "reinflow", "epochs": 1}


def begun(policy: Path, *overrides: str) -> PolicyHolder:
    """Return an agent that begins from a policy, as `genpol train` makes it."""
    start = initial.find(str(policy), overrides[0].removeprefix("agent="))
    config = configuration.compose([*overrides, "env=Reacher-v5"], model=start.settings())
    settings = configuration.to_settings(config)
    made, _ = build(settings)
    start.give(made, settings)
    made.check_ready()
    assert isinstance(made, PolicyHolder)
    return made


def test_a_run_begins_from_it(policy: Path) -> None:
    made = begun(policy, "agent=ogpo", "agent.preset=ogpo", "env.observation_steps=2")
    weights, _ = made.give_policy()
    kept = policy_folder.read(policy).weights
    assert all(torch.equal(x, kept[name]) for name, x in weights.items())


def test_a_run_without_the_history_is_refused(policy: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"width 20 .the environment: 10.* with env\.obs"
    ) as caught:
        begun(policy, "agent=bc")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("agent", ["dppo", "reinflow"])
def test_an_on_policy_run_begins_from_it(policy: Path, agent: str) -> None:
    made = begun(policy, f"agent={agent}", "env.observation_steps=2")
    kept = policy_folder.read(policy)
    weights, _ = made.give_policy()
    assert all(torch.equal(x, kept.weights[name]) for name, x in weights.items())
    assert made.give_bounds()["action_high"] == kept.action_high


def test_a_policy_folder_is_evaluated(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(policy), "env=Reacher-v5", "env.observation_steps=2"]
    assert main([*command, "episodes=1", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1
    assert main(["eval", str(policy), "episodes=1"]) == 2
    assert "no environment given" in capsys.readouterr().err


def test_as_many_actions_are_carried_out_unless_told_otherwise(policy: Path) -> None:
    trained = load_run(policy, ["env=Reacher-v5", "env.observation_steps=2"])
    assert trained.settings.agent.action_steps == 2
    other = load_run(policy, ["env=Reacher-v5", "env.observation_steps=2", "agent.action_steps=1"])
    assert other.settings.agent.action_steps == 1


@pytest.mark.slow
def test_a_run_from_it_is_evaluated_and_packed(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", "env=Reacher-v5", "env.observation_steps=2", f"init={policy}"]
    run += ["agent=best_of_n", "agent.best_of=1", "agent.num_critics=2", "agent.critic.hidden=[8]"]
    run += ["total_steps=100", "evaluation.episodes=2", "video=false", "tensorboard=false"]
    assert main([*run, f"output={tmp_path}"]) == 0
    made = next(tmp_path.glob("Reacher-v5/best_of_n/*"))
    capsys.readouterr()
    assert main(["eval", str(made), "episodes=2", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 2
    assert main(["policies", "pack", str(made), f"output={tmp_path / 'packed'}"]) == 0
    first, packed = policy_folder.read(policy), policy_folder.read(tmp_path / "packed")
    assert all(torch.equal(x, packed.weights[k]) for k, x in first.weights.items())
    assert packed.model == first.model
    for name in ("observation_steps", "observation_clip", "action_low", "action_high"):
        assert getattr(packed, name) == getattr(first, name), name


def test_an_existing_folder_is_not_overwritten(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy").mkdir()
    command = ["policies", "import", "--format=reinflow", str(file), f"output={tmp_path}/policy"]
    assert main(command) == 1
    assert "policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "write genpol policies import --format FORMAT PATH output=FOLDER"),
        (["output=x"], "the formats are dppo, reinflow, robomimic, lerobot"),
        (["output=x", "FILE"], "the formats are"),
        (["output=x", "FILE", "--format"], "format = ''"),
        (["output=x", "FILE", "--format", "act"], "format = 'act'"),
        (["output=x", "nowhere.pt", "--format", "dppo"], "nowhere.pt: no such file or folder"),
        (["output=x", "FILE", "--format", "dppo"], "import it with format=reinflow"),
        (["output=x", "FILE", "--format", "robomimic"], "is no checkpoint of robomimic"),
        (["output=x", "FILE", "--format", "lerobot"], "name that of config.json"),
        (["output=x", "FILE", "format=reinflow", "steps=0"], "steps = '0': must be an integer > 0"),
        (["output=x", "FILE", "format=reinflow", "steps=a"], "steps = 'a'"),
        (["output=x", "FILE", "format=reinflow", "action_range=[1]"], "action_range=[LOW,HIGH]"),
        (["output=x", "FILE", "format=reinflow", "action_range=[1,-1]"], "[LOW,HIGH]"),
        (["output=x", "FILE", "format=reinflow", "control_period_s=-1"], "must be a number > 0"),
        (["output=x", "FILE", "format=reinflow", "action_steps=5"], "must lie in [1, 4]"),
        (["output=x", "FILE", "format=reinflow", "config=none.yaml"], "none.yaml: no such file"),
        (["output=x", "FILE", "format=reinflow", "stepz=3"], "unknown option 'stepz'. Did you"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    file: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(file) if x == "FILE" else x for x in arguments]
    assert main(["policies", "import", *given]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()

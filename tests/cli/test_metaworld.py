"""Meta-World from the command line: data of its experts, and a clone that learns from them."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from genpol.cli import data_generate
from genpol.cli.configuration import compose
from genpol.cli.main import main
from genpol.envs import generation
from genpol.envs.metaworld_data import Recipe
from genpol.envs.settings import MetaWorldSettings
from genpol.errors import ConfigError

GENERATE = ["data", "generate", "env=reach-v3", "episodes=2", "noise=0.5", "num_workers=1"]
needs_metaworld = pytest.mark.metaworld


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("metaworld", reason="needs Meta-World: make test-metaworld")
    output = tmp_path_factory.mktemp("data") / "reach.npz"
    assert main([*GENERATE, f"output={output}"]) == 0
    return output


@pytest.fixture(scope="module")
def run_folder(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a clone for a few updates."""
    output = tmp_path_factory.mktemp("runs")
    small = ["agent=bc", "agent.actor.hidden=[8]", "agent.horizon=4", "num_envs=1"]
    small += ["total_steps=20", "evaluation.episodes=1", "video=false", "tensorboard=false"]
    assert main(["train", "env=reach-v3", *small, f"data={made}", f"output={output}"]) == 0
    return next(output.glob("reach-v3/bc/*"))


# --- without Meta-World ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["data", "generate", "env=reach-v3"], ["train", "env=reach-v3", "agent=ppo"]]
)
def test_missing_package_is_told_in_one_line(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    assert main([*command, f"output={tmp_path / 'made' / 'x.npz'}"]) == 2
    error = capsys.readouterr().err
    assert "package 'metaworld' is not installed" in error
    assert "make metaworld" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_task_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'peg-insert-side-v3'") as caught:
        compose(["env=peg-insert-v3"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["env=reach"], "unknown environment.*Did you mean 'reach-v3'"),
        (["env=reach-v3", "episodes=0"], "episodes = 0: must be >= 1"),
        (["env=reach-v3", "noise=much"], "noise = 'much': must be a number"),
        (["env=reach-v3", "noise=-1"], "noise = -1.0: must be >= 0"),
        (["env=reach-v3", "reward=spare"], "reward = 'spare'.*Did you mean 'sparse'"),
        (["env=reach-v3", "kind=play"], "kind: is no setting of"),
        (["env=cube-single-play", "reward=dense"], "reward: is no setting of"),
    ],
)
def test_wrong_settings_of_data_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        data_generate.run(arguments)
    assert "\n" not in str(caught.value)


# --- with it ---------------------------------------------------------------------------------


@needs_metaworld
def test_file_says_how_it_came_about(made: Path) -> None:
    with zipfile.ZipFile(made) as archive:
        found = json.loads(archive.comment)["genpol"]["metadata"]
    assert sorted(found.pop("versions")) == ["genpol", "metaworld", "mujoco", "numpy"]
    assert found == {
        **{"env": "reach-v3", "reward": "sparse", "noise": 0.5, "seed": 0},
        **{"split": "train", "episodes": 2},
    }


@needs_metaworld
def test_a_result_is_not_made_twice(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = made.read_bytes()
    assert main([*GENERATE, f"output={made}"]) == 1
    error = capsys.readouterr().err
    assert f"{made}: exists; nothing is overwritten" in error
    assert error.count("\n") == 1
    assert made.read_bytes() == before


@needs_metaworld
def test_the_same_command_goes_on_after_an_interruption(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "reach.npz"
    recipe = Recipe(settings=MetaWorldSettings(name="reach-v3"), noise=0.5)
    begun = generation.Generation(generation.Plan.of_size(recipe, 2), output)
    split, index, name = begun.missing()[0]
    generation._save(begun.folder / name, recipe.demonstrator().episode(split, index))
    begun.close()
    assert main([*GENERATE, f"output={output}"]) == 0
    out = capsys.readouterr().out
    assert "going on after 1 of 3 episodes" in out
    assert output.read_bytes() == made.read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["reach-val.npz", "reach.npz"]


@needs_metaworld
def test_file_is_valid(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, trajectories in ((made, 2), (made.with_name("reach-val.npz"), 1)):
        assert main(["data", "validate", str(path)]) == 0
        assert f"valid (ogbench, {trajectories} trajectories, " in capsys.readouterr().out


@needs_metaworld
def test_a_clone_is_judged_by_its_success(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header, *rows = (run_folder / "evals.csv").read_text().splitlines()
    assert "success_mean" in header.split(",")
    assert len(rows) == 2  # before and after
    assert main(["eval", str(run_folder), "episodes=1", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["success_mean"] in (0, 1)
    assert -500 <= found["return_mean"] <= 0


@needs_metaworld
def test_data_with_the_other_reward_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "env=reach-v3", "env.reward=dense", "agent=bc", "num_envs=1"]
    assert main([*command, f"data={made}", f"output={tmp_path}"]) == 1
    assert "set env.reward=sparse" in capsys.readouterr().err

from __future__ import annotations

from pathlib import Path

import pytest

from genpol.errors import ConfigError
from genpol.report import experiment

YAML = """
description: A test.
compute: none
seeds: [0, 1]
envs: [WalkerWalk, CheetahRun]
common: [total_steps=3, seed=9]
runs:
  gorl: [agent=gorl]
  ppo: [agent=ppo, total_steps=2]
"""


def load(folder: Path, text: str) -> experiment.Experiment:
    path = folder / "demo.yaml"
    path.write_text(text)
    return experiment.load(str(path))


def test_a_plan_has_every_agent_env_and_seed_seed_by_seed(tmp_path: Path) -> None:
    plan = load(tmp_path, YAML).plan()
    assert [run.name for run in plan[:4]] == [
        "gorl-WalkerWalk-s0",
        "ppo-WalkerWalk-s0",
        "gorl-CheetahRun-s0",
        "ppo-CheetahRun-s0",
    ]
    assert len({run.name for run in plan}) == 8


def test_a_key_is_given_once_and_the_run_wins_over_the_common(tmp_path: Path) -> None:
    run = load(tmp_path, YAML).plan(seeds=[5], only=["ppo", "WalkerWalk"])[0]
    assert sorted(run.overrides) == ["agent=ppo", "env=WalkerWalk", "seed=5", "total_steps=2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds:", "seed:"), "unknown field 'seed'.*'seeds'"),
        (("[0, 1]", "[zero]"), "seeds"),
        (("[0, 1]", "[]"), "seeds is empty"),
        (("agent=ppo,", "agent,"), "'agent' must read key=value"),
        (("gorl: [", "go/rl: ["), "'go/rl' must be letters"),
        (("compute: none\n", ""), "compute"),
        (("runs:", "runs: ["), "is not YAML"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, YAML.replace(*change, 1))
    assert "\n" not in str(error.value)


def test_the_shipped_experiments_load() -> None:
    assert {"gorl-hopperstand", "gorl-controls", "gorl-dmc"} <= set(experiment.names())
    for name in experiment.names():
        assert experiment.load(name).plan()


DATA = (
    YAML
    + """
data:
  CheetahRun: [num_transitions=10, output=made/cheetah.npz]
"""
)


def test_runs_learn_from_the_data_set_of_their_environment(tmp_path: Path) -> None:
    chosen = load(tmp_path, DATA)
    plan = chosen.plan(seeds=[0])
    given = {run.env: [x for x in run.overrides if x.startswith("data=")] for run in plan}
    assert given == {"WalkerWalk": [], "CheetahRun": ["data=made/cheetah.npz"]}
    command = ["env=CheetahRun", "num_transitions=10", "output=made/cheetah.npz"]
    assert chosen.data_sets(plan) == {Path("made/cheetah.npz"): command}
    assert chosen.data_sets(chosen.plan(only=["WalkerWalk"])) == {}


@pytest.mark.parametrize("change", [("  CheetahRun:", "  HopperStand:"), (", output=", ", out=")])
def test_data_that_no_run_can_find_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be of one of envs, and have output=FILE"):
        load(tmp_path, DATA.replace(*change))

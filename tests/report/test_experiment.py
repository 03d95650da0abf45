from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genpol.errors import ConfigError
from genpol.report import experiment, plan
from genpol.report.plan import DataSet, Training

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
        (("[0, 1]", "[0, 0]"), r"seeds = \[0, 0\]: must differ"),
        (("[0, 1]", "[0, -1]"), r"seeds = \[0, -1\].*at least 0"),
        (("WalkerWalk, CheetahRun", "WalkerWalk, WalkerWalk"), "envs = .*must differ"),
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
    assert chosen.data_sets(plan) == [
        DataSet(file=Path("made/cheetah.npz"), arguments=tuple(command), training=None)
    ]
    assert chosen.data_sets(chosen.plan(only=["WalkerWalk"])) == []


@pytest.mark.parametrize("change", [("  CheetahRun:", "  HopperStand:"), (", output=", ", out=")])
def test_data_that_no_run_can_find_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be of one of envs, and have output=FILE"):
        load(tmp_path, DATA.replace(*change))


OF_ENVS = (
    YAML
    + """
env_overrides:
  WalkerWalk: [total_steps=4, num_envs=8, seed=7]
"""
)


def test_overrides_of_an_environment_come_after_the_common_and_before_the_run(
    tmp_path: Path,
) -> None:
    plan = load(tmp_path, OF_ENVS).plan(seeds=[5])
    assert {run.name: run.command for run in plan} == {
        "gorl-WalkerWalk-s5": "genpol train env=WalkerWalk total_steps=4 seed=5 num_envs=8 "
        "agent=gorl",
        "ppo-WalkerWalk-s5": "genpol train env=WalkerWalk total_steps=2 seed=5 num_envs=8 "
        "agent=ppo",
        "gorl-CheetahRun-s5": "genpol train env=CheetahRun total_steps=3 seed=5 agent=gorl",
        "ppo-CheetahRun-s5": "genpol train env=CheetahRun total_steps=2 seed=5 agent=ppo",
    }


OF_RUNS = (
    OF_ENVS
    + """
run_overrides:
  ppo:
    WalkerWalk: [agent.clip=0.3, num_envs=2]
"""
)


def test_overrides_of_a_label_in_one_environment_come_before_all_others(tmp_path: Path) -> None:
    plain = {run.name: run.overrides for run in load(tmp_path, OF_ENVS).plan(seeds=[5])}
    own = {run.name: run.overrides for run in load(tmp_path, OF_RUNS).plan(seeds=[5])}
    changed = {name for name in plain if plain[name] != own[name]}
    assert changed == {"ppo-WalkerWalk-s5"}
    assert {"agent.clip=0.3", "num_envs=2", "agent=ppo"} <= {*own["ppo-WalkerWalk-s5"]}
    assert "num_envs=8" not in own["ppo-WalkerWalk-s5"]


RECORDED = (
    YAML
    + """
recorded:
  CheetahRun:
    - train: [agent=sac, total_steps=7]
      record: [episodes=9, output=made/cheetah-v0]
"""
)


def test_runs_learn_from_the_recorded_data_of_their_environment(tmp_path: Path) -> None:
    chosen = load(tmp_path, RECORDED)
    plan = chosen.plan(seeds=[0])
    given = {run.env: [x for x in run.overrides if x.startswith("data=")] for run in plan}
    assert given == {"WalkerWalk": [], "CheetahRun": ["data=made/cheetah-v0"]}
    (data,) = chosen.data_sets(plan)
    assert data == DataSet(
        file=Path("made/cheetah-v0"),
        arguments=("episodes=9", "output=made/cheetah-v0"),
        training=Training(
            name="data-CheetahRun", overrides=("env=CheetahRun", "agent=sac", "total_steps=7")
        ),
    )


SEVERAL = (
    YAML
    + """
recorded:
  CheetahRun:
    - {train: [agent=sac], record: [output=a/walk-v0]}
    - {train: [agent=sac, env=CartpoleSwingup], record: [output=a/pole-v0]}
"""
)


def test_runs_learn_from_a_folder_of_several_recordings(tmp_path: Path) -> None:
    chosen = load(tmp_path, SEVERAL)
    plan = chosen.plan(seeds=[0], only=["CheetahRun"])
    assert all("data=a" in run.overrides for run in plan)
    made = chosen.data_sets(plan)
    assert [data.file for data in made] == [Path("a/walk-v0"), Path("a/pole-v0")]
    trainings = [data.training for data in made]
    assert trainings == [
        Training(name="data-CheetahRun-1", overrides=("env=CheetahRun", "agent=sac")),
        Training(name="data-CheetahRun-2", overrides=("env=CartpoleSwingup", "agent=sac")),
    ]


# In the file, a run may stand before those that it begins from.
CHAINED = """
description: A test.
compute: none
seeds: [0, 1]
envs: [WalkerWalk]
common: [total_steps=3]
runs:
  tuned: [agent=gorl, "init={gorl}"]
  gorl: [agent=gorl]
  best: ["init={tuned}", "agent.x={a: 1}"]
"""


def test_runs_come_behind_those_that_they_begin_from(tmp_path: Path) -> None:
    chosen = load(tmp_path, CHAINED)
    gorl, tuned, best = chosen.plan(seeds=[5])
    assert [run.label for run in (gorl, tuned, best)] == ["gorl", "tuned", "best"]
    assert (gorl.needs, tuned.needs, best.needs) == ((), (gorl,), (tuned,))
    assert chosen.plan(seeds=[5], only=["tuned"]) == [gorl, tuned]
    assert chosen.plan(seeds=[5], only=["gorl"]) == [gorl]
    assert [chosen.made_of(x) for x in ("gorl", "tuned", "best")] == [
        {"tuned", "best"},
        {"best"},
        set(),
    ]


EVALUATED = (
    YAML
    + """
evaluations:
  gorl-plain: {run: gorl}
  gorl-corrected:
    run: gorl
    arguments: [episodes=9, "corrector=cdsa:{ppo}", "agent.x={a: 1}"]
"""
)


def test_an_evaluation_names_the_runs_of_its_environment_and_seed(tmp_path: Path) -> None:
    chosen = load(tmp_path, EVALUATED)
    planned = chosen.plan_evaluations(seeds=[5], only=["CheetahRun"])
    assert [item.name for item in planned] == [
        "gorl-plain-CheetahRun-s5",
        "gorl-corrected-CheetahRun-s5",
    ]
    runs = chosen.plan(seeds=[5], only=["CheetahRun"])
    assert planned[0].runs == (runs[0],)
    assert planned[1].runs == (runs[0], runs[1])
    folders = {"gorl": Path("some/gorl"), "ppo": Path("some/ppo")}
    expected = ["episodes=9", "corrector=cdsa:some/ppo", "agent.x={a: 1}"]
    assert plan.filled(planned[1].arguments, folders) == expected
    assert len(chosen.plan_evaluations()) == 2 * 2 * 2


@pytest.mark.parametrize(
    ("only", "runs", "evaluations"),
    [
        ((), {"gorl", "ppo"}, {"gorl-plain", "gorl-corrected"}),
        (("WalkerWalk",), {"gorl", "ppo"}, {"gorl-plain", "gorl-corrected"}),
        (("gorl",), {"gorl"}, set()),
        (("gorl-plain",), {"gorl"}, {"gorl-plain"}),
        (("gorl-corrected", "WalkerWalk"), {"gorl", "ppo"}, {"gorl-corrected"}),
        (("ppo", "gorl-plain"), {"gorl", "ppo"}, {"gorl-plain"}),
    ],
)
def test_the_label_of_an_evaluation_keeps_what_it_needs(
    tmp_path: Path, only: tuple[str, ...], runs: set[str], evaluations: set[str]
) -> None:
    chosen = load(tmp_path, EVALUATED)
    assert {run.label for run in chosen.plan(only=only)} == runs
    planned = chosen.plan_evaluations(only=only)
    assert {item.label for item in planned} == evaluations
    if "WalkerWalk" in only:
        assert {item.env for item in planned} == {"WalkerWalk"}


# Makes a run folder as training does, and notes what it was called with.
GENPOL = """#!{python}
import sys
from pathlib import Path
arguments = dict(x.partition("=")[::2] for x in sys.argv[1:])
if sys.argv[1] == "train":
    (Path(arguments["output"]) / arguments["env"] / arguments["agent"] / "now").mkdir(parents=True)
with open("calls", "a") as calls:
    print(*sys.argv[1:], sep="|", file=calls)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_a_shell_repeats_an_evaluation_by_its_command(tmp_path: Path) -> None:
    program = tmp_path / "genpol"
    program.write_text(GENPOL.format(python=sys.executable))
    program.chmod(0o755)
    item = load(tmp_path, EVALUATED).plan_evaluations(seeds=[5], only=["CheetahRun"])[1]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    line = f"{item.command}  # unfinished"
    subprocess.run(["sh", "-c", line], check=True, cwd=tmp_path, env={"PATH": path})
    folder = "repeat/{0}-CheetahRun-s5/CheetahRun/{0}/now"
    assert (tmp_path / "calls").read_text().splitlines() == [
        "train|env=CheetahRun|total_steps=3|seed=5|agent=gorl|output=repeat/gorl-CheetahRun-s5",
        "train|env=CheetahRun|total_steps=2|seed=5|agent=ppo|output=repeat/ppo-CheetahRun-s5",
        f"eval|{folder.format('gorl')}|json=true|episodes=9|corrector=cdsa:{folder.format('ppo')}"
        "|agent.x={a: 1}",
    ]


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_a_shell_repeats_a_run_after_those_that_it_needs(tmp_path: Path) -> None:
    program = tmp_path / "genpol"
    program.write_text(GENPOL.format(python=sys.executable))
    program.chmod(0o755)
    text = CHAINED.replace('"init={tuned}", ', 'agent=ppo, "init={tuned}", "other={gorl}/x", ')
    (*_, item) = load(tmp_path, text).plan(seeds=[5])
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", item.command], check=True, cwd=tmp_path, env={"PATH": path})
    folder = "repeat/{}-WalkerWalk-s5"
    run = folder + "/WalkerWalk/gorl/now"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"train|env=WalkerWalk|total_steps=3|agent=gorl|seed=5|output={folder.format('gorl')}",
        f"train|env=WalkerWalk|total_steps=3|agent=gorl|init={run.format('gorl')}|seed=5"
        f"|output={folder.format('tuned')}",
        f"train|env=WalkerWalk|total_steps=3|agent=ppo|init={run.format('tuned')}"
        f"|other={run.format('gorl')}/x|agent.x={{a: 1}}|seed=5"
        f"|output={folder.format('best')}",
    ]


def test_a_changed_run_changes_the_commands_of_its_evaluations(tmp_path: Path) -> None:
    before = load(tmp_path, EVALUATED).plan_evaluations(seeds=[0])
    after = load(tmp_path, EVALUATED.replace("=ppo,", "=ppo, x=1,")).plan_evaluations(seeds=[0])
    changed = {a.label for a, b in zip(before, after, strict=True) if a.command != b.command}
    assert changed == {"gorl-corrected"}


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (
            OF_ENVS,
            ("  WalkerWalk:", "  Walkerwalk:"),
            "env_overrides of 'Walkerwalk'.*'WalkerWalk'",
        ),
        (OF_ENVS, ("num_envs=8", "num_envs"), "'num_envs' must read key=value"),
        (
            OF_RUNS,
            ("    WalkerWalk: [agent", "    Walkerwalk: [agent"),
            "run_overrides of 'ppo' in 'Walkerwalk' must be of one of envs.*'WalkerWalk'",
        ),
        (OF_RUNS, ("  ppo:\n    Walk", "  pp:\n    Walk"), "run_overrides needs runs 'pp'.*'ppo'"),
        (OF_RUNS, ("agent.clip=0.3", "agent.clip"), "'agent.clip' must read key=value"),
        (OF_RUNS, ("agent.clip=0.3", "'x={gorl}'"), "stands for the folder of a run only in runs"),
        (RECORDED, ("  CheetahRun:", "  HopperStand:"), "recorded of 'HopperStand' must be of one"),
        (RECORDED, (", output=", ", out="), "and have output=FILE"),
        (RECORDED, ("agent=sac,", "sac,"), "'sac' must read key=value"),
        (RECORDED, ("episodes=9", "9"), "'9' must read key=value"),
        (RECORDED, ("train:", "trained:"), r"recorded.CheetahRun\[0\]: Key 'trained'"),
        (
            RECORDED,
            ("      record: [ep", "      # record: [ep"),
            r"recorded.CheetahRun\[0\]: .*: record",
        ),
        (RECORDED, ("- train:", "  train:"), "recorded.CheetahRun: must be a list of"),
        (
            SEVERAL,
            ("{train: [agent=sac], record: [output=a/walk-v0]}", "agent=sac"),
            r"recorded.CheetahRun\[0\]: must be {train: .*record",
        ),
        (RECORDED, ("agent=sac", "'x={gorl}'"), "{gorl} stands for the folder of a run only in"),
        (RECORDED, ("episodes=9", "'x={gorl}'"), "{gorl} stands for the folder of a run only in"),
        (SEVERAL, ("a/pole", "b/pole"), "must be different data sets in one folder"),
        (SEVERAL, ("a/pole-v0", "a/walk-v0"), "must be different data sets in one folder"),
        (CHAINED, ("init={gorl}", "init={gorll}"), "run 'tuned' needs runs 'gorll'.*'gorl'"),
        (CHAINED, ("[agent=gorl]", '["init={best}"]'), "tuned for gorl for best for tuned"),
        (CHAINED, ("[agent=gorl]", '["init={gorl}"]'), "wait for each other: gorl for gorl"),
        (CHAINED, ("[total_", '["x={gorl}", total_'), "{gorl} stands for .* only in"),
        (RECORDED, ("recorded:", "data: {CheetahRun: [output=x]}\nrecorded:"), "data and in rec"),
        (EVALUATED, ("run: gorl}", "run: gorll}"), "needs runs 'gorll', which there are not"),
        (EVALUATED, ("cdsa:{ppo}", "cdsa:{pp}"), "'pp', which there are not. Did you mean 'ppo'"),
        (EVALUATED, ("gorl-plain:", "ppo:"), "evaluation 'ppo' is also the label of runs"),
        (EVALUATED, ("gorl-plain:", "gorl/plain:"), "'gorl/plain' must be letters"),
        (EVALUATED, ("episodes=9", "json=true"), "json=true is given anyway"),
        (EVALUATED, ("episodes=9", "episodes"), "'episodes' must read key=value"),
        (EVALUATED, ("{run: gorl}", "{arguments: []}"), "evaluations.gorl-plain.run"),
    ],
)
def test_a_wrong_entry_is_told_in_one_line(
    tmp_path: Path, text: str, change: tuple[str, str], message: str
) -> None:
    assert change[0] in text
    with pytest.raises(ConfigError, match=message) as error:
        load(tmp_path, text.replace(*change, 1))
    assert "\n" not in str(error.value)

"""Overrides become typed settings, and wrong ones are refused in one line."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from genpol.cli.configuration import compose, load, to_settings
from genpol.errors import ConfigError
from genpol.training.settings import TrainSettings

Refused = Callable[..., str]
STAND = "env=HopperStand"


def settings(*overrides: str) -> TrainSettings:
    return to_settings(compose(overrides))


# --- what is composed ------------------------------------------------------------------------


@pytest.mark.usefixtures("stub_configs")
def test_settings_are_frozen_dataclasses() -> None:
    result = settings(STAND)
    assert type(result.agent).__name__ == "AgentSettings"
    assert type(result.env).__name__ == "MujocoSettings"
    for level in (result, result.agent, result.agent.decoder, result.evaluation):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(level, dataclasses.fields(level)[0].name, 1)


@pytest.mark.usefixtures("stub_configs")
def test_recipe_of_agent_and_environment_is_taken_by_itself() -> None:
    result = settings(STAND)
    assert (result.agent.epochs, result.seed, result.choices.recipe) == (7, 3, "gorl_HopperStand")


@pytest.mark.usefixtures("stub_configs")
def test_pair_without_recipe_has_the_defaults() -> None:
    result = settings("env=CheetahRun")
    assert (result.agent.epochs, result.seed, result.choices.recipe) == (4, 0, "")


@pytest.mark.usefixtures("stub_configs")
@pytest.mark.parametrize("override", ["recipe=none", "recipe=null", "~recipe"])
def test_recipe_can_be_left_out(override: str) -> None:
    result = settings(STAND, override)
    assert (result.agent.epochs, result.choices.recipe) == (4, "")


@pytest.mark.usefixtures("stub_configs")
def test_recipe_of_another_environment_can_be_asked_for() -> None:
    result = settings("env=CheetahRun", "recipe=gorl_HopperStand")
    assert (result.agent.epochs, result.choices.recipe) == (7, "gorl_HopperStand")


@pytest.mark.usefixtures("stub_configs")
def test_overrides_win_over_the_recipe() -> None:
    assert settings(STAND, "agent.epochs=2", "seed=9").agent.epochs == 2


@pytest.mark.usefixtures("stub_configs")
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_plus_signs_of_hydra_are_accepted(prefix: str) -> None:
    assert settings(STAND, f"{prefix}seed=8", f"{prefix}recipe=none").seed == 8


@pytest.mark.usefixtures("stub_configs")
@pytest.mark.parametrize("text", ["2e6", "2_000_000", "2000000", "2.0e+6"])
def test_whole_numbers_may_be_written_short(text: str) -> None:
    steps = settings(STAND, f"total_steps={text}").total_steps
    assert (type(steps), steps) == (int, 2_000_000)


@pytest.mark.usefixtures("stub_configs")
def test_integer_is_taken_for_a_number() -> None:
    rate = settings(STAND, "agent.learning_rate=1").agent.learning_rate
    assert (type(rate), rate) == (float, 1.0)


@pytest.mark.usefixtures("stub_configs")
def test_nested_values_lists_and_references_are_set() -> None:
    result = settings(
        STAND,
        "agent.decoder.steps=2",
        "agent.hidden=[8,8,8]",
        "evaluation={episodes: 3, seed: 4}",
        "checkpoint.interval_steps=${total_steps}",
        "resume=runs/a b/c",
    )
    assert (result.agent.decoder.steps, result.agent.hidden) == (2, [8, 8, 8])
    assert (result.evaluation.episodes, result.evaluation.seed) == (3, 4)
    assert result.checkpoint.interval_steps == result.total_steps
    assert result.resume == "runs/a b/c"


@pytest.mark.usefixtures("stub_configs")
def test_composing_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    handlers = list(logging.getLogger().handlers)
    settings(STAND)
    settings("env=CheetahRun")
    assert set(tmp_path.rglob("*")) == before
    assert logging.getLogger().handlers == handlers
    assert capsys.readouterr() == ("", "")
    assert not GlobalHydra.instance().is_initialized()


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["env=HoperStand"],
            "unknown environment 'HoperStand'. Did you mean 'HopperStand'?"
            " `genpol list envs` shows all",
        ),
        (["env=hopperstand"], "Did you mean 'HopperStand'?"),
        (["env=mujoco_schema"], "unknown environment 'mujoco_schema'"),
        (["env=[a]"], "env is a name"),
        (["env="], "env is empty"),
        ([STAND, "agent=pppo"], "unknown agent 'pppo'. Did you mean 'ppo'? `genpol list agents`"),
        ([STAND, "agent=null"], "agent is empty"),
        ([STAND, "recipe=gorl_Hoper"], "unknown recipe 'gorl_Hoper'. Did you mean 'gorl_Hopper"),
        ([STAND, "experiment=x"], "experiments are run by `genpol reproduce <name>`"),
        (["agent=ppo"], "no environment given: add env=<name>"),
        ([], "no environment given: add env=<name>"),
        (["env=gym"], "env.id is not set: add env.id=<value>"),
    ],
)
def test_wrong_names(refused: Refused, overrides: list[str], message: str) -> None:
    assert message in refused(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agent.learning_rte=1", "'agent.learning_rte'. Did you mean 'agent.learning_rate'?"),
        ("agent.decoder.stps=1", "'agent.decoder.stps'. Did you mean 'agent.decoder.steps'?"),
        ("agent.decodr.steps=1", "'agent.decodr.steps'. Did you mean 'agent.decoder'?"),
        ("evaluation.episods=1", "Did you mean 'evaluation.episodes'?"),
        ("evaluation={episods: 1}", "Did you mean 'evaluation.episodes'?"),
        ("num_env=1", "Did you mean 'num_envs'?"),
        ("learning_rate=1", "'learning_rate'. Did you mean 'agent.learning_rate'?"),
        ("+agent.epoch=1", "Did you mean 'agent.epochs'?"),
        ("agent.zzz=1", "agent has learning_rate, epochs, layer_norm, hidden, decoder"),
        ("seed.x=1", "seed has no settings of its own"),
        ("hydra.run.dir=x", "unknown setting 'hydra.run.dir'"),
        ("choices.agent=ppo", "choices.agent is filled in by genpol"),
    ],
)
def test_unknown_keys(refused: Refused, override: str, message: str) -> None:
    assert message in refused(STAND, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agent.epochs=abc", "agent.epochs = 'abc': must be an integer"),
        ("agent.epochs=2.5", "agent.epochs = 2.5: must be an integer"),
        ("seed=null", "seed = null: must be an integer"),
        ("agent.learning_rate=fast", "agent.learning_rate = 'fast': must be a number"),
        ("agent.layer_norm=perhaps", "agent.layer_norm = 'perhaps': must be true or false"),
        ("agent.hidden=64", "agent.hidden = 64: must be a list of int"),
        ("agent.hidden=[a]", "agent.hidden = ['a']: must be a list of int"),
        ("agent.decoder.steps=x", "agent.decoder.steps = 'x': must be an integer"),
        ("resume=[a]", "resume = ['a']: must be text or null"),
        ("evaluation=3", "evaluation = 3: is a group of settings; set evaluation."),
        ("agent.epochs=${output}", "agent.epochs = '${output}': "),
        ("seed=${nothing}", "seed = '${nothing}': Interpolation key 'nothing' not found"),
    ],
)
def test_wrong_types(refused: Refused, override: str, message: str) -> None:
    assert message in refused(STAND, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agent.learning_rate=-1", "agent.learning_rate = -1.0: must be > 0"),
        ("agent.learning_rate=nan", "agent.learning_rate = nan: must be > 0"),
        ("agent.decoder.steps=0", "agent.decoder.steps = 0: must be > 0"),
        ("seed=-1", "seed = -1: must lie in [0, "),
        ("total_steps=0", "total_steps = 0: must be >= 1"),
        ("num_envs=0", "num_envs = 0: must be >= 1"),
        ("num_threads=-1", "num_threads = -1: must be >= 0"),
        ("evaluation.episodes=0", "evaluation.episodes = 0: must be >= 1"),
        ("evaluation.interval_steps=0", "evaluation.interval_steps = 0: must be > 0"),
        ("checkpoint.interval_steps=0", "checkpoint.interval_steps = 0: must be > 0"),
        ("checkpoint.keep=0", "checkpoint.keep = 0: must be >= 1"),
        ("device=gpu", "device = 'gpu': must be cpu, cuda"),
        ("output=", "output = ''"),
    ],
)
def test_bounds(refused: Refused, override: str, message: str) -> None:
    assert refused(STAND, override).startswith(message)


def test_resume_and_init_exclude_each_other(refused: Refused) -> None:
    assert "exclude each other" in refused(STAND, "resume=a", "init=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a=(", "cannot read 'a=('"),
        ("a=[1,2", "cannot read 'a=[1,2'"),
        ("=3", "cannot read '=3'"),
        ("CheetahRun", "cannot read 'CheetahRun': write env=CheetahRun"),
        ("nonsense", "cannot read 'nonsense': write key=value"),
        ("--num-envs", "unknown option '--num-envs'; settings are written num_envs=value"),
        ("--num-envs=3", "cannot read '--num-envs=3'"),
        ("seed=1,2", "asks for several runs"),
        ("seed=range(1,3)", "asks for several runs"),
        ("env@other=CheetahRun", "packages (@) are not supported"),
        ("~seed", "only ~recipe can be left out"),
    ],
)
def test_syntax(refused: Refused, override: str, message: str) -> None:
    assert message in refused(STAND, override)


def test_key_given_twice(refused: Refused) -> None:
    assert "seed is given twice: 'seed=1' and '+seed=2'" in refused(STAND, "seed=1", "+seed=2")


def test_group_given_twice(refused: Refused) -> None:
    assert "env is given twice" in refused(STAND, "env=CheetahRun")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("misspelt", "recipe/misspelt.yaml: unknown setting 'agent.epoch'"),
        ("ill-typed", "recipe/ill-typed.yaml: agent.epochs: Value 'many'"),
        ("broken", 'recipe/broken.yaml", line 2'),
    ],
)
def test_wrong_files(refused: Refused, recipe: str, message: str) -> None:
    assert message in refused(STAND, f"recipe={recipe}")


# --- what is restored ------------------------------------------------------------------------


def _save(path: Path, *overrides: str) -> TrainSettings:
    config = compose(overrides)
    OmegaConf.save(config, path / "config.yaml", resolve=True)
    return to_settings(config)


def test_saved_configuration_is_restored(stub_configs: Path, tmp_path: Path) -> None:
    saved = _save(tmp_path, STAND, "agent.hidden=[8]", "resume=a", "total_steps=2e6")
    (stub_configs / "recipe/gorl_HopperStand.yaml").write_text(
        "# @package _global_\nagent: {epochs: 1}\n"
    )
    restored = to_settings(load(tmp_path / "config.yaml"))
    assert restored == saved


@pytest.mark.usefixtures("stub_configs")
def test_restored_configuration_takes_overrides(tmp_path: Path) -> None:
    _save(tmp_path, STAND)
    restored = to_settings(load(tmp_path / "config.yaml", ["total_steps=77"]))
    assert (restored.total_steps, restored.agent.epochs) == (77, 7)


@pytest.mark.usefixtures("stub_configs")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("a: [", "is not a configuration: while parsing"),
        ("seed: 1\n", "is not the configuration of a genpol run"),
        ("choices: {task: x}\n", "has unknown choices"),
        ("- 1\n", "is not the configuration of a genpol run"),
        ("choices: {agent: sac, env: HopperStand}\n", "unknown agent 'sac'"),
        ("choices: {agent: ppo, env: HopperStand}\nsede: 1\n", "'sede'. Did you mean 'seed'?"),
    ],
)
def test_foreign_file_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("stub_configs")
def test_run_keeps_its_agent(tmp_path: Path) -> None:
    _save(tmp_path, STAND)
    with pytest.raises(ConfigError, match="agent=ppo: a run keeps the agent it has"):
        load(tmp_path / "config.yaml", ["agent=ppo"])

"""`genpol eval RUN corrector=cdsa:RUN`: without a step the numbers are those of the policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genpol.agent import Specs
from genpol.cli import correction
from genpol.cli.main import main
from genpol.envs import MujocoSettings, OGBenchSettings
from genpol.errors import ConfigError

TINY = ["env=Reacher-v5", "num_threads=1", "env.num_threads=1", "evaluation.episodes=1"]
TINY += ["tensorboard=false", "video=false"]
OFFLINE = [*TINY, "num_envs=2", "agent.batch_size=8", "total_steps=20"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return runs by agent, and under `data` a data set that the first of them recorded."""
    output = tmp_path_factory.mktemp("runs")
    data = output / "data"

    def train(agent: str, *arguments: str) -> Path:
        made = [*arguments, f"agent={agent}", f"output={output}"]
        assert main(["train", *made]) == 0
        return next(output.glob(f"*/{agent}/*"))

    ppo = ["num_envs=4", "agent.rollout_steps=25", "agent.minibatches=2", "total_steps=100"]
    found = {"ppo": train("ppo", *TINY, *ppo), "data": data}
    recording = [str(found["ppo"]), f"output={data}", "episodes=4", "format=genpol"]
    assert main(["data", "record", *recording]) == 0
    small = ["agent.actor.hidden=[8]", "agent.critic.hidden=[8]"]
    for agent in ("iql", "cdsa"):
        found[agent] = train(agent, *OFFLINE, *small, f"data={data}")
    return found


@pytest.fixture
def evaluated(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function from a policy's agent and options to what `genpol eval` says."""

    def run(agent: str, *options: str, corrector: str | None = None) -> dict[str, Any]:
        capsys.readouterr()
        given = [] if corrector is None else [f"corrector={corrector}"]
        arguments = ["eval", str(runs[agent]), "episodes=3", "json=true", *given, *options]
        assert main(arguments) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def apart(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split what is said of the corrector from the rest."""
    own = {key: value for key, value in found.items() if key.startswith("corrector")}
    return own, {key: value for key, value in found.items() if key not in own}


@pytest.mark.parametrize(("agent", "stochastic"), [("ppo", "true"), ("iql", "false")])
def test_no_step_gives_the_numbers_of_a_plain_evaluation(
    runs: dict[str, Path], evaluated: Any, agent: str, stochastic: str
) -> None:
    how = f"stochastic={stochastic}"
    weights = ["corrector.action_weight=0", "corrector.state_weight=0"]
    own, rest = apart(evaluated(agent, how, *weights, corrector=f"cdsa:{runs['cdsa']}"))
    assert rest == evaluated(agent, how, corrector="none") == evaluated(agent, how)
    assert own["corrector_mean_correction"] == 0.0
    assert "corrector_mean_support_before" not in own


def test_a_step_changes_actions_and_says_by_how_much(runs: dict[str, Path], evaluated: Any) -> None:
    options = ["corrector.action_weight=1", "corrector.noise_level=0.3", "corrector.steps=2"]
    own, rest = apart(evaluated("ppo", *options, corrector=f"cdsa:{runs['cdsa']}"))
    assert rest["return_mean"] != evaluated("ppo")["return_mean"]
    assert own["corrector_mean_correction"] > 0
    assert own["corrector_mean_support_before"] > 0
    assert own["corrector_mean_support_after"] > 0
    assert own["corrector_action_weight"] == 1.0
    assert own["corrector_state_weight"] == 0.1
    assert own["corrector_steps"] == 2
    assert "corrector_tried" not in own


@pytest.mark.parametrize(("agent", "judge"), [("ppo", "support alone"), ("iql", "and value")])
def test_without_weights_the_step_is_chosen_from_the_data(
    runs: dict[str, Path], evaluated: Any, agent: str, judge: str
) -> None:
    corrector = f"cdsa:{runs['cdsa']}"
    own, _ = apart(evaluated(agent, corrector=corrector))
    assert judge in own["corrector_criterion"]
    tried = own["corrector_tried"]
    assert len(tried) == 25
    chosen = [
        row
        for row in tried
        if row["action_weight"] == own["corrector_action_weight"]
        and row["state_weight"] == own["corrector_state_weight"]
    ]
    allowed = [row for row in tried if row["allowed"]]
    if allowed:
        assert chosen == [allowed[-1]]
    assert all((row["value_change"] is None) is (agent == "ppo") for row in tried)


def test_what_was_tried_is_told_in_words(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"corrector=cdsa:{runs['cdsa']}"
    assert main(["eval", str(runs["iql"]), "episodes=2", given]) == 0
    out = capsys.readouterr().out
    assert out.count("action weight") == 25 + 1  # and that which was chosen
    assert "action weight 0, state weight 0: correction 0.000, support" in out
    assert "value +0.00%" in out
    assert "support of the data" in out
    assert "corrector mean correction" in out


def test_data_that_are_gone_leave_the_weights_to_be_given(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    moved = Path(shutil.move(runs["data"], tmp_path / "elsewhere"))
    try:
        given = ["eval", str(runs["iql"]), "episodes=1", f"corrector=cdsa:{runs['cdsa']}"]
        assert main(given) == 1
        assert "corrector.select needs the corrector's data" in capsys.readouterr().err
        assert main([*given, "corrector.action_weight=0.5", "json=true"]) == 0
    finally:
        shutil.move(moved, runs["data"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iql", [], "is a run of agent=iql; train one of agent=cdsa"),
        ("cdsa", ["corrector.noise_level=0.7"], "has learned levels from 0.02 to 0.5"),
        ("cdsa", ["corrector.steps=-1"], "corrector.steps = -1: must be >= 0"),
        ("data", [], "no checkpoint in it"),
    ],
)
def test_what_cannot_correct_is_refused_in_one_line(
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: list[str],
    message: str,
) -> None:
    arguments = ["eval", str(runs["ppo"]), "episodes=1", f"corrector=cdsa:{runs[name]}", *options]
    assert main(arguments) != 0
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def trained(env: Any, **specs: int) -> Any:
    """Return what the check of two runs reads of one."""
    sizes = {"observation_dim": 3, "action_dim": 2, "num_envs": 1} | specs
    return SimpleNamespace(
        settings=SimpleNamespace(env=env), agent=SimpleNamespace(specs=Specs(**sizes))
    )


HOPPER = MujocoSettings(name="HopperStand")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            trained(MujocoSettings(name="HopperHop")),
            "was trained in HopperStand, the policy Hopper",
        ),
        (trained(HOPPER, observation_dim=4), "sees observations of width 3, the policy 4"),
        (trained(HOPPER, action_dim=1), "corrects actions of width 2, the policy 1"),
        (trained(HOPPER, action_repeat=2), "holds each action for steps: 1, the policy 2"),
    ],
)
def test_a_corrector_made_for_something_else_is_refused(policy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"cdsa:there: {message}"):
        correction._check_alike(policy, trained(HOPPER), Path("there"))


def test_all_tasks_of_one_data_set_share_a_corrector() -> None:
    corrector = trained(OGBenchSettings(name="cube-single"))
    for env in ({"task": 3}, {"goal_conditioned": True}):
        policy = trained(OGBenchSettings(name="cube-single", **env))
        correction._check_alike(policy, corrector, Path("there"))
    with pytest.raises(ConfigError, match="was trained in cube-single-play, the policy scene-play"):
        correction._check_alike(trained(OGBenchSettings(name="scene")), corrector, Path("there"))


def test_a_corrector_of_another_action_repeat_is_refused(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(runs["ppo"]), "episodes=1", "env.action_repeat=2"]
    assert main([*arguments, f"corrector=cdsa:{runs['cdsa']}"]) == 2
    assert "holds each action for steps: 1, the policy 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("corrector", "options", "message"),
    [
        (
            "cdsa:x",
            {"state_wieght": "1"},
            r"unknown option 'corrector\.state_wieght'.*state_weight",
        ),
        (None, {"steps": "2"}, r"corrector\.steps: there is no corrector; add corrector=cdsa"),
        ("none", {"steps": "2"}, r"corrector\.steps: there is no corrector"),
        ("csda:x", {}, r"corrector = 'csda:x': must be none or cdsa:<run>.*Did you mean 'cdsa'"),
        ("cdsa:", {}, r"corrector = 'cdsa:': must be none or cdsa:<run>"),
        ("cdsa:x", {"steps": "two"}, r"corrector\.steps = 'two': must be a whole number"),
        ("cdsa:x", {"max_norm": "big"}, r"corrector\.max_norm = 'big': must be a number"),
        ("cdsa:x", {"select": "1"}, r"corrector\.select = '1': must be true or false"),
        (
            "cdsa:x",
            {"select": "true", "action_weight": "1"},
            r"chooses the weights; leave out corrector\.action_weight",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(
    corrector: str | None, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        correction.parse(corrector, options)


@pytest.mark.parametrize(
    ("options", "select"),
    [
        ({}, True),
        ({"noise_level": "0.2"}, True),
        ({"select": "false"}, False),
        ({"state_weight": "0.5"}, False),
        ({"steps": "0"}, False),
    ],
)
def test_the_step_is_chosen_where_no_weight_is_given(options: dict[str, str], select: bool) -> None:
    request = correction.parse("cdsa:a=b:c", options)
    assert request is not None
    assert request.select is select
    assert request.run == Path("a=b:c")


def test_numbers_may_be_infinite() -> None:
    request = correction.parse("cdsa:x", {"max_norm": ".inf"})
    assert request is not None
    assert request.changes == {"max_norm": float("inf")}

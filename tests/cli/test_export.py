"""`genpol export` of tiny runs: what is in a bundle, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genpol.cli import export as exporting
from genpol.cli.main import main
from genpol.deploy.bundle import Bundle, open_bundle

pytest.importorskip("onnxruntime", reason="needs the extra genpol[deploy]")
pytest.importorskip("onnxscript", reason="needs the extra genpol[deploy]")

LINES = Callable[..., str]

ROBOT = """
observation:
  - {name: joint0.cosine}
  - {name: joint1.cosine}
  - {name: joint0.sine}
  - {name: joint1.sine}
  - {name: target.x, unit: m, low: -0.3, high: 0.3}
  - {name: target.y, unit: m}
  - {name: joint0.velocity, unit: rad/s}
  - {name: joint1.velocity, unit: rad/s}
  - {name: tip.x, unit: m}
  - {name: tip.y, unit: m}
joints:
  joint0: {name: shoulder, unit: N m, low: -0.5, high: 0.75, velocity: 20, neutral: 0.125}
  joint1: {interface: velocity, acceleration: 300, jerk: 9000}
"""


@pytest.fixture(scope="module")
def exported(
    reacher_run: Path, reacher_clone: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """Return what exports a run, each once."""
    folder = tmp_path_factory.mktemp("bundles")
    runs = {"ppo": reacher_run, "bc": reacher_clone}
    made: dict[str, Bundle] = {}

    def export(agent: str, *options: str) -> Bundle:
        name = "-".join((agent, *options)).replace("/", "_")
        if name not in made:
            assert main(["export", str(runs[agent]), f"output={folder / name}", *options]) == 0
            made[name] = open_bundle(folder / name)
        return made[name]

    return export


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> LINES:
    """Return the one line with which an export is refused, after which nothing is there."""

    def message(*arguments: str) -> str:
        target = tmp_path / "refused"
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        assert main(["export", *arguments, f"output={target}"]) in (1, 2)
        error = capsys.readouterr().err.strip()
        assert error.startswith("genpol: error:")
        assert "\n" not in error
        assert sorted(tmp_path.iterdir()) == before
        return error

    return message


# --- what is in a bundle -------------------------------------------------------------------------


def test_a_policy_of_single_actions(exported: Callable[..., Bundle], reacher_run: Path) -> None:
    contract = exported("ppo").contract
    assert (contract.env, contract.agent) == ("Reacher-v5", "ppo")
    assert contract.period_s == pytest.approx(0.02)
    assert (contract.horizon, contract.action_steps, contract.memory) == (1, 1, "none")
    assert [joint.name for joint in contract.action] == ["joint0", "joint1"]
    assert contract.commands == ((-1.0, 1.0),) * 2
    assert contract.sampling == "mode"
    assert contract.parity["onnx"] <= 1e-5
    assert {"policy.onnx", "examples.npz"} == set(contract.files)
    assert contract.source["checkpoint"].startswith(f"{reacher_run.name}/checkpoints/step-")
    assert contract.source["simulation"]["name"] == "Reacher-v5"
    names = [channel.name for channel in contract.observation]
    assert names[4:8] == [
        "target_x.position",
        "target_y.position",
        "joint0.velocity",
        "joint1.velocity",
    ]
    # A simulation takes any command behind any other.
    for joint in contract.action:
        assert joint.velocity * contract.period_s >= joint.high - joint.low


def test_a_policy_of_chunks(exported: Callable[..., Bundle]) -> None:
    contract = exported("bc").contract
    assert (contract.agent, contract.horizon, contract.action_steps) == ("bc", 4, 2)
    assert contract.solver_steps == 10
    assert contract.inputs == {"observation": (10,), "noise": (8,)}
    assert contract.parity["onnx"] <= 1e-5


def test_examples_are_of_a_rollout(exported: Callable[..., Bundle]) -> None:
    examples = exported("bc").examples()
    observation = examples["observation"]
    assert len(observation) == 32
    assert len(np.unique(observation, axis=0)) == 32
    cosine, sine = observation[:, 0], observation[:, 2]
    np.testing.assert_allclose(cosine**2 + sine**2, 1.0, atol=1e-5)  # of real joints


def test_chunks_may_go_on_from_those_before(exported: Callable[..., Bundle]) -> None:
    contract = exported("bc", "real_time_chunking=true").contract
    assert contract.memory == "chunk"
    assert contract.inputs["previous"] == (4, 2)
    assert contract.inputs["kept"] == (4,)


def test_a_policy_may_sample(exported: Callable[..., Bundle]) -> None:
    contract = exported("ppo", "stochastic=true").contract
    assert contract.sampling == "sample"
    assert contract.inputs["noise"] == (2,)


def test_every_format_that_was_asked_for_is_written(exported: Callable[..., Bundle]) -> None:
    bundle = exported("ppo", "formats=onnx,torchscript")
    assert bundle.formats == ["onnx", "torchscript"]
    assert set(bundle.contract.parity) == {"onnx", "torchscript"}
    assert max(bundle.contract.parity.values()) <= 1e-5


def test_settings_of_the_run_may_be_changed(exported: Callable[..., Bundle]) -> None:
    contract = exported("bc", "agent.action_steps=1").contract
    assert (contract.horizon, contract.action_steps) == (4, 1)


def test_what_was_made_is_told(
    reacher_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "bundle"
    capsys.readouterr()
    assert main(["export", str(reacher_run), f"output={target}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{target}: ppo for Reacher-v5, 50 Hz, 1 of 1 actions a chunk"
    assert lines[1].startswith("greatest difference from the trained policy: onnx ")
    assert lines[2] == f"try it: genpol deploy {target} link=sim"


# --- the robot's own names and limits ----------------------------------------------------------


def test_names_and_limits_of_the_robot_are_in_the_contract(
    reacher_run: Path, tmp_path: Path
) -> None:
    robot, target = tmp_path / "robot.yaml", tmp_path / "bundle"
    robot.write_text(ROBOT)
    assert main(["export", str(reacher_run), f"output={target}", f"robot={robot}"]) == 0
    contract = open_bundle(target).contract
    assert [channel.name for channel in contract.observation][3:7] == [
        "joint1.sine",
        "target.x",
        "target.y",
        "joint0.velocity",
    ]
    x, y = contract.observation[4:6]
    assert (x.unit, x.low, x.high) == ("m", -0.3, 0.3)
    assert (y.unit, y.low, y.high) == ("m", -math.inf, math.inf)
    shoulder, elbow = contract.action
    assert (shoulder.name, shoulder.unit, shoulder.interface) == ("shoulder", "N m", "effort")
    assert (shoulder.low, shoulder.high, shoulder.neutral) == (-0.5, 0.75, 0.125)
    assert shoulder.velocity == 20.0
    assert (elbow.name, elbow.interface) == ("joint1", "velocity")
    assert (elbow.acceleration, elbow.jerk) == (300.0, 9000.0)
    # What -1 and 1 mean to the policy does not depend on what the robot may be told.
    assert contract.commands == ((-1.0, 1.0),) * 2
    record = json.loads((target / "contract.json").read_text())
    assert record["action"][0]["velocity"] == 20.0


CHANNELS = "\n".join(["observation:", *("  - {name: x}" for _ in range(9))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("joint: {}", "unknown entry 'joint'. Did you mean 'joints'?"),
        ("- joints", "must have the entries observation or joints"),
        ("", "must have the entries observation or joints"),
        ("joints: {joint0: {velocity: [", "is no YAML"),
        ("joints: {joint2: {velocity: 1}}", "no joint 'joint2'"),
        ("joints: {joint0: {velocty: 1}}", "unknown limit 'velocty'. Did you mean 'velocity'"),
        ("joints: {joint0: {velocity: fast}}", "velocity = 'fast': not a number"),
        ("joints: {joint0: {velocity: 0}}", "velocity"),
        ("joints: {joint0: {low: 2}}", "low"),
        ("joints: {joint0: {high: .inf}}", "high"),
        ("joints: {joint0: {neutral: 5}}", "neutral"),
        ("joints: {joint0: {interface: torque}}", "interface"),
        ("joints: {joint0: {velocity: .nan}}", "velocity"),
        ("joints: [joint0]", "joints: must be {name of the action: {limit: value}}"),
        ("joints: {joint0: 3}", "joints: must be {name of the action: {limit: value}}"),
        ("joints: {joint0: {name: joint1}}", "joint1"),
        (CHANNELS, "observation has 9 entries, the policy sees 10"),
        ("observation: {name: x}", "observation has no list of entries, the policy sees 10"),
        (CHANNELS + "\n  - {nmae: x}", "nmae"),
        (CHANNELS + "\n  - just text", "entries are {name: ..., unit: ...,"),
        (CHANNELS + "\n  - {unit: m}", "name"),
        (CHANNELS + "\n  - {name: y, low: deep}", "low"),
    ],
)
def test_faults_of_a_robot_s_file_are_told_in_one_line(
    reacher_run: Path, tmp_path: Path, refusal: LINES, text: str, message: str
) -> None:
    robot = tmp_path / "robot.yaml"
    robot.write_text(text)
    assert message in refusal(str(reacher_run), f"robot={robot}")


def test_a_robot_s_file_that_is_not_there_is_told(reacher_run: Path, refusal: LINES) -> None:
    assert "nowhere.yaml: cannot be read" in refusal(str(reacher_run), "robot=nowhere.yaml")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["formats=onxn"], "formats = 'onxn': must be one of aoti, onnx, torchscript"),
        (["formats="], "formats"),
        (["guidance.weight=0.1,0.2"], "guidance.weight: one weight is exported"),
        (["guidance.wieght=1"], "unknown option 'guidance.wieght'"),
        (["stochastic=maybe"], "stochastic = 'maybe': must be true or false"),
        (["real_time_chunking=1"], "real_time_chunking = '1': must be true or false"),
        (["real_time_chunking=true"], "PPO has none"),
        (["corrector=none:x"], "corrector = 'none:x'"),
        (["corrector.steps=2"], "there is no corrector; add corrector=cdsa"),
        (["agent.horizn=3"], "horizn"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    reacher_run: Path, refusal: LINES, options: list[str], message: str
) -> None:
    assert message in refusal(str(reacher_run), *options)


def test_a_run_is_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in ([], ["formats=onnx"]):
        assert main(["export", *arguments]) == 2
        assert "no run given; write: genpol export <run folder>" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nowhere")]) != 0
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bundle_is_not_overwritten(
    exported: Callable[..., Bundle], reacher_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported("ppo").folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert main(["export", str(reacher_run), f"output={folder}"]) == 1
    error = capsys.readouterr().err
    assert str(folder) in error
    assert "exists" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_existing_bundle_is_refused_before_the_work_is_done(
    exported: Callable[..., Bundle], reacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("ppo").folder

    def rollout(*_: Any) -> None:
        raise AssertionError("an episode runs")

    monkeypatch.setattr(exporting, "_observations", rollout)
    assert main(["export", str(reacher_run), f"output={folder}"]) == 1


@pytest.fixture(scope="module")
def corrected(
    reacher_clone: Path, reacher_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Return the arguments of an export with a corrector."""
    output = tmp_path_factory.mktemp("corrector")
    arguments = ["env=Reacher-v5", "agent=cdsa", f"data={reacher_data}", "num_envs=2"]
    arguments += ["num_threads=1", "env.num_threads=1", "agent.batch_size=8", "total_steps=20"]
    arguments += ["agent.actor.hidden=[8]", "evaluation.episodes=1", "tensorboard=false"]
    assert main(["train", *arguments, "video=false", f"output={output}"]) == 0
    run = next(output.glob("Reacher-v5/cdsa/*"))
    return [str(reacher_clone), f"corrector=cdsa:{run}", "corrector.action_weight=0.5"]


def test_a_corrector_needs_an_observation_for_every_action(
    corrected: list[str], refusal: LINES
) -> None:
    message = refusal(*corrected)
    assert "2 actions are carried out without one; add agent.action_steps=1" in message


def test_a_corrector_does_not_go_with_chunks_that_are_bound(
    corrected: list[str], refusal: LINES
) -> None:
    assert "do not go together" in refusal(*corrected, "real_time_chunking=true")


@pytest.mark.slow
def test_a_corrector_is_in_the_graph(corrected: list[str], tmp_path: Path) -> None:
    target = tmp_path / "corrected"
    assert main(["export", *corrected, "agent.action_steps=1", f"output={target}"]) == 0
    contract = open_bundle(target).contract
    assert contract.action_steps == 1
    assert contract.parity["onnx"] <= 1e-5


@pytest.mark.slow
def test_a_policy_of_generated_targets(tmp_path: Path) -> None:
    """GoRL on HopperStand, as the README has it."""
    arguments = ["env=HopperStand", "agent=gorl", "num_envs=4", "total_steps=200"]
    arguments += ["num_threads=1", "env.num_threads=1", "evaluation.episodes=1"]
    arguments += ["tensorboard=false", "video=false", f"output={tmp_path / 'runs'}"]
    assert main(["train", *arguments]) == 0
    run = next((tmp_path / "runs").glob("HopperStand/gorl/*"))
    assert main(["export", str(run), f"output={tmp_path / 'bundle'}"]) == 0
    contract = open_bundle(tmp_path / "bundle").contract
    assert [joint.name for joint in contract.action] == ["waist", "hip", "knee", "ankle"]
    assert contract.observation[2].name == "waist.position"
    assert contract.parity["onnx"] <= 1e-5

"""`genpol deploy`: on a robot that speaks UDP, on a simulation, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from genpol.cli import deploy as deploying
from genpol.cli.main import main
from genpol.data.formats import open_dataset
from genpol.deploy.bundle import Bundle, open_bundle
from genpol.deploy.links.udp import UdpRobot
from genpol.deploy.safety import Command, Mode

pytest.importorskip("onnxruntime", reason="needs the extra genpol[deploy]")
pytest.importorskip("onnxscript", reason="needs the extra genpol[deploy]")

KEY = b"0123456789abcdef0123456789abcdef"
EPISODE = 50  # steps of an episode of Reacher-v5, a second


@pytest.fixture(scope="module")
def bundle(reacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("bundles") / "reacher"
    assert main(["export", str(reacher_run), f"output={target}"]) == 0
    return open_bundle(target)


@pytest.fixture(scope="module")
def limited(reacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle for a robot, with limits of its own, though wide ones."""
    folder = tmp_path_factory.mktemp("limited")
    robot = folder / "robot.yaml"
    robot.write_text("joints: {joint0: {velocity: 90}, joint1: {velocity: 90}}\n")
    arguments = [str(reacher_run), f"output={folder / 'reacher'}", f"robot={robot}"]
    assert main(["export", *arguments]) == 0
    return open_bundle(folder / "reacher")


@pytest.fixture(autouse=True)
def _considerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the tests' own process without real-time priority, and do not tidy up for long."""
    monkeypatch.setattr("genpol.deploy.start.take_priority", lambda: "not in tests")
    monkeypatch.setattr("gc.collect", lambda *_: 0)


class Robot(threading.Thread):
    """A robot that tells something new every period.

    Attributes:
        link: Its side of the link.
        received: What it was commanded.
        told: How often it has told what it sees.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.link = UdpRobot("127.0.0.1:0", KEY)
        self.received: list[Command] = []
        self.told = 0
        self._over = threading.Event()

    def run(self) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            command = self.link.command(0.002)
            if command is not None:
                self.received.append(command)
            if time.monotonic() >= due and self.link.connected:
                due = max(due + 0.02, time.monotonic() - 0.02)
                self.told += 1
                self.link.observation([0.01 * (self.told % 7 + i) for i in range(10)])
        self.link.close()

    def when(self, count: int, call: Callable[[], None]) -> None:
        """Have something called when it has been commanded so often."""

        def wait() -> None:
            deadline = time.monotonic() + 20.0
            while len(self.received) < count and time.monotonic() < deadline:
                time.sleep(0.002)
            call()

        threading.Thread(target=wait, daemon=True).start()

    def end(self) -> None:
        self._over.set()
        self.join(2.0)


@pytest.fixture
def robot() -> Iterator[Robot]:
    made = Robot()
    made.start()
    yield made
    made.end()


@pytest.fixture
def deploy(
    robot: Robot, limited: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Return what runs a bundle on the robot: the exit code, the report, and what was said."""
    key = tmp_path / "robot.key"
    key.write_bytes(KEY + b"\n")

    def run(*options: str, folder: Path = limited.folder) -> tuple[int, dict[str, Any], str]:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        capsys.readouterr()
        link = [f"link=udp:{robot.link.address}", f"key={key}", f"report={report}"]
        code = main(["deploy", str(folder), *link, *options])
        said = "".join(capsys.readouterr())
        return code, json.loads(report.read_text()), said

    return run


@pytest.fixture
def refusal(limited: Bundle, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return the one line with which options are refused, after which no process is left."""

    def message(*options: str) -> str:
        before = {child.pid for child in psutil.Process().children()}
        capsys.readouterr()
        assert main(["deploy", str(limited.folder), *options]) in (1, 2)
        lines = capsys.readouterr().err.splitlines()
        errors = [x for x in lines if not x.startswith("genpol: no real-time priority")]
        assert len(errors) == 1
        assert errors[0].startswith("genpol: error:")
        assert {child.pid for child in psutil.Process().children()} <= before
        return errors[0]

    return message


# --- on a robot ----------------------------------------------------------------------------------


def test_a_robot_is_commanded_for_as_long_as_was_asked_for(
    deploy: Any, robot: Robot, bundle: Bundle
) -> None:
    code, report, said = deploy("seconds=0.6")
    assert code == 0
    assert 20 <= report["ticks"] + report["ticks_skipped"] <= 31
    assert report["rate_hz"] == pytest.approx(50.0)
    assert report["stop_reason"] == ""
    assert {"p50", "p99", "max", "mean"} == set(report["work_ms"]) == set(report["policy_ms"])
    assert sum(report["work_histogram"].values()) == report["ticks"]
    assert f"{report['ticks']} ticks, {report['deadlines_missed']} deadlines missed" in said
    assert "no real-time priority (not in tests)" in said
    # What the robot was told is what the policy makes of what it saw.
    plan, ran = bundle.load(), [x for x in robot.received if x.mode is Mode.RUN]
    seen = np.array([[0.01 * (k + i) for i in range(10)] for k in range(7)], np.float32)
    noise = np.zeros((1, 0), np.float32)
    possible = [plan({"observation": row[None], "noise": noise})[0, 0] for row in seen]
    assert len(ran) > 10
    for command in ran:
        assert min(np.abs(np.array(command.values) - x).max() for x in possible) < 1e-6
    assert robot.received[-1].mode is Mode.STOP  # it was brought to rest


def test_a_stop_by_the_robot_is_the_exit_code(deploy: Any, robot: Robot) -> None:
    robot.when(10, robot.link.stop)
    code, report, said = deploy("seconds=0.6")
    assert code == 1
    assert report["stop_reason"] == "the robot's side asked for it"
    assert "STOPPED: the robot's side asked for it" in said
    assert report["interventions"]["stop: the robot's side asked for it"] == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order(deploy: Any, robot: Robot, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    robot.when(15, lambda: os.kill(os.getpid(), number))
    code, report, _ = deploy()  # without an end
    assert code == 0
    assert report["ticks"] >= 15
    assert report["stop_reason"] == ""
    assert robot.received[-1].mode is Mode.STOP
    assert signal.getsignal(number) is before


def test_what_was_recorded_can_be_read(deploy: Any, tmp_path: Path) -> None:
    path = tmp_path / "recordings" / "run.mcap"
    code, report, _ = deploy("seconds=0.6", f"record={path}")
    assert code == 0
    dataset = open_dataset(path)
    assert 0 < dataset.num_transitions < report["ticks"]
    assert dataset.columns["observation"].shape[-1] == 10


def test_a_recording_comes_as_a_minari_data_set_too(deploy: Any, tmp_path: Path) -> None:
    target = tmp_path / "robot-v0"
    code, _, said = deploy("seconds=0.6", f"minari={target}")
    assert code == 0
    assert str(target) in said
    found, wanted = open_dataset(target), open_dataset(tmp_path / "robot-v0.mcap")
    assert found.num_transitions == wanted.num_transitions > 0
    np.testing.assert_array_equal(found.columns["action"], wanted.columns["action"])


def test_a_robot_that_does_not_answer_is_told(refusal: Any, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    free = UdpRobot("127.0.0.1:0", KEY)
    address = free.address
    free.close()
    message = refusal(f"link=udp:{address}", f"key={key}", "connect_s=0.2")
    assert "no observation within 0.2 s" in message


def test_without_limits_there_is_a_warning_and_what_is_finite_is_sent(
    deploy: Any, robot: Robot, bundle: Bundle, tmp_path: Path
) -> None:
    """With limits that the policy's commands are far beyond, or the two would be the same."""
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for file in bundle.folder.iterdir():
        (narrow / file.name).write_bytes(file.read_bytes())
    record = json.loads((narrow / "contract.json").read_text())
    for joint in record["action"]:
        joint["low"], joint["high"] = -1e-5, 1e-5
    (narrow / "contract.json").write_text(json.dumps(record))
    _, report, said = deploy("seconds=0.4", folder=narrow)
    assert "WARNING" not in said
    assert report["interventions"]["position"] > 5
    limited = [x for x in robot.received if x.mode is Mode.RUN]
    assert max(abs(x) for command in limited for x in command.values) <= 1e-5
    robot.received.clear()
    _, report, said = deploy("seconds=0.4", "--unsafe-no-limits", folder=narrow)
    assert "genpol: WARNING: --unsafe-no-limits: whatever the policy wants is sent" in said
    assert "position" not in report["interventions"]
    free = [x for x in robot.received if x.mode is Mode.RUN]
    assert max(abs(x) for command in free for x in command.values) > 1e-4


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "link = '': must be sim, udp:HOST:PORT or ros2"),
        (["link=usb"], "link = 'usb': must be sim, udp:HOST:PORT or ros2"),
        (["link=sim", "secnds=3"], "unknown option 'secnds'. Did you mean 'seconds'?"),
        (["link=sim", "seconds=soon"], "seconds = 'soon': must be a number"),
        (["link=sim", "seconds=-1"], "seconds = '-1': must be finite and >= 0"),
        (["link=sim", "seconds=nan"], "seconds = 'nan': must be finite and >= 0"),
        (["link=sim", "episodes=1.5"], "episodes = '1.5': must be a whole number"),
        (["link=sim", "viewer=yes"], "viewer = 'yes': must be true or false"),
        (["link=sim", "policy_wait=2"], "policy_wait"),
        (["link=sim", "blend_steps=0.5"], "blend_steps = '0.5': must be a whole number"),
        (["link=sim", "domain=3"], "domain: only link=ros2 has it"),
        (["link=sim", "format=aoti"], "format = 'aoti': "),
        (["link=sim", "format=onxn"], "format = 'onxn': must be one of"),
        (["link=sim", "start=here"], "start = 'here': must be {joint: command, ...}"),
        (["link=sim", "--unsafe"], "'--unsafe': write key=value"),
        (["link=udp:127.0.0.1:9870", "episodes=2"], "episodes: only link=sim has it"),
        (["link=udp:127.0.0.1:9870"], "link=udp: needs key=<file>"),
        (["link=udp:127.0.0.1:9870", "key=nowhere.key"], "key: nowhere.key: cannot be read"),
        (["link=udp:nowhere", "key=KEY"], "write host:port"),
        (["link=udp:127.0.0.1:9870", "key=SHORT"], "key: has 3 bytes"),
        (["link=ros2", "domain=one"], "domain = 'one': must be a whole number"),
        (["link=sim", "report=THERE"], "exists already; give another name"),
        (["link=sim", "record=THERE"], "exists already; give another name"),
        (["link=sim", "minari=THERE"], "end in a version"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    refusal: Any, tmp_path: Path, options: list[str], message: str
) -> None:
    files = {"KEY": KEY, "SHORT": b"abc", "THERE": b"precious"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        options = [x.replace(name, str(tmp_path / name)) for x in options]
    assert message in refusal(*options)
    assert (tmp_path / "THERE").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("start", "message"),
    [("{jiont0: 0.1}", "jiont0"), ("{joint0: .nan}", "joint0"), ("{joint0: .inf}", "joint0")],
)
def test_a_wrong_start_is_refused_before_the_robot_moves(
    robot: Robot, refusal: Any, tmp_path: Path, start: str, message: str
) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    found = refusal(f"link=udp:{robot.link.address}", f"key={key}", f"start={start}", "seconds=0.2")
    assert message in found
    assert robot.received == []


def test_what_the_link_to_ros_can_be_told_can_be_told() -> None:
    """Its messages name these options."""
    options = ["controller=/arm", "command=trajectory", "states=/s", "domain=3"]
    options += ["observations=/policy/observation", "peers=127.0.0.1"]
    request = deploying._parse(["bundle", "link=ros2", *options])
    assert deploying._ros2_options(request.ros2) == {
        "controller": "/arm",
        "command": "trajectory",
        "states": "/s",
        "domain": 3,
        "observations": "/policy/observation",
        "peers": "127.0.0.1",
    }


def test_a_bundle_is_needed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in ([], ["link=sim"]):
        assert main(["deploy", *arguments]) == 2
        assert "no bundle given; write: genpol deploy <bundle>" in capsys.readouterr().err
    assert main(["deploy", str(tmp_path / "nowhere"), "link=sim"]) == 1
    assert "no such bundle; make one with genpol export RUN" in capsys.readouterr().err


def test_a_damaged_bundle_is_refused(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in bundle.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "policy.onnx").write_bytes(b"x")
    assert main(["deploy", str(tmp_path), "link=sim"]) == 1
    error = capsys.readouterr().err
    assert "policy.onnx: is not the file that contract.json was written with" in error
    assert error.count("\n") == 1


def test_a_simulation_runs_for_a_minute_unless_told_otherwise() -> None:
    def asked(*options: str) -> tuple[float, int]:
        request = deploying._parse(["bundle", *options])
        return request.seconds, request.episodes

    assert asked("link=sim") == (60.0, 0)
    assert asked("link=sim", "seconds=3") == (3.0, 0)
    assert asked("link=sim", "episodes=3") == (float("inf"), 3)
    assert asked("link=udp:127.0.0.1:1") == (float("inf"), 0)


# --- on a simulation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Deploy to the simulation for two episodes, in a process as anyone would."""
    folder = tmp_path_factory.mktemp("simulated")
    options = ["link=sim", "episodes=2", f"report={folder / 'report.json'}"]
    options += [f"record={folder / 'run.mcap'}"]
    command = [sys.executable, "-m", "genpol.cli.main", "deploy", str(bundle.folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done, folder


@pytest.mark.slow
def test_a_simulation_ends_with_its_episodes(
    simulated: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = simulated
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["stop_reason"] == ""
    assert report["simulation"]["episodes"] == 2
    assert report["simulation"]["length_mean"] == EPISODE
    assert report["simulation"]["periods"] == 2 * EPISODE
    assert abs(report["ticks"] + report["ticks_skipped"] - 2 * EPISODE) <= 10
    assert "simulation: 2 episodes, return" in done.stdout


@pytest.mark.slow
def test_its_returns_are_those_of_an_evaluation(
    simulated: tuple[subprocess.CompletedProcess[str], Path],
    reacher_run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """To the number where no command was late, within 2 % where some were."""
    report = json.loads((simulated[1] / "report.json").read_text())
    capsys.readouterr()
    options = ["episodes=2", "json=true", "evaluation.num_envs=1"]
    assert main(["eval", str(reacher_run), *options]) == 0
    wanted = json.loads(capsys.readouterr().out)["returns"]
    found = report["simulation"]["returns"]
    late = report["simulation"]["periods_without_command"] or report["interventions"].get("hold")
    assert found == pytest.approx(wanted, rel=2e-2 if late else 1e-3)


@pytest.mark.slow
def test_its_recording_has_the_episodes_apart(
    simulated: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    dataset = open_dataset(simulated[1] / "run.mcap")
    assert dataset.num_trajectories >= 2
    assert dataset.num_transitions > 1.5 * EPISODE
    assert (dataset.ends - dataset.starts).max() <= EPISODE


@pytest.mark.slow
def test_what_fails_before_the_run_is_told_and_nothing_is_left(refusal: Any) -> None:
    assert "no observation within 1e-06 s" in refusal("link=sim", "seconds=1", "connect_s=1e-6")

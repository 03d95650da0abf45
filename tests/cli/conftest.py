"""A small configuration tree with its own schemas, so that messages are tested to the letter.

And an experiment whose runs are trained by thirty lines.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from genpol.cli import configuration, reproduce, reproduce_processes
from genpol.cli import list as listing
from genpol.cli.main import main
from genpol.report import results
from genpol.settings import positive


@dataclass(frozen=True, kw_only=True)
class Decoder:
    steps: int = 4

    def __post_init__(self) -> None:
        positive("steps", self.steps)


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    learning_rate: float = 1e-3
    epochs: int = 4
    layer_norm: bool = False
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    decoder: Decoder = field(default_factory=Decoder)

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)


@dataclass(frozen=True, kw_only=True)
class MujocoSettings:
    name: str = "???"
    num_threads: int = 0


@dataclass(frozen=True, kw_only=True)
class GymSettings:
    id: str = "???"


YAML = {
    "agent/ppo.yaml": "# The yardstick.\ndefaults: [ppo_schema]\n",
    "agent/gorl.yaml": "defaults: [gorl_schema]\n",
    "env/HopperStand.yaml": "# Stand.\ndefaults: [mujoco_schema]\nname: HopperStand\n",
    "env/CheetahRun.yaml": "# Run.\ndefaults: [mujoco_schema]\nname: CheetahRun\n",
    "env/gym.yaml": "defaults: [gym_schema]\n",
    "recipe/gorl_HopperStand.yaml": "# @package _global_\n# Tuned.\nagent: {epochs: 7}\nseed: 3\n",
    "recipe/misspelt.yaml": "# @package _global_\nagent: {epoch: 7}\n",
    "recipe/ill-typed.yaml": "# @package _global_\nagent: {epochs: many}\n",
    "recipe/broken.yaml": "# @package _global_\nagent: {epochs: 7\n",
}


@pytest.fixture
def stub_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the configurations, agents and environments; keep the real ``train.yaml``."""
    folder = tmp_path / "configs"
    for name, text in YAML.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(listing.config_folder() / "train.yaml", folder)
    for module in (configuration, listing):
        monkeypatch.setattr(module, "config_folder", lambda: folder)
    agents = ModuleType("genpol.agents")
    agents.__spec__ = ModuleSpec("genpol.agents", None, is_package=True)
    agents.__spec__.submodule_search_locations = [str(tmp_path)]
    agents.names = lambda: ["gorl", "ppo"]
    agents.settings_class = lambda name: AgentSettings
    envs = ModuleType("genpol.envs")
    envs.settings_classes = lambda: {"mujoco": MujocoSettings, "gym": GymSettings}
    monkeypatch.setitem(sys.modules, "genpol.agents", agents)
    monkeypatch.setitem(sys.modules, "genpol.envs", envs)
    return folder


@pytest.fixture
def refused(stub_configs: Path) -> Callable[..., str]:
    """Return the message with which overrides are refused, after checking that it is one line."""

    def message(*overrides: str) -> str:
        with pytest.raises(configuration.ConfigError) as caught:
            configuration.to_settings(configuration.compose(overrides))
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return message


# Makes a run folder, evaluates `total` times, and does what FAKE says at its second evaluation.
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
arguments = dict(item.split("=", 1) for item in sys.argv[1:])
mode = os.environ.get("FAKE", "")
folder = Path(arguments.get("resume") or Path(arguments["output"]) / "env/agent" / str(time.time()))
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").touch()
table = folder / "evals.csv"
if not table.exists():
    table.write_text("env_steps,gradient_steps,wall_clock_s,episodes,return_mean\\n")
done = len(table.read_text().splitlines()) - 1
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
print("training with", arguments)
for index in range(done, 3):
    with table.open("a") as file:
        file.write(f"{index * 100},{index},{index}.04,5,{index}.5\\n")
    checkpoint = folder / "checkpoints" / f"step-{index * 100:012d}"
    if mode != "no checkpoint":
        checkpoint.mkdir()
        (checkpoint / "manifest.json").touch()
    if index == 1 and mode in ("crash", "no checkpoint"):
        sys.exit("genpol: error: the lights went out")
    while index == 1 and mode == "wait" and not stopped:
        time.sleep(0.01)
    if stopped:
        (folder / "run.json").write_text('{"status": "interrupted"}')
        sys.exit(0)
(folder / "run.json").write_text('{"status": "finished"}')
"""

EXPERIMENT = """
description: A test.
compute: none
seeds: [0, 1]
envs: [HopperStand]
common: [total_steps=3]
runs:
  gorl: [agent=gorl]
  ppo: [agent=ppo, total_steps=2]
"""


class Scene:
    """An experiment in a folder of its own, with a trainer whose calls are noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.yaml = folder / "demo.yaml"
        self.yaml.write_text(EXPERIMENT)
        self.results = folder / "results" / "demo.csv"
        self.calls: list[tuple[str, ...]] = []
        self._monkeypatch = monkeypatch
        trainer = folder / "trainer.py"
        trainer.write_text(TRAINER)

        def train(overrides: tuple[str, ...], output: Path) -> list[str]:
            self.calls.append(("train", *overrides))
            return [sys.executable, "-S", str(trainer), *overrides, f"output={output}"]

        def resume(run_folder: Path) -> list[str]:
            self.calls.append(("resume", str(run_folder)))
            return [sys.executable, "-S", str(trainer), f"resume={run_folder}"]

        monkeypatch.setattr(reproduce_processes, "train_command", train)
        monkeypatch.setattr(reproduce_processes, "resume_command", resume)
        monkeypatch.setattr(reproduce_processes, "_POLL_S", 0.02)

    def run(self, *options: str, trainer: str = "") -> int:
        self.calls.clear()
        self._monkeypatch.setenv("FAKE", trainer)
        output = ("--output", str(self.folder / "runs"), "--results", str(self.results.parent))
        return reproduce.run([str(self.yaml), *output, *options])

    def add(self, text: str) -> None:
        """Append lines to the experiment."""
        self.yaml.write_text(self.yaml.read_text() + text)

    def change(self, old: str, new: str) -> None:
        """Change the experiment where it reads ``old``."""
        assert old in self.yaml.read_text()
        self.yaml.write_text(self.yaml.read_text().replace(old, new))

    @contextmanager
    def interrupted_when(self, ready: Callable[[], bool]) -> Iterator[None]:
        """Interrupt this process as soon as something is ready."""

        def interrupt() -> None:
            deadline = time.monotonic() + 10
            while not ready() and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        yield
        interrupter.join()

    def recorded(self, label: str = "gorl", seed: int = 0) -> list[tuple[int, float, str]]:
        return [
            (row.env_steps, row.value, row.command)
            for row in results.rows_of(self.results)
            if (row.agent, row.seed) == (label, seed)
        ]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def reacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of ppo on Reacher-v5, whose episodes take a second, trained for 100 steps."""
    output = tmp_path_factory.mktemp("reacher")
    arguments = ["env=Reacher-v5", "agent=ppo", "num_envs=4", "num_threads=1", "env.num_threads=1"]
    arguments += ["agent.rollout_steps=25", "agent.minibatches=2", "total_steps=100"]
    arguments += ["evaluation.episodes=1", "tensorboard=false", "video=false", f"output={output}"]
    assert main(["train", *arguments]) == 0
    return next(output.glob("Reacher-v5/ppo/*"))


@pytest.fixture(scope="session")
def reacher_data(reacher_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of four episodes of that run."""
    target = tmp_path_factory.mktemp("reacher-data") / "data"
    recording = [str(reacher_run), f"output={target}", "episodes=4", "format=genpol"]
    assert main(["data", "record", *recording]) == 0
    return target


@pytest.fixture(scope="session")
def reacher_clone(reacher_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of bc on that data, with chunks of 4 actions of which 2 are carried out."""
    output = tmp_path_factory.mktemp("reacher-clone")
    arguments = ["env=Reacher-v5", "agent=bc", f"data={reacher_data}", "num_envs=2"]
    arguments += ["num_threads=1", "env.num_threads=1", "agent.batch_size=8", "total_steps=20"]
    arguments += ["agent.actor.hidden=[8]", "agent.horizon=4", "agent.action_steps=2"]
    arguments += ["evaluation.episodes=1", "tensorboard=false", "video=false", f"output={output}"]
    assert main(["train", *arguments]) == 0
    return next(output.glob("Reacher-v5/bc/*"))

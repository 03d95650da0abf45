"""A small configuration tree with its own schemas, so that messages are tested to the letter."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from genpol.cli import configuration
from genpol.cli import list as listing
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

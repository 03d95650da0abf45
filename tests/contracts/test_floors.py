"""The walls of the design: imports only go down, and no file is a drawer for odds and ends."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The longest matching prefix decides. `genpol` alone holds nothing but the version.
FLOORS = {
    "genpol": 0,
    "genpol.errors": 1,
    "genpol.settings": 1,
    "genpol.seeding": 1,
    "genpol.parallel": 1,
    "genpol.provenance": 1,
    "genpol.nn": 1,
    "genpol.policies": 2,
    "genpol.objectives": 2,
    "genpol.agent": 3,
    "genpol.data": 3,
    "genpol.off_policy": 3,
    "genpol.offline": 3,
    "genpol.on_policy": 3,
    "genpol.pretrained": 3,
    "genpol.finetuning": 3,
    "genpol.world_model": 3,
    "genpol.foreign": 4,
    "genpol.training": 4,
    "genpol.report": 4,
    "genpol.deploy": 4,
    "genpol.agents": 5,
    "genpol.envs": 5,
    "genpol.configs": 5,
    "genpol.assets": 5,
    "genpol.cli": 6,
}
LOOP = ("genpol.training", "genpol.report", "genpol.deploy", "genpol.cli")


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in [
        ("genpol", "genpol"),
        *((name, f"genpol.{name}") for name in ("agents", "envs", "configs", "assets")),
    ]:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = file
    return found


MODULES = _modules()


def imports(source: str, package: str) -> set[str]:
    """Return the full names that a module imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from genpol import agents` and `from genpol.nn import MLP` look alike here; both
            # are resolved by the longest prefix.
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def prefix(module: str) -> str | None:
    """Return the entry of ``FLOORS`` that a module belongs to, if it is one of ours."""
    parts = module.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in candidates if name in FLOORS), None)


def ours(module: str) -> set[str]:
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = imports(file.read_text(encoding="utf-8"), package)
    return {name for name in found if name.split(".")[0] == "genpol"}


def broken(module: str, imported: set[str]) -> list[str]:
    """Return the imports that break a wall."""
    own = prefix(module)
    found = []
    for name in sorted(imported):
        other = prefix(name)
        assert own is not None
        assert other is not None
        if (
            FLOORS[other] > FLOORS[own]
            or (own in ("genpol.agents", "genpol.envs") and other in LOOP)
            or {own, other} == {"genpol.agents", "genpol.envs"}
            or (own == other == "genpol.agents" and name != own)
        ):
            found.append(name)
    return found


def test_all_code_is_seen() -> None:
    assert {"genpol.errors", "genpol.cli.main", "genpol.agents", "genpol.envs"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_floor(module: str) -> None:
    assert module == "genpol" or prefix(module) != "genpol"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert broken(module, ours(module)) == []


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_subject(module: str) -> None:
    assert not {"utils", "util", "helpers", "helper", "common", "misc"} & set(module.split("."))


@pytest.mark.parametrize("name", ["safety", "controller", "observer", "links.udp", "links.ros2"])
def test_controller_needs_no_torch(name: str) -> None:
    module = f"genpol.deploy.{name}"
    # With all that it imports of ours, because one step away is as heavy.
    pending, seen = [module], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        found = imports(MODULES[current].read_text(encoding="utf-8"), current.rpartition(".")[0])
        heads = {imported.split(".")[0] for imported in found}
        assert not {"torch", "tensordict", "torchrl"} & heads, current
        pending += [known for known in MODULES for imported in found if _within(imported, known)]


def _within(imported: str, known: str) -> bool:
    return imported == known or imported.rpartition(".")[0] == known


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("genpol.agents.gorl", "genpol.envs.make"),
        ("genpol.agents.gorl", "genpol.training.loop.train"),
        ("genpol.agents.gorl", "genpol.agents.ppo.PPO"),
        ("genpol.envs.gym", "genpol.agents.make"),
        ("genpol.envs.gym", "genpol.report.results"),
        ("genpol.training.loop", "genpol.agents"),
        ("genpol.training.loop", "genpol.cli.main"),
        ("genpol.nn.mlp", "genpol.policies.flow.FlowPolicy"),
        ("genpol.policies.flow", "genpol.agent.Agent"),
    ],
)
def test_wall_would_be_noticed(module: str, imported: str) -> None:
    assert broken(module, {imported}) == [imported]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import genpol.agents as a", "genpol.agents"),
        ("from genpol import envs", "genpol.envs"),
        ("def f():\n    from genpol.envs import make", "genpol.envs.make"),
        ("from . import ppo", "genpol.agents.ppo"),
        ("from .ppo import PPO", "genpol.agents.ppo.PPO"),
        ("from ..training import loop", "genpol.training.loop"),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: str) -> None:
    assert imports(source, "genpol.agents") == {expected}

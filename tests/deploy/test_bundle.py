"""A bundle acts as the trained policy, in every format, and only whole."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.envs import ExplorationType

from genpol.deploy import export
from genpol.deploy.bundle import Bundle, open_bundle
from genpol.deploy.contract import Contract
from genpol.deploy.export import ExportError
from genpol.deploy.tracing import TracedPolicy, acting, trace
from genpol.errors import CheckpointError, ConfigError, DatasetError
from genpol.offline.settings import NetworkSettings

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra genpol[deploy]")
pytest.importorskip("onnxscript", reason="needs the extra genpol[deploy]")


@pytest.fixture(scope="module")
def policy(make_agent):
    net = NetworkSettings(hidden=[8])
    return make_agent("bc", horizon=3, action_steps=2, solver_steps=2, actor=net)


@pytest.fixture(scope="module")
def traced(policy) -> TracedPolicy:
    return trace(policy)


@pytest.fixture(scope="module")
def bundle(policy, reach, write_bundle, tmp_path_factory) -> Bundle:
    target = tmp_path_factory.mktemp("bundles") / "reach"
    return write_bundle(target, policy, reach, ("onnx", "torchscript"))


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for file in bundle.folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
def test_formats_do_as_the_trained_policy(bundle: Bundle, form: str) -> None:
    assert bundle.contract.parity[form] <= 1e-6
    examples = bundle.examples()
    chunks = examples.pop("chunk")
    found = bundle.load(form)({name: x[2:3] for name, x in examples.items()})
    np.testing.assert_allclose(found[0], chunks[2], atol=1e-6)
    assert found.shape == (1, 3, 2)
    assert np.abs(found).max() > 0.01


def test_contract_comes_back_as_it_was(bundle: Bundle, reach: Contract) -> None:
    found = open_bundle(bundle.folder).contract
    assert replace(found, files={}, parity={}, versions={}) == reach
    assert set(found.files) == {"policy.onnx", "policy.ts", "examples.npz"}
    assert found.observation[0].high == math.inf
    assert torch.__version__.startswith(found.versions["torch"].partition("+")[0])


@pytest.mark.parametrize("name", ["policy.onnx", "examples.npz", "policy.ts"])
def test_damaged_file_is_refused(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        open_bundle(copied)


@pytest.mark.parametrize("name", ["policy.onnx", "contract.json"])
def test_missing_file_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_bundle(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "no contract"),
        ({"format_version": 2}, "version 2"),
        ({"period_s": 0.0}, "period_s"),
        ({"commands": [[0, 1]]}, "1 entries for 2 joints"),
        ({"observation_steps": 2}, "make 10 numbers"),
        ({"files": {"../../etc/passwd": "0"}}, "missing"),
    ],
)
def test_wrong_contract_is_refused(copied: Path, change: dict, message: str) -> None:
    file = copied / "contract.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        open_bundle(copied)


def test_existing_bundle_is_not_overwritten(bundle, policy, traced, reach) -> None:
    act = acting(policy, ExplorationType.DETERMINISTIC).act
    before = (bundle.folder / "contract.json").read_text()
    with pytest.raises(DatasetError):
        export.write(bundle.folder, traced, act, reach, torch.zeros(2, 5))
    assert (bundle.folder / "contract.json").read_text() == before


def test_what_differs_from_the_policy_is_not_written(policy, traced, reach, tmp_path) -> None:
    act = acting(policy, ExplorationType.DETERMINISTIC).act

    def other(observation: torch.Tensor) -> torch.Tensor:
        return act(observation) + 1e-3

    with pytest.raises(ExportError, match=r"differs from the trained policy by 0\.001"):
        export.write(tmp_path / "wrong", traced, other, reach, torch.zeros(2, 5))
    assert not list(tmp_path.iterdir())


def test_format_that_was_not_asked_for_is_named(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="aoti"):
        bundle.load("aoti")


def test_actions_become_commands_in_units(reach: Contract) -> None:
    assert reach.to_commands([-1.0, 1.0]) == [-1.0, 3.0]
    assert reach.to_commands([0.0, 0.0]) == [0.5, 0.0]


def test_limits_are_narrowed_by_name(reach: Contract) -> None:
    found = reach.with_limits({"elbow": {"velocity": 1.0, "jerk": None, "unit": "deg"}})
    elbow, motor = found.action
    assert (elbow.velocity, elbow.jerk, elbow.unit) == (1.0, math.inf, "deg")
    assert motor == reach.action[1]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"elbwo": {}}, "Did you mean 'elbow'"),
        ({"elbow": {"speed": 1}}, "unknown limit 'speed'"),
        ({"elbow": {"velocity": "fast"}}, "not a number"),
        ({"elbow": {"velocity": -1}}, "velocity"),
    ],
)
def test_wrong_limits_are_told(reach: Contract, limits: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reach.with_limits(limits)


def test_bundle_runs_without_torch(bundle: Bundle) -> None:
    program = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from genpol.deploy.bundle import open_bundle\n"
        f"bundle = open_bundle(Path({str(bundle.folder)!r})); x = bundle.examples()\n"
        "chunk = bundle.load()({name: a[:1] for name, a in x.items()})\n"
        "assert np.allclose(chunk, x['chunk'][:1], atol=1e-5)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

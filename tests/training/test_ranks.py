"""Two ranks of torchrun learn what one process learns, stay equal, and go on exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from genpol import parallel
from genpol.cli.main import main
from genpol.objectives.advantages import normalize_advantage
from genpol.training import checkpoint

SCRIPT = Path(__file__).with_name("ranks_script.py")
TOLERANCE = 2e-5  # of weights after 16 steps of Adam; sums are added up in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let two ranks do all that the script says, and return their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """Return what each rank found."""
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def test_a_nan_on_one_rank_skips_the_step_on_all(ranks: list[dict[str, Any]]) -> None:
    assert [rank["nan"]["skipped"] for rank in ranks] == [1, 1]
    assert ranks[0]["nan"] == ranks[1]["nan"]
    assert ranks[0]["nan"]["weight"] == pytest.approx(0.8)


def test_advantages_are_normalised_over_the_rows_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    shares = [rank["normalized"] for rank in ranks]
    assert [len(share) for share in shares] == [2, 4]
    expected = normalize_advantage(torch.arange(6.0))
    torch.testing.assert_close(torch.tensor([*shares[0], *shares[1]]), expected)


def test_ranks_learn_what_one_process_learns(
    folder: Path, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    assert [rank["whole"] for rank in ranks] == ["0", "0"]
    run = next((folder / "whole").glob("*/*/*"))
    command = json.loads((run / "run.json").read_text())["command"].split()
    own = [text for text in command[1:] if not text.startswith("output=")]
    assert main([*own, "num_collectors=2", f"output={tmp_path}"]) == 0
    one = next(tmp_path.glob("*/*/*"))
    a, b = (checkpoint.load(checkpoint.resolve(x)) for x in (one, run))
    assert a["env_steps"] == b["env_steps"] == 400
    assert a["weights"].keys() == b["weights"].keys()
    for name, x in a["weights"].items():
        torch.testing.assert_close(b["weights"][name], x, atol=TOLERANCE, rtol=TOLERANCE, msg=name)
    lines = [(x / "metrics.csv").read_text().splitlines() for x in (one, run)]
    assert lines[0][0].split(",") == lines[1][0].split(",")
    first = [[float(cell or "nan") for cell in line[1].split(",")] for line in lines]
    clock = lines[0][0].split(",").index("wall_clock_s")
    for cells in first:
        del cells[clock]
    assert first[1] == pytest.approx(first[0], rel=1e-4, abs=1e-6, nan_ok=True)


def test_resuming_on_as_many_ranks_is_exact(folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert [rank["resumed"] for rank in ranks] == ["0", "0"]
    runs = (next((folder / name).glob("*/*/*")) for name in ("whole", "half"))
    a, b = (checkpoint.load(checkpoint.resolve(run)) for run in runs)
    for state in (a, b):
        del state["wall_clock_s"]
    assert _text(a) == _text(b)


def _text(node: Any) -> Any:
    """Return a checkpoint with tensors as lists, which compare."""
    if isinstance(node, dict):
        return {name: _text(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_text(value) for value in node]
    return node.tolist() if isinstance(node, torch.Tensor) else node


def test_one_process_goes_on_only_with_as_many_groups(folder: Path, capsys: Any) -> None:
    run = next((folder / "whole").glob("*/*/*"))
    assert main(["train", f"resume={run}", "total_steps=800"]) == 1
    assert "was saved by 2 collectors or ranks, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("sac", "this agent learns in one process: leave torchrun out"),
        ("capo", "agent.capo.enabled=true: plans steps from the gradient of all rows"),
        ("collectors", "num_collectors = 2: every rank of torchrun is a collector"),
        ("odd", "num_envs = 3: 2 ranks cannot share them equally"),
    ],
)
def test_what_ranks_cannot_do_is_refused_by_all(
    ranks: list[dict[str, Any]], case: str, message: str
) -> None:
    assert all(rank[case].startswith(message) for rank in ranks)


def test_a_process_that_is_alone_changes_nothing() -> None:
    generator, x = torch.Generator(), torch.arange(4.0)
    assert parallel.branch(generator) is generator
    assert parallel.total(x) is x
    assert parallel.mean(x) is x
    assert parallel.gather("own") == ["own"]
    assert not parallel.started_by_torchrun({"WORLD_SIZE": "2"})  # of a host's own making
    assert parallel.started_by_torchrun({"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"})


def test_cuda_is_a_device_of_its_own_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"LOCAL_RANK": "1"}
    assert parallel.own_device("cuda", environ) == "cuda"
    monkeypatch.setattr(parallel._SELF, "size", 2)
    assert parallel.own_device("cuda", environ) == "cuda:1"
    assert parallel.own_device("cuda:0", environ) == "cuda:0"
    assert parallel.own_device("cpu", environ) == "cpu"

"""Several collectors, wherever they are: the same batches bit for bit; nothing is lost with one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensordict import TensorDict

from genpol.cli.main import main
from genpol.training import checkpoint, distributed_collection, groups
from genpol.training.distributed_collection import DistributedCollection

WITH_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (extra `distributed`)"
)
TINY = [
    *("env=Reacher-v5", "num_envs=4", "num_threads=1", "env.num_threads=1"),
    *("evaluation.episodes=2", "tensorboard=false", "video=false"),
]
AGENTS = {
    "ppo": ["agent.rollout_steps=25", "agent.minibatches=2", "agent.noise_correlation=0.5"],
    "gorl": [
        *("agent.rollout_steps=25", "agent.minibatches=2", "agent.stage_steps=[100]"),
        *("agent.refinement_steps=100", "agent.fit_steps=5", "agent.decoder_hidden=[8]"),
    ],
    "sac": ["agent.rollout_steps=5", "agent.warmup_steps=150", "agent.updates_per_step=0.1"],
}


def train(output: Path, agent: str, *more: str, steps: int = 400) -> tuple[int, Path]:
    """Run the command and return its exit code and run folder."""
    arguments = [*TINY, f"agent={agent}", *AGENTS[agent], f"total_steps={steps}", *more]
    code = main(["train", *arguments, f"output={output}"])
    return code, next(output.glob("*/*/*"))


def saved(run: Path) -> dict[str, Any]:
    """Return the last checkpoint's leaves by their places.

    Left out are what tells the time, torch's own generator, from which nothing here draws and which
    is as the tests before left it, and how a replay is divided into files.
    """
    state = checkpoint.load(checkpoint.resolve(run))
    del state["wall_clock_s"], state["torch_generator"]
    (state["replay"] or {}).pop("segments", None)
    return dict(_leaves(state, ""))


def _leaves(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for name, value in items:
        if isinstance(value, Mapping | list | tuple):
            yield from _leaves(value, f"{place}/{name}")
        else:
            yield f"{place}/{name}", value


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    return [place for place in a if not equal(a[place], b[place])]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train PPO with two groups in this process."""
    torch.set_num_threads(1)
    code, run = train(tmp_path_factory.mktemp("straight"), "ppo", "num_collectors=2")
    assert code == 0
    return run


@pytest.mark.parametrize("agent", AGENTS)
def test_resume_with_groups_is_exact(tmp_path: Path, agent: str) -> None:
    code, whole = train(tmp_path / "whole", agent, "num_collectors=2")
    assert code == 0
    code, half = train(tmp_path / "half", agent, "num_collectors=2", steps=200)
    assert code == 0
    assert main(["train", f"resume={half}", "total_steps=400"]) == 0
    assert differing(saved(whole), saved(half)) == []


def test_groups_differ_in_their_starts_and_their_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[TensorDict] = []
    collect = groups.DirectCollection.collect

    def noting(self: Any, learned: Mapping[str, Any]) -> TensorDict:
        batches.append(collect(self, learned).clone())
        return batches[-1]

    monkeypatch.setattr(groups.DirectCollection, "collect", noting)
    train(tmp_path, "ppo", "num_collectors=2", steps=100)
    (batch,) = batches
    assert batch.batch_size == (4, 25)
    first, second = batch.split(2)
    noise = [(x["latent"]).flatten() for x in (first, second)]  # the policy begins at N(0, 1)
    assert not torch.isclose(*noise).any()
    assert not torch.equal(first["observation"], second["observation"])


def kill_before(
    monkeypatch: pytest.MonkeyPatch, kind: type, call: int, kill: Callable[[Any], None]
) -> None:
    """Let a collector be killed before a batch is asked for."""
    collect = kind.collect  # type: ignore[attr-defined]
    calls: list[None] = []

    def killing(self: Any, learned: Mapping[str, Any]) -> TensorDict:
        calls.append(None)
        if len(calls) == call:
            kill(self)
        batch: TensorDict = collect(self, learned)
        return batch

    monkeypatch.setattr(kind, "collect", killing)


def check_killed(
    tmp_path: Path, straight: Path, capsys: Any, backend: str, who: str, *more: str
) -> None:
    """Check that a run stops with a checkpoint from which another backend goes on as if nothing."""
    code, run = train(tmp_path, "ppo", f"collector={backend}", "num_collectors=2", *more)
    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"genpol: error: collector 1 of 2 ({who}")
    assert error.endswith(f"step-000000000200 is saved, go on with: genpol train resume={run}\n")
    assert error.count("\n") == 1
    assert main(["train", f"resume={run}", "collector=direct"]) == 0
    assert differing(saved(straight), saved(run)) == []


def test_other_processes_play_the_same_and_a_killed_one_loses_nothing(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def kill(collection: DistributedCollection) -> None:
        os.kill(collection._processes[1].pid or 0, signal.SIGKILL)

    kill_before(monkeypatch, DistributedCollection, 3, kill)
    check_killed(tmp_path, straight, capsys, "distributed", "process ")


def test_ctrl_c_while_collectors_come_up_is_the_learners_to_heed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = DistributedCollection._await

    def interrupting(self: DistributedCollection) -> None:
        for pid in [*(process.pid for process in self._processes), os.getpid()]:
            os.kill(pid or 0, signal.SIGINT)  # as a terminal does
        wait(self)

    monkeypatch.setattr(DistributedCollection, "_await", interrupting)
    code, run = train(tmp_path, "ppo", "collector=distributed", "num_collectors=2")
    assert code == 130
    assert checkpoint.resolve(run).name == "step-000000000100"


def test_a_collector_that_is_killed_after_its_last_rollout_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = DistributedCollection.close

    def killing(self: DistributedCollection) -> None:
        os.kill(self._processes[1].pid or 0, signal.SIGKILL)
        self._processes[1].join()
        time.sleep(0.5)  # for the connection to be known as closed
        close(self)

    monkeypatch.setattr(DistributedCollection, "close", killing)
    more = ["collector=distributed", "num_collectors=2"]
    code, run = train(tmp_path, "ppo", *more, steps=100)
    assert code == 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("backend", ["distributed", pytest.param("ray", marks=WITH_RAY)])
def test_what_a_collector_refuses_is_told_in_one_line(
    tmp_path: Path, capsys: Any, backend: str
) -> None:
    groups_of_4 = ["env.group_size=4", "env.group_steps=25", "agent.advantage=group"]
    more = ["env=HopperStand", f"collector={backend}", "num_collectors=2", *groups_of_4]
    rest = [text for text in [*TINY, *AGENTS["ppo"]] if not text.startswith("env=")]
    assert main(["train", "agent=ppo", *rest, *more, f"output={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert " of 2 (" in error
    assert "env.group_size = 4, env.group_steps = 25: the size must divide num_envs = 2" in error
    assert error.count("\n") == 1


def test_a_collector_ends_in_silence_where_the_learner_was_killed() -> None:
    class Line:
        def receive(self, rank: int) -> Any:
            return {}

        def send(self, rank: int, parcel: torch.Tensor) -> None:
            raise distributed_collection._LineCut

    class Played:
        def collect(self, learned: Any) -> Any:
            return 1

        def state(self) -> Any:
            return 2

    distributed_collection._answer(Line(), Played())  # type: ignore[arg-type]


def test_processes_find_each_other_on_this_machine_alone() -> None:
    store = distributed_collection._open_store(2)
    listening = [x.laddr for x in psutil.Process().net_connections() if x.status == "LISTEN"]
    assert [place.ip for place in listening if place.port == store.port] == ["127.0.0.1"]


@WITH_RAY
def test_actors_of_ray_play_the_same_and_a_killed_one_loses_nothing(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import ray

    from genpol.training.ray_collection import RayCollection

    def kill(collection: RayCollection) -> None:
        actor = collection._collector.remote_collectors[1]
        pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
        os.kill(pid, signal.SIGKILL)

    kill_before(monkeypatch, RayCollection, 3, kill)
    check_killed(tmp_path, straight, capsys, "ray", "Ray) died")


def test_a_missing_ray_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    code, _ = train(tmp_path, "ppo", "collector=ray", "num_collectors=2")
    assert code == 2
    assert "pip install 'genpol[distributed]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["num_collectors=3"], "num_collectors = 3: does not divide num_envs = 4"),
        (["collector=ray"], "set num_collectors=2 or more"),
        (["collector=rayy"], "Did you mean 'ray'?"),
        (["num_collectors=0"], "num_collectors = 0"),
    ],
)
def test_what_cannot_be_shared_is_refused(capsys: Any, settings: list[str], message: str) -> None:
    assert main(["train", *TINY, "agent=ppo", *settings]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("number", "mend"), [(1, "num_collectors=2"), (4, "num_collectors=2")])
def test_other_numbers_of_collectors_cannot_go_on(
    tmp_path: Path, straight: Path, capsys: Any, number: int, mend: str
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    more = [f"num_collectors={number}", "total_steps=800"]
    assert main(["train", f"resume={run}", *more]) == 1
    error = capsys.readouterr().err
    assert f"was saved by 2 collectors or ranks, not {number}" in error
    assert mend in error

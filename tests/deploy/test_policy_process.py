"""A policy in a real process of its own: the same chunks, and an end that is noticed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from genpol.deploy.bundle import Bundle, sha256
from genpol.deploy.chunks import Answer, kept_weights
from genpol.deploy.contract import Contract
from genpol.deploy.policy_process import PolicyError, PolicyProcess
from genpol.deploy.start import LOOP_PRIORITY, POLICY_PRIORITY
from genpol.offline.settings import NetworkSettings

pytest.importorskip("onnxruntime", reason="needs the extra genpol[deploy]")
pytest.importorskip("onnxscript", reason="needs the extra genpol[deploy]")

Start = Callable[..., PolicyProcess]
Write = Callable[..., Bundle]
Array = np.ndarray[Any, np.dtype[np.float32]]

NET = NetworkSettings(hidden=[8])
SEARCH: dict[str, Any] = {
    "encoder_dim": 8,
    "mlp_dim": 8,
    "latent_dim": 8,
    "num_plans": 8,
    "num_elites": 4,
    "num_policy_plans": 2,
    "horizon": 2,
    "num_critics": 2,
    "dropout": 0.0,
    "num_bins": 11,
    "task_dim": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def plain(make_agent: Any, write_bundle: Write, reach: Contract, folder: Path) -> Bundle:
    agent = make_agent("bc", horizon=3, action_steps=2, solver_steps=2, actor=NET)
    return write_bundle(folder / "plain", agent, reach)


@pytest.fixture(scope="module")
def bound(make_agent: Any, write_bundle: Write, reach: Contract, folder: Path) -> Bundle:
    agent = make_agent("bc", horizon=5, action_steps=2, solver_steps=4, actor=NET)
    return write_bundle(folder / "bound", agent, reach, real_time_chunking=True)


@pytest.fixture(scope="module")
def wild(make_wild_bundle: Any, reach: Contract, folder: Path) -> Bundle:
    made: Bundle = make_wild_bundle(folder / "wild", reach)
    return made


def ask(
    process: PolicyProcess, tick: int, observation: Array, *, delay: int = 0, anew: bool = False
) -> Array:
    """Ask, and wait for the chunk."""
    process.ask(tick, observation.tolist(), delay=delay, anew=anew)
    answer = process.answer(10.0)
    assert answer is not None
    assert answer.tick == tick
    return np.asarray(answer.chunk, np.float32)


def observations(count: int) -> Array:
    drawn: Array = np.random.default_rng(5).standard_normal((count, 5), np.float32)
    return drawn


# --- the same chunks ---------------------------------------------------------------------------


def test_its_chunks_are_those_of_the_bundle_for_the_same_noise(
    plain: Bundle, start_policy: Start
) -> None:
    process = start_policy(plain, seed=3)
    plan, noise = plain.load(), np.random.default_rng(3)
    for tick, seen in enumerate(observations(6)):
        found = ask(process, tick, seen, anew=tick == 0)
        inputs = {"observation": seen[None], "noise": noise.standard_normal((1, 6), np.float32)}
        np.testing.assert_array_equal(found, plan(inputs)[0])
    assert found.shape == (3, 2)
    assert np.abs(found).max() > 0.01


def test_a_seed_decides_on_all_chunks(plain: Bundle, start_policy: Start) -> None:
    seen = observations(1)[0]
    chunks = []
    for seed in (7, 7, 8):
        process = start_policy(plain, seed=seed)
        chunks.append([ask(process, tick, seen) for tick in range(3)])
        process.close()
    first, again, other = chunks
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], other[0])
    assert not np.allclose(first[0], first[1])  # every question has noise of its own


def test_it_tells_how_long_an_answer_took(plain: Bundle, start_policy: Start) -> None:
    process = start_policy(plain)
    assert not process.pending
    assert process.waited_s == process.slowest_s == 0.0
    assert process.answer(0.0) is None
    begin = time.monotonic()
    process.ask(4, [0.0] * 5, delay=0, anew=True)
    assert process.pending
    answer = process.answer(10.0)
    passed = time.monotonic() - begin
    assert isinstance(answer, Answer)
    assert 0.0 < answer.seconds < process.slowest_s <= passed
    assert not process.pending
    assert process.waited_s == 0.0


# --- what is left of the chunk before ----------------------------------------------------------

QUESTIONS = [  # tick, delay, and whether an episode begins
    (10, 0, True),
    (12, 0, False),
    (14, 1, False),
    (15, 2, False),
    (18, 4, False),  # more than what is left, which is two
    (30, 1, False),  # nothing is left
    (31, 1, True),  # nor is there anything in a new episode
    (33, 3, False),
]


def left_of(chunk: Array, passed: int) -> Array:
    """Return what is left of a chunk with zeros behind."""
    found = np.zeros_like(chunk)
    for i in range(len(chunk) - passed):
        found[i] = chunk[i + passed]
    return found


def test_a_bound_policy_is_told_what_is_left_and_how_much_it_is_bound(
    bound: Bundle, start_policy: Start
) -> None:
    assert bound.contract.memory == "chunk"
    horizon = bound.contract.horizon
    process = start_policy(bound, seed=2)
    plan, noise = bound.load(), np.random.default_rng(2)
    chunk, last = np.zeros((horizon, 2), np.float32), 0
    for (tick, delay, anew), seen in zip(QUESTIONS, observations(len(QUESTIONS)), strict=True):
        passed = horizon if anew else min(tick - last, horizon)
        left = horizon - passed
        kept = kept_weights(horizon, delay=min(delay, left), left=left)
        inputs = {
            "observation": seen[None],
            "noise": noise.standard_normal((1, 2 * horizon), np.float32),
            "previous": left_of(chunk, passed)[None],
            "kept": np.asarray(kept, np.float32)[None],
        }
        found = ask(process, tick, seen, delay=delay, anew=anew)
        np.testing.assert_array_equal(found, plan(inputs)[0], err_msg=f"tick {tick}")
        if left:
            # It goes on from the chunk before, which it would not do by itself.
            free = plan(inputs | {"kept": np.zeros((1, horizon), np.float32)})[0]
            first = inputs["previous"][0, 0]
            assert np.abs(found[0] - first).max() < 0.7 * np.abs(free[0] - first).max()
        chunk, last = found, tick


def test_what_is_left_of_a_plan_moves_up(
    make_wild_bundle: Any, reach: Contract, tmp_path: Path, start_policy: Start
) -> None:
    """Of a policy that adds noise to the plan that it is told."""
    bundle = make_wild_bundle(tmp_path / "plan", replace(reach, memory="plan"))
    process = start_policy(bundle, seed=4)
    noise = np.random.default_rng(4)
    chunk, last = np.zeros((3, 2), np.float32), 0
    steps = [(5, True), (6, False), (7, False), (9, False), (12, False), (13, True), (14, False)]
    for tick, anew in steps:
        drawn = np.sign(noise.standard_normal((1, 6), np.float32)).reshape(3, 2)
        expected = drawn + left_of(chunk, 3 if anew else tick - last)
        chunk = ask(process, tick, np.zeros(5, np.float32), anew=anew)
        np.testing.assert_array_equal(chunk, expected, err_msg=f"tick {tick}")
        last = tick


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mbdpo", {"act": "search", "diffusion_steps": 2, "num_critics": 3}),
        ("mbdpo", {"act": "score", "score_network": True}),
        ("mbdpo", {"act": "policy"}),
        ("tdmpc2", {"iterations": 2}),
    ],
    ids=["search", "score", "policy", "tdmpc2"],
)
def test_a_planner_is_told_where_its_search_begins(
    make_agent: Any,
    write_bundle: Write,
    reach: Contract,
    tmp_path: Path,
    start_policy: Start,
    name: str,
    options: dict[str, Any],
) -> None:
    bundle = write_bundle(tmp_path / name, make_agent(name, **(SEARCH | options)), reach)
    assert bundle.contract.memory == "plan"
    assert bundle.contract.action_steps == 1
    process = start_policy(bundle, seed=4)
    plan, noise = bundle.load(), np.random.default_rng(4)
    width = bundle.contract.inputs["noise"][0]
    chunk, last, told = np.zeros((2, 2), np.float32), 0, 0
    for (tick, anew), seen in zip(
        [(0, True), (1, False), (2, False), (4, False), (5, True), (6, False)],
        observations(6),
        strict=True,
    ):
        previous = left_of(chunk, 2 if anew else tick - last)
        inputs = {
            "observation": seen[None],
            "noise": noise.standard_normal((1, width), np.float32),
            "previous": previous[None],
        }
        found = ask(process, tick, seen, anew=anew)
        np.testing.assert_array_equal(found, plan(inputs)[0], err_msg=f"tick {tick}")
        other = plan(inputs | {"previous": np.full((1, 2, 2), 0.5, np.float32)})[0]
        told += not np.array_equal(found, other)
        chunk, last = found, tick
    if name == "tdmpc2" or options["act"] == "search":
        assert told == 6


# --- how it ends -------------------------------------------------------------------------------


def noticed(process: PolicyProcess, seconds: float = 5.0) -> str:
    """Wait for the failure that the process is looked after for."""
    deadline = time.monotonic() + seconds
    while not process.failure and time.monotonic() < deadline:
        process.check()
        time.sleep(0.002)
    return process.failure


def pid_of(process: PolicyProcess) -> int:
    assert process._process is not None
    pid = process._process.pid
    assert pid in {child.pid for child in psutil.Process().children()}
    return pid


def test_a_killed_process_is_noticed_and_named(wild: Bundle, start_policy: Start) -> None:
    process = start_policy(wild)
    assert process.failure == ""
    os.kill(pid_of(process), signal.SIGKILL)
    assert noticed(process) == "the policy's process ended (SIGKILL)"
    assert not process.pending


@pytest.mark.parametrize("times", range(3))
def test_a_process_that_is_killed_over_a_question_is_named_too(
    wild: Bundle, start_policy: Start, times: int
) -> None:
    process = start_policy(wild)
    pid = pid_of(process)
    os.kill(pid, signal.SIGSTOP)  # so that it does not answer
    process.ask(0, [0.0] * 5, delay=0, anew=True)
    assert process.answer(0.01) is None
    assert process.pending
    os.kill(pid, signal.SIGKILL)
    assert process.answer(5.0) is None
    assert process.failure == "the policy's process ended (SIGKILL)"
    assert not process.pending
    assert process.waited_s == 0.0


def test_a_process_that_is_gone_may_be_asked_without_harm(
    wild: Bundle, start_policy: Start
) -> None:
    process = start_policy(wild)
    os.kill(pid_of(process), signal.SIGKILL)
    assert noticed(process)
    process.ask(0, [0.0] * 5, delay=0, anew=True)
    assert process.answer(0.1) is None
    assert process.failure.startswith("the policy's process ended")


def test_ctrl_c_is_for_the_controller_to_answer(wild: Bundle, start_policy: Start) -> None:
    process = start_policy(wild)
    os.kill(pid_of(process), signal.SIGINT)
    assert ask(process, 0, observations(1)[0]).shape == (3, 2)
    process.check()
    assert process.failure == ""


def test_close_leaves_no_process_behind(wild: Bundle, start_policy: Start) -> None:
    process = start_policy(wild)
    pid = pid_of(process)
    begin = time.monotonic()
    process.close()
    assert time.monotonic() - begin < 2.0
    assert not psutil.pid_exists(pid)
    assert process.failure
    process.close()  # and again, which does nothing


def test_close_ends_a_process_that_is_stuck(
    wild: Bundle, start_policy: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genpol.deploy.policy_process._END_S", 0.1)
    process = start_policy(wild)
    pid = pid_of(process)
    os.kill(pid, signal.SIGSTOP)
    process.close()
    assert not psutil.pid_exists(pid)


def test_a_policy_that_was_not_started_says_so(wild: Bundle) -> None:
    process = PolicyProcess(wild.folder, wild.contract)
    assert process.failure == "it was not started"
    process.check()
    process.close()


# --- what cannot be started --------------------------------------------------------------------


@pytest.fixture
def copied(wild: Bundle, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for file in wild.folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def refusal(folder: Path, contract: Contract, **options: Any) -> str:
    """Return the one line with which a policy refuses to start; nothing is left behind."""
    before = {child.pid for child in psutil.Process().children()}
    process = PolicyProcess(folder, contract, **options)
    with pytest.raises(PolicyError) as caught:
        process.start()
    assert "\n" not in str(caught.value)
    assert {child.pid for child in psutil.Process().children()} <= before
    assert process.failure
    return str(caught.value)


def test_a_damaged_bundle_is_one_clear_error(copied: Path, wild: Bundle) -> None:
    data = bytearray((copied / "policy.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "policy.onnx").write_bytes(data)
    message = refusal(copied, wild.contract)
    assert message.startswith(f"policy: {copied / 'policy.onnx'}: is not the file that")


def test_a_policy_that_cannot_be_loaded_is_one_clear_error(copied: Path, wild: Bundle) -> None:
    """Though its checksum is right."""
    policy, contract = copied / "policy.onnx", copied / "contract.json"
    policy.write_bytes(b"no graph")
    record = json.loads(contract.read_text()) | {"files": {"policy.onnx": sha256(policy)}}
    contract.write_text(json.dumps(record))
    assert refusal(copied, wild.contract).startswith(f"policy: {policy}: cannot be loaded (")


def test_a_format_that_is_not_there_is_one_clear_error(wild: Bundle) -> None:
    assert "format = 'torchscript'" in refusal(wild.folder, wild.contract, form="torchscript")


@pytest.mark.skipif(os.geteuid() != 0, reason="real-time priority is root's")
def test_it_runs_before_others_but_after_the_loop(plain: Bundle, start_policy: Start) -> None:
    process = start_policy(plain)._process
    assert process is not None
    assert process.pid is not None
    assert os.sched_getscheduler(process.pid) == os.SCHED_FIFO
    assert os.sched_getparam(process.pid).sched_priority == POLICY_PRIORITY < LOOP_PRIORITY

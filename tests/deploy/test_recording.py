"""Recordings: what is written is what was done, it is read back for training, and nobody waits."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from genpol.data.dataset import OfflineDataset
from genpol.data.formats import convert, open_dataset
from genpol.deploy.contract import Contract, to_json
from genpol.deploy.controller import Tick
from genpol.deploy.links import Observed
from genpol.deploy.observer import CONTRACT, EVENT_TOPIC, TICK_TOPIC, Observer, line
from genpol.deploy.safety import Command, Event, Mode
from genpol.errors import DatasetError

reader = pytest.importorskip("mcap.reader", reason="needs the extra genpol[deploy]")

WIDTH = 5


def tick(
    number: int,
    observation: Sequence[float] | None,
    command: Sequence[float] = (0.0, 0.0),
    *,
    first: bool = False,
    events: tuple[Event, ...] = (),
    target: Sequence[float] | None = (0.0, 0.0),
    mode: Mode = Mode.RUN,
) -> Tick:
    seen = None if observation is None else Observed(tuple(observation), 1.0, first)
    wanted = None if target is None else list(target)
    sent = Command(list(command), mode)
    return Tick(number, 0.02 * number, seen, wanted, sent, events, 0.003)


@pytest.fixture
def observe(reach: Contract, tmp_path: Path) -> Iterator[Callable[..., Observer]]:
    """Return what starts observers; those that are not closed are with the test."""
    started: list[Observer] = []

    def start(record: Path | None = tmp_path / "run.mcap") -> Observer:
        started.append(Observer(reach, record=record, view=False))
        return started[-1]

    yield start
    for observer in started:
        if observer._process.is_alive():
            observer._process.kill()
        observer._process.join()


@pytest.fixture
def recorded(observe: Callable[..., Observer], tmp_path: Path) -> Callable[[list[Tick]], Path]:
    """Return what records ticks, and the file."""

    def record(ticks: list[Tick]) -> Path:
        observer = observe()
        for entry in ticks:
            observer(entry)
        observer.close()
        assert observer.dropped == 0
        return tmp_path / "run.mcap"

    return record


def observations(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    drawn: np.ndarray[Any, np.dtype[np.float64]] = np.random.default_rng(seed).standard_normal(
        (count, WIDTH)
    )
    return drawn


def commands(count: int, contract: Contract) -> np.ndarray[Any, np.dtype[np.float64]]:
    low, high = np.array(contract.commands).T
    drawn: np.ndarray[Any, np.dtype[np.float64]] = np.random.default_rng(9).uniform(
        low, high, (count, len(low))
    )
    return drawn


def messages(path: Path, topic: str) -> list[tuple[Any, Any, Any]]:
    with path.open("rb") as file:
        return list(reader.make_reader(file).iter_messages(topics=[topic]))


# --- what is written -----------------------------------------------------------------------------


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value is valid under those words of JSON Schema that are used here."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kind = {
        type(None): "null",
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }[type(value)]
    assert set(schema) <= {"type", "items", "properties"}
    if kind not in kinds and not (kind == "integer" and "number" in kinds):
        return False
    if kind == "array" and "items" in schema:
        return all(fits(x, schema["items"]) for x in value)
    if kind == "object":
        known = schema.get("properties", {})
        return all(fits(x, known[name]) for name, x in value.items() if name in known)
    return True


def test_a_recording_opens_and_its_messages_are_what_the_schemas_say(
    recorded: Callable[[list[Tick]], Path], reach: Contract
) -> None:
    events = (
        Event(1, "motion", "elbow", 2.5, 0.5),
        Event(1, "observation: none"),
    )
    path = recorded(
        [
            tick(0, [0.1, 0.2, 0.3, 0.4, 0.5], [0.25, -1.0], first=True),
            tick(1, None, [0.5, -1.0], events=events, target=None, mode=Mode.HOLD),
            tick(2, [math.nan, 1.0, math.inf, 0.0, -0.0], [0.5, 1.0], mode=Mode.STOP),
        ]
    )
    with path.open("rb") as file:
        opened = reader.make_reader(file)
        summary = opened.get_summary()
        (attachment,) = opened.iter_attachments()
    assert summary.statistics.message_count == 5
    assert {x.topic for x in summary.channels.values()} == {TICK_TOPIC, EVENT_TOPIC}
    assert (attachment.name, attachment.media_type) == (CONTRACT, "application/json")
    assert attachment.data.decode() == to_json(reach)
    for topic in (TICK_TOPIC, EVENT_TOPIC):
        for schema, channel, message in messages(path, topic):
            assert (schema.encoding, channel.message_encoding) == ("jsonschema", "json")
            shape = json.loads(schema.data)
            value = json.loads(message.data, parse_constant=pytest.fail)
            assert shape["type"] == "object"
            assert set(value) == set(shape["properties"])
            assert fits(value, shape)
    first, second, third = (json.loads(x[2].data) for x in messages(path, TICK_TOPIC))
    assert first == {
        "tick": 0,
        "time_s": 0.0,
        "first": True,
        "accepted": True,
        "observation": [0.1, 0.2, 0.3, 0.4, 0.5],
        "target": [0.0, 0.0],
        "command": [0.25, -1.0],
        "mode": "run",
        "work_s": 0.003,
    }
    assert second["observation"] is second["target"] is None
    assert second["mode"] == "hold"
    assert third["observation"] == [None, 1.0, None, 0.0, 0.0]
    told = [json.loads(x[2].data) for x in messages(path, EVENT_TOPIC)]
    assert told == [
        {"tick": 1, "what": "motion", "joint": "elbow", "asked": 2.5, "sent": 0.5},
        {"tick": 1, "what": "observation: none", "joint": "", "asked": None, "sent": None},
    ]


def test_times_are_those_of_the_ticks(recorded: Callable[[list[Tick]], Path]) -> None:
    before = time.time_ns()
    path = recorded([tick(number, observations(1)[0]) for number in range(4)])
    times = [message.log_time for _, _, message in messages(path, TICK_TOPIC)]
    assert before <= times[0] <= time.time_ns()
    assert np.diff(times).tolist() == [20_000_000] * 3


def test_a_line_is_one_line_whatever_is_in_it() -> None:
    text = line(tick(3, [math.nan] * 5, events=(Event(3, 'a "reason"\nof two lines'),)), 10)
    assert text.count(b"\n") == 1
    assert text.endswith(b"\n")
    assert json.loads(text)["at_ns"] == 10 + 60_000_000


# --- what is read back -------------------------------------------------------------------------


def as_actions(sent: np.ndarray, contract: Contract) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the actions that make these commands."""
    low, high = np.array(contract.commands).T
    found: np.ndarray[Any, np.dtype[np.float32]] = (2.0 * (sent - low) / (high - low) - 1.0).astype(
        np.float32
    )
    return found


def assert_rows(
    dataset: OfflineDataset, rows: slice, seen: np.ndarray, sent: np.ndarray, contract: Contract
) -> None:
    """Check one trajectory; its last state has no action."""
    found = dataset.columns["observation"][rows]
    np.testing.assert_array_equal(found, seen.astype(np.float32))
    actions = dataset.columns["action"][rows]
    np.testing.assert_array_equal(actions[:-1], as_actions(sent[:-1], contract))
    assert not actions[-1].any()


def test_what_was_seen_and_done_comes_back(
    recorded: Callable[[list[Tick]], Path], reach: Contract
) -> None:
    seen, sent = observations(50), commands(50, reach)
    path = recorded([tick(i, seen[i].tolist(), sent[i].tolist()) for i in range(50)])
    dataset = open_dataset(path)
    assert (dataset.num_trajectories, dataset.num_transitions) == (1, 49)
    assert dataset.columns["observation"].dtype == np.float32
    assert_rows(dataset, slice(0, 50), seen, sent, reach)
    assert reach.to_commands(dataset.columns["action"][7].tolist()) == pytest.approx(sent[7])
    assert not dataset.columns["terminated"].any()
    assert "reward" not in dataset.columns
    assert dataset.metadata["env"] == "Reach"


def test_numbers_of_the_policy_come_back_to_the_last_bit(
    recorded: Callable[[list[Tick]], Path],
) -> None:
    """As a simulation sends them: 32 bits of a float as 64."""
    seen = observations(3).astype(np.float32)
    seen[0] = [1e-38, -1e-45, 3.4e38, 0.1, -0.0]
    path = recorded([tick(i, seen[i].tolist()) for i in range(3)])
    found = open_dataset(path).columns["observation"]
    assert found.tobytes() == seen.tobytes()


def test_commands_beyond_what_the_policy_can_ask_for_are_its_greatest(
    recorded: Callable[[list[Tick]], Path],
) -> None:
    path = recorded([tick(i, [float(i)] * 5, [-9.0, 9.0]) for i in range(3)])
    assert open_dataset(path).columns["action"].tolist() == [[-1.0, 1.0]] * 2 + [[0.0, 0.0]]


TRAJECTORIES: dict[str, tuple[list[tuple[int, Any]], list[list[int]]]] = {
    # Ticks with their kind, and the trajectories that they make.
    "whole": ([(i, "") for i in range(6)], [[0, 1, 2, 3, 4, 5]]),
    "an episode begins": (
        [(0, "first"), (1, ""), (2, ""), (3, "first"), (4, "")],
        [[0, 1, 2], [3, 4]],
    ),
    "a tick was skipped": ([(0, ""), (1, ""), (3, ""), (4, "")], [[0, 1], [3, 4]]),
    "nothing was seen": ([(0, ""), (1, ""), (2, "none"), (3, ""), (4, "")], [[0, 1], [3, 4]]),
    "not finite": ([(0, ""), (1, ""), (2, "nan"), (3, ""), (4, "")], [[0, 1], [3, 4]]),
    "in part not finite": ([(0, ""), (1, ""), (2, "inf"), (3, ""), (4, "")], [[0, 1], [3, 4]]),
    "one alone is left out": (
        [(0, ""), (1, "none"), (2, ""), (3, ""), (4, "first"), (5, "first"), (6, "")],
        [[2, 3], [5, 6]],
    ),
    "bad ones at both ends": ([(0, "nan"), (1, ""), (2, ""), (3, "none")], [[1, 2]]),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_no_trajectory_jumps_over_a_gap(
    recorded: Callable[[list[Tick]], Path], reach: Contract, name: str
) -> None:
    kinds, wanted = TRAJECTORIES[name]
    seen, sent = observations(10), commands(10, reach)
    ticks = []
    for number, kind in kinds:
        values: Any = seen[number].tolist()
        values = {
            "none": None,
            "nan": [math.nan] * 5,
            "inf": [*values[:4], math.inf],
        }.get(kind, values)
        ticks.append(tick(number, values, sent[number].tolist(), first=kind == "first"))
    dataset = open_dataset(recorded(ticks))
    found = [slice(a, b + 1) for a, b in zip(dataset.starts, dataset.ends, strict=True)]
    assert len(found) == len(wanted)
    for rows, numbers in zip(found, wanted, strict=True):
        assert_rows(dataset, rows, seen[numbers], sent[numbers], reach)


def test_minari_holds_the_same(
    recorded: Callable[[list[Tick]], Path], reach: Contract, tmp_path: Path
) -> None:
    pytest.importorskip("h5py")
    seen, sent = observations(30), commands(30, reach)
    path = recorded(
        [tick(i, seen[i].tolist(), sent[i].tolist(), first=i in (0, 12)) for i in range(30)]
    )
    target = tmp_path / "robot-v0"
    convert(path, target, "minari")
    found, wanted = open_dataset(target), open_dataset(path)
    assert found.ends.tolist() == wanted.ends.tolist() == [11, 29]
    for name in ("observation", "action", "terminated"):
        np.testing.assert_array_equal(found.columns[name], wanted.columns[name])


# --- what cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_one_clear_error(
    recorded: Callable[[list[Tick]], Path], share: float
) -> None:
    path = recorded([tick(i, observations(1, i)[0].tolist()) for i in range(50)])
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DatasetError, match=r"is damaged .*mcap recover") as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_with_a_wrong_bit_is_one_clear_error(
    recorded: Callable[[list[Tick]], Path],
) -> None:
    path = recorded([tick(i, observations(1, i)[0].tolist()) for i in range(50)])
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match="is damaged") as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)


def test_a_recording_of_others_is_one_clear_error(tmp_path: Path) -> None:
    from mcap.writer import Writer

    path = tmp_path / "other.mcap"
    writer = Writer(str(path))
    writer.start()
    writer.finish()
    with pytest.raises(DatasetError, match=r"has no contract\.json, so genpol deploy did not"):
        open_dataset(path)


@pytest.mark.parametrize("seen", [None, [math.nan] * 5])
def test_a_recording_without_observations_is_one_clear_error(
    recorded: Callable[[list[Tick]], Path], seen: list[float] | None
) -> None:
    path = recorded([tick(i, seen) for i in range(5)])
    with pytest.raises(DatasetError, match="holds no two ticks on end with an observation"):
        open_dataset(path)


# --- what cannot be written, and who waits --------------------------------------------------------


def test_a_file_that_exists_is_refused(observe: Callable[..., Observer], tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    path.write_text("precious")
    with pytest.raises(DatasetError, match="exists already; give another name") as caught:
        observe(path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "precious"


def test_a_folder_is_made(observe: Callable[..., Observer], tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "run.mcap"
    observer = observe(path)
    observer(tick(0, [0.0] * 5))
    observer.close()
    assert len(messages(path, TICK_TOPIC)) == 1


@pytest.mark.parametrize("kind", ["a file", "closed", "not a disk"])
def test_a_folder_that_cannot_be_written_is_told_before_the_robot_moves(
    observe: Callable[..., Observer], tmp_path: Path, kind: str
) -> None:
    folder = Path("/proc") if kind == "not a disk" else tmp_path / "folder"
    if kind == "a file":
        folder.write_text("no folder")
    elif kind == "closed":
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("who runs this may write anywhere")
    elif not folder.is_dir():
        pytest.skip("there is no such folder here")
    with pytest.raises(DatasetError, match="cannot be written") as caught:
        observe(folder / "run.mcap")
    assert "\n" not in str(caught.value)


def stuck(observer: Observer) -> int:
    pid = observer._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_a_stuck_observer_is_not_waited_for(observe: Callable[..., Observer]) -> None:
    observer = observe()
    observer(tick(0, [0.0] * 5))
    stuck(observer)
    entry = tick(1, [0.123456789] * 5, events=tuple(Event(1, "motion") for _ in range(20)))
    size = len(line(entry, 0))
    count, slowest = 4_000_000 // size, 0.0
    for _ in range(count):
        begin = time.perf_counter()
        observer(entry)
        slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 0.1  # where it waited it would wait for ever
    # It keeps a megabyte besides what the socket takes, and no more.
    assert 0.2 * count < observer.dropped < count
    assert len(observer._pending) < 2_000_000


def test_an_observer_that_comes_back_goes_on_behind_what_was_dropped(
    observe: Callable[..., Observer], tmp_path: Path
) -> None:
    observer = observe()
    pid = stuck(observer)
    events = tuple(Event(1, "motion") for _ in range(100))
    number = 0
    while observer.dropped < 50:
        observer(tick(number, [0.5] * 5, events=events))
        number += 1
    dropped = observer.dropped
    os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + 5.0
    while observer._pending and time.monotonic() < deadline:
        observer._send()
    for later in range(number, number + 10):
        observer(tick(later, [0.5] * 5))
    observer.close()
    assert observer.dropped == dropped
    found = [json.loads(x[2].data)["tick"] for x in messages(tmp_path / "run.mcap", TICK_TOPIC)]
    assert found == [*range(number - dropped), *range(number, number + 10)]


def test_an_observer_that_is_gone_does_not_stop_the_loop_and_is_told(
    observe: Callable[..., Observer],
) -> None:
    observer = observe()
    observer(tick(0, [0.0] * 5))
    pid = observer._process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    observer._process.join()
    for number in range(1, 101):
        observer(tick(number, [0.0] * 5))
    begin = time.monotonic()
    observer.close()
    assert time.monotonic() - begin < 1.0
    assert observer.dropped >= 100


def test_close_ends_an_observer_that_is_stuck(
    observe: Callable[..., Observer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genpol.deploy.observer._END_S", 0.1)
    observer = observe()
    stuck(observer)
    observer(tick(0, [0.0] * 5))
    observer.close()
    observer._process.join(1.0)
    assert not observer._process.is_alive()

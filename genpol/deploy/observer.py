"""Recording and a live view in a process of their own, which the control loop never waits for.

Each tick becomes a line of JSON that is sent without waiting. What the other process cannot take in
time is dropped and counted, and never holds up the loop. A recording is an MCAP file that Foxglove
and PlotJuggler open: topic ``/tick`` with what was observed, wanted and commanded, topic ``/event``
with interventions, and the contract as an attachment. `genpol data convert` and ``data=`` of
`genpol train` read it (:mod:`genpol.data.formats.mcap`).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from genpol.deploy.contract import Contract, to_json
from genpol.deploy.controller import Tick
from genpol.errors import DatasetError, require

TICK_TOPIC = "/tick"
EVENT_TOPIC = "/event"
CONTRACT = "contract.json"

_MOST_BYTES = 1 << 20  # that wait to be taken
_END_S = 10.0
_REFRESH_S = 0.25
_SHOWN_TICKS = 250

_NUMBERS = {"type": ["array", "null"], "items": {"type": ["number", "null"]}}
_SCHEMAS = {
    TICK_TOPIC: {
        "type": "object",
        "properties": {
            "tick": {"type": "integer"},
            "time_s": {"type": "number"},
            "first": {"type": "boolean"},
            "accepted": {"type": "boolean"},
            "observation": _NUMBERS,
            "target": _NUMBERS,
            "command": _NUMBERS,
            "mode": {"type": "string"},
            "work_s": {"type": "number"},
        },
    },
    EVENT_TOPIC: {
        "type": "object",
        "properties": {
            "tick": {"type": "integer"},
            "what": {"type": "string"},
            "joint": {"type": "string"},
            "asked": {"type": ["number", "null"]},
            "sent": {"type": ["number", "null"]},
        },
    },
}


class Observer:
    """Sends ticks to a process that records and shows them.

    Args:
        contract: Of the policy.
        record: File to write; ``None`` for none.
        view: Whether to show them on the terminal.

    Attributes:
        dropped: Ticks that could not be taken.
        failed: Why nothing more is recorded; empty if all is well.

    Raises:
        DatasetError: If the file exists or its folder cannot be written.
        MissingExtraError: If mcap is not installed.
    """

    def __init__(self, contract: Contract, *, record: Path | None, view: bool) -> None:
        if record is not None:
            require("mcap.writer", "deploy")
            if record.exists():
                raise DatasetError(f"{record}: exists already; give another name to record=")
            try:
                record.parent.mkdir(parents=True, exist_ok=True)
                record.touch()
            except OSError as error:
                raise DatasetError(f"{record}: cannot be written ({error.strerror})") from None
        self.dropped = 0
        self.failed = ""
        self._begun_ns = time.time_ns()
        self._pending = b""
        self._socket, theirs = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        self._process: BaseProcess = context.Process(
            target=_work,
            args=(theirs, to_json(contract), record, view),
            name="genpol observer",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self._socket.setblocking(False)

    def __call__(self, tick: Tick) -> None:
        """Take note of a tick."""
        if self.failed or len(self._pending) > _MOST_BYTES:
            self.dropped += 1
        else:
            self._pending += line(tick, self._begun_ns)
        self._send()

    def close(self) -> None:
        """Have everything written, and end."""
        self._socket.settimeout(_END_S)
        with suppress(OSError):
            self._socket.sendall(self._pending)
        self._socket.close()
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self.failed = self.failed or "its process did not end"
        elif self._process.exitcode:
            self.failed = self.failed or f"its process ended with {self._process.exitcode}"

    def _send(self) -> None:
        try:
            sent = self._socket.send(self._pending)
        except BlockingIOError:  # it is full
            return
        except OSError:
            self.failed = "its process ended"
            self.dropped += self._pending.count(b"\n")
            self._pending = b""
            return
        self._pending = self._pending[sent:]


def line(tick: Tick, begun_ns: int) -> bytes:
    """Return a tick as a line of JSON."""
    observed = tick.observed
    record = {
        "tick": tick.number,
        "time_s": tick.time_s,
        "first": observed is not None and observed.first,
        "accepted": tick.accepted and observed is not None,
        "observation": None if observed is None else _finite(observed.values),
        "target": None if tick.target is None else _finite(tick.target),
        "command": tick.command.values,
        "mode": tick.command.mode.value,
        "work_s": tick.work_s,
    }
    events = [
        {
            "tick": event.tick,
            "what": event.what,
            "joint": event.joint,
            "asked": _number(event.asked),
            "sent": _number(event.sent),
        }
        for event in tick.events
    ]
    whole = {"at_ns": begun_ns + round(tick.time_s * 1e9), "tick": record, "events": events}
    return json.dumps(whole, separators=(",", ":")).encode() + b"\n"


def _finite(values: Sequence[float]) -> Sequence[float | None]:
    return values if all(map(math.isfinite, values)) else [_number(x) for x in values]


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _work(theirs: socket.socket, contract: str, record: Path | None, view: bool) -> None:
    """Record and show what comes until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recorder = None if record is None else _Recorder(record, contract)
    shown = _View(json.loads(contract)) if view else None
    try:
        for text in _lines(theirs):
            entry = json.loads(text)
            if recorder is not None:
                recorder.add(entry)
            if shown is not None:
                shown.add(entry)
    finally:
        if recorder is not None:
            recorder.close()
        if shown is not None:
            shown.close()


def _lines(theirs: socket.socket) -> Iterator[bytes]:
    left = b""
    with suppress(ConnectionError):
        while data := theirs.recv(1 << 16):
            *whole, left = (left + data).split(b"\n")
            yield from whole


class _Recorder:
    """Writes an MCAP file."""

    def __init__(self, path: Path, contract: str) -> None:
        from mcap.writer import Writer

        self._writer: Any = Writer(str(path))
        self._writer.start(profile="", library="genpol")
        now = time.time_ns()
        self._writer.add_attachment(now, now, CONTRACT, "application/json", contract.encode())
        self._channels = {}
        for topic, schema in _SCHEMAS.items():
            number = self._writer.register_schema(
                f"genpol{topic.replace('/', '.')}", "jsonschema", json.dumps(schema).encode()
            )
            self._channels[topic] = self._writer.register_channel(topic, "json", number)

    def add(self, entry: dict[str, Any]) -> None:
        at = entry["at_ns"]
        self._add(TICK_TOPIC, at, entry["tick"])
        for event in entry["events"]:
            self._add(EVENT_TOPIC, at, event)

    def close(self) -> None:
        self._writer.finish()

    def _add(self, topic: str, at: int, message: dict[str, Any]) -> None:
        data = json.dumps(message, separators=(",", ":")).encode()
        self._writer.add_message(self._channels[topic], at, data, at)


class _View:
    """A few lines on the terminal that follow what happens."""

    def __init__(self, contract: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.live import Live

        self._period_ms = 1e3 * contract["period_s"]
        self._title = f"{contract['agent']} on {contract['env']}"
        self._work: deque[float] = deque(maxlen=_SHOWN_TICKS)
        self._interventions = 0
        self._last_event = "none"
        self._shown_s = 0.0
        self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._live.start()

    def add(self, entry: dict[str, Any]) -> None:
        tick = entry["tick"]
        self._work.append(1e3 * tick["work_s"])
        self._interventions += len(entry["events"])
        if entry["events"]:
            event = entry["events"][-1]
            self._last_event = f"{event['what']} {event['joint']} in tick {event['tick']}"
        now = time.monotonic()
        if now - self._shown_s < _REFRESH_S:
            return
        self._shown_s = now
        work = sorted(self._work)
        self._live.update(
            f"{self._title}   {tick['time_s']:8.1f} s   {tick['mode']}\n"
            f"to the command  {work[len(work) // 2]:.2f} ms, slowest {work[-1]:.2f} ms of "
            f"{self._period_ms:.1f} ms\n"
            f"interventions   {self._interventions}, last: {self._last_event}   (Ctrl-C ends)",
            refresh=True,
        )

    def close(self) -> None:
        self._live.stop()

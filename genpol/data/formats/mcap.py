"""MCAP recordings of `genpol deploy`: what a robot saw and was commanded.

A recording has a topic ``/tick`` with a JSON object per tick of the control loop, and the policy's
contract as an attachment; see :mod:`genpol.deploy.observer`. Other MCAP files are not read.

Actions are the commands that were *sent*, which the safety filter may have changed, scaled to
[-1, 1] by the contract's ``commands``. A trajectory ends where an episode of a simulation begins
anew, and where an observation is missing, was refused or a tick was skipped: never does one jump
over a gap. A goal that came behind the observation is the column ``goal``.
There are no rewards, for robots tell none; no trajectory is ``terminated``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from genpol.data.columns import Source
from genpol.data.sink import RowSink
from genpol.errors import DatasetError, require

EXPECTED = "an MCAP file that genpol deploy recorded"

_MAGIC = b"\x89MCAP0\r\n"
_TICK = "/tick"
_CONTRACT = "contract.json"
_BLOCK = 4096


def matches(path: Path) -> bool:
    """Return whether ``path`` is an MCAP file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read(path: Path, sink: RowSink) -> None:
    """Read a recording into ``sink``.

    Raises:
        DatasetError: If it is damaged, was not made by genpol, or holds no two ticks on end.
        MissingExtraError: If mcap is not installed.
    """
    reader_of = require("mcap.reader", "deploy").make_reader
    source = Source(file=str(path))
    with path.open("rb") as file:
        try:
            reader = reader_of(file, validate_crcs=True)
            contract = _contract(reader, path)
            sink.metadata.update(format="mcap", source=str(path), env=contract["env"])
            bounds = np.asarray(contract["commands"], dtype=np.float64)
            rows = _Rows(sink, bounds, source, goal_dim=contract["goal_dim"])
            for _, _, message in reader.iter_messages(topics=[_TICK]):
                rows.add(json.loads(message.data))
            rows.finish()
        except DatasetError:
            raise
        except Exception as error:  # mcap has several, of no common class
            raise DatasetError(
                f"{path}: is damaged ({type(error).__name__}: {error}); `mcap recover` may save "
                "what was written before"
            ) from None
    if sink.num_trajectories == 0:
        raise DatasetError(f"{path}: holds no two ticks on end with an observation")


def _contract(reader: Any, path: Path) -> dict[str, Any]:
    for attachment in reader.iter_attachments():
        if attachment.name == _CONTRACT:
            found: dict[str, Any] = json.loads(attachment.data)
            return found
    raise DatasetError(f"{path}: has no {_CONTRACT}, so genpol deploy did not record it")


class _Rows:
    """Gathers ticks into trajectories, a block at a time.

    Whether a tick is the last of its trajectory is known when the next one comes.
    """

    def __init__(
        self, sink: RowSink, bounds: np.ndarray[Any, Any], source: Source, *, goal_dim: int
    ) -> None:
        self._sink = sink
        self._goal_dim = goal_dim
        self._low, self._high = bounds.T
        self._source = source
        self._held: dict[str, Any] | None = None
        self._alone = True  # whether what is held begins a trajectory
        self._block: list[tuple[dict[str, Any], bool]] = []

    def add(self, tick: dict[str, Any]) -> None:
        held, seen = self._held, tick["observation"]
        sound = tick["accepted"] and seen is not None and None not in seen
        follows = held is not None and tick["tick"] == held["tick"] + 1
        goes_on = sound and follows and not tick["first"]
        self._release(last=not goes_on)
        if sound:
            self._alone = not goes_on
            self._held = tick

    def finish(self) -> None:
        self._release(last=True)
        self._flush()

    def _release(self, *, last: bool) -> None:
        if self._held is None:
            return
        if not (last and self._alone):  # a trajectory of a single state has no transition
            self._block.append((self._held, last))
        self._held = None
        if len(self._block) >= _BLOCK:
            self._flush()

    def _flush(self) -> None:
        if not self._block:
            return
        ticks = [tick for tick, _ in self._block]
        command = np.asarray([tick["command"] for tick in ticks], dtype=np.float64)
        action = 2.0 * (command - self._low) / (self._high - self._low) - 1.0
        seen = np.asarray([tick["observation"] for tick in ticks], dtype=np.float32)
        width = seen.shape[1] - self._goal_dim
        goal = {"goal": seen[:, width:]} if self._goal_dim else {}
        columns = {
            "observation": seen[:, :width],
            **goal,
            "action": action.clip(-1.0, 1.0).astype(np.float32),
            "terminated": np.zeros(len(ticks), dtype=bool),
        }
        self._sink.append_rows(columns, [last for _, last in self._block], source=self._source)
        self._block = []

"""The rows of a replay on disk: every checkpoint adds those that came since the one before.

A replay of a million transitions, written whole with each checkpoint, takes long to save and fills
the disk. Here each save writes one segment of new rows, a verified folder beside the checkpoints::

    replay/rows-000000120000-000000160000/

and the checkpoint itself holds the names of the segments it needs, with their digests. A segment is
never changed; it is removed when no checkpoint that is kept needs it any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from genpol.errors import CheckpointError
from genpol.training import checkpoint

TAG = "genpol.replay"


class Stored(Protocol):
    """A replay whose rows are numbered as they come, the oldest being forgotten."""

    @property
    def span(self) -> tuple[int, int]:
        """The numbers of the oldest row held and of the next one to come."""
        ...

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return held rows by their numbers, ``[last - first, ...]`` each."""
        ...

    def position(self) -> dict[str, Any]:
        """Return all else."""
        ...

    def restore(self, rows: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Become what it was."""
        ...


class ReplayStore:
    """The segments of one run.

    Args:
        folder: Where they lie; made with the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segments: list[dict[str, Any]] = []

    def save(self, replay: Stored) -> dict[str, Any]:
        """Write the rows that no segment holds yet; return what a checkpoint must hold.

        Raises:
            CheckpointError: If the folder cannot be written; what lies there is as it was.
        """
        first, last = replay.span
        self._segments = [x for x in self._segments if x["last"] > first]
        begin = max(first, self._segments[-1]["last"] if self._segments else first)
        if last > begin:
            self._segments.append(self._write(begin, last, replay.rows(begin, last)))
        segments = [dict(x) for x in self._segments]
        return {"first": first, "segments": segments, "position": replay.position()}

    def _write(self, first: int, last: int, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        name = f"rows-{first:012d}-{last:012d}"
        place = {"first": first, "last": last}
        checkpoint.write_folder(self.folder / name, {"rows": dict(rows)}, tag=TAG, metadata=place)
        return {"name": name, **place, "sha256": checkpoint.digest(self.folder / name, tag=TAG)}

    def load(self, replay: Stored, state: Mapping[str, Any], path: Path) -> None:
        """Restore a replay from what :meth:`save` returned, and forget what was saved later.

        Args:
            replay: Still empty.
            state: See above.
            path: The checkpoint, for messages.

        Raises:
            CheckpointError: If a segment is missing, damaged or not the one that was written.
        """
        segments: Sequence[Mapping[str, Any]] = state["segments"]
        parts = [self._read(segment, path) for segment in segments]
        rows: dict[str, Tensor] = {}
        if parts:
            forgotten = state["first"] - segments[0]["first"]
            rows = {
                name: torch.cat([part[name] for part in parts])[forgotten:] for name in parts[0]
            }
        replay.restore(rows, state["position"])
        self._segments = [dict(segment) for segment in segments]
        known = {segment["name"] for segment in segments}
        end = segments[-1]["last"] if segments else 0
        for place, first, _ in self._places():
            if place.name not in known and first >= end:
                shutil.rmtree(place, ignore_errors=True)

    def _read(self, segment: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
        place = self.folder / segment["name"]
        try:
            found = checkpoint.digest(place, tag=TAG)
            state = checkpoint.read_folder(place, tag=TAG)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; {path} needs it for its replay, so resume from a whole copy of the run"
            ) from None
        if found != segment["sha256"]:
            raise CheckpointError(
                f"{place}: is not what was written with {path}; resume from a whole copy of the run"
            )
        rows: dict[str, Tensor] = state["rows"]
        return rows

    def prune(self, oldest: int) -> None:
        """Remove the segments that hold no row from number ``oldest`` on."""
        for place, _, last in self._places():
            if last <= oldest:
                shutil.rmtree(place, ignore_errors=True)

    def _places(self) -> list[tuple[Path, int, int]]:
        """Return the folders of segments, and the numbers that their names say."""
        found = []
        for place in self.folder.glob("rows-*-*"):
            _, first, last = place.name.split("-")
            found.append((place, int(first), int(last)))
        return found

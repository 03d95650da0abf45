"""The socket protocol between controller and robot: one datagram a message, no pickle.

A message, in network byte order:

====== ======= ===================================================================================
bytes  type    what
====== ======= ===================================================================================
4      chars   ``GPL1``: protocol and version
1      uint8   kind: 1 observation, 2 command, 3 heartbeat, 4 stop, 5 reset, 6 greeting
1      uint8   mode of a command: 0 run, 1 hold, 2 damp, 3 stop; of an observation: 1 if an
               episode begins with it; else 0
2      uint16  count of numbers
8      uint64  sequence number, from 1, greater in every message of a sender
8      int64   age in nanoseconds when it was sent: of an observation since it was measured
8 n    float64 the numbers, in the order of the contract, in its units
32     bytes   HMAC-SHA256 of all before, with the key that both sides were given
====== ======= ===================================================================================

Ages, not times, are sent: the clocks of two machines need not agree. What is too short, of another
version, or not signed with the key is dropped and counted, as is what comes late, twice or out of
order (a sequence number that is not greater than the last).
"""

from __future__ import annotations

import hmac
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from genpol.errors import ConfigError

MAGIC = b"GPL1"
MAX_NUMBERS = 4096

_HEADER = struct.Struct("!4sBBHQq")
_SIGNATURE = 32
_LEAST_KEY = 16
_NEW_SENDER = 1_000_000  # a gap so long is that between two senders, not of what was lost


class Kind(IntEnum):
    """What a message is."""

    OBSERVATION = 1
    COMMAND = 2
    HEARTBEAT = 3
    STOP = 4
    RESET = 5
    GREETING = 6


@dataclass(frozen=True, slots=True)
class Message:
    """What one side tells the other.

    Attributes:
        kind: What it is.
        sequence: Its number.
        numbers: What it holds.
        age_s: Seconds from the measurement to the sending.
        mode: Of a command, by number; of an observation, whether an episode begins.
    """

    kind: Kind
    sequence: int
    numbers: tuple[float, ...] = ()
    age_s: float = 0.0
    mode: int = 0


class Sender:
    """Writes messages with rising sequence numbers.

    Args:
        key: That both sides know, at least 16 bytes.
        first: Sequence number of the first message. A sender that takes another's place must begin
            behind it: the time in nanoseconds does.

    Raises:
        ConfigError: If the key is too short.
    """

    def __init__(self, key: bytes, *, first: int = 1) -> None:
        self._key = checked_key(key)
        self._sequence = first - 1

    def message(
        self, kind: Kind, numbers: Sequence[float] = (), *, age_s: float = 0.0, mode: int = 0
    ) -> bytes:
        """Return a datagram.

        Raises:
            ConfigError: If there are too many numbers.
        """
        if len(numbers) > MAX_NUMBERS:
            raise ConfigError(
                f"a message holds up to {MAX_NUMBERS} numbers, and was given {len(numbers)}"
            )
        self._sequence += 1
        header = _HEADER.pack(MAGIC, kind, mode, len(numbers), self._sequence, round(age_s * 1e9))
        body = header + struct.pack(f"!{len(numbers)}d", *numbers)
        return body + hmac.digest(self._key, body, "sha256")


class Receiver:
    """Reads messages, and drops what it must not believe.

    Args:
        key: That both sides know, at least 16 bytes.

    Attributes:
        dropped: Datagrams that were dropped, by reason.
        lost: Sequence numbers that never came.

    Raises:
        ConfigError: If the key is too short.
    """

    def __init__(self, key: bytes) -> None:
        self._key = checked_key(key)
        self._last = 0
        self.dropped: Counter[str] = Counter()
        self.lost = 0

    def read(self, datagram: bytes) -> Message | None:
        """Return the message of a datagram; ``None`` if it is to be dropped."""
        found, reason = self._parse(datagram)
        if found is None:
            self.dropped[reason] += 1
            return None
        missing = found.sequence - self._last - 1
        self.lost += missing if self._last and missing < _NEW_SENDER else 0
        self._last = found.sequence
        return found

    def _parse(self, datagram: bytes) -> tuple[Message | None, str]:
        if len(datagram) < _HEADER.size + _SIGNATURE:
            return None, "too short"
        magic, kind, mode, count, sequence, age_ns = _HEADER.unpack_from(datagram)
        if magic != MAGIC:
            return None, "another protocol or version"
        body, signature = datagram[:-_SIGNATURE], datagram[-_SIGNATURE:]
        if not hmac.compare_digest(hmac.digest(self._key, body, "sha256"), signature):
            return None, "wrong signature"
        if count > MAX_NUMBERS or len(body) != _HEADER.size + 8 * count:
            return None, "wrong length"
        if sequence <= self._last:
            return None, "late or twice"
        try:
            known = Kind(kind)
        except ValueError:
            return None, "unknown kind"
        numbers = struct.unpack_from(f"!{count}d", body, _HEADER.size)
        return Message(known, sequence, numbers, age_ns * 1e-9, mode), ""


def checked_key(key: bytes) -> bytes:
    """Return a key that is long enough.

    Raises:
        ConfigError: If it is not.
    """
    if len(key) < _LEAST_KEY:
        raise ConfigError(
            f"key: has {len(key)} bytes; both sides need the same one of at least {_LEAST_KEY}, "
            "such as `openssl rand -hex 16` makes"
        )
    return key

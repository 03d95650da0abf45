"""The socket protocol between controller and robot: one datagram a message, no pickle.

A message, in network byte order:

====== ======= ===================================================================================
bytes  type    what
====== ======= ===================================================================================
4      chars   ``GPL1``: protocol and version
1      uint8   kind: 1 observation, 2 command, 3 stop, 4 reset, 5 greeting
1      uint8   mode of a command: 0 run, 1 hold, 2 damp, 3 stop; of an observation: 1 if an
               episode begins with it, and 2 more as long as the robot's side wants a stop; else 0
2      uint16  count of numbers
8      uint64  session: a random number of the sender's process
8      uint64  session of the receiver, as the sender knows it; 0 in a first greeting
8      uint64  sequence number, from 1, greater in every message of a session
8      int64   time in nanoseconds on the sender's monotonic clock when it was sent
8      int64   age in nanoseconds when it was sent: of an observation since it was measured
8 n    float64 the numbers, in the order of the contract, in its units
32     bytes   HMAC-SHA256 of all before, with the key that both sides were given
====== ======= ===================================================================================

The clocks of two machines need not agree: ages are sent, and delays are told from the fastest
message of the last seconds. What is too short, of another version, or not signed with the key is
dropped and counted, and so is what comes late, twice or out of order (a sequence number that is not
greater than the last of its session), and what was meant for another process than this one.

The controller greets with no session of the receiver; the robot answers to where that came from,
with its own session; the controller greets again with that. Only then is it the one that the robot
obeys, and only if no other has commanded within a second. So nothing that was recorded on the way
can be used again: all but first greetings are bound to two processes and a place in their order.
"""

from __future__ import annotations

import hmac
import secrets
import struct
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from genpol.errors import ConfigError

MAGIC = b"GPL1"
MAX_NUMBERS = 4096

_HEADER = struct.Struct("!4sBBHQQQqq")
_SIGNATURE = 32
_LEAST_KEY = 16
_SESSIONS = 64  # that are remembered


class Kind(IntEnum):
    """What a message is."""

    OBSERVATION = 1
    COMMAND = 2
    STOP = 3
    RESET = 4
    GREETING = 5


@dataclass(frozen=True, slots=True)
class Message:
    """What one side tells the other.

    Attributes:
        kind: What it is.
        session: Of the sender.
        sequence: Its number.
        sent_s: When it was sent, on the sender's monotonic clock.
        bound: Whether it was meant for this process; a first greeting is meant for any.
        numbers: What it holds.
        age_s: Seconds from the measurement to the sending.
        mode: Of a command, by number; of an observation, whether an episode begins.
    """

    kind: Kind
    session: int
    sequence: int
    sent_s: float
    bound: bool
    numbers: tuple[float, ...] = ()
    age_s: float = 0.0
    mode: int = 0


class Endpoint:
    """Writes and reads messages.

    Args:
        key: That both sides know, at least 16 bytes.

    Attributes:
        session: A random number of its own.
        peer: Session of the other side; 0 as long as it is not known.
        dropped: Datagrams that were dropped, by reason.
        lost: Sequence numbers that never came.

    Raises:
        ConfigError: If the key is too short.
    """

    def __init__(self, key: bytes) -> None:
        self._key = checked_key(key)
        self._sequence = 0
        self._last: dict[int, int] = {}
        self.session = secrets.randbits(63) + 1
        self.peer = 0
        self.dropped: Counter[str] = Counter()
        self.lost = 0

    def message(
        self, kind: Kind, numbers: Sequence[float] = (), *, age_s: float = 0.0, mode: int = 0
    ) -> bytes:
        """Return a datagram for the other side.

        Raises:
            ConfigError: If there are too many numbers.
        """
        if len(numbers) > MAX_NUMBERS:
            raise ConfigError(
                f"a message holds up to {MAX_NUMBERS} numbers, and was given {len(numbers)}"
            )
        self._sequence += 1
        header = _HEADER.pack(
            *(MAGIC, kind, mode, len(numbers), self.session, self.peer, self._sequence),
            *(time.monotonic_ns(), round(age_s * 1e9)),
        )
        body = header + struct.pack(f"!{len(numbers)}d", *numbers)
        return body + hmac.digest(self._key, body, "sha256")

    def read(self, datagram: bytes) -> Message | None:
        """Return the message of a datagram; ``None`` if it is to be dropped."""
        found, reason = self._parse(datagram)
        if found is None:
            self.dropped[reason] += 1
            return None
        last = self._last.pop(found.session, 0)
        self.lost += found.sequence - last - 1 if last else 0
        self._last[found.session] = found.sequence  # behind all others
        if len(self._last) > _SESSIONS:
            del self._last[next(iter(self._last))]
        return found

    def _parse(self, datagram: bytes) -> tuple[Message | None, str]:
        if len(datagram) < _HEADER.size + _SIGNATURE:
            return None, "too short"
        magic, kind, mode, count, session, peer, sequence, sent_ns, age_ns = _HEADER.unpack_from(
            datagram
        )
        if magic != MAGIC:
            return None, "another protocol or version"
        body, signature = datagram[:-_SIGNATURE], datagram[-_SIGNATURE:]
        if not hmac.compare_digest(hmac.digest(self._key, body, "sha256"), signature):
            return None, "wrong signature"
        if count > MAX_NUMBERS or len(body) != _HEADER.size + 8 * count:
            return None, "wrong length"
        if session == self.session:
            return None, "from this process"
        if peer != self.session and not (kind == Kind.GREETING and peer == 0):
            return None, "for another process"
        if sequence <= self._last.get(session, 0):
            return None, "late or twice"
        try:
            known = Kind(kind)
        except ValueError:
            return None, "unknown kind"
        numbers = struct.unpack_from(f"!{count}d", body, _HEADER.size)
        times = (sequence, sent_ns * 1e-9)
        bound = peer == self.session
        return Message(known, session, *times, bound, numbers, age_ns * 1e-9, mode), ""


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

"""Messages come through as they were sent, and nothing else comes through."""

from __future__ import annotations

import math
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.deploy.messages import Endpoint, Kind
from genpol.errors import ConfigError

KEY = b"sixteen bytes or more"


def pair(key: bytes = KEY) -> tuple[Endpoint, Endpoint]:
    """Return a sender and a receiver that know each other."""
    sender, receiver = Endpoint(key), Endpoint(KEY)
    sender.peer, receiver.peer = receiver.session, sender.session
    return sender, receiver


@settings(deadline=None)
@given(
    st.sampled_from(list(Kind)),
    st.lists(st.floats(allow_nan=False), max_size=50),
    st.integers(0, 3),
    st.floats(0, 1e3),
)
def test_a_message_comes_through(kind: Kind, numbers: list[float], mode: int, age_s: float) -> None:
    sender, receiver = pair()
    found = receiver.read(sender.message(kind, numbers, age_s=age_s, mode=mode))
    assert found is not None
    assert (found.kind, found.mode, found.sequence) == (kind, mode, 1)
    assert found.session == sender.session
    assert found.bound
    assert found.numbers == tuple(numbers)
    assert found.age_s == pytest.approx(age_s, abs=1e-9)


def test_numbers_that_are_not_finite_are_the_filter_s_to_refuse() -> None:
    sender, receiver = pair()
    found = receiver.read(sender.message(Kind.OBSERVATION, [math.nan, math.inf]))
    assert math.isnan(found.numbers[0])
    assert found.numbers[1] == math.inf


def test_the_layout_is_the_documented_one() -> None:
    sender, receiver = pair()
    sender.message(Kind.COMMAND)
    before = time.monotonic_ns()
    datagram = sender.message(Kind.COMMAND, [1.5], age_s=2e-9, mode=1)
    (sent,) = struct.unpack("!q", datagram[32:40])
    assert before <= sent <= time.monotonic_ns()
    sessions = (sender.session, receiver.session)
    head = struct.pack("!BBHQQQqq", 2, 1, 1, *sessions, 2, sent, 2)
    assert datagram[:-32] == b"GPL1" + head + struct.pack("!d", 1.5)
    assert len(datagram) == 48 + 8 + 32


@settings(deadline=None)
@given(st.binary(max_size=120))
def test_noise_is_dropped(datagram: bytes) -> None:
    receiver = Endpoint(KEY)
    assert receiver.read(datagram) is None
    assert sum(receiver.dropped.values()) == 1


@pytest.mark.parametrize("index", [0, 4, 5, 7, 15, 20, 30, 37, 45, 52, 60, -1])
def test_one_wrong_bit_is_enough(index: int) -> None:
    sender, receiver = pair()
    datagram = bytearray(sender.message(Kind.OBSERVATION, [1.0, 2.0]))
    datagram[index] ^= 1
    assert receiver.read(bytes(datagram)) is None


def test_another_key_is_refused() -> None:
    sender, receiver = pair(b"another key of some length")
    assert receiver.read(sender.message(Kind.STOP)) is None
    assert receiver.dropped == {"wrong signature": 1}


def test_what_is_cut_short_is_dropped() -> None:
    sender, receiver = pair()
    datagram = sender.message(Kind.OBSERVATION, [1.0, 2.0])
    assert all(receiver.read(datagram[:length]) is None for length in range(len(datagram)))


def test_late_and_repeated_messages_are_dropped_and_lost_ones_counted() -> None:
    sender, receiver = pair()
    sent = [sender.message(Kind.OBSERVATION, [float(i)]) for i in range(6)]
    order = [0, 1, 1, 4, 2, 3, 5, 0]
    found = [receiver.read(sent[i]) for i in order]
    assert [x.numbers[0] for x in found if x is not None] == [0.0, 1.0, 4.0, 5.0]
    assert receiver.dropped == {"late or twice": 4}
    assert receiver.lost == 2


def test_another_sender_is_not_a_loss() -> None:
    first, receiver = pair()
    second = Endpoint(KEY)
    second.peer = receiver.session
    for sender in (first, first, second, first, second):
        assert receiver.read(sender.message(Kind.COMMAND)) is not None
    assert receiver.lost == 0


def test_what_was_recorded_cannot_be_used_again() -> None:
    sender, receiver = pair()
    sent = [sender.message(Kind.COMMAND, [1.0]), sender.message(Kind.COMMAND, [2.0])]
    assert all(receiver.read(datagram) is not None for datagram in sent)
    other = Endpoint(KEY)
    other.peer = receiver.session
    receiver.read(other.message(Kind.COMMAND))  # another controller in between changes nothing
    assert all(receiver.read(datagram) is None for datagram in sent)
    assert receiver.dropped == {"late or twice": 2}
    begun_anew = Endpoint(KEY)
    assert all(begun_anew.read(datagram) is None for datagram in sent)
    assert begun_anew.dropped == {"for another process": 2}


def test_only_a_greeting_may_be_for_anybody() -> None:
    stranger, receiver = Endpoint(KEY), Endpoint(KEY)
    found = [receiver.read(stranger.message(kind)) is not None for kind in Kind]
    assert found == [kind is Kind.GREETING for kind in Kind]


def test_short_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="key: has 3 bytes"):
        Endpoint(b"abc")


def test_too_many_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="4097"):
        Endpoint(KEY).message(Kind.COMMAND, [0.0] * 4097)

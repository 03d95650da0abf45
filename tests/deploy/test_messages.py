"""Messages come through as they were sent, and nothing else comes through."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpol.deploy.messages import Kind, Receiver, Sender
from genpol.errors import ConfigError

KEY = b"sixteen bytes or more"


@settings(deadline=None)
@given(
    st.sampled_from(list(Kind)),
    st.lists(st.floats(allow_nan=False), max_size=50),
    st.integers(0, 3),
    st.floats(0, 1e3),
)
def test_a_message_comes_through(kind: Kind, numbers: list[float], mode: int, age_s: float) -> None:
    found = Receiver(KEY).read(Sender(KEY).message(kind, numbers, age_s=age_s, mode=mode))
    assert found is not None
    assert (found.kind, found.mode, found.sequence) == (kind, mode, 1)
    assert found.numbers == tuple(numbers)
    assert found.age_s == pytest.approx(age_s, abs=1e-9)


def test_numbers_that_are_not_finite_are_the_filter_s_to_refuse() -> None:
    found = Receiver(KEY).read(Sender(KEY).message(Kind.OBSERVATION, [math.nan, math.inf]))
    assert math.isnan(found.numbers[0])
    assert found.numbers[1] == math.inf


def test_the_layout_is_the_documented_one() -> None:
    datagram = Sender(KEY, first=7).message(Kind.COMMAND, [1.5], age_s=2e-9, mode=1)
    assert datagram[:-32] == b"GPL1" + struct.pack("!BBHQqd", 2, 1, 1, 7, 2, 1.5)
    assert len(datagram) == 24 + 8 + 32


@settings(deadline=None)
@given(st.binary(max_size=120))
def test_noise_is_dropped(datagram: bytes) -> None:
    receiver = Receiver(KEY)
    assert receiver.read(datagram) is None
    assert sum(receiver.dropped.values()) == 1


@pytest.mark.parametrize("index", [0, 4, 5, 7, 15, 20, 30, -1])
def test_one_wrong_bit_is_enough(index: int) -> None:
    datagram = bytearray(Sender(KEY).message(Kind.OBSERVATION, [1.0, 2.0]))
    datagram[index] ^= 1
    assert Receiver(KEY).read(bytes(datagram)) is None


def test_another_key_is_refused() -> None:
    receiver = Receiver(KEY)
    assert receiver.read(Sender(b"another key of some length").message(Kind.STOP)) is None
    assert receiver.dropped == {"wrong signature": 1}


def test_what_is_cut_short_is_dropped() -> None:
    datagram = Sender(KEY).message(Kind.OBSERVATION, [1.0, 2.0])
    assert all(Receiver(KEY).read(datagram[:length]) is None for length in range(len(datagram)))


def test_late_and_repeated_messages_are_dropped_and_lost_ones_counted() -> None:
    sender, receiver = Sender(KEY), Receiver(KEY)
    sent = [sender.message(Kind.OBSERVATION, [float(i)]) for i in range(6)]
    order = [0, 1, 1, 4, 2, 3, 5, 0]
    found = [receiver.read(sent[i]) for i in order]
    assert [x.numbers[0] for x in found if x is not None] == [0.0, 1.0, 4.0, 5.0]
    assert receiver.dropped == {"late or twice": 4}
    assert receiver.lost == 2


def test_another_sender_is_not_a_loss() -> None:
    receiver = Receiver(KEY)
    receiver.read(Sender(KEY, first=5).message(Kind.COMMAND))
    assert receiver.read(Sender(KEY, first=10**18).message(Kind.COMMAND)) is not None
    assert receiver.lost == 0


def test_short_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match="key: has 3 bytes"):
        Sender(b"abc")


def test_too_many_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="4097"):
        Sender(KEY).message(Kind.COMMAND, [0.0] * 4097)

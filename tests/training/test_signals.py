"""Signals are noted, not obeyed at once, and the old handlers return."""

from __future__ import annotations

import contextlib
import signal
import threading

import pytest

from genpol.training.signals import SignalWatch


def send(number):
    signal.raise_signal(number)


def test_nothing_is_asked_at_first():
    with SignalWatch() as watch:
        assert not watch.stop_requested
        assert not watch.checkpoint_requested()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_first_signal_asks_for_a_stop(number):
    with SignalWatch() as watch:
        send(number)
        assert watch.stop_requested
        assert watch.stop_signal == number.name


def test_second_interrupt_raises():
    with SignalWatch():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_an_interrupt_after_a_termination_is_still_the_first():
    with SignalWatch() as watch:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert watch.stop_signal == "SIGTERM"


def test_a_request_for_a_checkpoint_is_answered_once():
    with SignalWatch() as watch:
        send(signal.SIGUSR1)
        assert watch.checkpoint_requested()
        assert not watch.checkpoint_requested()
        assert not watch.stop_requested


def test_old_handlers_return_even_after_an_error():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with contextlib.suppress(RuntimeError), SignalWatch():
        during = [signal.getsignal(number) for number in numbers]
        raise RuntimeError
    assert during != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_outside_the_main_thread_it_is_inert():
    answers = []

    def body():
        with SignalWatch() as watch:
            answers.append((watch.stop_requested, watch.checkpoint_requested()))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert answers == [(False, False)]
    assert signal.getsignal(signal.SIGTERM) is before

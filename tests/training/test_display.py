"""The console: what it says, how often, and that no terminal is too small for it."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from genpol.training.display import TerminalReport


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def make(total=1000, *, terminal=False, width=80, **options):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    clock = Clock()
    report = TerminalReport(total, console=console, clock=clock, **options)
    return report, console, clock


def written(console):
    return console.file.getvalue().splitlines()


def test_line_tells_steps_speed_fields_and_time_left():
    report, _, clock = make(1_000_000)
    clock.now_s = 10.0
    report.update(100_000, train_return=312.456, stage="flow")
    expected = "100k/1M steps | 10k steps/s | train return 312.5 | stage flow | 1m30s left"
    assert report.line() == expected


def test_fields_stay_until_they_are_removed():
    report, _, _ = make()
    report.update(1, eval_return=2.0)
    report.update(2)
    assert "eval return 2" in report.line()
    report.update(3, eval_return=None)
    assert "eval return" not in report.line()


def test_speed_is_that_of_the_last_seconds():
    report, _, clock = make(10**6)
    for second in range(1, 101):
        clock.now_s = float(second)
        report.update(second if second <= 50 else 50 + 100 * (second - 50))
    assert report.steps_per_s == pytest.approx(100)


def test_a_resumed_training_does_not_count_what_it_found():
    report, _, clock = make(1000, start_steps=900)
    clock.now_s = 1.0
    report.update(910)
    assert report.steps_per_s == pytest.approx(10)


def test_without_terminal_there_is_a_line_every_so_many_seconds_and_a_last_one():
    report, console, clock = make(interval_s=10)
    with report:
        for second in range(25):
            clock.now_s = float(second)
            report.update(second)
    assert [line.split("/")[0] for line in written(console)] == ["0", "10", "20", "24"]


def test_without_terminal_lines_are_plain_and_whole():
    report, console, _ = make(width=20)
    with report:
        report.update(1, stage="x" * 100)
    assert all("x" * 100 in line and "\x1b" not in line for line in written(console))


def test_message_keeps_brackets():
    report, console, _ = make()
    report.message("saved [bold]step-1[/bold]")
    assert written(console) == ["saved [bold]step-1[/bold]"]


@pytest.mark.parametrize("width", [1, 2, 5, 10, 40, 200])
def test_no_terminal_is_too_narrow(width):
    report, console, clock = make(terminal=True, width=width)
    with report:
        for second in range(3):
            clock.now_s = float(second)
            report.update(second, train_return=math.nan, stage="a [long] stage")
        report.message("message")
    assert written(console)


@pytest.mark.parametrize("total", [0, 1])
def test_steps_beyond_the_total_are_shown(total):
    report, _, clock = make(total, terminal=True)
    with report:
        clock.now_s = 1.0
        report.update(5)
    assert report.line().endswith("0m00s left")


def test_an_error_passes_through():
    report, _, _ = make(terminal=True)
    with pytest.raises(RuntimeError), report:
        raise RuntimeError

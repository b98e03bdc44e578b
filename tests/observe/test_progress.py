"""The progress line: plain in a file, live on a terminal, cheap in both, and never left behind broken."""

from __future__ import annotations

import io
import logging

import pytest

from vlpjax.observe.progress import Progress, ProgressHandler, format_duration


class Reads:
    """A loss that counts how often somebody wanted its value, as a device array would have to be fetched."""

    def __init__(self) -> None:
        self.count = 0

    def __float__(self) -> float:
        self.count += 1
        return 1.25


def test_a_file_gets_one_plain_line_per_interval_and_one_for_the_last_step():
    stream, seconds = io.StringIO(), iter(range(1000))
    with Progress(25, every=10, stream=stream, now=lambda: next(seconds)) as progress:
        for step in range(1, 26):
            progress.update(step, loss=0.5, examples_per_second=431.2, input_wait=0.02, eta=192)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith(
        "step=1/25 loss=0.5 examples_per_second=431.2 input_wait=0.02 eta=3m12s memory_gb="
    )
    assert lines[-1].startswith("step=25/25 ")
    assert 3 <= len(lines) <= 5
    assert "\x1b" not in stream.getvalue()


def test_values_are_read_only_when_they_are_drawn():
    loss, now = Reads(), 0.0
    with Progress(1000, every=10, stream=io.StringIO(), now=lambda: now) as progress:
        for step in range(1, 500):
            progress.update(step, loss=loss)
        assert loss.count == 1


def test_leaving_shows_the_newest_values():
    stream = io.StringIO()
    with Progress(100, every=10, stream=stream, now=lambda: 0.0) as progress:
        progress.update(1, loss=3.0)
        progress.update(2, loss=2.0)
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["step=1/100", "step=2/100"]


def test_a_loss_that_is_not_a_number_is_shown():
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.update(1, loss=float("nan"), eta=float("nan"))
    assert "loss=nan" in stream.getvalue()
    assert "eta" not in stream.getvalue()


def test_the_terminal_is_restored_after_an_exception():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(10, live=True, stream=stream) as progress:
        progress.update(1, loss=1.0)
        raise KeyboardInterrupt
    hidden, shown = stream.getvalue().rfind("\x1b[?25l"), stream.getvalue().rfind("\x1b[?25h")
    assert -1 < hidden < shown


def test_messages_stand_as_they_are_in_both_forms():
    for live in (False, True):
        stream = io.StringIO()
        with Progress(10, live=live, stream=stream) as progress:
            progress.update(1, loss=1.0)
            progress.message("saved [bold]/tmp/x[/bold]")
            logger = logging.Logger("test")
            logger.addHandler(ProgressHandler(progress))
            logger.warning("slow %s", "disk")
        assert "saved [bold]/tmp/x[/bold]\n" in stream.getvalue().replace("\r", "")
        assert "slow disk\n" in stream.getvalue()


def test_a_process_that_is_not_enabled_is_silent():
    stream, loss = io.StringIO(), Reads()
    with Progress(2, enabled=False, stream=stream) as progress:
        progress.update(2, loss=loss)
        progress.message("hello")
    assert (stream.getvalue(), loss.count) == ("", 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.2, "3s"),
        (59.7, "1m00s"),
        (192, "3m12s"),
        (7500, "2h05m"),
        (200000, "2d07h"),
        (float("nan"), "unknown"),
    ],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text

"""The line that a person watches while a run trains: live on a terminal, plain ``key=value`` lines elsewhere.

Drawing is bounded by time, not by steps, and values are read only when they are drawn: passing a device array
as ``loss`` costs nothing on all the steps in between.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

Scalar = Any  # Whatever ``float`` accepts: a number, a NumPy scalar, a device array of one element.


class Progress:
    """Shows how far a run is; as a context manager it restores the terminal, also after an exception.

    Args:
        total_steps: the last step of the run.
        start_step: step that the run starts or resumes at.
        title: name shown before the live line.
        every: seconds between plain lines when the output is not a terminal.
        refresh: least seconds between two drawings of the live line.
        enabled: whether this process shows anything (process 0 does).
        stream: where to write; standard output unless given.
        live: draw a live line; by default whether ``stream`` is a terminal.
        now: seconds from any origin; tests pass their own.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        title: str = "",
        every: float = 10.0,
        refresh: float = 0.25,
        enabled: bool = True,
        stream: TextIO | None = None,
        live: bool | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._step, self._title = total_steps, start_step, title
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._use_live = self._stream.isatty() if live is None else live
        self._interval = refresh if self._use_live else every
        self._now = now
        self._drawn_at = -math.inf
        self._live: Any = None
        self._values: dict[str, Scalar] = {}
        self._drawn_step: int | None = None

    def __enter__(self) -> Progress:
        if self._enabled and self._use_live:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, force_terminal=True, highlight=False)
            self._live = Live(
                "", console=console, auto_refresh=False, redirect_stdout=True, redirect_stderr=True
            )
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None and self._values and self._drawn_step != self._step:
                self._draw()
        finally:
            if self._live is not None:
                self._live.stop()  # Shows the cursor again and leaves the last line in place.
                self._live = None

    def update(
        self,
        step: int,
        *,
        loss: Scalar | None = None,
        examples_per_second: Scalar | None = None,
        input_wait: Scalar | None = None,
        eta: Scalar | None = None,
    ) -> None:
        """Tells the newest values; draws them if the last drawing is long ago or this is the last step."""
        self._step = step
        told = {
            "loss": loss,
            "examples_per_second": examples_per_second,
            "input_wait": input_wait,
            "eta": eta,
        }
        self._values = {name: value for name, value in told.items() if value is not None}
        if self._now() - self._drawn_at >= self._interval or step >= self._total:
            self._draw()

    def message(self, text: str) -> None:
        """Prints ``text`` above the live line, or as a line of its own."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _draw(self) -> None:
        if not self._enabled:
            return
        self._drawn_at, self._drawn_step = self._now(), self._step
        values = {name: float(value) for name, value in self._values.items()}
        if self._live is not None:
            self._live.update(self._line(values), refresh=True)
        else:
            print(plain_line(self._step, self._total, values), file=self._stream, flush=True)

    def _line(self, values: dict[str, float]) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts: list[tuple[str, str]] = []
        for text, style in self._parts(values):
            parts += [("  ", ""), (text, style)] if parts else [(text, style)]
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=16)
        grid.add_row(bar, Text.assemble(*parts, no_wrap=True, overflow="ellipsis"))
        return grid

    def _parts(self, values: dict[str, float]) -> Iterable[tuple[str, str]]:
        """The live line from the most to the least important, since a narrow terminal cuts its end."""
        if self._title:
            yield self._title, "bold"
        yield f"{self._step:,}/{self._total:,}", "bold"
        if math.isfinite(values.get("eta", math.nan)) and self._step < self._total:
            yield f"{format_duration(values['eta'])} left", "cyan"
        if "loss" in values:  # A loss that is not finite is news, so it is shown.
            yield f"loss {values['loss']:.4g}", "" if math.isfinite(values["loss"]) else "bold red"
        if math.isfinite(values.get("examples_per_second", math.nan)):
            yield f"{values['examples_per_second']:,.4g} examples/s", ""
        if math.isfinite(values.get("input_wait", math.nan)):
            # A machine that waits for its input a tenth of the time is worth a look.
            yield f"input wait {values['input_wait']:.0%}", "yellow" if values["input_wait"] > 0.1 else "dim"
        yield f"{resident_gigabytes():.1f} GB", "dim"


def plain_line(step: int, total: int, values: dict[str, float]) -> str:
    """One line for a log file: ``step=120/800 loss=1.234 input_wait=0.02 eta=3m12s memory_gb=1.20``."""
    parts = [f"step={step}/{total}"]
    parts += [
        f"{name}={_plain(name, value)}"
        for name, value in values.items()
        if not math.isnan(value) or name == "loss"
    ]
    return " ".join([*parts, f"memory_gb={resident_gigabytes():.2f}"])


def _plain(name: str, value: float) -> str:
    if name == "eta":
        return format_duration(value)
    return f"{value:.2f}" if name == "input_wait" else f"{value:.5g}"


def format_duration(seconds: float) -> str:
    """``3.2 -> "3s"``, ``192 -> "3m12s"``, ``7500 -> "2h05m"``, ``200000 -> "2d07h"``."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"


def resident_gigabytes() -> float:
    """Resident memory of this process in GB (1e9 bytes): now where /proc tells, else the peak so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except FileNotFoundError:
        import resource

        # Without /proc this is macOS, which counts the peak in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


class ProgressHandler(logging.Handler):
    """A logging handler that prints records above the live line instead of through it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.message(self.format(record))

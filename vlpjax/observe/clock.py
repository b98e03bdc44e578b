"""The clock of a run: how long it trained and paused, and for what; how fast it goes; when it will end.

Program time is training time plus pauses, exactly.  The totals live in the checkpoint, so they continue after
a resume instead of starting at zero.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

SETUP = "setup"
# Paid once at the start of a run, so they say nothing about the time that is still to come.
_PAID_ONCE = frozenset({SETUP, "compile"})


class _Tick(NamedTuple):
    step: int
    examples: int
    training_seconds: float
    waited_seconds: float


class Clock:
    """Counts training, pauses and waits.

    The clock is created paused for "setup"; ``start()`` begins training time.  ``pause(reason)`` stops it
    (evaluate, save, compile).  ``wait(reason)`` measures a part of training time that was spent idle (input):
    a run that waits for data is a slower run, not a shorter one.

    Args:
        now: seconds from any origin; tests pass their own.
        window: seconds of training that the recent speed is taken over.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic, window: float = 30.0) -> None:
        self._now = now
        self._window = window
        self._seconds: dict[str, float] = {}
        self._training = 0.0
        self._waits: dict[str, float] = {}
        self._reasons: list[str] = [SETUP]  # Innermost last; empty while training.
        self._since = now()
        self._ticks: deque[_Tick] = deque()

    def start(self) -> None:
        """Ends the setup; training time runs from here."""
        self._settle()
        if SETUP in self._reasons:
            self._reasons.remove(SETUP)

    @contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Stops training time inside the block; of nested pauses, the inner one is counted."""
        self._settle()
        self._reasons.append(reason)
        try:
            yield
        finally:
            self._settle()
            self._reasons.remove(reason)

    @contextmanager
    def wait(self, reason: str = "input") -> Iterator[None]:
        """Measures idle time inside the block; it stays part of training time."""
        begin = self.training_seconds
        try:
            yield
        finally:
            self._waits[reason] = self._waits.get(reason, 0.0) + self.training_seconds - begin

    def tick(self, step: int, examples: int) -> None:
        """Notes that ``step`` is done, with ``examples`` seen since the beginning of the run."""
        self._ticks.append(_Tick(step, examples, self.training_seconds, sum(self._waits.values())))
        newest = self._ticks[-1].training_seconds
        # The second tick decides: the window is then at least as long as asked for, however slow a step is.
        while len(self._ticks) > 2 and newest - self._ticks[1].training_seconds >= self._window:
            self._ticks.popleft()

    @property
    def training_seconds(self) -> float:
        """Seconds of training, waits included and pauses excluded, over all resumes."""
        self._settle()
        return self._training

    @property
    def pauses(self) -> dict[str, float]:
        """Seconds paused, by reason, over all resumes."""
        self._settle()
        return dict(self._seconds)

    @property
    def waits(self) -> dict[str, float]:
        """Seconds of training time spent idle, by reason, over all resumes."""
        return dict(self._waits)

    @property
    def program_seconds(self) -> float:
        """Seconds the program ran: training and all pauses, over all resumes."""
        return self.training_seconds + sum(self._seconds.values())

    @property
    def examples_per_second(self) -> float:
        """Recent speed; ``nan`` before the second tick."""
        return self._recent(lambda first, last, seconds: (last.examples - first.examples) / seconds)

    @property
    def step_seconds(self) -> float:
        """Recent training seconds per step; ``nan`` before the second tick."""
        return self._recent(lambda first, last, seconds: seconds / max(last.step - first.step, 1))

    @property
    def input_wait(self) -> float:
        """Recent share of training time spent in ``wait`` (0 to 1); ``nan`` before the second tick."""
        return self._recent(
            lambda first, last, seconds: (last.waited_seconds - first.waited_seconds) / seconds
        )

    def eta(self, step: int, total: int) -> float:
        """Seconds until step ``total`` at the recent speed and with as many pauses; ``nan`` if unknown."""
        recurring = sum(seconds for reason, seconds in self.pauses.items() if reason not in _PAID_ONCE)
        per_training_second = 1.0 + recurring / self._training if self._training > 0 else 1.0
        return max(total - step, 0) * self.step_seconds * per_training_second

    def state(self) -> dict[str, Any]:
        """The totals as JSON-like values, for the checkpoint."""
        training = self.training_seconds
        return {"training_seconds": training, "pauses": dict(self._seconds), "waits": dict(self._waits)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], **kwargs: Any) -> Clock:
        """A clock that continues from ``state``, again paused for "setup" until ``start()``."""
        clock = cls(**kwargs)
        clock.restore(state)
        return clock

    def restore(self, state: Mapping[str, Any]) -> None:
        """Adds the totals of ``state``, so that a clock that already runs continues an earlier run."""
        self._training += float(state["training_seconds"])
        for totals, stored in ((self._seconds, state["pauses"]), (self._waits, state["waits"])):
            for reason, seconds in stored.items():
                totals[reason] = totals.get(reason, 0.0) + float(seconds)
        self._ticks.clear()

    def _settle(self) -> None:
        """Books the time since the last call on whatever the clock was doing."""
        now = self._now()
        elapsed, self._since = now - self._since, now
        if self._reasons:
            self._seconds[self._reasons[-1]] = self._seconds.get(self._reasons[-1], 0.0) + elapsed
        else:
            self._training += elapsed

    def _recent(self, rate: Callable[[_Tick, _Tick, float], float]) -> float:
        if len(self._ticks) < 2:
            return math.nan
        first, last = self._ticks[0], self._ticks[-1]
        seconds = last.training_seconds - first.training_seconds
        return rate(first, last, seconds) if seconds > 0 else math.nan

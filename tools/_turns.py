"""Two programs on one machine, timed in turn: what the speed benchmarks share."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Turn = Callable[[], None]
HEADING = f"{'':40} {'parameters, ours / theirs':>28} {'ours':>9} {'theirs':>9}   theirs / ours"


@dataclass(frozen=True)
class Pair:
    """Seconds of both sides, turn by turn.

    Attributes:
      ours, theirs: one number per turn; those at the same place were measured one right after the other.
    """

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    def text(self) -> str:
        """The median of both, and median and range of their ratio per turn: above 1, ours is faster."""
        ratios = sorted(theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True))
        return (
            f"{statistics.median(self.ours):8.3f}s {statistics.median(self.theirs):8.3f}s   "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def alternate(ours: Turn, theirs: Turn, pairs: int) -> Pair:
    """Both sides in turn, after one turn each that is not measured."""
    ours(), theirs()
    measured = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    return Pair(tuple(pair[0] for pair in measured), tuple(pair[1] for pair in measured))


def seconds(turn: Turn) -> float:
    """The time that a turn takes."""
    start = time.perf_counter()
    turn()
    return time.perf_counter() - start


def row(title: str, sizes: tuple[int, int], pair: Pair) -> str:
    """A line under :data:`HEADING`."""
    return f"{title:40} {sizes[0]:>13,} / {sizes[1]:>12,} {pair.text()}"


def parse(
    arguments: Sequence[str] | None, description: str | None, kind: str, names: Iterable[str], batch: int
) -> argparse.Namespace:
    """The options of a speed benchmark: ``names`` of what is measured, ``batch`` and ``pairs``.

    Args:
      kind: what the names name, in the plural, such as ``"towers"``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ",".join(names)
    parser.add_argument(f"--{kind}", dest="names", default=known, help="names, separated by commas")
    parser.add_argument(
        "--batch",
        type=int,
        default=batch,
        help="examples of a step" + ("" if batch else "; 0 is what each is given"),
    )
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side")
    options = parser.parse_args(arguments)
    options.names = options.names.split(",")
    if unknown := [name for name in options.names if name not in known.split(",")]:
        parser.error(f"there is no {unknown[0]!r} among the {kind}; there are {known}.")
    return options

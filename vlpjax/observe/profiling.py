"""Records a device trace of a few steps, to be opened in Perfetto, XProf or TensorBoard's profile page."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vlpjax.errors import UserError


def parse_profile(profile: str) -> tuple[int, int] | None:
    """Reads ``config.profile``: ``""`` is no trace, ``"10:15"`` traces steps 10 to 14.

    Raises:
        UserError: the text is neither.
    """
    if not profile:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", profile)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(
            f'config.profile is {profile!r}; it should be "" or "first:stop" with first < stop, as "10:15".'
        )
    return int(found[1]), int(found[2])


class trace:  # Reads as a verb: ``with trace(workdir, steps=...) as profiler``.
    """Traces the steps ``[start, stop)`` into ``workdir/profile``; does nothing when ``steps`` is ``None``.

    Call ``before(step)`` ahead of every step.  Leaving the block ends a trace that is still running, so a
    short or failing run keeps what it recorded.
    """

    def __init__(self, workdir: str | os.PathLike[str], steps: tuple[int, int] | None) -> None:
        self._directory = Path(workdir) / "profile"
        self._steps = steps
        self._running = False

    def before(self, step: int) -> None:
        """Starts or stops the trace if ``step`` is where it begins or is past its end."""
        if self._steps is None:
            return
        inside = self._steps[0] <= step < self._steps[1]
        if inside and not self._running:
            import jax

            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif not inside:
            self.close()

    def close(self) -> None:
        """Ends the trace if it is running."""
        if self._running:
            import jax

            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> trace:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

"""Bad examples: which failures count as bad data, and the record that is kept of each replacement.

An example is bad when its own content makes it unusable: bytes that no decoder accepts, a file that cannot be
read, an empty caption, an image of absurd size.  Sources and transforms say so by raising one of `BAD_DATA`;
the pipeline then takes the next good example and reports it.  A `UserError` from reading a record counts as
well: sources are opened before, so it is about that record.

Everything else (``TypeError``, ``AttributeError``, ``KeyError``, a transform's `UserError`, ...) is a mistake in
the program or in the settings and ends the run at once.  A ``ValueError`` can be either: it counts as bad data,
and a programming mistake that raises it for every record ends the run too, because no stand-in is found.
"""

from __future__ import annotations

from typing import NamedTuple

from vlpjax.errors import UserError


class BadExample(ValueError):
    """Raised by a source or a transform: this example, by its content, cannot be used."""


BAD_DATA: tuple[type[Exception], ...] = (BadExample, OSError, EOFError, ValueError)


def is_bad_data(error: BaseException) -> bool:
    """Whether `error` condemns the example rather than the program."""
    return isinstance(error, BAD_DATA) and not isinstance(error, UserError)


class Replacement(NamedTuple):
    """One example that could not be used, and the one that stands in for it."""

    position: int  # stream position at which it was drawn
    source: str  # the record as its source describes it
    drawn: int  # its index in the pipeline's source
    used: int  # index of the example that was taken instead
    reason: str

    def __str__(self) -> str:
        return f"{self.source} cannot be used ({self.reason}); example {self.used} stands in for it"

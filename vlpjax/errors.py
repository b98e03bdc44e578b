"""The one exception that is addressed to the person who runs the program."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a setting, a file or a call, told in one sentence.

    The sentence names the thing, the value it has, and what would be right.  The command line prints it
    without a traceback; library users catch it as a ``ValueError``.
    """

"""The one exception that is addressed to the person who runs the program."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

Given = ParamSpec("Given")


class UserError(ValueError):
    """A mistake in a setting, a file or a call, told in one sentence.

    The sentence names the thing, the value it has, and what would be right.  The command line prints it
    without a traceback; library users catch it as a ``ValueError``.
    """


def tells_mistakes(main: Callable[Given, int]) -> Callable[Given, int]:
    """A command whose :class:`UserError` is one line on standard error, and the exit status 2."""

    @functools.wraps(main)
    def command(*args: Given.args, **kwargs: Given.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return command

"""The tiny run of the tests, for the command line; the whole is done in seconds and learns nothing to speak of.

With ``TINY_HOLD=4:record`` the process stops for good while it writes the record of checkpoint 4.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.tiny import run_config
from vlpjax.config import Config


def hold(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: never lets the part of a checkpoint get its final name."""
    step, _, part = os.environ["TINY_HOLD"].partition(":")
    if event == "os.rename":
        path = Path(str(arguments[0]))
        if path.name.startswith(f"{part}.") and path.parent.name.startswith(f"{step}."):
            time.sleep(3600)


def get_config() -> Config:
    if "TINY_HOLD" in os.environ:
        sys.addaudithook(hold)
    return run_config()

"""The tiny run of the tests, for the command line; the whole is done in seconds and learns nothing to speak of."""

from __future__ import annotations

from tests.tiny import run_config
from vlpjax.config import Config


def get_config() -> Config:
    return run_config()

"""Gives the tests of this folder a finished run to look at."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def write_fake_run() -> Callable[..., Path]:
    """``write_fake_run(workdir, **options) -> workdir``; read by path, so it works in every import mode."""
    return runpy.run_path(str(Path(__file__).with_name("fake_run.py")))["write_fake_run"]

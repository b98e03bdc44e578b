"""Every program under tools/ imports, and says what it is for when it is asked."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TOOLS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "tools").glob("*.py") if not path.stem.startswith("_")
)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_program_can_be_imported_and_explains_itself(tool):
    module = importlib.import_module(f"tools.{tool}")
    assert (module.__doc__ or "").strip()
    assert callable(module.main)

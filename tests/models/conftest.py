"""Models of a few tokens take longer to compile than to run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tiny import most_optimizations_off


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    """All files of this folder are compiled without most optimisations."""
    with most_optimizations_off():
        yield

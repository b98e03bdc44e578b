"""Where data is: turns the paths that people write in configs into files on this machine."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlpjax.errors import UserError

BUNDLED = Path(__file__).resolve().parent / "bundled"
_BUNDLED_PREFIX = "bundled:"
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def resolve_path(path: str | os.PathLike[str]) -> str:
    """The path as the operating system knows it.

    ``bundled:emoji1594/1.0.0`` is data that ships inside the package, ``~`` is the home folder, addresses
    such as ``gs://bucket/folder`` are left alone, and every other path is taken as it is written.

    Raises:
      UserError: for a bundled name that does not exist or that leaves the bundled folder.
    """
    text = os.fspath(path)
    if not text.startswith(_BUNDLED_PREFIX):
        return text if "://" in text else os.path.expanduser(text)
    name = text[len(_BUNDLED_PREFIX) :]
    found = (BUNDLED / name).resolve()
    if not name or not found.is_relative_to(BUNDLED) or not found.exists():
        exist = sorted(f"{p.parent.name}/{p.name}" for p in BUNDLED.glob("*/*") if p.is_dir())
        raise UserError(
            f"There is no bundled data named {name!r}; bundled are: {', '.join(exist) or 'none'}."
        )
    return str(found)


def path_inside(folder: str, name: str, named_by: str) -> str:
    """Joins ``folder`` and ``name``, refusing names that lead out of the folder.

    Raises:
      UserError: if ``name`` is absolute, climbs out with ``..`` or is a link to something outside.
    """
    joined = os.path.join(folder, name)
    real_folder = os.path.realpath(folder)
    if os.path.isabs(name) or os.path.commonpath([real_folder, os.path.realpath(joined)]) != real_folder:
        raise UserError(
            f"{named_by} names the file {name!r}, which lies outside {folder!r}; keep files inside it."
        )
    return joined


def expand_braces(pattern: str) -> list[str]:
    """``a-{000..002}.tar`` and ``{x,y}.tar`` as the list of names they stand for, in written order."""
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices = [[piece] if i % 2 == 0 else _alternatives(piece) for i, piece in enumerate(pieces)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def _alternatives(inside: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",")
    first, last = numbers.groups()
    return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]


def expand_files(patterns: str | Sequence[str], kind: str) -> tuple[str, ...]:
    """All files that the patterns name: brace forms are expanded, globs sorted, order otherwise kept.

    Raises:
      UserError: if a pattern names no existing file, or if there is no pattern.
    """
    files: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        for name in expand_braces(resolve_path(pattern)):
            found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * os.path.isfile(name)
            if not found:
                raise UserError(
                    f"No {kind} file {name!r} exists (from {pattern!r}); give the path of existing files."
                )
            files += found
    if not files:
        raise UserError(f"The list of {kind} files is empty; name at least one file.")
    return tuple(files)

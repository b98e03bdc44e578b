"""The work directory of a run: it belongs to one experiment, and to one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO

from ml_collections import ConfigDict

from vlpjax.config import Config, differences, from_json, to_json
from vlpjax.errors import UserError
from vlpjax.observe.metrics import disk_full_is_told

# What may change when a run is resumed: how it is watched, saved, fed and laid out, never what it computes.
_FREE = ("log.", "checkpoint.", "profile", "evaluators", "mesh", "sharding_rules")
_FREE_ENDINGS = (".workers", ".threads", ".prefetch")


def claim(workdir: str | os.PathLike[str], config: ConfigDict, *, write: bool = True) -> IO[str] | None:
    """Takes ``workdir`` for this run and writes ``config.json``; keep the result until the run ends.

    Args:
      workdir: made if it is not there.
      config: of the run that is started or resumed.
      write: whether this process is the one that writes.

    Raises:
      UserError: the directory holds another experiment (naming what differs), or another process uses it.
    """
    folder = Path(workdir)
    stored = folder / "config.json"
    if stored.is_file():
        _check_same(config, read_config(folder), folder)
    elif folder.is_dir() and any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise UserError(f"{folder} holds a run without its config.json; choose another work directory.")
    if not write:
        return None
    with disk_full_is_told(stored):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"Another process is training in {folder}; wait for it, or choose another work directory."
            ) from error
        temporary = stored.with_suffix(".tmp")
        temporary.write_text(to_json(config) + "\n")
        os.replace(temporary, stored)
    return lock


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """The config of the run in ``workdir``."""
    stored = Path(workdir) / "config.json"
    if not stored.is_file():
        raise UserError(f"There is no run in {str(workdir)!r}: it has no config.json.")
    try:
        return from_json(stored.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{stored} is damaged ({error}); restore it, or choose another work directory."
        ) from error


def _check_same(ours: ConfigDict, theirs: ConfigDict, folder: Path) -> None:
    changed = [
        (path, mine, other)
        for path, mine, other in differences(ours, theirs)
        if not path.startswith(_FREE) and not path.endswith(_FREE_ENDINGS)
    ]
    if changed:
        path, mine, other = changed[0]
        more = f" (and {len(changed) - 1} more settings differ)" if len(changed) > 1 else ""
        raise UserError(
            f"The work directory {folder} belongs to another experiment: config.{path} is {other!r} there and "
            f"{mine!r} here{more}; choose another --workdir."
        )

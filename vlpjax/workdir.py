"""The work directory of a run: it belongs to one experiment, and to one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from ml_collections import ConfigDict

from vlpjax.config import Config, complete, differences, from_json, suggest, to_json
from vlpjax.errors import UserError
from vlpjax.experiment import base_config
from vlpjax.observe.metrics import disk_full_is_told

# What may change when a run is resumed: how it is watched, saved, fed and laid out, never what it computes.
_FREE = ("log.", "checkpoint.", "profile", "evaluators", "mesh", "sharding_rules")
_FREE_ENDINGS = (".workers", ".threads", ".prefetch")


def claim(workdir: str | os.PathLike[str], config: ConfigDict) -> IO[str]:
    """Takes ``workdir`` for this run and writes ``config.json``; keep the result open until the run ends.

    Of several processes of one run, one claims it (see ``vlpjax.processes.agreed``).

    Args:
      workdir: made if it is not there.
      config: of the run that is started or resumed.

    Raises:
      UserError: the directory holds another experiment (naming what differs), or another process uses it.
    """
    folder = Path(workdir)
    stored = folder / "config.json"
    if stored.is_file():
        _check_same(config, _completed(_read(stored), stored, without=("evaluators",)), folder)
    elif folder.is_dir() and any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise UserError(f"{folder} holds a run without its config.json; choose another work directory.")
    with disk_full_is_told(stored):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise UserError(
                f"Another process is training in {folder}; wait for it, or choose another work directory."
            ) from error
        temporary = stored.with_suffix(".tmp")
        temporary.write_text(to_json(config) + "\n", encoding="utf-8")
        os.replace(temporary, stored)
    return lock


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """The config of the run in ``workdir``, complete: fields that were added since have their defaults.

    Raises:
      UserError: there is no run, its config is damaged, or it sets a field or names a class that is no more.
    """
    stored = Path(workdir) / "config.json"
    if not stored.is_file():
        raise UserError(f"There is no run in {str(workdir)!r}: it has no config.json.")
    return _completed(_read(stored), stored)


def _read(stored: Path) -> Config:
    try:
        return from_json(stored.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, no text, or no object
        raise UserError(
            f"{stored} is damaged ({error}); restore it, or choose another work directory."
        ) from error


def _completed(config: Config, stored: Path, without: tuple[str, ...] = ()) -> Config:
    """A config that an earlier version may have written, as the present one would write it.

    Args:
      config: what ``stored`` holds.
      stored: the file, for messages.
      without: groups to leave out, whatever they hold.
    """
    try:
        return _with_base(complete(Config({name: config[name] for name in config if name not in without})))
    except UserError as error:
        raise UserError(
            f"{stored} is of another version of the program ({str(error).rstrip('.')}); continue with that "
            "version, or choose another work directory."
        ) from error


def _with_base(config: Config) -> Config:
    """The config with the fields that every experiment has; those are no class, so their defaults are here."""
    base = base_config()
    for name in ("", "start", "checkpoint", "log"):
        group, known = (config.get(name, {}), base[name]) if name else (config, base)
        for field in group:
            if field not in known:
                where = f"config.{name}".rstrip(".")
                raise UserError(f"{where} has no field {field!r} any more{suggest(field, known)}.")
        own = {field: group[field] for field in group}
        config.update({name: {**known, **own}} if name else {**known, **own})
    return config


def _check_same(ours: ConfigDict, theirs: ConfigDict, folder: Path) -> None:
    changed = [
        (path, mine, other)
        for path, mine, other in differences(complete(ours), theirs)
        if not path.startswith(_FREE) and not path.endswith(_FREE_ENDINGS)
    ]
    if changed:
        path, mine, other = changed[0]
        more = f" (and {len(changed) - 1} more settings differ)" if len(changed) > 1 else ""
        raise UserError(
            f"The work directory {folder} belongs to another experiment: config.{path} is {other!r} there and "
            f"{mine!r} here{more}; choose another --workdir."
        )

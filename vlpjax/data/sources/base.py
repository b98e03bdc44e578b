"""What a source is, and the habits that all sources share: lazy opening, pickling, checked indices.

A source gives random access to examples: flat dicts with encoded images as ``bytes``, texts as ``str``, and
plain numbers.  It is a frozen description of where the data is.  Files are opened on first use, once per
process, and never travel in a pickle, so a source can be sent to worker processes at no cost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
import threading
from typing import Any, ClassVar, Protocol, SupportsIndex, runtime_checkable

from vlpjax.errors import UserError

Example = dict[str, Any]

_OPENING = threading.RLock()  # opening is rare; re-entrant because combined sources open their parts


def _renew_lock() -> None:
    """A forked child must not inherit a lock that another thread of its parent holds."""
    global _OPENING
    _OPENING = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


@runtime_checkable
class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Example: ...

    def describe(self, index: int) -> str:
        """Names the record for a person, as in ``emoji1594 noto[17] in file F``."""
        ...

    def fingerprint(self) -> str:
        """An id of the content that does not depend on where the files lie."""
        ...


class LazySource:
    """Base of the frozen source dataclasses: subclasses say in ``_open`` what they need to read.

    The result of ``_open`` is shared by the threads of a process, so it must be safe to read from many
    threads; it is made anew in a forked child and after unpickling.
    """

    _OPENED: ClassVar[str] = "_opened_state"
    _survives_fork: ClassVar[bool] = True  # False where the reading library crashes in a forked child

    def _open(self) -> Any:
        raise TypeError(f"{type(self).__name__} must define _open.")

    @property
    def _opened(self) -> Any:
        held = self.__dict__.get(self._OPENED)
        if held is None or held[0] != os.getpid():
            with _OPENING:
                held = self.__dict__.get(self._OPENED)
                if held is None or held[0] != os.getpid():
                    if held is not None and not self._survives_fork:
                        raise UserError(
                            f"{type(self).__name__} was read before this process was forked, which the"
                            " ArrayRecord library does not survive; start processes with the 'spawn' method."
                        )
                    held = (os.getpid(), self._open())
                    self.__dict__[self._OPENED] = held
        return held[1]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def checked_index(index: SupportsIndex, length: int, source: object) -> int:
    """``index`` as an int.

    Raises:
      IndexError: if it is not in ``[0, length)``; sources do not count from the end.
    """
    number = operator.index(index)
    if not 0 <= number < length:
        raise IndexError(
            f"Record {number} of {type(source).__name__} does not exist: it has {length} records."
        )
    return number


def digest(*parts: Any) -> str:
    """A short stable id of JSON-like values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

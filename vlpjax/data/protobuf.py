"""Protobuf messages read and edited byte by byte, for files of SentencePiece.

The message classes that SentencePiece ships load beside few versions of the protobuf library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_FIXED = {1: 8, 5: 4}  # bytes of the wire types that are neither a varint (0) nor counted content (2)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, content): an int for a varint, bytes for text, messages and fixed-size numbers."""
    for number, content, _ in _parts(message):
        yield number, content


def message(content: int | bytes) -> dict[int, Any]:
    """The last content of every field of a message; a field that holds a message is handed in here again."""
    return dict(fields(content)) if isinstance(content, bytes) else {}


def with_fields(message: bytes, changes: Mapping[int, Callable[[bytes], bytes]]) -> bytes:
    """The message in which the contents of some fields of text or messages, by number, have been replaced."""
    changed = b""
    for number, content, raw in _parts(message):
        if number in changes and raw[0] & 7 == 2 and isinstance(content, bytes):
            content = changes[number](content)
            raw = varint(number << 3 | 2) + varint(len(content)) + content
        changed += raw
    return changed


def varint(number: int) -> bytes:
    """A non-negative integer in protobuf's variable-length form."""
    more = b""
    while number > 127:
        more, number = more + bytes([number & 127 | 128]), number >> 7
    return more + bytes([number])


def read_varint(message: bytes, position: int) -> tuple[int, int]:
    """The variable-length integer at a position, and the position after it."""
    number = shift = 0
    while True:
        byte = message[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position


def _parts(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Yields (field number, content, all its bytes)."""
    position = 0
    while position < len(message):
        start = position
        key, position = read_varint(message, position)
        content: int | bytes
        if key & 7 == 0:
            content, position = read_varint(message, position)
        else:
            size = _FIXED.get(key & 7)
            if size is None:
                size, position = read_varint(message, position)
            content, position = message[position : position + size], position + size
        yield key >> 3, content, message[start:position]

"""The safetensors format: 8 bytes with the length of a JSON header, the header, the tensors.

https://github.com/huggingface/safetensors describes it.  Large models are several files and an index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlpjax.errors import UserError
from vlpjax.weights.tensors import Entry, MappedTensors

TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
MOST_HEADER_BYTES = 100_000_000  # the format's own limit


def read_header(file: Path) -> dict[str, Entry]:
    """Where the tensors of one file lie; everything that the header claims is checked against the file's size.

    Raises:
      UserError: a file that is cut off or is no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > MOST_HEADER_BYTES:
            raise UserError(f"{file} is no safetensors file: its header would have {length} bytes.")
        if 8 + length > size:
            raise UserError(
                f"{file} is cut off: it has {size} bytes, and its header alone takes {8 + length}."
            )
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f"{file} is no safetensors file: its header is not JSON ({error}).") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        try:
            kind, shape, (low, high) = (
                fields["dtype"],
                tuple(map(int, fields["shape"])),
                fields["data_offsets"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged: its header says nothing sensible of {name!r}.") from error
        if kind not in TYPES:
            raise UserError(f"{file}: the tensor {name!r} has the type {kind}; known are {', '.join(TYPES)}.")
        entry = Entry(file, TYPES[kind], shape, 8 + length + low)
        if low < 0 or high - low != entry.nbytes:
            raise UserError(
                f"{file}: the tensor {name!r} of shape {entry.shape} needs {entry.nbytes} bytes, and the header gives "
                f"it those from {low} to {high}."
            )
        entries[name] = entry
    return entries


def open_safetensors(file: Path) -> MappedTensors:
    """The tensors of one file, or of all files of a ``*.safetensors.index.json``.

    Raises:
      UserError: a file that is damaged or missing, or an index that does not fit its files.
    """
    if file.suffix != ".json":
        return MappedTensors(str(file), read_header(file))
    found: dict[str, Entry] = {}
    headers: dict[str, dict[str, Entry]] = {}
    for name, part in read_index(file).items():
        if part not in headers:
            headers[part] = read_header(_beside(file, part))
        if name not in headers[part]:
            raise UserError(f"{file} says that {part} holds the tensor {name!r}, but it does not.")
        found[name] = headers[part][name]
    return MappedTensors(str(file.parent), found)


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index file."""
    try:
        table = json.loads(file.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no index of weight files: it has no readable 'weight_map'.") from error
    return {str(name): str(part) for name, part in table.items()}


def _beside(index: Path, part: str) -> Path:
    path = index.parent / part
    if Path(part).name != part or not path.is_file():
        raise UserError(f"{index} names the file {part!r}, which is not beside it.")
    return path


def write_safetensors(
    file: Path,
    kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    arrays: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Writes one file, one tensor at a time.

    Args:
      kinds: type and shape per tensor, in the order of ``arrays``.
      arrays: the tensors; each may be made when it is its turn.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in kinds.items():
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, kind), (given, array) in zip(kinds.items(), arrays, strict=True):
            assert (name, *kind) == (given, array.dtype, array.shape), (name, kind, given, array.shape)
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

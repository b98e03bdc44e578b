"""Weights out of ONNX files: the initialisers of a graph, under the names that they had in PyTorch.

The format is protocol buffers (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); only the few fields that
lead to initialisers are read, and numbers stay where they lie in the file.

The exporter keeps the names of parameters that it passes on as they are.  The weight of a linear layer it transposes
to (in, out) and calls ``onnx::MatMul_1966``: the module's name is that of the node that uses it,
``/encoder/layer.0/attention/key/MatMul``.  Such a tensor appears here as ``encoder.layer.0.attention.key.weight``
with its usual shape (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlpjax.errors import UserError
from vlpjax.weights.tensors import Entry, MappedTensors

# TensorProto.DataType -> type, and the field that holds numbers of that type when they are not raw bytes.
TYPES: dict[int, np.dtype] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.uint8),
    3: np.dtype(np.int8),
    6: np.dtype(np.int32),
    7: np.dtype(np.int64),
    9: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
    16: np.dtype(ml_dtypes.bfloat16),
}
PACKED = {1: 4, 11: 10}  # float_data and double_data lie in the file as in memory
RAW, EXTERNAL = 9, 1
GRAPH, NODE, INITIALIZER = 7, 1, 5  # field numbers of ModelProto and GraphProto
MADE_UP = "onnx::"  # names that the exporter invents

Span = tuple[int, int]  # of bytes in the file
Field = tuple[int, Any]  # number, and an int or the span of its bytes


def open_onnx(file: Path) -> MappedTensors:
    """The initialisers of an ONNX file that hold real numbers.

    Raises:
      UserError: a damaged file, or weights that lie in other files.
    """
    content = np.memmap(file, np.uint8, mode="r").data if file.stat().st_size else memoryview(b"")
    try:
        entries = _entries(file, content)
    except (IndexError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is cut off or no ONNX file ({error}).") from error
    if not entries:
        raise UserError(f"{file} is no ONNX file with weights.")
    return MappedTensors(str(file), entries)


def _entries(file: Path, content: memoryview) -> dict[str, Entry]:
    users: dict[str, str] = {}  # name of an initialiser -> name of the MatMul whose right side it is
    found: dict[str, Entry] = {}
    for number, graph in _fields(content, (0, len(content))):
        if number != GRAPH:
            continue
        for kind, span in _fields(content, graph):
            if kind == NODE:
                inputs, name, operation = _node(content, span)
                if operation == "MatMul" and len(inputs) == 2:
                    users[inputs[1]] = name
            elif kind == INITIALIZER:
                name, entry = _tensor(file, content, span)
                if entry is not None:
                    found[name] = entry
    named: dict[str, Entry] = {}
    for name, entry in found.items():
        if name.startswith(MADE_UP) and len(entry.shape) == 2 and users.get(name, "").endswith("/MatMul"):
            name = users[name].removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight"
            row = entry.shape[1] * entry.dtype.itemsize
            # The transpose, without moving a byte.
            entry = Entry(file, entry.dtype, entry.shape[::-1], entry.offset, (entry.dtype.itemsize, row))
        if name in named:
            raise UserError(f"{file} holds two tensors that are both {name!r}.")
        named[name] = entry
    return named


def _node(content: memoryview, span: Span) -> tuple[list[str], str, str]:
    """Inputs, name and operation of a NodeProto."""
    inputs, texts = [], {3: "", 4: ""}
    for number, value in _fields(content, span):
        if number == 1:
            inputs.append(_text(content, value))
        elif number in texts:
            texts[number] = _text(content, value)
    return inputs, texts[3], texts[4]


def _tensor(file: Path, content: memoryview, span: Span) -> tuple[str, Entry | None]:
    """Name and place of a TensorProto; no place for one that is no array of real numbers."""
    shape: list[int] = []
    name, kind, external = "", 0, False
    data: dict[int, Span] = {}
    for number, value in _fields(content, span):
        if number == 1:  # dims, packed or one by one
            shape += [value] if isinstance(value, int) else list(_varints(content, value))
        elif number == 2:
            kind = value
        elif number == 8:
            name = _text(content, value)
        elif number == 14:
            external = value == EXTERNAL
        elif number in (RAW, *PACKED.values()):
            data[number] = value
    if external:
        raise UserError(f"{file} keeps the tensor {name!r} in another file; save the model as one file.")
    if kind not in TYPES or TYPES[kind].kind in "iub":
        return name, None  # shapes and indices that the graph computes with
    dtype = TYPES[kind]
    start, end = data.get(RAW) or data.get(PACKED.get(kind, RAW)) or (0, 0)
    entry = Entry(file, dtype, tuple(shape), start)
    if entry.nbytes != end - start:
        raise UserError(
            f"{file} is damaged: the tensor {name!r} of shape {entry.shape} needs {entry.nbytes} bytes, and has "
            f"{end - start}."
        )
    return name, entry


def _fields(content: memoryview, span: Span) -> Iterator[Field]:
    """The fields of a message: an int, or the span of a field with a length; other kinds are passed over."""
    position, end = span
    while position < end:
        key, position = _varint(content, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(content, position)
            yield number, value
        elif wire == 2:
            length, position = _varint(content, position)
            if position + length > end:
                raise IndexError(f"a field ends at byte {position + length}, and its message at {end}")
            yield number, (position, position + length)
            position += length
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise IndexError(f"byte {position} begins no field")


def _varints(content: memoryview, span: Span) -> Iterator[int]:
    position, end = span
    while position < end:
        value, position = _varint(content, position)
        yield value


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError(f"byte {position} ends no number")


def _text(content: memoryview, span: Span) -> str:
    return bytes(content[slice(*span)]).decode()

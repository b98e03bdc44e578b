"""PyTorch's own files (``pytorch_model.bin``, ``.pth``, ``.pt``), read without PyTorch and without running them.

They hold pickles, which are programs: a hostile file can run anything.  Here an unpickler that knows a dozen names
rebuilds descriptions of tensors, every other name is refused, and the numbers are read from where they lie in the
file.  Both forms are read: the zip archive that PyTorch writes since 1.6, and the stream of pickles from before.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from vlpjax.errors import UserError
from vlpjax.weights.safetensors_files import read_index
from vlpjax.weights.tensors import Entry, MappedTensors

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
MAGIC = 0x1950A86A20F9469CFC6C  # of the form before zip archives
PROTOCOL = 1001
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "module",
    "net",
)  # keys that training scripts save under


@dataclass
class Storage:
    """A run of numbers in the file; where it begins is known at the end."""

    key: str
    dtype: np.dtype
    count: int
    offset: int = -1


@dataclass
class Described:
    """A tensor that was not read: a view into a storage, in elements."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


class Inert:
    """Stands for an object that may be beside tensors in a file, and does nothing here."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def open_pickle(file: Path) -> MappedTensors:
    """The tensors of one file, or of all files of a ``*.bin.index.json``.

    Raises:
      UserError: a file that is damaged or of another kind, that names anything but tensors, or that holds several
        sets of tensors.
    """
    if file.suffix != ".json":
        return MappedTensors(str(file), _entries(file))
    found: dict[str, Entry] = {}
    for part in dict.fromkeys(read_index(file).values()):
        path = file.parent / part
        if Path(part).name != part or not path.is_file():
            raise UserError(f"{file} names the file {part!r}, which is not beside it.")
        found.update(_entries(path))
    missing = [name for name in read_index(file) if name not in found]
    if missing:
        raise UserError(f"{file} names the tensor {missing[0]!r}, which none of its files holds.")
    return MappedTensors(str(file.parent), found)


def _entries(file: Path) -> dict[str, Entry]:
    try:
        with file.open("rb") as stream:
            zipped = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            content = _read_zip(file, stream) if zipped else _read_stream(file, stream)
    except UserError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{file} is damaged or no PyTorch file ({error}).") from error
    except (TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise UserError(f"{file} is damaged: its pickle makes no sense ({error}).") from error
    return {name: _entry(file, name, tensor) for name, tensor in _named_tensors(file, content)}


def _entry(file: Path, name: str, tensor: Described) -> Entry:
    bytes_of_storage = tensor.storage.count * tensor.storage.dtype.itemsize
    strides = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    entry = Entry(file, tensor.dtype, tensor.shape, tensor.start * tensor.dtype.itemsize, strides)
    wrong = len(strides) != len(tensor.shape) or min((*strides, *tensor.shape, tensor.start, 0)) < 0
    if wrong or (entry.nbytes and entry.end > bytes_of_storage):
        raise UserError(
            f"{file} is damaged: the tensor {name!r} of shape {tensor.shape} is larger than its storage of "
            f"{tensor.storage.count} numbers."
        )
    return Entry(file, tensor.dtype, tensor.shape, tensor.storage.offset + entry.offset, strides)


def _named_tensors(file: Path, content: Any) -> Iterator[tuple[str, Described]]:
    """The state dict in what was unpickled: that itself, or what training scripts put around it."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__} and no dict of tensors.")
    if not any(isinstance(value, Described) for value in content.values()):
        inner = {
            str(key): value
            for key, value in content.items()
            if isinstance(value, Mapping) and any(isinstance(item, Described) for item in value.values())
        }
        known = [key for key in WRAPPERS if key in inner] or list(inner)
        if len(known) != 1:
            found = f"several dicts of tensors ({', '.join(known)})" if known else "no dict of tensors"
            raise UserError(f"{file} holds {found}; save the state_dict alone.")
        content = inner[known[0]]
    for name, value in content.items():
        if isinstance(value, Described):
            yield str(name), value


class _Unpickler(pickle.Unpickler):
    """Knows what tensors are made of, and nothing else."""

    def __init__(self, file: IO[bytes], path: Path, storages: dict[str, Storage]):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        allowed = _allowed(module, name)
        if allowed is None:
            raise UserError(
                f"{self.path} names {module}.{name}, which is no part of a tensor: nothing is run or read; "
                "save the state_dict alone."
            )
        return allowed

    def persistent_load(self, identifier: Any) -> Storage:
        kind, storage_type, key, _, count = identifier[:5]
        if kind != "storage":
            raise UserError(f"{self.path} refers to a {kind!r}; only storages of tensors are known.")
        if len(identifier) > 5 and identifier[5] is not None:  # a view of another storage, written before 0.4
            raise UserError(
                f"{self.path} holds views of storages, as PyTorch before 0.4 wrote them; save it anew."
            )
        return self.storages.setdefault(str(key), Storage(str(key), storage_type(), int(count)))


def _allowed(module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
        return collections.OrderedDict
    if module in ("torch", "torch.storage", "torch.cuda") and (name in STORAGES or name == "UntypedStorage"):
        return lambda: STORAGES.get(name, np.dtype(np.uint8))
    if module == "torch" and name == "Size":
        return tuple
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    if module == "torch._utils":
        return {
            "_rebuild_tensor": _rebuild_tensor,
            "_rebuild_tensor_v2": _rebuild_tensor,
            "_rebuild_tensor_v3": _rebuild_tensor_v3,
            "_rebuild_parameter": _rebuild_parameter,
        }.get(name)
    if (module, name) in (("torch", "device"), ("argparse", "Namespace")):
        return Inert
    return None


def _rebuild_tensor(
    storage: Storage, start: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Described:
    return _described(storage, start, shape, strides, storage.dtype)


def _rebuild_tensor_v3(
    storage: Storage,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: Any,
    hooks: Any,
    dtype: np.dtype,
    *_: Any,
) -> Described:
    return _described(storage, start, shape, strides, dtype)


def _described(
    storage: Storage, start: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype
) -> Described:
    """A tensor of these parts; a TypeError or ValueError if the pickle gave something else in their places."""
    if not isinstance(storage, Storage):
        raise TypeError("a tensor has no storage")
    return Described(storage, int(start), tuple(map(int, shape)), tuple(map(int, strides)), np.dtype(dtype))


def _rebuild_parameter(tensor: Described, *_: Any) -> Described:
    return tensor


def _read_zip(file: Path, stream: IO[bytes]) -> Any:
    """The form since 1.6: ``<name>/data.pkl`` and one uncompressed file per storage, ``<name>/data/<key>``."""
    with zipfile.ZipFile(stream) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        main = next((name for name in infos if name.endswith("/data.pkl")), None)
        if main is None or any(name.endswith("/constants.pkl") for name in infos):
            raise UserError(
                f"{file} is no file of weights: it is another zip archive, or a TorchScript program."
            )
        root = main.removesuffix("data.pkl")
        order = infos.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise UserError(f"{file} was written on a machine with another order of bytes; save it anew.")
        storages: dict[str, Storage] = {}
        content = _Unpickler(io.BytesIO(archive.read(main)), file, storages).load()
        for key, storage in storages.items():
            info = infos[f"{root}data/{key}"]
            if (
                info.compress_type != zipfile.ZIP_STORED
                or info.file_size < storage.count * storage.dtype.itemsize
            ):
                raise UserError(f"{file} is damaged: the storage {key!r} is compressed or too short.")
            stream.seek(info.header_offset)
            header = stream.read(30)  # the local header may be longer than the central one says
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            storage.offset = info.header_offset + 30 + names
    return content


def _read_stream(file: Path, stream: IO[bytes]) -> Any:
    """The form before: five pickles, then every storage as a count and its numbers, in the order of the fifth."""
    storages: dict[str, Storage] = {}

    def load() -> Any:
        return _Unpickler(stream, file, storages).load()

    if load() != MAGIC:
        raise UserError(f"{file} is no PyTorch file.")
    if load() != PROTOCOL:
        raise UserError(f"{file} is of an unknown version of PyTorch's format.")
    if not load().get("little_endian", True):
        raise UserError(f"{file} was written on a machine with another order of bytes; save it anew.")
    content = load()
    for key in load():
        storage = storages[str(key)]
        count = int.from_bytes(stream.read(8), "little")
        if count != storage.count:
            raise UserError(
                f"{file} is damaged: the storage {key!r} has {count} numbers, and its tensors say {storage.count}."
            )
        storage.offset = stream.tell()
        stream.seek(count * storage.dtype.itemsize, io.SEEK_CUR)
    return content

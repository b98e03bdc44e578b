"""Writing: a module and its variables become a folder that other libraries load as their own.

The folder appears complete or not at all: everything is written beside it and renamed at the end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.experimental import multihost_utils

from vlpjax.data.tokenizers import Tokenizer
from vlpjax.errors import UserError
from vlpjax.rules import tree_names
from vlpjax.weights.families import family_holding, family_named
from vlpjax.weights.family import COLLECTIONS, Family, boxed_shapes
from vlpjax.weights.importing import DTYPES
from vlpjax.weights.matching import Piece, match_parameters, members
from vlpjax.weights.preprocessing import Preprocessing
from vlpjax.weights.safetensors_files import write_safetensors

MAX_SHARD_BYTES = 5_000_000_000


def save_pretrained(
    model: nn.Module,
    variables: Any,
    folder: str | Path,
    *,
    family: str | None = None,
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a folder of pretrained weights.

    With several processes all of them call it; the first one writes.

    Args:
      model: a module that one of the families can hold.
      variables: its ``{"params": ...}``, on one device or sharded; gathered one tensor at a time.
      folder: to be made.
      family: the name of the family to write as; None takes the first that can hold the module.
      dtype: of the tensors in the file; float32 values become bfloat16 by rounding to the nearest.
      preprocessing: how images are made ready, written as ``preprocessor_config.json``.
      tokenizer: saved beside the weights; or a folder, whose tokenizer's files are copied as they are.
      max_shard_bytes: of one file; a larger model becomes several files and an index.
      overwrite: whether a folder that is already there is replaced.

    Raises:
      UserError: no family can hold the module, variables that are not the module's, or a folder that is there.
        Nothing has been written then.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; there are {', '.join(map(repr, DTYPES))}.")
    if family is None:
        chosen, config = family_holding(model)
    else:
        chosen = family_named(family)
        config = chosen.describe(model)
    leaves = _leaves(chosen, model, variables)
    sizes = chosen.sizes(config)
    plan = match_parameters(chosen, members(_shapes(variables)), sizes)
    copies = tokenizer_files(tokenizer) if isinstance(tokenizer, (str, Path)) else {}
    target = Path(folder).absolute()
    with complete_or_nothing(target, overwrite=overwrite) as partial:
        if partial is not None:
            _write_json(partial / chosen.config_file, full_config(chosen, config, dtype))
            if preprocessing is not None:
                _write_json(partial / "preprocessor_config.json", preprocessing.to_json())
            for name, content in copies.items():
                (partial / name).write_bytes(content)
            if isinstance(tokenizer, Tokenizer):
                tokenizer.save(partial)
        write_tensors(
            plan, leaves, partial, chosen.weights_file, DTYPES[dtype], max_shard_bytes, chosen.fixed(model)
        )


def full_config(family: Family, config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A family's fields, and those that `transformers` finds the class by."""
    if not family.architecture:
        return dict(config)
    head = {"architectures": [family.architecture], "model_type": family.model_types[0], "torch_dtype": dtype}
    return {**head, **config}


def write_tensors(
    plan: Mapping[str, Sequence[Piece]],
    leaves: Mapping[str, Any],
    folder: Path | None,
    file_name: str,
    dtype: np.dtype,
    max_shard_bytes: int,
    fixed: Mapping[str, np.ndarray],
) -> None:
    """Writes the tensors of a plan and the fixed ones as one safetensors file, or as several and an index.

    Args:
      plan: per tensor the parameters that it holds.
      leaves: arrays of the variables by path.
      folder: None for a process that takes part in gathering and writes nothing.
      fixed: tensors that no parameter holds, by name.
    """
    kinds = {name: (dtype, pieces[0].binding.their_shape) for name, pieces in plan.items()}
    kinds |= {name: (dtype, tensor.shape) for name, tensor in fixed.items()}
    files: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, (_, shape) in kinds.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > room and files[-1]:
            files.append([])
            room = max_shard_bytes
        files[-1].append(name)
        room -= nbytes
    stem, suffix = os.path.splitext(file_name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        part = file_name if len(files) == 1 else f"{stem}-{number:05d}-of-{len(files):05d}{suffix}"
        weight_map.update(dict.fromkeys(names, part))
        arrays = (
            (name, (fixed[name] if name in fixed else _tensor(plan[name], leaves)).astype(dtype)) for name in names
        )  # fmt: skip
        if folder is None:
            for _ in arrays:  # the writing process needs what this one holds
                pass
        else:
            write_safetensors(folder / part, {name: kinds[name] for name in names}, arrays)
    if len(files) > 1 and folder is not None:
        total = sum(math.prod(shape) * dtype.itemsize for _, shape in kinds.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{file_name}.index.json", index)


@contextlib.contextmanager
def complete_or_nothing(folder: Path, *, overwrite: bool = False) -> Iterator[Path | None]:
    """A folder to write into that gets its name when everything in it is on the disk; on other processes None.

    Raises:
      UserError: the name is taken.
    """
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} is there already; choose another folder, or say that it may be overwritten."
        )
    if jax.process_index() != 0:
        yield None
        multihost_utils.sync_global_devices("weights are written")
        return
    partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    old = folder.parent / f".{folder.name}.{os.getpid()}.old"
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        _sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("weights are written")


def tokenizer_files(folder: str | Path) -> dict[str, bytes]:
    """Names and contents of the files in a folder that a tokenizer is loaded from.

    Raises:
      UserError: there is no tokenizer.
    """
    known = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
    also = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    places = {name: Path(folder) / name for name in (*known, *also)}
    found = {name: place.read_bytes() for name, place in places.items() if place.is_file()}
    if not any(name in found for name in known):
        raise UserError(f"{folder} holds no tokenizer; known files are {', '.join(known)}.")
    if "tokenizer_config.json" not in found:
        kind = "PreTrainedTokenizerFast" if "tokenizer.json" in found else "LlamaTokenizer"
        found["tokenizer_config.json"] = json.dumps({"tokenizer_class": kind}, indent=2).encode()
    return found


def _leaves(family: Family, model: nn.Module, variables: Any) -> dict[str, Any]:
    """The variables by path, after a look at whether they are the module's."""
    given = {name: tree for name, tree in meta.unbox(dict(variables)).items() if name in COLLECTIONS}
    wanted = meta.unbox(boxed_shapes(family, model))
    need = dict(zip(tree_names(wanted), jax.tree.leaves(wanted), strict=True))
    have = dict(zip(tree_names(given), jax.tree.leaves(given), strict=True))
    for path in need.keys() ^ have.keys():
        lacking = "lack" if path in need else "hold too much:"
        raise UserError(
            f"The variables are not those of this {type(model).__name__}: they {lacking} {path!r}."
        )
    for path, leaf in have.items():
        if tuple(leaf.shape) != tuple(need[path].shape):
            raise UserError(
                f"The variable {path!r} has shape {tuple(leaf.shape)}; the module wants {tuple(need[path].shape)}."
            )
    return have


def _shapes(variables: Any) -> Any:
    return {name: tree for name, tree in variables.items() if name in COLLECTIONS}


def _tensor(pieces: Sequence[Piece], leaves: Mapping[str, Any]) -> np.ndarray:
    parts = [_gather(leaves[piece.member.path], piece.member.layer) for piece in pieces]
    whole = parts[0] if pieces[0].position is None else np.stack(parts)
    return pieces[0].binding.to_theirs(whole)


def _gather(leaf: Any, layer: int | None) -> np.ndarray:
    """One parameter (one layer of a stacked one) whole, on every host."""
    part = leaf if layer is None else leaf[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(jax.device_get(part))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

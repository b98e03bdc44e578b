"""Reading: a folder of another library becomes a module and its variables, every device reading its own part.

No host ever holds the whole model: for every shard of every parameter, the rule of the parameter gives the part
of the tensor that it is made of, and that part alone is read from the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax.core import meta

from vlpjax.errors import UserError
from vlpjax.mesh import Layout
from vlpjax.rules import map_with_names
from vlpjax.weights.families import family_named, family_of, model_type
from vlpjax.weights.family import Family, boxed_shapes
from vlpjax.weights.matching import Member, Piece, match_tensors, members, tied_copies, without_prefixes
from vlpjax.weights.opening import Opened, open_weights
from vlpjax.weights.tensors import Tensors

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_ROUNDED = 0.01  # how far a file of half precision may be from a table of sines and cosines
_ROWS_COMPARED = 16  # of a tensor that repeats another, at its start


def from_pretrained(
    folder: str | Path, mesh: Layout | None = None, *, dtype: str = "float32", family: str | None = None
) -> tuple[nn.Module, Any]:
    """The module and the variables of a folder of pretrained weights.

    Args:
      folder: with ``config.json`` and weights (safetensors, ``pytorch_model.bin``, ``.pth``, ONNX); or one file; a
        GGUF file needs no config.
      mesh: a layout to spread the variables over, from :func:`vlpjax.mesh.make_layout`; None is the default device.
      dtype: of the variables, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
      family: name of a family, for a config that does not say it.

    Returns:
      the module, and ``{"params": ...}`` (with ``"batch_stats"`` if it has any), without axis names.

    Raises:
      UserError: an unknown architecture, an option of it that our modules do not have, or weights that are damaged or
        do not fit the config.
    """
    opened = open_weights(folder)
    chosen = family_for(opened, family)
    model = chosen.build(opened.config)
    return model, read_variables(chosen, model, opened, mesh, dtype=dtype)


def family_for(opened: Opened, name: str | None = None) -> Family:
    """The family of what was opened: the one that is named, or the one that its config says."""
    if name is not None:
        return family_named(name)
    if not model_type(opened.config):
        raise UserError(
            f"{opened.path} does not say what its weights are: there is no config.json with a 'model_type'; write one, "
            "or name a family."
        )
    return family_of(opened.config)


def read_variables(
    family: Family, model: nn.Module, opened: Opened, mesh: Layout | None = None, *, dtype: str = "float32"
) -> Any:
    """The variables of a module out of opened weights.

    Raises:
      UserError: weights that do not fit the module; before any of them is read.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; there are {', '.join(map(repr, DTYPES))}.")
    boxed = boxed_shapes(family, model)
    layers = _match(family, members(boxed), opened, family.fixed(model))
    plain = meta.unbox(boxed)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: device, plain)
    else:
        places = {name: mesh.shard_parameters(tree) for name, tree in boxed.items()}

    def make(path: str, leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
        return _make_array(opened.tensors, layers[path], leaf.shape, place, DTYPES[dtype])

    return map_with_names(make, plain, places)


def fill_variables(
    family: Family,
    variables: Any,
    opened: Opened,
    new: Sequence[str] = (),
    beside: Any = None,
    fixed: Mapping[str, np.ndarray] | None = None,
) -> Any:
    """Variables with the values of opened weights, of the types that they have and where they lie.

    Args:
      variables: of a module that the family's rules know, as arrays.
      new: regular expressions of parameters that no tensor holds; they stay as they are.
      beside: shapes of what the weights hold besides the module's own; it is matched and not read.
      fixed: tensors that the family's module computes.

    Raises:
      UserError: weights that do not fit the variables; before any of them is read.
    """
    others = [] if beside is None else members(beside)
    own = [
        member
        for member in members(variables)
        if not any(re.fullmatch(expression, member.name) for expression in new)
    ]
    layers = _match(family, [*own, *others], opened, fixed or {})

    def fill(path: str, leaf: jax.Array) -> jax.Array:
        if path not in layers:
            return leaf
        return _make_array(opened.tensors, layers[path], leaf.shape, leaf.sharding, np.dtype(leaf.dtype))

    return map_with_names(fill, variables)


def _match(
    family: Family, parameters: Sequence[Member], opened: Opened, fixed: Mapping[str, np.ndarray]
) -> dict[str, list[Piece]]:
    """Per path of a parameter, what it is made of; everything that can be wrong shows here."""
    tensors, what = opened.tensors, str(opened.path)
    pieces = match_tensors(family, parameters, tensors.shapes, family.sizes(opened.config), what, fixed)
    for piece in pieces:
        if not is_float(tensors.dtype(piece.tensor)):
            raise UserError(
                f"{what}: the tensor {piece.tensor!r} has the type {tensors.dtype(piece.tensor)}, which is no "
                "floating-point type; quantised weights are read from GGUF files only."
            )
    _check_fixed(family, tensors, fixed, what)
    _check_tied(family, tensors, {piece.tensor for piece in pieces}, what)
    layers: dict[str, list[Piece]] = {}
    for piece in pieces:
        layers.setdefault(piece.member.path, []).append(piece)
    return layers


def read_part(tensors: Tensors, piece: Piece, part: Sequence[slice]) -> np.ndarray:
    """The part of a parameter between these slices, read as little as its rule allows."""
    wanted = tuple(part)
    if piece.position is not None:
        wanted = (slice(piece.position, piece.position + 1), *wanted)
    source, rearrange = piece.binding.window(wanted)
    found = rearrange(tensors.read(piece.tensor, source))
    return found if piece.position is None else found[0]


def is_float(dtype: np.dtype) -> bool:
    """Whether a type holds real numbers, the types of :mod:`ml_dtypes` included."""
    return dtype.kind == "f" or (dtype.kind == "V" and hasattr(ml_dtypes, dtype.name))


def _make_array(
    tensors: Tensors,
    pieces: Sequence[Piece],
    shape: tuple[int, ...],
    place: jax.sharding.Sharding,
    dtype: np.dtype,
) -> jax.Array:
    by_layer = {piece.member.layer: piece for piece in pieces}
    parts: dict[tuple[Any, ...], np.ndarray] = {}  # devices that hold copies share one reading

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if bounds not in parts:
            slices = tuple(slice(low, high) for low, high in bounds)
            if None in by_layer:
                found = read_part(tensors, by_layer[None], slices)
            else:
                chosen = range(*bounds[0])
                found = np.stack([read_part(tensors, by_layer[layer], slices[1:]) for layer in chosen])
            parts[bounds] = found.astype(
                dtype, order="C"
            )  # (ascontiguousarray would make a vector of a number)
        return parts[bounds]

    return jax.make_array_from_callback(shape, place, read)


def _check_fixed(family: Family, tensors: Tensors, fixed: Mapping[str, np.ndarray], what: str) -> None:
    """Tensors that the module computes must be what it computes."""
    for name, full in without_prefixes(family, tensors.shapes, what).items():
        if name not in fixed:
            continue
        if tensors.shapes[full] != fixed[name].shape:
            raise UserError(
                f"{what}: the tensor {full!r} has shape {tensors.shapes[full]}, but the module computes one of shape "
                f"{fixed[name].shape}."
            )
        found = tensors.read(full).astype(np.float32)
        difference = float(np.abs(found - fixed[name]).max())
        if not difference <= _ROUNDED:
            raise UserError(
                f"{what}: the tensor {full!r} is off by {difference:.2g} from what the module computes in its place "
                "and cannot take from a file."
            )


def _check_tied(family: Family, tensors: Tensors, used: set[str], what: str) -> None:
    """Tensors that the config ties must be equal: their first rows are compared."""
    for copy, original in tied_copies(family, tensors.shapes, used):
        shapes: Mapping[str, tuple[int, ...]] = tensors.shapes
        rows = (slice(0, _ROWS_COMPARED),)
        if shapes[copy] != shapes[original]:
            raise UserError(
                f"{what}: the config ties {copy!r} of shape {shapes[copy]} to {original!r} of shape {shapes[original]}."
            )
        if shapes[copy] and not np.array_equal(tensors.read(copy, rows), tensors.read(original, rows)):
            raise UserError(
                f"{what}: the config ties {copy!r} to {original!r}, but their values differ; the config should say "
                "that they are not tied."
            )

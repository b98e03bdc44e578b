"""``Family``: what is to be known about an architecture of another library to exchange weights with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.towers import Towers
from vlpjax.weights.layout import Rule

Kind = TypeVar("Kind")

COLLECTIONS = ("params", "batch_stats")  # of Flax variables: what is learned, and running statistics


def patch_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the axes p, q and c (height, width, channels of a patch) by the usual fields of a config."""
    vision = config.get("vision_config") or config
    patch = vision.get("patch_size")
    if patch is None:
        return {}
    height, width = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return {"p": height, "q": width, "c": vision.get("num_channels", 3)}


@dataclass(frozen=True)
class Family:
    """An architecture as others write it down.

    Attributes:
      name: ours, such as ``"clip"``; the file in :mod:`vlpjax.weights.families` has it too.
      model_types: values of ``model_type`` in ``config.json`` that it answers; the first one is written.
      architecture: class name that is written as ``architectures`` in ``config.json``, unless ``describe`` gives
        ``"architectures"`` itself; empty for formats of others than `transformers`, which have no such fields.
      build: makes the module of a ``config.json``: one tower, or :class:`~vlpjax.models.towers.Towers` of several.
        ``UserError`` for options that our modules do not have, naming field and value.
      describe: the inverse: the fields of ``config.json`` for a module.  ``UserError`` if the architecture cannot
        hold it, naming the field of the module.
      rules: of parameters and tensors, in order of preference: where two tensors may hold one parameter (an older
        and a newer spelling), the first is written and either is read.  A rule that finds nothing is not used.
      example: arguments of the module for shape inference: a tuple of ``jax.ShapeDtypeStruct`` (and of constants, such
        as a grid) for one tower; for ``Towers`` a dict of such tuples per tower (``()`` for a head without arguments).
      sizes: of a config, the sizes of axes that no shape of ours determines.
      fixed: of a module, the tensors of theirs that ours computes (tables of positions), by the names that are
        written; a file that is read must have these values, if it has them.
      ignored: regular expressions of tensor names that hold nothing that is learned.
      tied: (copy, original) names of tensors, with placeholders, of which the first repeats the second when a
        config ties them.  Copies are not written; if a file has only the copy, it is read in its place.
      config_file, weights_file: names of the files that are written.
      prefixes: that wrapping classes put before names, such as ``"bert."``; read with or without, written without.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    build: Callable[[dict[str, Any]], nn.Module]
    describe: Callable[[nn.Module], dict[str, Any]]
    rules: tuple[Rule, ...]
    example: Callable[[nn.Module], Any]
    sizes: Callable[[Mapping[str, Any]], Mapping[str, int]] = patch_sizes
    fixed: Callable[[nn.Module], Mapping[str, np.ndarray]] = lambda model: {}
    ignored: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ("",)
    config_file: str = "config.json"
    weights_file: str = "model.safetensors"


def first_that_holds(
    writers: Iterable[tuple[Kind, str, Callable[[Any], dict[str, Any]]]], model: nn.Module, none: str
) -> tuple[Kind, dict[str, Any]]:
    """The first of several forms that can hold a module, and the config that it writes for it.

    Args:
      writers: per form what to return, its name for messages, and ``describe``.
      none: the beginning of the message if there is none; the reason of each form follows.

    Raises:
      UserError: no form can hold the module.
    """
    reasons = []
    for kind, name, describe in writers:
        try:
            return kind, describe(model)
        except UserError as error:
            reasons.append(f"{name}: {str(error).rstrip('.')}")
    raise UserError(f"{none} ({'; '.join(reasons)}).")


def boxed_shapes(family: Family, model: nn.Module) -> Any:
    """Shapes of all variables, with the logical axes of parameters; nothing is computed."""
    # Towers hold functions, which are never equal; what these make is.
    made = (
        tuple((name, make()) for name, make in model.makers.items()) if isinstance(model, Towers) else model
    )
    try:
        hash((family, made))
    except TypeError:  # a field of a module is a list or a dictionary
        return _traced_shapes.__wrapped__(family, made)
    return _traced_shapes(family, made)


@functools.lru_cache(maxsize=16)
def _traced_shapes(family: Family, made: nn.Module | tuple[tuple[str, nn.Module], ...]) -> Any:
    """Remembered: tracing a deep model takes seconds, and reading and writing it ask for the same."""
    model = Towers.of(dict(made)) if isinstance(made, tuple) else made
    arrays, whole = _arrays(family.example(model))
    shapes = jax.eval_shape(lambda arrays: _initialize(model, whole(arrays), 0), arrays)
    return {name: tree for name, tree in shapes.items() if name in COLLECTIONS}


def initial_variables(family: Family, model: nn.Module, seed: int = 0) -> Any:
    """Random variables of a module, as its initializers make them, without axis names: for tests and examples."""
    arrays, whole = _arrays(family.example(model))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), arrays)
    variables = nn.meta.unbox(jax.jit(lambda arrays: _initialize(model, whole(arrays), seed))(zeros))
    return {name: tree for name, tree in variables.items() if name in COLLECTIONS}


def _arrays(example: Any) -> tuple[list[jax.ShapeDtypeStruct], Callable[[list[Any]], Any]]:
    """The arrays of an example, and what puts arrays back between its constants, which are not traced."""
    leaves, tree = jax.tree.flatten(example)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def whole(arrays: list[Any]) -> Any:
        filled = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(tree, [filled.get(place, leaf) for place, leaf in enumerate(leaves)])

    return [leaves[place] for place in places], whole


def _initialize(model: nn.Module, example: Any, seed: int) -> Any:
    """All variables; of towers by calling each with its own arguments."""
    rngs = {"params": jax.random.key(seed), "dropout": jax.random.key(seed + 1)}
    if not isinstance(model, Towers):
        return model.init(rngs, *example)

    def call_all(towers: Towers) -> dict[str, Any]:
        return {name: towers.call(name, *arguments) for name, arguments in example.items()}

    return model.init(rngs, method=call_all)

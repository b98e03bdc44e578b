"""Elastic Vision Transformers: sub-networks of a ViT that share its weights, and cutting them out.

A sub-network of width d has the first d features of everything: the first d rows and columns of every kernel, the
first heads, the first part of every MLP.  A sub-network of depth l has l of the blocks, evenly spread, the first and
the last among them.

The shared forward pass keeps the shapes of the whole network and multiplies parameters by masks, instead of slicing
arrays.  So one compiled program serves all sizes, drawn inside the step, and a sharded kernel stays where it is;
slicing would compile a program for each of the 143 sizes of POA and move parts of every kernel at each of them.  The
price is that a sub-network costs as many operations as the whole one.  What is cut out at the end is small.

Source: "POA: Pre-training Once for Models of All Sizes", arXiv 2408.01031, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.vit import ViT
from vlpjax.rules import map_with_names

# Where a parameter of a ViT has features that follow its width: (end of its name, axes with features or heads in, axes
# with features or heads out).  Kernels with features in make up for the missing ones.
_AXES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("query/kernel", (0,), (1,)),
    ("key/kernel", (0,), (1,)),
    ("value/kernel", (0,), (1,)),
    ("query/bias", (), (0,)),
    ("key/bias", (), (0,)),
    ("value/bias", (), (0,)),
    ("out/kernel", (0,), (2,)),
    ("up/kernel", (0,), (1,)),
    ("gate/kernel", (0,), (1,)),
    ("down/kernel", (0,), (1,)),
)
_BRANCH_ENDS = ("attention/out/", "mlp/down/")  # a block without these adds nothing


class Size(NamedTuple):
    """A sub-network: its width and its depth, which may be traced."""

    width: Int[Array, ""] | int
    depth: Int[Array, ""] | int


class ElasticViT(nn.Module):
    """A ViT of which every sub-network can be run with the same weights.

    Its parameters have the names of the ViT's; without ``size`` it is the ViT.

    Attributes:
      tower: the whole network: patches from one projection, LayerNorms, blocks that are not scanned, and nothing after
        the last norm: no pooler, no projection.
    """

    tower: ViT

    def setup(self) -> None:
        nn.share_scope(self, self.tower)

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        *,
        size: Size | tuple[int, int] | None = None,
        masked: jax.Array | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """Encodes a batch.

        Args:
          size: the sub-network, also as a pair (width, depth); None is all of it.
          masked: as of :class:`vlpjax.models.vit.ViT`.

        Returns:
          the tower's outputs at its whole width; of a sub-network the features beyond its own are 0.

        Raises:
          UserError: a tower of a form that has no sub-networks.
        """
        self._check()
        if size is None or self.is_initializing():
            outputs: dict[str, Any] = self.tower(images, masked=masked, train=train)
            return outputs
        size = Size(*size)
        params = shrink(self.tower.variables["params"], self.tower, size)
        rngs = {"dropout": self.make_rng("dropout")} if train and self.has_rng("dropout") else {}
        with nn.intercept_methods(_norms_of_width(size.width, self.tower.width)):
            small: Any = self.tower.clone(parent=None, name=None).apply(
                {"params": params}, images, masked=masked, train=train, rngs=rngs
            )
        return dict(small)

    def _check(self) -> None:
        tower = self.tower
        if tower.scan or tower.norm != "layer" or tower.qk_norm is not None:
            raise UserError("An elastic ViT has LayerNorms, no qk_norm and blocks that are not scanned.")
        if tower.stem != "linear" or tower.pooler:
            raise UserError(
                "An elastic ViT has a linear stem and no pooler, whose parameters have no sub-networks."
            )
        if tower.embedding is not None or tower.pool == "map" or tower.positions not in ("learned", "none"):
            raise UserError(
                "An elastic ViT has learned positions or none, is pooled by 'cls', 'mean' or 'none', and has no "
                "projection."
            )


def kept_blocks(depth: int, whole: int) -> tuple[int, ...]:
    """The blocks of a sub-network of this depth: evenly spread, the first and the last among them."""
    return tuple(int(place) for place in np.floor(np.linspace(0, whole - 1, depth)))


def shrink(params: Mapping[str, Any], tower: ViT, size: Size) -> Any:
    """A ViT's parameters with which it computes what the sub-network does, at the shapes of the whole.

    Everything beyond the width is 0, kernels make up for the missing inputs by ``whole width / width``, and the blocks
    that are left out add nothing.
    """
    kept = np.zeros((tower.depth + 1, tower.depth), np.float32)
    for depth in range(1, tower.depth + 1):
        kept[depth, list(kept_blocks(depth, tower.depth))] = 1
    blocks = jnp.asarray(kept)[size.depth]
    share = jnp.asarray(size.width, jnp.float32) / tower.width

    def change(name: str, value: jax.Array) -> jax.Array:
        inputs, outputs = _axes(name, value.ndim)
        for axis in (*inputs, *outputs):
            length = value.shape[axis]
            present = jnp.arange(length) < jnp.round(share * length)
            value = value * present.reshape([-1 if axis == other else 1 for other in range(value.ndim)])
        if inputs:
            value = value / share
        block = _block(name)
        if block is not None and any(end in name for end in _BRANCH_ENDS):
            value = value * blocks[block]
        return value

    return map_with_names(change, params)


def extract(params: Mapping[str, Any], tower: ViT, width: int, depth: int) -> tuple[dict[str, Any], ViT]:
    """Cuts a sub-network out: its parameters, which are an ordinary ViT's, and that ViT.

    The factor that made up for missing inputs is part of the kernels.

    Args:
      params: of the whole tower.
      tower: the whole tower.

    Raises:
      UserError: a width that is no number of whole heads, or a size that the tower does not have.
    """
    head = tower.width // tower.heads
    if width % head or not 0 < width <= tower.width or not 0 < depth <= tower.depth:
        raise UserError(
            f"A sub-network of width {width} and depth {depth} cannot be cut out of width {tower.width} and depth "
            f"{tower.depth}; widths are multiples of {head}, the width of a head."
        )
    kept = kept_blocks(depth, tower.depth)

    def cut(name: str, value: Any) -> Any:
        inputs, outputs = _axes(name, value.ndim)
        for axis in (*inputs, *outputs):
            value = jnp.take(value, jnp.arange(value.shape[axis] * width // tower.width), axis=axis)
        return value * (tower.width / width) if inputs else value

    small = map_with_names(cut, params)
    renamed = {name: value for name, value in small.items() if _block(name) is None}
    renamed |= {f"block_{place}": small[f"block_{block}"] for place, block in enumerate(kept)}
    fields: dict[str, Any] = {"width": width, "depth": depth, "heads": width // head}
    if tower.mlp_dim is not None:
        fields["mlp_dim"] = tower.mlp_dim * width // tower.width
    return renamed, tower.clone(parent=None, name=None, **fields)


def _axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of a parameter that are as long as its inputs' and outputs' width, or as their number of heads."""
    for end, inputs, outputs in _AXES:
        if name.endswith(end):
            return inputs, outputs
    # Everything else (patches, positions, learned tokens, norms, scales, biases) has features last.
    return (), (ndim - 1,)


def _block(name: str) -> int | None:
    """The number of the block that a parameter belongs to."""
    first = name.partition("/")[0]
    return int(first.removeprefix("block_")) if first.startswith("block_") else None


def _norms_of_width(width: Int[Array, ""] | int, whole: int) -> Any:
    """An interceptor under which LayerNorms take mean and variance over the first ``width`` features."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, nn.LayerNorm) or context.method_name != "__call__":
            return call(*args, **kwargs)
        norm, x = context.module, args[0].astype(jnp.float32)
        present = jnp.arange(whole) < width
        mean = jnp.sum(x, axis=-1, keepdims=True) / width  # beyond the width there are zeros
        variance = jnp.sum(jnp.where(present, jnp.square(x - mean), 0.0), axis=-1, keepdims=True) / width
        scale: Any = norm.get_variable("params", "scale")
        bias: Any = norm.get_variable("params", "bias")
        normed = (x - mean) * jax.lax.rsqrt(variance + norm.epsilon) * scale + bias
        # At the whole width, exactly what the network does without a size.
        normed = normed.astype(args[0].dtype if norm.dtype is None else norm.dtype)
        return jnp.where(jnp.asarray(width) == whole, call(*args, **kwargs), normed)

    return intercept

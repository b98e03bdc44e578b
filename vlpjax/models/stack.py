"""A stack of equal blocks: unrolled or scanned, rematerialised or not, with what was asked for from each layer.

Every tower (images, text, decoder) is embeddings, one stack and a head; depth, scanning, rematerialisation,
stochastic depth, key-value caches and the reading out of layers are dealt with here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.mesh import constrain
from vlpjax.models.layers import CrossKeyValues, KeyValues, Mixed

# Intermediate results of a block that have names, in the order that they are made in.  Of attention, what its backward
# pass needs beside query, key and value is there where a kernel with a backward pass of its own takes it.
NAMED = (
    "kernel",  # parameters, cast and gathered: saved, they are gathered once per step and not twice
    "query",  # after norm and rotation, as key
    "key",
    "value",
    "exchanged",  # these three where sequence ranks trade tokens for heads: saved, they are traded once
    "attention_out",
    "attention_lse",
    "residual",  # between attention and MLP
    "mlp_gate",
    "mlp_up",
)

# What the backward pass finds saved; everything else it computes again.
REMAT: dict[str, Any] = {
    "none": None,  # save everything
    "full": jax.checkpoint_policies.nothing_saveable,  # save the blocks' inputs only
    "dots": jax.checkpoint_policies.dots_saveable,  # save every matrix product
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # save products with weights
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "tensors": jax.checkpoint_policies.save_only_these_names(*NAMED[1:]),  # all of NAMED but the kernels
}


def remat_policy(text: str) -> Any:
    """What the backward pass finds saved: a key of :data:`REMAT`, or names of :data:`NAMED`.

    Args:
      text: such as ``"full"``; or ``"save:attention_out,attention_lse"``; or, with what waits in the memory of the
        host, ``"save:attention_out,attention_lse;offload:query,key"``.

    Raises:
      UserError: an unknown word, with those that there are.
    """
    if text in REMAT:
        return REMAT[text]
    chosen: dict[str, tuple[str, ...]] = {"save": (), "offload": ()}
    for part in text.split(";"):
        where, colon, names = part.partition(":")
        if not colon or where not in chosen:
            raise UserError(
                f"remat is {text!r}; there are {', '.join(map(repr, REMAT))}, and 'save:' or 'offload:' with names."
            )
        chosen[where] += tuple(names.split(","))
    for name in (*chosen["save"], *chosen["offload"]):
        if name not in NAMED:
            raise UserError(f"remat {text!r} names {name!r}; blocks name {', '.join(NAMED)}.")
    if not chosen["offload"]:
        return jax.checkpoint_policies.save_only_these_names(*chosen["save"])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(chosen["save"]),
        names_which_can_be_offloaded=list(chosen["offload"]),
        offload_src="device",
        offload_dst="pinned_host",
    )


class Stacked(NamedTuple):
    """What a stack returns.

    Attributes:
      tokens: after the last block.
      hidden: per layer that was asked for, the tokens after it; layer -1 is the last block, 0 the first.
      weights: per layer that was asked for, its attention weights.
      cache: all layers' keys and values, if there was a cache.
    """

    tokens: Float[Array, "batch tokens width"]
    hidden: dict[int, Float[Array, "batch tokens width"]]
    weights: dict[int, Float[Array, "batch heads tokens keys"]]
    cache: KeyValues | CrossKeyValues | None


@dataclass(frozen=True)
class Stack:
    """``depth`` blocks, one after the other.  Not a module: blocks become children of the module that calls it.

    Attributes:
      block: makes a block (``functools.partial(Block, heads=..., ...)``); called with a name.
      depth: number of blocks.
      scan: one block's program, run ``depth`` times over stacked parameters ``blocks/...`` whose first axis is the
        layer: compile time does not grow with depth.  Otherwise parameters are ``block_0/...``, ``block_1/...``.
      remat: as :func:`remat_policy` takes it.
      drop_path: stochastic depth of the last block; the rate grows linearly from 0 at the first (arXiv 1603.09382).
      axes: logical axes of the tokens between blocks.
    """

    block: Callable[..., nn.Module]
    depth: int
    scan: bool = False
    remat: str = "none"
    drop_path: float = 0.0
    axes: tuple[str | None, ...] = ("frames", None, "activation")

    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        *context: Any,
        cache: KeyValues | CrossKeyValues | None = None,
        hidden: Sequence[int] = (),
        weights: Sequence[int] = (),
        kinds: Sequence[int] = (),
        varied: Mapping[str, Sequence[Any]] | None = None,
        train: bool = False,
        **shared: Any,
    ) -> Stacked:
        """Runs all blocks.

        Args:
          context: further positional arguments of every block, such as its interval.
          cache: keys and values of all layers, layer first.
          hidden, weights: layers to read out tokens and attention weights of; negative ones count from the end.
          kinds: the kind of every layer, as an index into the values of ``varied``; needed with ``varied`` only.
          varied: keyword arguments of the blocks that differ from kind to kind, one value per kind: a window for
            local layers and none for global ones.  Blocks of all kinds have the same parameters, so a scan picks
            each layer's values as it goes; any sequence of kinds can be scanned, periodic or not.
          shared: further keyword arguments of every block, the same for all.

        Raises:
          UserError: an unknown ``remat``, or a layer that there is not.
        """
        policy = remat_policy(self.remat)
        for layer in (*hidden, *weights):
            if not -self.depth <= layer < self.depth:
                raise UserError(
                    f"Layer {layer} was asked for, but the tower has layers 0 to {self.depth - 1}."
                )
        varied = dict(varied or {})
        rates = [self.drop_path * index / max(self.depth - 1, 1) for index in range(self.depth)]

        def pick(kind: jax.Array) -> dict[str, Any]:
            """The arguments of a layer of this kind, where the kind is not known before the program runs."""
            alike = {name: jax.tree.map(lambda *x: jnp.stack(x), *values) for name, values in varied.items()}
            return {name: jax.tree.map(lambda leaf: leaf[kind], values) for name, values in alike.items()}

        def run(
            block: nn.Module, tokens: jax.Array, layer: tuple[KeyValues | CrossKeyValues | None, Any, Any]
        ) -> tuple[jax.Array, Mixed]:
            slots, rate, own = layer
            options: dict[str, Any] = dict(own if isinstance(own, dict) else pick(own))
            if slots is not None:
                options["cache"] = slots
            if self.drop_path:
                options["drop_path"] = rate
            if weights:
                options["weights"] = True
            tokens = constrain(tokens, *self.axes)
            mixed = block(tokens, *context, **shared, **options, train=train)
            return mixed.tokens, mixed._replace(tokens=mixed.tokens if hidden else None)

        if self.remat != "none":
            # Inside a scan nothing can be merged with the forward pass anyway.
            run = nn.remat(run, policy=policy, prevent_cse=not self.scan)
        if self.scan and self.depth:
            chosen: Any = jnp.asarray(kinds, jnp.int32) if varied else {}
            tokens, stacked = nn.scan(
                run,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(self.block(name="blocks"), tokens, (cache, jnp.asarray(rates), chosen))
            layers = [jax.tree.map(lambda leaf, i=index: leaf[i], stacked) for index in range(self.depth)]
            written = stacked.cache
        else:
            layers = []
            for index, rate in enumerate(rates):
                slots = None if cache is None else jax.tree.map(lambda leaf, i=index: leaf[i], cache)
                own = {name: values[kinds[index]] for name, values in varied.items()}
                tokens, mixed = run(self.block(name=f"block_{index}"), tokens, (slots, rate, own))
                layers.append(mixed)
            written = None
            if cache is not None:
                written = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(mixed.cache for mixed in layers))
        return Stacked(
            tokens,
            {layer: layers[layer].tokens for layer in hidden},
            {layer: layers[layer].weights for layer in weights},
            written,
        )

"""A family of its own for the tests of the exchange itself: every kind of rule in a module that compiles at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.layers import Block, named, norm
from vlpjax.models.patches import PatchEmbedding
from vlpjax.models.stack import Stack
from vlpjax.models.towers import Towers
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under


class Small(nn.Module):
    """Patches, blocks, a norm; with ``head`` a projection that is not tied to anything."""

    patch: int = 2
    width: int = 16
    heads: int = 2
    depth: int = 2
    kv_heads: int | None = None
    scan: bool = False
    head: int | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        tokens = PatchEmbedding(self.patch, self.width, bias=True, name="patches")(images)
        initial = named(nn.initializers.normal(), None, "position", "embed")
        tokens = tokens + self.param("position_embedding", initial, (1, *tokens.shape[1:]))
        kv_heads = None if self.kv_heads == self.heads else self.kv_heads
        block = functools.partial(
            Block, heads=self.heads, mlp_dim=2 * self.width, depth=self.depth, kv_heads=kv_heads
        )
        tokens = Stack(block, self.depth, scan=self.scan)(tokens).tokens
        tokens = norm("final_norm")(tokens)
        if self.head is not None:
            kernel = named(nn.initializers.normal(), "embed", None)
            tokens = tokens @ self.param("head", kernel, (self.width, self.head))
        return {"tokens": tokens, "pooled": jnp.mean(tokens, axis=1)}


BLOCK = (
    *(
        rule
        for name, short in (("query", "q"), ("key", "k"), ("value", "v"))
        for rule in (
            Rule(f"attention/{name}/kernel", f"attn.{short}.weight", "(h d) i -> i h d"),
            Rule(f"attention/{name}/bias", f"attn.{short}.bias", "(h d) -> h d"),
        )
    ),
    Rule("attention/out/kernel", "attn.out.weight", "o (h d) -> h d o"),
    Rule("attention/out/bias", "attn.out.bias"),
    Rule("mlp/up/kernel", "mlp.up.weight", "o i -> i o"),
    Rule("mlp/up/bias", "mlp.up.bias"),
    Rule("mlp/down/kernel", "mlp.down.weight", "o i -> i o"),
    Rule("mlp/down/bias", "mlp.down.bias"),
    *(
        Rule(f"{name}_norm/{ours}", f"{name}_norm.{theirs}")
        for name in ("attention", "mlp")
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    ),
)
FUSED = (
    Rule(
        tuple(f"attention/{name}/kernel" for name in ("query", "key", "value")),
        "attn.qkv.weight",
        "(n h d) i -> n i h d",
    ),
    Rule(
        tuple(f"attention/{name}/bias" for name in ("query", "key", "value")),
        "attn.qkv.bias",
        "(n h d) -> n h d",
    ),
    *BLOCK[6:],
)
OUTER = (
    Rule("patches/projection/kernel", "patch.weight", "o c p q -> (p q c) o"),
    Rule("patches/projection/bias", "patch.bias"),
    Rule("position_embedding", "positions", "n d -> 1 n d"),
    Rule("final_norm/scale", "norm.weight"),
    Rule("final_norm/bias", "norm.bias"),
    Rule("head", "head.weight", "o i -> i o"),
)
FIELDS = ("width", "heads", "depth", "kv_heads", "scan", "head")


def build(config: dict[str, Any]) -> Small:
    """The inverse of :func:`describe`."""
    if config.get("activation", "gelu") != "gelu":
        raise UserError(f"activation is {config['activation']!r}; Small has 'gelu'.")
    fields = {name: config[name] for name in FIELDS if name in config}
    return Small(patch=config["patch_size"], **fields)


def describe(model: nn.Module) -> dict[str, Any]:
    """The fields of a config."""
    if not isinstance(model, Small):
        raise UserError(f"a {type(model).__name__} is not Small.")
    return {"patch_size": model.patch, **{name: getattr(model, name) for name in FIELDS}}


def example(model: Any) -> Any:
    """Images of 4 x 6 patches."""
    return (jax.ShapeDtypeStruct((1, 4 * model.patch, 6 * model.patch, 3), jnp.float32),)


SMALL = Family(
    name="small",
    model_types=("small",),
    architecture="SmallModel",
    build=build,
    describe=describe,
    rules=(*OUTER, *under("block_{n}/", "layers.{n}.", BLOCK)),
    example=example,
    ignored=(r".*\.inv_freq",),
    tied=(("tied.weight", "patch.bias"),),
    prefixes=("", "model."),
)
FUSED_SMALL = Family(
    name="small_fused",
    model_types=("small_fused",),
    architecture="SmallFusedModel",
    build=build,
    describe=describe,
    rules=(*OUTER, *under("block_{n}/", "layers.{n}.", FUSED)),
    example=example,
)
TWO = Family(
    name="two",
    model_types=("two",),
    architecture="TwoModel",
    build=lambda config: Towers.of({"left": build(config["left"]), "right": build(config["right"])}),
    describe=lambda model: (
        {name: describe(model.makers[name]()) for name in model.makers}
        if isinstance(model, Towers)
        else describe(model)
    ),
    rules=(*under("left/", "l.", SMALL.rules), *under("right/", "r.", FUSED_SMALL.rules)),
    example=lambda model: {name: example(model.makers[name]()) for name in model.makers},
    sizes=lambda config: {"p": 2, "q": 2, "c": 3},
)

"""Layers by parameter name: which layer a parameter belongs to, and learning rates that fall towards the input.

Blocks stand apart (``image/block_3/...``) or are stacked (``image/blocks/...``, layer first); everything here holds
for both alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vlpjax.errors import UserError
from vlpjax.rules import match_rules, tree_names

# (expression after the tower's name, what the parameter is), first match wins.  There is deliberately no last rule
# for everything: a parameter of an unknown kind of tower is an error, and not a layer too early or too late.
LAYERS = (
    (r"(block|convolution|norm)_\d+(_[a-z]+)*/.*|blocks/.*", "block"),
    (r"(patches|token_embedding|type_embedding|embedding_norm|pre_norm|stem(_[a-z]+)?)(/.*)?", "first"),
    (r"((image|text)_)?(position_embedding|class_token)|registers|mask_token", "first"),
    (r"(final_norm|early_norm|pool_norm|pool|pool_head|pooler|standard|top|head)(/.*)?|kernel", "last"),
    (r"((image|text)_)?(early_)?projection/.*", "last"),
)
WHERE = ("first", "block", "last")
_NUMBER = re.compile(r"[a-z]+_(\d+)(_[a-z]+)*/.*")


@dataclass(frozen=True)
class LayerDecay:
    """Learning rates that are multiplied by ``factor`` for every layer from the end to the input.

    A tower of L blocks has L + 2 layers: embeddings, positions and class tokens are layer 0, block i is layer i + 1,
    final norms and projections are layer L + 1.  Layer j learns at ``factor ** (L + 1 - j)`` of the rate ("BEiT",
    arXiv 2106.08254; "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, appendix A.1).  Weight
    decay is multiplied by the rate and so falls alike.  Other modules, heads of objectives among them, learn at the
    whole rate.

    Attributes:
      factor: 1 changes nothing; 0.65 to 0.75 is usual when a ViT-B is fine-tuned.
      towers: names of the towers whose layers count.
      rules: (expression, one of :data:`WHERE`) on the parameter names within a tower, first match wins; a
        parameter without a rule is an error.  The number of a block is the first in its name.
    """

    factor: float
    towers: tuple[str, ...] = ("image",)
    rules: tuple[tuple[str, str], ...] = LAYERS

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise UserError(f"LayerDecay.factor is {self.factor}; it is above 0 and at most 1.")
        for pattern, where in self.rules:
            if where not in WHERE:
                raise UserError(
                    f"LayerDecay.rules has {where!r} for {pattern!r}; there are {', '.join(WHERE)}."
                )

    def layers(self, params: Mapping[str, Any], tower: str) -> tuple[dict[str, np.ndarray], int]:
        """Per parameter of a tower its layer (an array of one per block where blocks are stacked), and the last one.

        Raises:
          UserError: no such tower, a parameter that no rule takes, or a block without a number.
        """
        if tower not in params:
            raise UserError(f"LayerDecay.towers names {tower!r}; there are {', '.join(map(repr, params))}.")
        names = [f"{tower}/{name}" for name in tree_names(params[tower])]
        leaves = dict(zip(names, jax.tree.leaves(params[tower]), strict=True))
        inner = {name: name.removeprefix(f"{tower}/").removeprefix("tower/") for name in names}
        where = match_rules(self.rules, inner.values(), f"LayerDecay.rules of {tower!r}", strict=False)
        blocks = {
            name: _blocks(name, inner[name], leaves[name]) for name in names if where[inner[name]] == "block"
        }
        depth = 1 + max((int(np.max(numbers)) for numbers in blocks.values()), default=-1)
        ends = {"first": np.asarray(0), "last": np.asarray(depth + 1)}
        return {
            name: blocks[name] + 1 if name in blocks else ends[where[inner[name]]] for name in names
        }, depth + 1

    def factors(self, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Per parameter name its factor, of a shape that multiplies the parameter; 1 outside the towers."""
        named = zip(tree_names(params), jax.tree.leaves(params), strict=True)
        ranks = {name: leaf.ndim for name, leaf in named}
        found = {name: np.ones((), np.float32) for name in ranks}
        for tower in self.towers:
            layers, last = self.layers(params, tower)
            for name, layer in layers.items():
                factor = np.asarray(self.factor ** (last - layer), np.float32)
                found[name] = (
                    factor.reshape(factor.shape + (1,) * (ranks[name] - 1)) if layer.ndim else factor
                )
        return found


def layer_axes(name: str) -> int:
    """How many leading axes of a parameter number layers: scanned blocks have one."""
    return int("/blocks/" in f"/{name}")


def _blocks(name: str, inner: str, leaf: Any) -> np.ndarray:
    """The number of a parameter's block, or those of all blocks where they are stacked."""
    if layer_axes(inner):
        return np.arange(leaf.shape[0])
    number = _NUMBER.fullmatch(inner)
    if number is None:
        raise UserError(f"LayerDecay.rules calls {name} a block's, but its name has no number.")
    return np.asarray(int(number[1]))

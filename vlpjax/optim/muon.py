"""Muon: matrices move along orthogonalised momentum, everything else by Adam, as one optax direction.

Momentum of a matrix is replaced by the nearest (semi-)orthogonal matrix, found by Newton-Schulz iterations
(optax.contrib), so that every direction of its row and column spaces moves equally far.  Which parameters are
matrices, and how a kernel with more than two dimensions is read as one, is said by name.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from optax import contrib

from vlpjax.errors import UserError
from vlpjax.optim.layers import layer_axes
from vlpjax.rules import map_with_names, match_rules, tree_names

# Kernels of attention keep heads apart: query, key and value are [in, heads, head_dim], the output projection
# is [heads, head_dim, out].  The number is how many leading dimensions are inputs; 0 leaves it to Adam.  The first
# layer of a stack of convolutions, which sees colours, is left to Adam, as embeddings are.
KERNELS = (
    (r".*/(cross_)?attention/out/kernel", 2),
    (r".*/(block_\d+|blocks|pool_head)/.*kernel", 1),
    (r".*/convolution_[1-9]\d*/kernel", 3),
    (r"[^/]+/projection/kernel/kernel", 1),
    (r".*", 0),
)


def muon(
    matrices: tuple[tuple[str, int], ...] = KERNELS,
    rate: float = 10.0,
    beta: float = 0.95,
    steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """A direction for :class:`vlpjax.optim.optimizer.Optimizer`.

    Args:
      matrices: (expression, number of leading dimensions that are inputs) per parameter name, first match
        wins; the dimensions after them are outputs; 0 is for Adam.  The layer axis of scanned blocks
        (``.../blocks/...``) comes before both and is not counted: each layer is a matrix of its own.
      rate: learning rate of matrices as a multiple of Adam's.  A matrix moves by ``rate * learning_rate *
        sqrt(max(1, outputs / inputs))`` in spectral norm.
      beta: momentum of matrices (Nesterov).
      steps: Newton-Schulz iterations.
      b1, b2, eps: Adam's, for the rest.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); "Muon is Scalable for
    LLM Training", arXiv 2502.16982.
    """

    def inputs(tree: Any) -> dict[str, int]:
        counts = match_rules(matrices, tree_names(tree), "muon.matrices", strict=False)
        for name, leaf in zip(tree_names(tree), jax.tree.leaves(tree), strict=True):
            if counts[name] and not 0 < counts[name] < len(leaf.shape) - layer_axes(name):
                raise UserError(
                    f"muon.matrices reads {name} with {counts[name]} input dimensions, but its shape is {leaf.shape}; "
                    "inputs and outputs each need at least one."
                )
        return counts

    def labels(tree: Any) -> Any:
        counts = inputs(tree)
        return map_with_names(lambda name, _: "matrix" if counts[name] else "other", tree)

    def dimensions(tree: Any) -> Any:
        counts = inputs(tree)

        def axes(name: str, leaf: jax.Array) -> contrib.MuonDimensionNumbers:
            first = layer_axes(name)
            middle = first + counts[name]
            return contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))

        return map_with_names(axes, tree)

    def scale(updates: Any) -> Any:
        counts = inputs(updates)

        def wide(name: str, update: jax.Array) -> jax.Array:
            shape = update.shape[layer_axes(name) :]
            rows, columns = math.prod(shape[: counts[name]]), math.prod(shape[counts[name] :])
            return rate * math.sqrt(max(1.0, columns / rows)) * update

        return map_with_names(wide, updates)

    orthogonal = contrib.scale_by_muon(ns_steps=steps, beta=beta, weight_dimension_numbers=dimensions)
    matrix = optax.chain(orthogonal, optax.stateless(lambda updates, params: scale(updates)))
    return optax.multi_transform({"matrix": matrix, "other": optax.scale_by_adam(b1, b2, eps)}, labels)

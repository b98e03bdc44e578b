"""The parts that transformers are made of: projections with named axes, attention, MLP, pre-norm block.

Every parameter carries the logical names of its axes, which :mod:`vlpjax.mesh` places on a mesh.  Kernels
are initialised as in CLIP (arXiv 2103.00020): normal, with the branches that write into the residual stream
scaled down by the square root of twice the depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.parallel.attention import Interval, attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # the OpenAI weights' GELU, arXiv 2103.00020
    "silu": nn.silu,
    "relu": nn.relu,
    "squared_relu": lambda x: jnp.square(nn.relu(x)),  # "Primer", arXiv 2109.08668
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation function of this name; an unknown name is an error that lists the known ones."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation is {name!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


class NamedParameter(nn.LogicallyPartitioned):
    """A parameter with the logical names of its axes, and how it was initialised (for tables)."""

    initializer: str = struct.field(default="", pytree_node=False)


def named(initializer: Callable[..., Any], *axes: str | None) -> Callable[..., Any]:
    """An initializer whose parameter carries these logical axis names."""
    label = _label(initializer)

    def make(*args: Any, **kwargs: Any) -> NamedParameter:
        return NamedParameter(initializer(*args, **kwargs), axes, initializer=label)

    return make


def _label(initializer: Callable[..., Any]) -> str:
    """``"normal(stddev=0.02)"``: the factory's name, and the numbers and words that it was given."""
    settings = inspect.getclosurevars(initializer).nonlocals
    shown = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in settings.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and "axis" not in name
    ]
    name = initializer.__qualname__.partition(".")[0]
    return f"{name}({', '.join(shown)})" if shown else name


def dense(
    features: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    stddev: float,
    name: str,
    inputs: int = 1,
    bias: bool = True,
    dtype: Any = None,
) -> nn.DenseGeneral:
    """A projection of the last ``inputs`` dimensions whose kernel carries ``axes``, and its bias the output's."""
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=bias,
        dtype=dtype,
        kernel_init=named(nn.initializers.normal(stddev), *axes),
        bias_init=named(nn.initializers.zeros, *axes[inputs:]),
        name=name,
    )


def norm(name: str, kind: str = "layer", dtype: Any = None, epsilon: float = 1e-6) -> nn.Module:
    """LayerNorm or RMSNorm over features: statistics in float32, replicated parameters.

    Args:
      kind: ``"layer"``, or ``"rms"`` ("Root Mean Square Layer Normalization", arXiv 1910.07467: no mean, no bias).
    """
    scale = named(nn.initializers.ones, "activation")
    if kind == "layer":
        bias = named(nn.initializers.zeros, "activation")
        return nn.LayerNorm(epsilon=epsilon, dtype=dtype, scale_init=scale, bias_init=bias, name=name)
    if kind == "rms":
        return nn.RMSNorm(epsilon=epsilon, dtype=dtype, scale_init=scale, name=name)
    raise UserError(f"norm is {kind!r}; there are 'layer' and 'rms'.")


class Attention(nn.Module):
    """Multi-head attention of ``tokens`` to themselves, or to ``memory``.

    Attributes:
      heads: number of heads; must divide the width.
      depth: blocks in the tower, for the scale of the output projection's initial values.
      dtype: compute type; parameters are float32.
    """

    heads: int
    depth: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        interval: Interval | None = None,
        memory: Float[Array, "batch memory width"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        width = tokens.shape[-1]
        if width % self.heads:
            raise UserError(f"width {width} is not a multiple of heads={self.heads}.")
        memory = tokens if memory is None else memory
        head = (self.heads, width // self.heads)

        def project(name: str, x: jax.Array) -> jax.Array:
            axes = ("embed", "heads", "head_dim")
            return dense(head, axes, stddev=width**-0.5, name=name, dtype=self.dtype)(x)  # [B, N, H, D]

        mixed = attention(
            project("query", tokens), project("key", memory), project("value", memory), interval
        )
        scale = (2 * width * self.depth) ** -0.5
        axes = ("heads", "head_dim", "embed")
        return dense(width, axes, stddev=scale, name="out", inputs=2, dtype=self.dtype)(mixed)


class Mlp(nn.Module):
    """Two projections with an activation between, applied per token."""

    hidden: int
    depth: int = 1
    activation: str = "gelu"
    dtype: Any = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        width = tokens.shape[-1]
        up = dense(self.hidden, ("embed", "mlp"), stddev=(2 * width) ** -0.5, name="up", dtype=self.dtype)
        scale = (2 * width * self.depth) ** -0.5
        down = dense(width, ("mlp", "embed"), stddev=scale, name="down", dtype=self.dtype)
        return down(activation(self.activation)(up(tokens)))


class Block(nn.Module):
    """A pre-norm transformer block: tokens + attention(norm(tokens)), then the same with the MLP.

    Attributes:
      heads: attention heads.
      mlp_dim: hidden width of the MLP.
      depth: blocks in the tower, for initial values.
      activation: the MLP's, a key of :data:`ACTIVATIONS`.
      dropout: share of each branch's output that is zeroed in training.
      norm: ``"layer"`` or ``"rms"``, and its ``epsilon``.
      dtype: compute type.
    """

    heads: int
    mlp_dim: int
    depth: int
    activation: str = "gelu"
    dropout: float = 0.0
    norm: str = "layer"
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        interval: Interval | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        normed = norm("attention_norm", self.norm, self.dtype, self.epsilon)(tokens)
        tokens = tokens + drop(
            Attention(self.heads, self.depth, self.dtype, name="attention")(normed, interval)
        )
        normed = norm("mlp_norm", self.norm, self.dtype, self.epsilon)(tokens)
        return tokens + drop(Mlp(self.mlp_dim, self.depth, self.activation, self.dtype, name="mlp")(normed))

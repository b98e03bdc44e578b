"""EfficientNet-lite: inverted residuals of depthwise convolutions, the convolutional image tower of small machines.

Against EfficientNet ("EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv 1905.11946),
its lite variants have no squeeze-and-excitation, ReLU6 in place of Swish, and a stem and a top that do not grow.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.models.heads import Projection
from vlpjax.models.layers import dense, named

# Stages of lite0: (blocks, side of the kernel, stride of the first block, expansion, channels); table 1 of the paper.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, TOP = 32, 1280  # channels before and after the stages, whatever the size
MULTIPLE = 8  # channels are rounded to a multiple of it

# Lite variants: factor of channels, factor of blocks, published image side in pixels.
SIZES = {0: (1.0, 1.0, 224), 1: (1.0, 1.1, 240), 2: (1.1, 1.2, 260), 3: (1.2, 1.4, 280), 4: (1.4, 1.8, 300)}


def scaled_channels(channels: int, factor: float) -> int:
    """Channels times a factor, as the nearest multiple of 8 that takes no more than a tenth away."""
    wanted = channels * factor
    rounded = max(MULTIPLE, int(wanted + MULTIPLE / 2) // MULTIPLE * MULTIPLE)
    return rounded + MULTIPLE if rounded < 0.9 * wanted else rounded


def scaled_stages(width: float, depth: float) -> tuple[tuple[int, int, int, int, int], ...]:
    """:data:`STAGES` with scaled channels, and with scaled numbers of blocks in all but the first and last stage."""
    last = len(STAGES) - 1
    return tuple(
        (
            count if place in (0, last) else math.ceil(count * depth),
            side,
            stride,
            expand,
            scaled_channels(out, width),
        )
        for place, (count, side, stride, expand, out) in enumerate(STAGES)
    )


def grouped_depthwise(
    grid: Float[Array, "batch height width channels"], kernel: Float[Array, "side side channels"], stride: int
) -> Float[Array, "batch rows columns channels"]:
    """A depthwise convolution with TensorFlow's "SAME" padding, as a convolution of as many groups as channels."""
    return jax.lax.conv_general_dilated(
        grid,
        kernel[:, :, None],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=grid.shape[-1],
    )


def shifted_depthwise(
    grid: Float[Array, "batch height width channels"], kernel: Float[Array, "side side channels"], stride: int
) -> Float[Array, "batch rows columns channels"]:
    """The same as a sum over the kernel's places of shifted, weighted grids, which XLA fuses into one loop."""
    side = kernel.shape[0]
    sizes = grid.shape[1:3]
    rows, columns = (-(-size // stride) for size in sizes)
    lacking = [
        max((out - 1) * stride + side - size, 0) for out, size in zip((rows, columns), sizes, strict=True)
    ]
    grid = jnp.pad(grid, ((0, 0), *((missing // 2, missing - missing // 2) for missing in lacking), (0, 0)))
    down, right = (rows - 1) * stride + 1, (columns - 1) * stride + 1
    return sum(
        (
            grid[:, row : row + down : stride, column : column + right : stride] * kernel[row, column]
            for row in range(side)
            for column in range(side)
        ),
        jnp.zeros((), grid.dtype),
    )


def depthwise(
    grid: Float[Array, "batch height width channels"], kernel: Float[Array, "side side channels"], stride: int
) -> Float[Array, "batch rows columns channels"]:
    """The faster form for the machine: on CPUs XLA's grouped convolution takes 8 to 30 times as long as the sum."""
    return jax.lax.platform_dependent(
        grid,
        kernel,
        cpu=lambda grid, kernel: shifted_depthwise(grid, kernel, stride),
        default=lambda grid, kernel: grouped_depthwise(grid, kernel, stride),
    )


class Unit(nn.Module):
    """One convolution without bias, BatchNorm and, unless it ends a branch, ReLU6.

    Attributes:
      kind: ``"full"``; ``"point"``, a 1x1 convolution; or ``"depthwise"``.
      features: output channels; a depthwise convolution keeps its input's.
      side, stride: of the kernel.
      active: whether ReLU6 follows.
      epsilon: of the norm.
      dtype: compute type.
    """

    kind: str
    features: int = 0
    side: int = 1
    stride: int = 1
    active: bool = True
    epsilon: float = 1e-3
    dtype: Any = None

    @nn.compact
    def __call__(
        self, grid: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[Array, "batch rows columns features"]:
        channels = grid.shape[-1]
        dtype = self.dtype or jnp.float32
        grid = grid.astype(dtype)
        # Deviations by the fan-out of one position, as the reference has them.
        if self.kind == "depthwise":
            initial = named(nn.initializers.normal(math.sqrt(2) / self.side), None, None, "activation")
            kernel = self.param("kernel", initial, (self.side, self.side, channels))
            grid = depthwise(grid, kernel.astype(dtype), self.stride)
        elif self.kind == "point":
            initial = named(nn.initializers.normal(math.sqrt(2 / self.features)), None, "embed")
            grid = grid @ self.param("kernel", initial, (channels, self.features)).astype(dtype)
        else:
            deviation = math.sqrt(2 / self.features) / self.side
            initial = named(nn.initializers.normal(deviation), None, None, None, "embed")
            kernel = self.param("kernel", initial, (self.side, self.side, channels, self.features))
            grid = jax.lax.conv_general_dilated(
                grid,
                kernel.astype(dtype),
                (self.stride, self.stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        grid = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.99,
            epsilon=self.epsilon,
            dtype=self.dtype,
            scale_init=named(nn.initializers.ones, "activation"),
            bias_init=named(nn.initializers.zeros, "activation"),
            name="norm",
        )(grid)
        return jnp.clip(grid, 0, 6) if self.active else grid


class InvertedResidual(nn.Module):
    """Widen each position, look around per channel, narrow; added to its input where the shape stays.

    Source: "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv 1801.04381.

    Attributes:
      features: output channels.
      expand: hidden channels over input channels; with 1 nothing is widened.
      side, stride: of the depthwise kernel.
      drop_path: in training, the probability that an example skips the block (arXiv 1603.09382).
      epsilon, dtype: of :class:`Unit`.
    """

    features: int
    expand: int
    side: int
    stride: int
    drop_path: float = 0.0
    epsilon: float = 1e-3
    dtype: Any = None

    @nn.compact
    def __call__(
        self, grid: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> Float[Array, "batch rows columns features"]:
        common: dict[str, Any] = dict(epsilon=self.epsilon, dtype=self.dtype)
        branch = grid
        if self.expand != 1:
            wide = self.expand * grid.shape[-1]
            branch = Unit("point", wide, name="expand", **common)(branch, train=train)
        look = Unit("depthwise", side=self.side, stride=self.stride, name="depthwise", **common)
        branch = look(branch, train=train)
        branch = Unit("point", self.features, active=False, name="project", **common)(branch, train=train)
        if branch.shape != grid.shape:
            return branch
        return grid + nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)(branch)


class EfficientNetLite(nn.Module):
    """Images of any size to features.

    Attributes:
      width: factor of the stages' channels, and ``depth`` of their blocks: see :data:`SIZES`.
      channels: of an image.
      embedding: width of the joint space that ``"embedding"`` is projected into; None projects nothing.
      classes: of a linear classifier on the pooled features; None has no classifier.
      dropout: in training, share of the pooled features that is zeroed before either.
      drop_path: stochastic depth of the last block; the others' grows with their place.
      epsilon: of the norms.
      dtype: compute type; None is float32.
    """

    width: float = 1.0
    depth: float = 1.0
    channels: int = 3
    embedding: int | None = None
    classes: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    epsilon: float = 1e-3
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> dict[str, Float[Array, ...]]:
        """Encodes a batch of images; published weights take pixels as (value - 127) / 128 with values of 0 to 255.

        Returns:
          ``"tokens"`` [B, N, 1280], one per position of the last grid, a 32nd of the image's sides rounded up;
          ``"pooled"`` [B, 1280], their mean; ``"embedding"`` [B, E] (equal to ``"pooled"`` without a projection);
          with ``classes``, ``"logits"`` [B, classes].
        """
        common: dict[str, Any] = dict(epsilon=self.epsilon, dtype=self.dtype)
        grid = Unit("full", STEM, side=3, stride=2, name="stem", **common)(images, train=train)
        blocks = [
            (features, expand, side, stride if first else 1)
            for count, side, stride, expand, features in scaled_stages(self.width, self.depth)
            for first in [True] + [False] * (count - 1)
        ]
        for number, fields in enumerate(blocks):
            rate = self.drop_path * number / len(blocks)
            block = InvertedResidual(*fields, drop_path=rate, name=f"block_{number}", **common)
            grid = block(grid, train=train)
        grid = Unit("point", TOP, name="top", **common)(grid, train=train)
        tokens = grid.reshape(grid.shape[0], -1, grid.shape[-1])  # [B, N, D]
        pooled = jnp.mean(tokens, axis=1, dtype=jnp.float32).astype(tokens.dtype)
        embedding = features = nn.Dropout(self.dropout, deterministic=not train)(pooled)
        if self.embedding is not None:
            embedding = Projection(self.embedding, self.dtype, name="projection")(features)  # [B, E]
        outputs = {"tokens": tokens, "pooled": pooled, "embedding": embedding}
        if self.classes is not None:
            head = dense(self.classes, ("embed", None), stddev=0.01, name="head", dtype=self.dtype)
            outputs["logits"] = head(features)
        return outputs

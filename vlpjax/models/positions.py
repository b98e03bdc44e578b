"""Rotary positions: where a token stands, as an angle that its queries and keys are turned by.

:class:`Rotary` says which angles: its base, the share of features that turn, how a model that was trained on short
texts is stretched to longer ones, and which of three coordinates (time, row, column) each angle follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError


class Rotation(NamedTuple):
    """Cosines and sines per token, of half as many angles as features turn; in float32."""

    cos: Float[Array, "#batch tokens angles"]
    sin: Float[Array, "#batch tokens angles"]


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], rotation: Rotation
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns pairs of features by the rotation's angles; features beyond the pairs pass unchanged.

    Feature ``i`` is paired with feature ``i + angles`` (halves, not neighbours), which is the convention of GPT-NeoX
    and of Llama weights in the `transformers` layout.

    Source: "RoFormer", arXiv 2104.09864.
    """
    angles = rotation.cos.shape[-1]
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]  # [B, N, 1, A]
    if x.dtype == jnp.bfloat16:
        return _rotate_by_product(x, cos, sin)
    first, second, rest = jnp.split(x.astype(jnp.float32), (angles, 2 * angles), axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x.dtype)


def _rotate_by_product(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same for bfloat16, without halves of heads: TPUs keep 128 features in a register and do not cut them well.

    Partners change places in a product with a permutation, which is exact, and which the matrix unit has time for.
    """
    angles, rest = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    partner = np.arange(x.shape[-1])
    partner[: 2 * angles] = np.roll(partner[: 2 * angles], angles)
    permutation = jnp.asarray(np.eye(x.shape[-1])[partner], x.dtype)
    swapped = jnp.einsum("bnhd,ed->bnhe", x, permutation, preferred_element_type=jnp.float32)
    unturned = jnp.zeros((*cos.shape[:-1], rest), cos.dtype)
    own = jnp.concatenate([cos, cos, unturned + 1], axis=-1)
    others = jnp.concatenate([-sin, sin, unturned], axis=-1)
    return (x.astype(jnp.float32) * own + swapped * others).astype(x.dtype)


@dataclass(frozen=True)
class Linear:
    """Every position counts ``1 / factor``: "Extending Context Window of LLMs via Positional Interpolation",
    arXiv 2306.15595."""

    factor: float

    def stretch(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """The new frequencies, radians per position."""
        return frequencies / self.factor

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Llama3:
    """Slow angles are interpolated, fast ones stay, those between are blended ("The Llama 3 Herd of Models",
    arXiv 2407.21783, in the form of the released weights).

    Attributes:
      factor: of the interpolation.
      low, high: turns within ``length`` positions below which an angle is slow, and above which it is fast.
      length: in tokens, of the texts before the extension.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    length: int = 8192

    def stretch(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """The new frequencies, radians per position."""
        turns = self.length * frequencies / (2 * math.pi)
        fast = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequencies * (fast + (1 - fast) / self.factor)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0


@dataclass(frozen=True)
class Yarn:
    """Interpolation that grows with the index of the angle, and a temperature of the attention: "YaRN",
    arXiv 2309.00071.

    Attributes:
      factor: of the interpolation.
      length: in tokens, of the texts before the extension.
      fast, slow: turns within ``length`` positions at which the ramp begins and ends.
      attention_factor: of cosines and sines, thus its square of the logits; None is ``0.1 ln(factor) + 1``.
      rounded: whether the ramp begins and ends at whole angles.
    """

    factor: float
    length: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None
    rounded: bool = True

    def stretch(self, frequencies: np.ndarray, base: float) -> np.ndarray:
        """The new frequencies, radians per position."""
        count = len(frequencies)

        def index(turns: float) -> float:
            """Of the angle that turns this often within ``length`` positions."""
            return count * math.log(self.length / (turns * 2 * math.pi)) / math.log(base)

        first, last = index(self.fast), index(self.slow)
        if self.rounded:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * count - 1)
        ramp = np.clip((np.arange(count) - first) / max(last - first, 1e-3), 0.0, 1.0)
        return frequencies * (1 - ramp + ramp / self.factor)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class Rotary:
    """Which angles tokens turn by.

    Attributes:
      base: the slowest angle turns about once in ``2 pi base`` positions.
      fraction: share of each head's features that turn, the first ones.
      scaling: :class:`Linear`, :class:`Llama3` or :class:`Yarn`, for models that were extended to longer texts.
      sections: how many angles follow each of the three coordinates of a token, time, row and column ("M-RoPE",
        "Qwen2-VL", arXiv 2409.12191); empty for text alone.
      interleaved: deals the angles to the coordinates in turn (t, h, w, t, h, w, ...; what remains goes to time), as
        in "Qwen3-VL", arXiv 2511.21631, instead of one section after the other.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: Linear | Llama3 | Yarn | None = None
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each angle, float64 [angles].

        Raises:
          UserError: an odd number of turning features, or sections that do not fit.
        """
        turning = int(head_dim * self.fraction)
        if turning % 2 or turning <= 0:
            raise UserError(
                f"Rotary.fraction={self.fraction} turns {turning} of {head_dim} features; it takes an even number."
            )
        if self.sections and (len(self.sections) != 3 or sum(self.sections) != turning // 2):
            raise UserError(
                f"Rotary.sections is {self.sections}; for {turning // 2} angles it takes three numbers with that sum."
            )
        plain = self.base ** -(np.arange(0, turning, 2) / turning)
        return plain if self.scaling is None else self.scaling.stretch(plain, self.base)

    def coordinates(self, angles: int) -> np.ndarray:
        """Which coordinate (0 time, 1 row, 2 column) each angle follows, [angles]."""
        if not self.interleaved:
            return np.repeat(np.arange(3), self.sections)
        index = np.arange(angles)
        return np.where(index < 3 * np.asarray(self.sections)[index % 3], index % 3, 0)

    def __call__(self, positions: Int[Array, "*three #batch tokens"], head_dim: int) -> Rotation:
        """The rotation of tokens at these positions.

        Args:
          positions: [B, T]; with ``sections`` also [3, B, T], one per coordinate ([B, T] is text, whose three
            coordinates are equal).

        Raises:
          UserError: as :meth:`frequencies`; or three coordinates without ``sections``.
        """
        frequencies = jnp.asarray(self.frequencies(head_dim), jnp.float32)
        positions = jnp.asarray(positions)
        angles: Any
        if positions.ndim == 2:
            angles = positions[..., None].astype(jnp.float32) * frequencies  # [B, T, A]
        elif self.sections and positions.ndim == 3 and len(positions) == 3:
            chosen = jnp.moveaxis(positions[self.coordinates(len(frequencies))], 0, -1)
            angles = chosen.astype(jnp.float32) * frequencies  # [B, T, A]
        else:
            wanted = "[batch, tokens] or [3, batch, tokens]" if self.sections else "[batch, tokens]"
            raise UserError(f"positions have the shape {positions.shape}; these rotary ones take {wanted}.")
        amplitude = 1.0 if self.scaling is None else self.scaling.amplitude
        return Rotation(amplitude * jnp.cos(angles), amplitude * jnp.sin(angles))

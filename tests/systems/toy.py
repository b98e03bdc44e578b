"""A toy world in which collapse shows within seconds: smooth patterns in two or more views, and a small net.

Images are positive, because zero-mean images hide a collapse: their features average out even where they are one
point up to sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.systems import training
from tests.systems.training import Trained
from vlpjax.config import Config, spec

SIZE, CLASSES, BATCH = 12, 10, 128


def images(key: jax.Array, labels: jax.Array) -> jax.Array:
    """One view of an image of each class: its pattern, shifted, brightened and under noise."""
    patterns = jax.random.uniform(jax.random.key(7), (CLASSES, 4, 4, 3))
    patterns = jax.image.resize(patterns, (CLASSES, SIZE, SIZE, 3), "linear")

    def view(key: jax.Array, label: jax.Array) -> jax.Array:
        shift_key, light_key, noise_key = jax.random.split(key, 3)
        shift = jax.random.randint(shift_key, (2,), -1, 2)
        light = jax.random.uniform(light_key, minval=0.6, maxval=1.4)
        moved = jnp.roll(patterns[label], shift, axis=(0, 1))
        return light * moved + 0.1 * jax.random.normal(noise_key, moved.shape)

    return jax.vmap(view)(jax.random.split(key, len(labels)), labels)


def views(seed: Any, names: tuple[str, ...], size: int = BATCH) -> dict[str, jax.Array]:
    """A batch: a view per name, and labels."""
    key = jax.random.fold_in(jax.random.key(1), seed)
    labels = jax.random.randint(key, (size,), 0, CLASSES)
    return {name: images(jax.random.fold_in(key, at), labels) for at, name in enumerate(names)} | {
        "label": labels
    }


class Net(nn.Module):
    """Two dense layers."""

    width: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = nn.relu(nn.Dense(self.width, name="first")(images.reshape(len(images), -1)))
        return {"pooled": nn.Dense(self.width, name="second")(x)}


def train(
    loss: Config,
    names: tuple[str, ...] = ("view1", "view2"),
    teachers: Mapping[str, Config] | None = None,
    steps: int = 400,
    learning_rate: float = 3e-3,
) -> Trained:
    """Trains the net under one objective called ``loss``."""
    return training.train(
        dict(image=spec(Net)),
        dict(loss=loss),
        lambda number: views(number, names),
        steps,
        learning_rate,
        teachers=teachers,
    )

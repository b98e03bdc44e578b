"""Pictures for the report: what a masked objective reconstructs, and where a tower looks."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from vlpjax.config import suggest
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.base import (
    Evaluator,
    Result,
    Variables,
    finite_batches,
    picture,
    require_finite,
    to_host,
)
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout
from vlpjax.objectives.base import Context, fold_name
from vlpjax.rules import tree_names

KINDS = ("original", "masked", "reconstructed")  # in the order in which they are shown
Images = Float[Array, "batch height width channels"]


@runtime_checkable
class Reconstructs(Protocol):
    """An objective that can show what it predicts."""

    def reconstruct(self, context: Context) -> Mapping[str, Images]:
        """Images by the names in :data:`KINDS`, all in the values that the tower reads."""


@dataclass(frozen=True)
class Reconstruction(Evaluator):
    """Shows images beside what an objective sees and makes of them; ``error`` is the mean squared one of all pixels.

    Attributes:
      data: a finite pipeline with the fields that the objective reads.
      objective: its name in the config; it has a method ``reconstruct`` (see :class:`Reconstructs`).
      examples: so many images of the first batch are shown.
    """

    data: Pipeline | None = None
    objective: str = ""
    examples: int = 8

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None:
            raise UserError("Reconstruction.data is not set; give it a finite pipeline.")
        data, name = self.data, self.objective
        require_finite(data, "Reconstruction")
        if name not in experiment.objectives:
            raise UserError(f"Reconstruction.objective is {name!r}{suggest(name, experiment.objectives)}.")
        objective = experiment.objectives[name][1]
        if not isinstance(objective, Reconstructs):
            raise UserError(
                f"Reconstruction.objective is {name!r}, a {type(objective).__name__}, which has no method reconstruct."
            )
        key = fold_name(jax.random.key(experiment.seed), "reconstruction")

        @jax.jit
        def reconstruct(variables: Variables, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
            def run(towers: Any) -> Mapping[str, jax.Array]:
                context = Context(
                    towers, batch, key, jnp.zeros((), jnp.int32), train=False,
                    state=experiment.initial_states()[name], objective=name, durations=experiment.durations,
                )  # fmt: skip
                return objective.reconstruct(context)

            with layout.activate():
                images: Any = experiment.towers.apply(variables, method=run)
                return {kind: value.astype(jnp.float32) for kind, value in images.items()}

        def evaluate(variables: Variables) -> Result:
            batch = next(iter(finite_batches(data, layout)))
            valid = to_host(batch.pop("valid"), layout)
            made = reconstruct(variables, batch)
            images = {kind: to_host(made[kind], layout)[valid] for kind in KINDS}
            error = np.mean(np.square(images["original"] - images["reconstructed"]))
            return Result({"error": float(error)}, examples=rows_of_pictures(images, self.examples))

        return evaluate


@dataclass(frozen=True)
class AttentionMaps(Evaluator):
    """Shows where a ViT looks: the attention of its class token, or of all patches on average if it has none.

    Attributes:
      data: a finite pipeline of images.
      tower: its name; ``image_field`` is what it reads.
      layer: whose attention is shown; negative ones count from the end.
      examples: so many images of the first batch are shown.
    """

    data: Pipeline | None = None
    tower: str = "image"
    image_field: str = "image"
    layer: int = -1
    examples: int = 8

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None:
            raise UserError("AttentionMaps.data is not set; give it a finite pipeline of images.")
        data = self.data
        require_finite(data, "AttentionMaps")
        if self.tower not in experiment.towers:
            raise UserError(
                f"AttentionMaps.tower is {self.tower!r}; there are {', '.join(experiment.towers)}."
            )

        @jax.jit
        def attention(variables: Variables, images: jax.Array) -> jax.Array:
            with layout.activate():
                outputs: Any = experiment.towers.apply(
                    variables, method=lambda towers: towers.call(self.tower, images, attention=(self.layer,))
                )
            prefix = outputs["prefix"].shape[1] if "prefix" in outputs else 0
            parameters = tree_names(variables["params"][self.tower])
            # Registers are in the prefix too, behind the class tokens.
            by_class = any(name.split("/")[-1] == "class_token" for name in parameters)
            return looked_at(outputs["attention"][self.layer], prefix, by_class)

        def evaluate(variables: Variables) -> Result:
            batch = next(iter(finite_batches(data, layout)))
            valid = to_host(batch["valid"], layout)
            images = to_host(batch[self.image_field], layout)[valid]
            maps = to_host(attention(variables, batch[self.image_field]), layout)[valid]
            shown = {"original": images, "attention": overlaid(images, maps)}
            # The share of the patches over which attention is spread evenly; 1 looks everywhere alike.
            entropy = -np.sum(maps * np.log(np.maximum(maps, 1e-12)), axis=1)
            metrics = {"attended_share": float(np.mean(np.exp(entropy)) / maps.shape[1])}
            return Result(metrics, examples=rows_of_pictures(shown, self.examples))

        return evaluate


def looked_at(
    weights: Float[Array, "batch heads tokens keys"], prefix: int, by_class: bool
) -> Float[Array, "batch patches"]:
    """Attention to the patches, summing to 1, of the first token or of all patches on average.

    Args:
      prefix: tokens that stand before the patches.
      by_class: whether the first token is a class token, and is the one that looks.
    """
    heads = weights.astype(jnp.float32).mean(axis=1)
    rows = heads[:, 0] if by_class else heads[:, prefix:].mean(axis=1)
    patches = rows[:, prefix:]
    return patches / jnp.sum(patches, axis=1, keepdims=True)


def overlaid(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images [B, H, W, C] that are bright where a map [B, patches] over them is high."""
    height, width = images.shape[1:3]
    patch = round((height * width / maps.shape[1]) ** 0.5)
    grid = (maps / maps.max(axis=1, keepdims=True)).reshape(-1, height // patch, width // patch)
    light = grid.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
    light = np.pad(light, ((0, 0), (0, height - light.shape[1]), (0, width - light.shape[2]), (0, 0)))
    dark = images.min()
    return dark + (images - dark) * (0.15 + 0.85 * light)


def rows_of_pictures(images: Mapping[str, np.ndarray], most: int) -> list[dict[str, Any]]:
    """For the report: per image a row of its pictures, all in the range of values of the first kind."""
    first = next(iter(images.values()))
    low, high = float(first.min()), float(first.max())
    return [
        {"pictures": [{"text": kind, "image": drawn(x[row], low, high)} for kind, x in images.items()]}
        for row in range(min(most, len(first)))
    ]


def drawn(image: np.ndarray, low: float, high: float) -> str:
    """An image [H, W, C] as a data URI; ``low`` is black and ``high`` white."""
    pixels = np.clip((image - low) / max(high - low, 1e-8), 0, 1)
    array = np.round(255 * pixels).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(data, "PNG")
    return picture(data.getvalue())

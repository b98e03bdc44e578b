"""Segmentation without training: every patch takes the label of the most similar patches of a memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.base import (
    Encoder,
    Evaluator,
    Result,
    Variables,
    encode_all,
    read_column,
    require_finite,
)
from vlpjax.evaluators.neighbors import count_votes, make_nearest
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout


@dataclass(frozen=True)
class PatchSegmentation(Evaluator):
    """Mean intersection over union of label maps that neighbours among patches predict.

    The memory holds patches of ``train`` with the commonest label of their pixels.  A patch of ``test`` takes the
    weighted vote of its k nearest by cosine, and gives it to all of its pixels; nothing is trained.  (The idea of
    "Towards In-context Scene Understanding", arXiv 2306.01667, with the vote of :class:`vlpjax.evaluators.knn.KNN`.)

    Attributes:
      train, test: finite pipelines with images and label maps, int32 [H, W] of the image's size.
      tower: its name; ``image_field`` is what it reads.
      output: features of patches [B, N, D], row by row over the image.
      label_map: field of the batch that holds the label maps; labels count from 0.
      k, temperature: of the vote; see :class:`vlpjax.evaluators.knn.KNN`.
      memory: at most so many patches are remembered, evenly spread over those of ``train``.
    """

    train: Pipeline | None = None
    test: Pipeline | None = None
    tower: str = "image"
    image_field: str = "image"
    output: str = "tokens"
    label_map: str = "label_map"
    k: int = 20
    temperature: float = 0.07
    memory: int = 65536

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.train is None or self.test is None:
            raise UserError(
                "PatchSegmentation needs 'train' and 'test', finite pipelines; the config leaves one of them out."
            )
        train, test, fields = self.train, self.test, (self.label_map,)
        for pipeline in (train, test):
            require_finite(pipeline, "PatchSegmentation")
        encoder = Encoder(experiment, layout, self.tower, self.image_field, self.output)
        nearest = make_nearest(layout, self.k)

        def predict(queries: jax.Array, memory: jax.Array, real: Any, labels: Any, classes: int) -> jax.Array:
            """The label of every patch, [Q N]."""
            width = memory.shape[-1]
            scores, places = nearest(queries.reshape(-1, width), memory.reshape(-1, width), real)
            return jnp.argmax(count_votes(scores, labels[places], classes, self.temperature), axis=1)

        predict_all: Any = jax.jit(predict, static_argnums=4, out_shardings=layout.replicated)

        def evaluate(variables: Variables) -> Result:
            seen, unseen = (
                encode_all(data, {"": encoder}, variables, layout, fields) for data in (train, test)
            )
            if seen.features[""].ndim != 3:
                raise UserError(
                    f"PatchSegmentation.output is {self.output!r}, which holds no features of patches [B, N, D]."
                )
            known, maps = (
                read_column(data.columns, self.label_map, "PatchSegmentation") for data in (seen, unseen)
            )
            classes = 1 + int(max(known.max(), maps.max()))
            patches = seen.features[""].shape[1]
            labels = patch_labels(known, patches, classes).ravel()
            real = evenly(np.repeat(seen.columns["valid"], patches), self.memory)
            if real.sum() < self.k:
                raise UserError(f"PatchSegmentation.k is {self.k}, but the memory has {real.sum()} patches.")
            found = np.asarray(predict_all(unseen.features[""], seen.features[""], real, labels, classes))
            counted = unseen.columns["valid"]
            whole = spread_out(found.reshape(-1, patches), maps.shape[1:])
            return Result(overlap(whole[counted], maps[counted], classes))

        return evaluate


def patch_side(patches: int, shape: tuple[int, ...]) -> int:
    """Pixels along a patch, of so many that cover an image of this shape.

    Raises:
      UserError: a number of patches that no square patch of whole pixels gives.
    """
    side = round((shape[0] * shape[1] / patches) ** 0.5)
    if side < 1 or shape[0] % side or shape[1] % side or (shape[0] // side) * (shape[1] // side) != patches:
        raise UserError(
            f"{patches} patches do not cover a label map of {shape[0]} x {shape[1]} pixels evenly."
        )
    return side


def patch_labels(maps: np.ndarray, patches: int, classes: int) -> np.ndarray:
    """The commonest label in every patch, [N, patches]; of equally common ones the smallest.

    Args:
      maps: int [N, H, W].
    """
    side = patch_side(patches, maps.shape[1:])
    count, height, width = maps.shape
    cut = maps.reshape(count, height // side, side, width // side, side).swapaxes(2, 3)
    pixels = cut.reshape(count * patches, side * side)
    votes = np.zeros((len(pixels), classes), np.int32)
    np.add.at(votes, (np.arange(len(pixels))[:, None], pixels), 1)
    return votes.argmax(axis=1).reshape(count, patches).astype(np.int32)


def spread_out(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels of patches [N, patches] as label maps [N, H, W]."""
    side = patch_side(labels.shape[1], shape)
    grid = labels.reshape(len(labels), shape[0] // side, shape[1] // side)
    return grid.repeat(side, axis=1).repeat(side, axis=2)


def overlap(found: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, float]:
    """Mean intersection over union of the classes that occur in either, and the share of right pixels.

    Args:
      found, truth: int, of any one shape.
    """
    table = np.bincount(truth.ravel() * classes + found.ravel(), minlength=classes**2).reshape(
        classes, classes
    )
    right, union = np.diag(table), table.sum(axis=0) + table.sum(axis=1) - np.diag(table)
    shares = right[union > 0] / union[union > 0]
    return {"mean_iou": float(shares.mean()), "pixel_accuracy": float(right.sum() / table.sum())}


def evenly(real: np.ndarray, most: int) -> np.ndarray:
    """bool [N]: at most so many of the real rows, evenly spread."""
    rows = np.flatnonzero(real)
    kept = np.zeros(len(real), bool)
    kept[rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]] = True
    return kept

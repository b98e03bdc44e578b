"""Segmentation without training: every patch takes the label of the most similar patches of a memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.errors import UserError
from vlpjax.evaluators.base import Result
from vlpjax.evaluators.labelled import Examples, LabelledEvaluator
from vlpjax.evaluators.neighbors import count_votes, make_nearest
from vlpjax.mesh import Layout


@dataclass(frozen=True)
class PatchSegmentation(LabelledEvaluator):
    """Mean intersection over union of label maps that neighbours among patches predict.

    The memory holds patches of ``train`` with the commonest label of their pixels.  A patch of ``test`` takes the
    weighted vote of its k nearest by cosine, and gives it to all of its pixels; nothing is trained.  (The idea of
    "Towards In-context Scene Understanding", arXiv 2306.01667, with the vote of :class:`vlpjax.evaluators.knn.KNN`.)

    Attributes:
      output: features of patches [B, N, D], row by row over the image.
      label: field of the batch that holds the label maps, int32 [H, W] of the image's size; labels count from 0.
      ignore: the label of pixels that count nowhere (255 in VOC and ADE20K); None counts all.
      k, temperature: of the vote; see :class:`vlpjax.evaluators.knn.KNN`.
      memory: at most so many patches are remembered, evenly spread over those of ``train``.
    """

    label_fields: ClassVar[bool] = True

    output: str = "tokens"
    label: str = "label_map"
    ignore: int | None = None
    k: int = 20
    temperature: float = 0.07
    memory: int = 65536

    def _judge(self, layout: Layout) -> Callable[[Examples, Examples], Result]:
        nearest = make_nearest(layout, self.k)
        remember: Any = jax.jit(
            lambda features, rows: features.reshape(-1, features.shape[-1])[rows],
            out_shardings=layout.sharding("frames", None),
        )

        def predict(queries: jax.Array, memory: jax.Array, real: Any, labels: Any, classes: int) -> jax.Array:
            """The label of every patch, [Q N]."""
            scores, places = nearest(queries.reshape(-1, queries.shape[-1]), memory, real)
            return jnp.argmax(count_votes(scores, labels[places], classes, self.temperature), axis=1)

        predict_all: Any = jax.jit(predict, static_argnums=4, out_shardings=layout.replicated)

        def judge(known: Examples, asked: Examples) -> Result:
            if known.features.ndim != 3:
                raise UserError(
                    f"PatchSegmentation.output is {self.output!r}, which holds no features of patches [B, N, D]."
                )
            patches = known.features.shape[1]
            maps = (known.labels, asked.labels)
            classes = 1 + max(int(x.max(where=is_counted(x, self.ignore), initial=0)) for x in maps)
            labels = patch_labels(known.labels, patches, classes, self.ignore).ravel()
            chosen = evenly(np.repeat(known.real, patches) & (labels >= 0), self.memory)
            if len(chosen) < self.k:
                raise UserError(f"PatchSegmentation.k is {self.k}, but the memory has {len(chosen)} patches.")
            # Every device holds equally many rows of the memory.
            rows = np.pad(chosen, (0, -len(chosen) % layout.mesh.size))
            real = np.arange(len(rows)) < len(chosen)
            memory = remember(known.features, rows)
            found = np.asarray(predict_all(asked.features, memory, real, labels[rows], classes))
            whole = spread_out(found.reshape(asked.features.shape[:2]), asked.labels.shape[1:])
            return Result(overlap(whole[asked.real], asked.labels[asked.real], classes, self.ignore))

        return judge


def patch_side(patches: int, shape: tuple[int, ...]) -> int:
    """Pixels along a patch, of so many that cover an image of this shape.

    Raises:
      UserError: a number of patches that no square patch of whole pixels gives.
    """
    side = round((shape[0] * shape[1] / patches) ** 0.5)
    if side < 1 or shape[0] % side or shape[1] % side or (shape[0] // side) * (shape[1] // side) != patches:
        raise UserError(f"{patches} patches do not cover an image of {shape[0]} x {shape[1]} pixels evenly.")
    return side


def label_counts(label_map: np.ndarray, patches: int, classes: int, ignore: int | None = None) -> np.ndarray:
    """How many pixels of each label a patch has, int [patches, classes].

    Args:
      label_map: int [H, W], with labels from 0 on.
      ignore: a label that is not counted.
    """
    side = patch_side(patches, label_map.shape)
    height, width = label_map.shape
    rows, columns = np.arange(height)[:, None] // side, np.arange(width) // side
    places = (rows * (width // side) + columns) * classes + label_map
    counted = places[is_counted(label_map, ignore)]
    return np.bincount(counted, minlength=patches * classes).reshape(patches, classes)


def is_counted(labels: np.ndarray, ignore: int | None) -> np.ndarray:
    """bool, in the shape of the labels: which of them are not ``ignore``."""
    return np.ones(labels.shape, bool) if ignore is None else labels != ignore


def patch_labels(maps: np.ndarray, patches: int, classes: int, ignore: int | None = None) -> np.ndarray:
    """The commonest label in every patch, int32 [N, patches]; of equally common ones the smallest; -1 if none counts.

    Args:
      maps: int [N, H, W].
    """
    labels = np.empty((len(maps), patches), np.int32)
    for index, label_map in enumerate(maps):
        counts = label_counts(label_map, patches, classes, ignore)
        labels[index] = np.where(counts.any(axis=1), counts.argmax(axis=1), -1)
    return labels


def spread_out(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels of patches [N, patches] as label maps [N, H, W]."""
    side = patch_side(labels.shape[1], shape)
    grid = labels.reshape(len(labels), shape[0] // side, shape[1] // side)
    return grid.repeat(side, axis=1).repeat(side, axis=2)


def overlap(
    found: np.ndarray, truth: np.ndarray, classes: int, ignore: int | None = None
) -> dict[str, float]:
    """Mean intersection over union of the classes that occur in either, and the share of right pixels.

    Args:
      found, truth: int, of any one shape.
      ignore: pixels with this true label count nowhere.
    """
    counted = is_counted(truth, ignore)
    pairs = truth[counted] * classes + found[counted]
    table = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    right, union = np.diag(table), table.sum(axis=0) + table.sum(axis=1) - np.diag(table)
    shares = right[union > 0] / union[union > 0]
    return {"mean_iou": float(shares.mean()), "pixel_accuracy": float(right.sum() / table.sum())}


def evenly(real: np.ndarray, most: int) -> np.ndarray:
    """The places of at most so many of the real rows, evenly spread."""
    rows = np.flatnonzero(real)
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]

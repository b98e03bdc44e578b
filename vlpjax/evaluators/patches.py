"""What single patch tokens know: segmentation by one prompted patch, and how apart objects are in feature space.

Nothing is trained.  Both read images with a map of objects: 0 is the ground, every other number an object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Evaluator, Result, Variables, finite_batches, require_finite, to_host
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout
from vlpjax.models.positions_2d import resize_matrix

THRESHOLDS = tuple(float(value) for value in np.round(np.arange(-0.95, 1.0, 0.05), 2))


def unit_features(tokens: np.ndarray) -> np.ndarray:
    """Tokens [..., D] of length one, in float64."""
    tokens = np.asarray(tokens, np.float64)
    return tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)


def prompt_patch(member: np.ndarray, grid: tuple[int, int]) -> int:
    """The patch that holds the object's pixel nearest to the object's centre.

    Args:
      member: bool [H, W], the object's pixels.
    """
    pixels = np.argwhere(member)
    nearest = pixels[np.argmin(np.square(pixels - pixels.mean(axis=0)).sum(axis=1))]
    row, column = nearest * np.array(grid) // np.array(member.shape)
    return int(row * grid[1] + column)


def prompt_scores(
    features: np.ndarray, prompt: int, grid: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Cosines of all patches with the prompted one, resized bilinearly to [H, W] pixels.

    Args:
      features: [N, D] of length one.
    """
    similarity = (features @ features[prompt]).reshape(grid)
    down = resize_matrix(grid[0], size[0], "bilinear")
    along = resize_matrix(grid[1], size[1], "bilinear")
    return down @ similarity @ along.T


def intersection_over_union(found: np.ndarray, member: np.ndarray) -> float:
    """Of two sets of pixels."""
    return float(np.sum(found & member) / max(np.sum(found | member), 1))


def patch_objects(objects: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """int [N]: the object that covers most of each patch, and -1 where none, and no ground either, covers half."""
    rows, columns = objects.shape[0] // grid[0], objects.shape[1] // grid[1]
    cut = objects[: rows * grid[0], : columns * grid[1]].reshape(grid[0], rows, grid[1], columns)
    cells = cut.transpose(0, 2, 1, 3).reshape(grid[0] * grid[1], rows * columns)
    owners = np.full(len(cells), -1)
    for patch, cell in enumerate(cells):
        names, counts = np.unique(cell, return_counts=True)
        if counts.max() * 2 >= cell.size:
            owners[patch] = names[np.argmax(counts)]
    return owners


def pair_similarities(features: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of pairs of patches within an object, and between two objects; the ground takes no part.

    Args:
      features: [N, D] of length one.
      owners: of :func:`patch_objects`.
    """
    inside = np.flatnonzero(owners > 0)
    cosines = features[inside] @ features[inside].T
    same = owners[inside][:, None] == owners[inside][None]
    upper = np.triu(np.ones_like(same), k=1)
    return cosines[same & upper], cosines[~same & upper]


def histogram_overlap(first: np.ndarray, second: np.ndarray, bins: int = 100) -> float:
    """Sum over bins of the smaller share, with bins of equal width on [-1, 1]: 0 is apart, 1 is equal."""
    edges = np.linspace(-1.0, 1.0, bins + 1)
    shares = [np.histogram(np.clip(x, -1, 1), edges)[0] / max(len(x), 1) for x in (first, second)]
    return float(np.minimum(*shares).sum())


@dataclass(frozen=True)
class PatchEvaluator(Evaluator):
    """What both evaluators share: a finite pipeline of images with their maps of objects, and a tower's tokens.

    Attributes:
      data: a finite pipeline.
      objects: field with the map of objects, int [H, W].
      tower, image: name of the tower, and the field that it reads.
      grid: rows and columns of its patches.
    """

    data: Pipeline | None = None
    objects: str = "objects"
    tower: str = "image"
    image: str = "image"
    grid: tuple[int, int] = (14, 14)

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        name = type(self).__name__
        if self.data is None:
            raise UserError(
                f"{name}.data is not set; give it a finite pipeline of images with their objects."
            )
        pipeline = self.data
        require_finite(pipeline, name)
        if self.tower not in experiment.towers:
            raise UserError(
                f"{name} names the tower {self.tower!r}; there are {', '.join(experiment.towers)}."
            )

        @jax.jit
        def encode(variables: Variables, images: jax.Array) -> jax.Array:
            with layout.activate():
                outputs: Any = experiment.towers.apply(
                    variables, method=lambda towers: towers.call(self.tower, images)
                )
            return outputs["tokens"].astype(jnp.float32)  # [B, N, D]

        def images(variables: Variables) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in finite_batches(pipeline, layout):
                if missing := [field for field in (self.image, self.objects) if field not in batch]:
                    raise UserError(
                        f"{name} reads the field {missing[0]!r}; the batch has {', '.join(batch)}."
                    )
                tokens = to_host(encode(variables, batch[self.image]), layout)
                if tokens.shape[1] != self.grid[0] * self.grid[1]:
                    raise UserError(
                        f"{name}.grid is {self.grid}, but the tower has {tokens.shape[1]} patches."
                    )
                objects, real = to_host(batch[self.objects], layout), to_host(batch["valid"], layout)
                yield from zip(unit_features(tokens[real]), objects[real], strict=True)

        return lambda variables: self.measure(images(variables))

    def measure(self, images: Iterator[tuple[np.ndarray, np.ndarray]]) -> Result:
        """The result of unit features [N, D] and objects [H, W], image by image."""
        raise TypeError(f"{type(self).__name__} is a patch evaluator and must define measure.")


@dataclass(frozen=True)
class PromptSegmentation(PatchEvaluator):
    """Mean intersection over union of each object with the pixels that are similar to its central patch.

    Attributes:
      threshold: cosine above which a pixel is found; None takes the best one of the first ``calibration`` objects,
        which then do not count.
      calibration: number of these objects.

    Source: "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding", arXiv 2308.11448.
    """

    threshold: float | None = None
    calibration: int = 64

    def measure(self, images: Iterator[tuple[np.ndarray, np.ndarray]]) -> Result:
        candidates = np.array(THRESHOLDS if self.threshold is None else (self.threshold,))
        rows = []
        for features, objects in images:
            for name in np.unique(objects[objects > 0]):
                member = objects == name
                prompt = prompt_patch(member, self.grid)
                scores = prompt_scores(features, prompt, self.grid, member.shape)
                rows.append([intersection_over_union(scores > value, member) for value in candidates])
        table = np.array(rows)  # [objects, thresholds]
        first = self.calibration if self.threshold is None else 0
        if len(table) <= first:
            raise UserError(
                f"PromptSegmentation found {len(table)} objects, of which calibration={first} do not count."
            )
        best = int(np.argmax(table[:first].mean(axis=0))) if first else 0
        return Result({"iou": float(table[first:, best].mean()), "threshold": float(candidates[best])})


@dataclass(frozen=True)
class ObjectOverlap(PatchEvaluator):
    """How much similarities within objects look like those between objects of an image: lower is better.

    Attributes:
      bins: of the histograms.

    Source: "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding", arXiv 2308.11448.
    """

    bins: int = 100

    def measure(self, images: Iterator[tuple[np.ndarray, np.ndarray]]) -> Result:
        pairs = [
            pair_similarities(features, patch_objects(objects, self.grid)) for features, objects in images
        ]
        intra, inter = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
        if not len(intra) or not len(inter):
            raise UserError("ObjectOverlap found no image with two objects of at least two patches.")
        overlap = histogram_overlap(intra, inter, self.bins)
        return Result({"overlap": overlap, "intra": float(intra.mean()), "inter": float(inter.mean())})

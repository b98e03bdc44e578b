"""What single patch tokens know: segmentation by one prompted patch, and how apart objects are in feature space.

Nothing is trained.  Both read images with a map of objects: 0 is the ground, every other number an object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
    to_host,
)
from vlpjax.evaluators.segmentation import label_counts, patch_side
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout
from vlpjax.models.positions_2d import resize_matrix

# Cosines, ever closer towards 1: tokens that share a large common part differ in the third decimal only.
THRESHOLDS = tuple(float(value) for value in np.round(1 - np.geomspace(1.95, 1e-4, 100), 6))
Images = Iterator[tuple[np.ndarray, np.ndarray]]  # unit features of patches [N, D], and objects [H, W]


def grid_of(patches: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of so many square patches that cover an image of this shape."""
    side = patch_side(patches, shape)
    return shape[0] // side, shape[1] // side


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


def patch_objects(objects: np.ndarray, patches: int) -> np.ndarray:
    """int [patches]: the object, or the ground, that covers half of a patch or more, and -1 where none does.

    Args:
      objects: int [H, W].
    """
    counts = label_counts(objects, patches, classes=1 + int(objects.max()))
    return np.where(2 * counts.max(axis=1) >= counts.sum(axis=1), counts.argmax(axis=1), -1)


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


def histogram_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Sum over bins of the smaller share of two histograms of counts: 0 is apart, 1 is equal."""
    return float(np.minimum(first / first.sum(), second / second.sum()).sum())


@dataclass(frozen=True)
class PatchEvaluator(Evaluator):
    """What both evaluators share: a finite pipeline of images with their maps of objects, and a tower's tokens.

    Attributes:
      data: a finite pipeline.
      tower: its name; ``image_field`` is what it reads.
      output: features of patches [B, N, D], row by row over the image.
      objects: field of the batch with the map of objects, int32 [H, W] of the image's size.
    """

    data: Pipeline | None = None
    tower: str = "image"
    image_field: str = "image"
    output: str = "tokens"
    objects: str = "objects"

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        name = type(self).__name__
        if self.data is None:
            raise UserError(
                f"{name}.data is not set; give it a finite pipeline of images with their objects."
            )
        pipeline = self.data
        require_finite(pipeline, name)
        encoder = Encoder(experiment, layout, self.tower, self.image_field, self.output)

        def images(variables: Variables) -> Images:
            encoded = encode_all(pipeline, {"": encoder}, variables, layout, (self.objects,))
            features, objects = encoded.features[""], read_column(encoded.columns, self.objects, name)
            if features.ndim != 3:
                raise UserError(
                    f"{name}.output is {self.output!r}, which holds no features of patches [B, N, D]."
                )
            for start in range(0, len(objects), pipeline.batch_size):  # not all tokens at once on the host
                part = slice(start, start + pipeline.batch_size)
                real = encoded.columns["valid"][part]
                yield from zip(to_host(features[part], layout)[real], objects[part][real], strict=True)

        return lambda variables: self.measure(images(variables))

    def measure(self, images: Images) -> Result:
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

    def measure(self, images: Images) -> Result:
        candidates = np.array(THRESHOLDS if self.threshold is None else (self.threshold,))
        rows = []
        for features, objects in images:
            grid = grid_of(len(features), objects.shape)
            for name in np.unique(objects[objects > 0]):
                member = objects == name
                scores = prompt_scores(features, prompt_patch(member, grid), grid, member.shape)
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
      bins: of the histograms, of equal width on [-1, 1].

    Source: "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding", arXiv 2308.11448.
    """

    bins: int = 100

    def measure(self, images: Images) -> Result:
        edges = np.linspace(-1.0, 1.0, self.bins + 1)
        histograms = np.zeros((2, self.bins), np.int64)  # within objects, and between them
        sums = np.zeros(2)
        for features, objects in images:
            pairs = pair_similarities(features, patch_objects(objects, len(features)))
            for kind, cosines in enumerate(pairs):
                histograms[kind] += np.histogram(np.clip(cosines, -1, 1), edges)[0]
                sums[kind] += cosines.sum(dtype=np.float64)
        counts = histograms.sum(axis=1)
        if not counts.all():
            raise UserError("ObjectOverlap found no image with two objects of at least two patches.")
        intra, inter = sums / counts
        overlap = histogram_overlap(*histograms)
        return Result({"overlap": overlap, "intra": float(intra), "inter": float(inter)})

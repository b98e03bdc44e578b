"""Scores of classification, on the host: shares of right answers, overall and per class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def class_numbers(*labels: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """How many classes there are, and the labels as numbers from 0 on, in the order of the labels."""
    classes, places = np.unique(np.concatenate(labels), return_inverse=True)
    ends = np.cumsum([len(part) for part in labels])[:-1]
    return len(classes), [part.astype(np.int32) for part in np.split(places, ends)]


def accuracies(ranked: np.ndarray, labels: np.ndarray, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Top-k accuracies, and the mean over classes of each class's own accuracy.

    Args:
      ranked: int [N, n], classes from the best on.
      labels: int [N].
      ks: those greater than n are left out.
    """
    hit = ranked == labels[:, None]
    scores = {f"top{k}": float(np.mean(hit[:, :k].any(axis=1))) for k in ks if k <= ranked.shape[1]}
    return scores | {"mean_per_class_accuracy": mean_per_class(hit[:, 0], labels)}


def mean_per_class(right: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the classes' accuracies, over the classes that occur.

    Args:
      right: bool [N].
      labels: int [N].
    """
    totals = np.bincount(labels)
    return float(np.mean((np.bincount(labels, weights=right) / np.maximum(totals, 1))[totals > 0]))


def chances(classes: int, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """What guessing among equally likely classes reaches of :func:`accuracies`."""
    return {f"top{k}": k / classes for k in ks if k <= classes} | {"mean_per_class_accuracy": 1 / classes}

"""Evaluators on features that a test gives: a tower that passes its input on, and data sets of labelled features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from tests.tiny import Rows, experiment_of, layout_of, model_config, rows_of
from vlpjax.config import spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources.base import digest
from vlpjax.evaluators.base import Evaluator, Result
from vlpjax.mesh import Layout
from vlpjax.models.heads import Scalar


class Given(nn.Module):
    """A tower whose features are what it is fed, or the first of them, times one parameter."""

    @nn.compact
    def __call__(self, x: jax.Array, *, first: int | None = None) -> dict[str, jax.Array]:
        out = x[..., :first] * Scalar(1.0, name="scale")()
        return {"embedding": out, "pooled": out, "tokens": out}


class Fingerprinted(Rows):
    """Rows that are told apart by what they hold."""

    def fingerprint(self) -> str:
        return digest(
            [sorted((name, np.asarray(x).tobytes().hex()) for name, x in row.items()) for row in self.rows]
        )


def dataset(batch_size: int = 8, **columns: Any) -> Pipeline:
    """A finite pipeline of given fields; NumPy arrays are taken row by row."""
    rows = rows_of(**{name: list(values) for name, values in columns.items()}).rows
    return Pipeline(Fingerprinted(rows), {}, batch_size=batch_size, shuffle=False, repeat=False)


def variables(layout: Layout, scale: float = 2.0) -> dict[str, Any]:
    """Parameters of the tower ``image``."""
    params = {"image": {"scale": {"value": np.float32(scale)}}}
    return {"params": jax.device_put(params, layout.replicated)}


def evaluate(evaluator: Evaluator, devices: int = 1) -> Result:
    """What the evaluator finds with the tower ``image`` passing the data's features on."""
    return evaluate_all((evaluator,), devices)[0]


def evaluate_all(evaluators: Sequence[Evaluator], devices: int = 1) -> list[Result]:
    """What all of them find with the very same parameters."""
    config = model_config()
    config.towers = dict(image=spec(Given), text=spec(Given))
    layout = layout_of(devices)
    experiment, given = experiment_of(config), variables(layout)
    return [evaluator.make(experiment, layout)(given) for evaluator in evaluators]

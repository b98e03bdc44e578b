"""Whether features have collapsed: their spread, and how many directions they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Encoder, Evaluator, Result, Variables, encode_all, require_finite, unit
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout


@dataclass(frozen=True)
class Collapse(Evaluator):
    """Watches what contrastive scores do not show: features that are all alike, or lie in few directions.

    ``spread`` is the mean deviation per feature of features of length one, times sqrt(E): 1 where they point
    everywhere, 0 where they are all the same ("Exploring Simple Siamese Representation Learning", arXiv 2011.10566,
    section 4.1).  ``effective_rank`` is the exponential of the entropy of their normalised singular values: from 1 to
    E ("RankMe", arXiv 2210.02885, equation 1), taken before normalisation.

    Attributes:
      data: a finite pipeline.
      tower: its name; ``image_field`` is what it reads, ``output`` which of its outputs is watched.
      samples: so many evenly spaced examples are looked at.
    """

    data: Pipeline | None = None
    tower: str = "image"
    image_field: str = "image"
    output: str = "pooled"
    samples: int = 4096

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None:
            raise UserError("Collapse.data is not set; give it a finite pipeline.")
        data = self.data
        require_finite(data, "Collapse")
        encoder = Encoder(experiment, layout, self.tower, self.image_field, self.output, normalize=False)
        take = jax.jit(lambda features, rows: features[rows], out_shardings=layout.replicated)

        def evaluate(variables: Variables) -> Result:
            encoded = encode_all(data, {"": encoder}, variables, layout)
            rows = np.flatnonzero(encoded.columns["valid"])
            rows = rows[np.linspace(0, len(rows) - 1, min(self.samples, len(rows))).astype(int)]
            features = np.asarray(take(encoded.features[""], rows), np.float64)
            return Result({"spread": spread(features), "effective_rank": effective_rank(features)})

        return evaluate


def spread(features: np.ndarray) -> float:
    """The mean deviation per feature of rows [N, E] brought to length one, times sqrt(E)."""
    directions = np.asarray(unit(jnp.asarray(features)), np.float64)
    return float(directions.std(axis=0).mean() * features.shape[1] ** 0.5)


def effective_rank(features: np.ndarray) -> float:
    """The exponential of the entropy of the normalised singular values of features [N, E]."""
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / max(values.sum(), 1e-12)
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))

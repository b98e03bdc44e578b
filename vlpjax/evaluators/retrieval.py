"""Image-text retrieval: recall at k in both directions, with identical images and captions counted as right.

Features stay sharded over the mesh.  Queries are ranked in chunks against all candidates, so that no matrix
of queries times candidates ever stands on one device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    picture,
    require_finite,
)
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout, constrain

SHOWN = 5  # candidates that the report shows per query


@dataclass(frozen=True)
class Retrieval(Evaluator):
    """Recall at k of image -> text and text -> image.

    Several captions of an image stand side by side, a field [B, captions, L]: a caption then finds its image, and an
    image counts as found if ANY of its captions is among the k best, as on Flickr30k and MSCOCO.

    A query counts as found if the best-scored right candidate has fewer than k wrong ones before it.  A wrong
    candidate with an equal score stands before it, so that features that have collapsed score nothing.

    Attributes:
      data: a finite pipeline of images, each with one text or with equally many.
      image, text: names of the towers; ``image_field`` and ``text_field`` are what they read.
      same: fields of the source's examples; pairs that are equal in any of them are right for one another.
      caption: the source's field that the report shows as the text.
      ks: the k of recall at k.
      examples: queries per direction, half of them found and half not, that the report shows.
      chunk: queries that are ranked at a time.
    """

    data: Pipeline | None = None
    image: str = "image"
    text: str = "text"
    image_field: str = "image"
    text_field: str = "text"
    same: tuple[str, ...] = ("image", "name")
    caption: str = "name"
    ks: tuple[int, ...] = (1, 5, 10)
    examples: int = 12
    chunk: int = 256

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None:
            raise UserError("Retrieval.data is not set; give it a finite pipeline of image-text pairs.")
        pipeline = self.data
        require_finite(pipeline, "Retrieval")
        encoders = {
            "image": Encoder(experiment, layout, self.image, self.image_field),
            "text": Encoder(experiment, layout, self.text, self.text_field),
        }
        groups = equal_groups(pipeline.source, self.same)
        rank = jax.jit(make_ranking(layout, self.chunk), out_shardings=layout.replicated)
        flat = jax.jit(
            lambda z: z.reshape(-1, z.shape[-1])
        )  # captions of an image become rows, one after the other

        def evaluate(variables: Variables) -> Result:
            z, columns = encode_all(pipeline, encoders, variables, layout)
            several = {name: features.shape[1] if features.ndim == 3 else 1 for name, features in z.items()}
            z = {name: flat(features) for name, features in z.items()}
            # Per side, the example of every row, and whether it is real.
            rows = {name: np.repeat(columns["index"], count) for name, count in several.items()}
            real = {name: np.repeat(columns["valid"], count) for name, count in several.items()}
            result = Result({}, {})
            for source, target in (("image", "text"), ("text", "image")):
                asked, found = groups[rows[source]], groups[rows[target]]
                ranks, best, scores = map(np.asarray, rank(z[source], z[target], found, real[target], asked))
                counted = real[source]
                self._score(
                    f"{source}_to_{target}", ranks[counted], asked[counted], found[real[target]], result
                )
                cases = self._examples(source, target, ranks, best, scores, rows, counted, groups)
                result.examples.extend(cases)
            return result

        return evaluate

    def _score(
        self, direction: str, ranks: np.ndarray, asked: np.ndarray, candidates: np.ndarray, result: Result
    ) -> None:
        count = len(candidates)
        right = np.bincount(candidates, minlength=asked.max() + 1)[asked]  # right candidates per query
        for k in self.ks:
            name = f"{direction}/recall@{k}"
            result.metrics[name] = float(np.mean(ranks < k))
            result.chance[name] = float(np.mean([chance_of_recall(count, int(size), k) for size in right]))
        result.metrics[f"{direction}/median_rank"] = float(np.median(ranks)) + 1

    def _examples(
        self,
        source: str,
        target: str,
        ranks: np.ndarray,
        best: np.ndarray,
        scores: np.ndarray,
        rows: dict[str, np.ndarray],
        real: np.ndarray,
        groups: np.ndarray,
    ) -> list[dict[str, Any]]:
        """Evenly spaced queries, half of them right; so the choice does not flatter and does not change."""
        data = self.data
        assert data is not None

        def item(row: int, kind: str) -> dict[str, Any]:
            example = data.source[int(row)]
            shown: dict[str, Any] = {"text": str(example[self.caption])} if self.caption in example else {}
            if kind == "image":
                shown["image"] = picture(example[self.image_field])
            return shown

        cases = []
        half = self.examples // 2
        for wanted in (True, False):
            queries = np.flatnonzero(real & ((ranks == 0) == wanted))
            for query in queries[np.linspace(0, len(queries) - 1, min(half, len(queries))).astype(int)]:
                own = groups[rows[source][query]]
                found = [
                    item(rows[target][candidate], target)
                    | {"score": float(score), "correct": bool(groups[rows[target][candidate]] == own)}
                    for candidate, score in zip(best[query], scores[query], strict=True)
                ]
                case = {
                    "direction": f"{source}->{target}",
                    "query": item(rows[source][query], source),
                    "results": found,
                }
                cases.append(case | {"correct": wanted})
        return cases


def make_ranking(layout: Layout, chunk: int) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """A function from queries [Q, E] and candidates [N, E] to ranks [Q], and the best [Q, 5] with their scores.

    Its further arguments are the candidates' groups and whether they are real, [N], and the queries' groups [Q], by
    default those of the candidates.
    """

    def rank(
        queries: jax.Array,
        candidates: jax.Array,
        groups: jax.Array,
        real: jax.Array,
        asked: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        with layout.activate():
            candidates = constrain(candidates, "frames", None)
            padding = -queries.shape[0] % chunk
            chunks = jnp.pad(queries, ((0, padding), (0, 0))).reshape(-1, chunk, queries.shape[1])
            query_groups = jnp.pad(
                groups if asked is None else asked, (0, padding), constant_values=-1
            ).reshape(-1, chunk)

            def rank_chunk(item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
                query, group = item
                scores = jnp.matmul(constrain(query, None, None), candidates.T, precision="highest")
                scores = constrain(scores, None, "frames")  # [c, N]
                scores = jnp.where(real[None], scores, -jnp.inf)
                right = (group[:, None] == groups[None]) & real[None]
                best_right = jnp.max(jnp.where(right, scores, -jnp.inf), axis=1, keepdims=True)
                # Written so that a score that is no number stands before everything.
                before = jnp.sum(~(scores < best_right) & ~right & real[None], axis=1)
                top, places = jax.lax.top_k(scores, min(SHOWN, scores.shape[1]))
                return before, places, top

            before, places, top = jax.lax.map(rank_chunk, (chunks, query_groups))
            count = queries.shape[0]
            return tuple(x.reshape(-1, *x.shape[2:])[:count] for x in (before, places, top))

    return rank


def equal_groups(source: Any, fields: Sequence[str]) -> np.ndarray:
    """int32 [N]: examples that are equal in any of the fields, directly or through others, share a number."""
    parent = np.arange(len(source))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = int(parent[item])
        return item

    first: dict[Any, int] = {}
    for index in range(len(source)):
        example = source[index]
        for name in fields:
            if name not in example:
                raise UserError(
                    f"Retrieval.same names the field {name!r}; the examples have {', '.join(example)}."
                )
            other = first.setdefault((name, example[name]), index)
            parent[root(index)] = root(other)
    return np.array([root(index) for index in range(len(source))], np.int32)


def chance_of_recall(candidates: int, right: int, k: int) -> float:
    """Probability that k random candidates of all hold at least one of the right ones."""
    return 1.0 - math.prod((candidates - right - i) / (candidates - i) for i in range(min(k, candidates)))

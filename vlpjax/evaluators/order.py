"""Multiple choice between captions: does a model know the order of words, attributes and relations (ARO)?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    finite_batches,
    require_finite,
    to_host,
)
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout


@dataclass(frozen=True)
class MultipleChoice(Evaluator):
    """Share of images whose right caption scores above all the wrong ones given with it.

    A wrong caption with an equal score counts as chosen, so that a model that does not see the difference scores
    nothing.

    Attributes:
      data: a finite pipeline with an image and several token sequences per example.
      choices: the fields of the batch with the captions; the first is the right one.
      image, text: names of the towers; ``image_field`` is what the image tower reads.
      group: a field of the source's examples by which scores are averaged first (a relation, a pair of attributes):
        then ``macro_accuracy`` is the mean over groups.  Empty has none.
      least: groups with fewer examples are left out of that mean.

    Source: "When and why vision-language models behave like bags-of-words", arXiv 2210.01936, section 2.
    """

    data: Pipeline | None = None
    choices: tuple[str, ...] = ("text", "negative")
    image: str = "image"
    text: str = "text"
    image_field: str = "image"
    group: str = ""
    least: int = 1

    def __post_init__(self) -> None:
        if len(self.choices) < 2:
            raise UserError(
                f"MultipleChoice.choices is {self.choices}; there are two or more to choose from."
            )

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None:
            raise UserError(
                "MultipleChoice.data is not set; give it a finite pipeline of images and captions."
            )
        pipeline = self.data
        require_finite(pipeline, "MultipleChoice")
        images = Encoder(experiment, layout, self.image, self.image_field)
        texts = [Encoder(experiment, layout, self.text, choice) for choice in self.choices]
        groups = (
            [str(pipeline.source[i][self.group]) for i in range(len(pipeline.source))] if self.group else []
        )

        @jax.jit
        def is_right(image: jax.Array, captions: list[jax.Array]) -> jax.Array:
            right, *wrong = [jnp.sum(image * caption, axis=-1) for caption in captions]
            return right > jnp.max(jnp.stack(wrong), axis=0)  # [B]

        def evaluate(variables: Variables) -> Result:
            hits, rows = [], []
            for batch in finite_batches(pipeline, layout):
                found = is_right(images(variables, batch), [text(variables, batch) for text in texts])
                real = to_host(batch["valid"], layout)
                hits.append(to_host(found, layout)[real])
                rows.append(to_host(batch["index"], layout)[real])
            hit, row = np.concatenate(hits), np.concatenate(rows)
            chance = 1 / len(self.choices)
            result = Result({"accuracy": float(np.mean(hit))}, {"accuracy": chance})
            if groups:
                kinds, place, counts = np.unique(
                    [groups[index] for index in row], return_inverse=True, return_counts=True
                )
                kept = [kind for kind in range(len(kinds)) if counts[kind] >= self.least]
                if not kept:
                    raise UserError(f"MultipleChoice.least is {self.least}, which no {self.group} reaches.")
                result.metrics["macro_accuracy"] = float(
                    np.mean([np.mean(hit[place == kind]) for kind in kept])
                )
                result.chance["macro_accuracy"] = chance
            return result

        return evaluate

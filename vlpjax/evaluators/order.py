"""Multiple choice between captions: does a model know the order of words, attributes and relations (ARO)?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.config import suggest
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.accuracy import class_numbers, mean_per_class
from vlpjax.evaluators.base import Encoder, Evaluator, Result, Variables, encode_all, require_finite
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
        if self.group and self.group not in (first := pipeline.source[0]):
            raise UserError(f"MultipleChoice.group is {self.group!r}{suggest(self.group, first)}.")
        encoders = {choice: Encoder(experiment, layout, self.text, choice) for choice in self.choices}
        images = Encoder(experiment, layout, self.image, self.image_field)

        @functools.partial(jax.jit, out_shardings=layout.replicated)
        def is_right(image: jax.Array, captions: list[jax.Array]) -> jax.Array:
            right, *wrong = [jnp.sum(image * caption, axis=-1) for caption in captions]
            return right > jnp.max(jnp.stack(wrong), axis=0)  # [N]

        @functools.cache  # the data are the same at every evaluation
        def group_of(index: int) -> str:
            return str(pipeline.source[index][self.group])

        def evaluate(variables: Variables) -> Result:
            z, columns = encode_all(pipeline, {**encoders, "": images}, variables, layout)
            real = columns["valid"]
            hit = np.asarray(is_right(z[""], [z[choice] for choice in self.choices]))[real]
            chance = 1 / len(self.choices)
            result = Result({"accuracy": float(np.mean(hit))}, {"accuracy": chance})
            if self.group:
                names = np.array([group_of(int(index)) for index in columns["index"][real]])
                groups, (numbers,) = class_numbers(names)
                large = np.bincount(numbers, minlength=groups)[numbers] >= self.least
                if not large.any():
                    raise UserError(f"MultipleChoice.least is {self.least}, which no {self.group} reaches.")
                result.metrics["macro_accuracy"] = mean_per_class(hit[large], numbers[large])
                result.chance["macro_accuracy"] = chance
            return result

        return evaluate

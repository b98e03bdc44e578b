"""Zero-shot classification: the text tower writes the classifier, out of class names put into prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.data.pipeline import Pipeline
from vlpjax.data.transforms import Tokenize
from vlpjax.errors import UserError
from vlpjax.evaluators.accuracy import accuracies, chances
from vlpjax.evaluators.base import (
    Encoder,
    Evaluator,
    Result,
    Variables,
    encode_all,
    require_finite,
    unit,
)
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout


@dataclass(frozen=True)
class ZeroShot(Evaluator):
    """Accuracy of the nearest class prompt, over all images and as the mean over classes.

    Per class the embeddings of all prompts are normalised, averaged, and normalised again (arXiv 2103.00020,
    section 3.1.4).  Classes with the same name are one class.

    Attributes:
      data: a finite pipeline of labelled images.
      tokenize: turns a prompt into token ids, with the settings that training used.
      templates: prompts with ``{}`` where the class name goes.
      label, name: fields of the source's examples: the class number, and what it is called.
      image, text: names of the towers; ``image_field`` is what the image tower reads.
      ks: the k of top-k accuracy.
    """

    data: Pipeline | None = None
    tokenize: Tokenize | None = None
    templates: tuple[str, ...] = ("{}",)
    label: str = "label"
    name: str = "name"
    image: str = "image"
    text: str = "text"
    image_field: str = "image"
    ks: tuple[int, ...] = (1, 5)

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None or self.tokenize is None:
            raise UserError("ZeroShot needs both 'data' and 'tokenize'; the config leaves one of them out.")
        pipeline = self.data
        require_finite(pipeline, "ZeroShot")
        names, class_of = self._classes(pipeline.source)
        prompts = self._prompts(names, self.tokenize, pipeline.batch_size)
        images = Encoder(experiment, layout, self.image, self.image_field)
        texts = Encoder(experiment, layout, self.text, "text")
        most = min(max(self.ks), len(names))
        sharding = layout.sharding("frames", None)

        @jax.jit
        def combine(parts: list[jax.Array]) -> jax.Array:
            z = jnp.concatenate(parts)[: len(names) * len(self.templates)]
            z = z.reshape(len(names), len(self.templates), -1).mean(axis=1)  # [classes, E]
            return unit(z)

        @functools.partial(jax.jit, out_shardings=layout.replicated)
        def predict(z: jax.Array, classifier: jax.Array) -> jax.Array:
            return jax.lax.top_k(jnp.matmul(z, classifier.T, precision="highest"), most)[1]  # [B, most]

        def evaluate(variables: Variables) -> Result:
            encoded = [texts(variables, {"text": jax.device_put(ids, sharding)}) for ids in prompts]
            classifier = combine(encoded)
            z, columns = encode_all(pipeline, {"image": images}, variables, layout)
            best = np.asarray(predict(z["image"], classifier))
            real = columns["valid"]
            metrics = accuracies(best[real], class_of[columns["index"][real]], self.ks)
            return Result(metrics, chances(len(names), self.ks))

        return evaluate

    def _classes(self, source: Any) -> tuple[list[str], np.ndarray]:
        """The distinct class names, and per example the place of its class among them."""
        names: dict[str, int] = {}
        of_label: dict[int, int] = {}
        class_of = []
        for index in range(len(source)):
            example = source[index]
            for field in (self.label, self.name):
                if field not in example:
                    raise UserError(
                        f"ZeroShot reads the field {field!r}; the examples have {', '.join(example)}."
                    )
            place = names.setdefault(str(example[self.name]), len(names))
            if of_label.setdefault(int(example[self.label]), place) != place:
                raise UserError(
                    f"ZeroShot: {self.label}={example[self.label]} is called {example[self.name]!r} in example {index} "
                    "and something else before; a class needs one name."
                )
            class_of.append(place)
        return list(names), np.array(class_of, np.int32)

    def _prompts(self, names: list[str], tokenize: Tokenize, size: int) -> list[np.ndarray]:
        """Token ids of all prompts, class after class, in batches of one size."""
        wrong = [template for template in self.templates if "{}" not in template]
        if wrong or not self.templates:
            raise UserError(
                f"ZeroShot.templates is {self.templates!r}; give at least one, each with '{{}}' in it."
            )
        rows = [
            tokenize.encode(template.replace("{}", name)) for name in names for template in self.templates
        ]
        rows += rows[-1:] * (-len(rows) % size)
        return [np.stack(rows[start : start + size]) for start in range(0, len(rows), size)]

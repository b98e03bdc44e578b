"""Linear probes: how well a linear classifier does on frozen features, by the two protocols that papers report."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.errors import UserError
from vlpjax.evaluators.base import Encoder
from vlpjax.evaluators.labelled import Answers, Classify, Examples, FeatureClassifier, best_classes
from vlpjax.evaluators.probing import (
    DIRECTIONS,
    Classifier,
    Standard,
    fit_logistic,
    held_out,
    search,
    train_classifier,
)
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout

# Regularisations from 1e-6 to 1e6, eight per decade (arXiv 2103.00020, appendix A.3).
SWEEP = np.logspace(-6, 6, 97)


Fit = Callable[[Examples, int], tuple[Classifier, dict[str, float]]]


@dataclass(frozen=True)
class _Probe(FeatureClassifier):
    """What both protocols share; each says how it fits.

    Attributes:
      normalize: whether features are brought to length one first.
    """

    normalize: bool = False

    def _encoder(self, experiment: Experiment, layout: Layout, normalize: bool = False) -> Encoder:
        return super()._encoder(experiment, layout, normalize or self.normalize)

    def _classify(self, layout: Layout) -> Classify:
        fit = self._fit(layout)

        @functools.partial(jax.jit, out_shardings=layout.replicated)
        def rank(model: Classifier, features: jax.Array) -> jax.Array:
            return best_classes(model(features))

        def classify(known: Examples, asked: Examples, classes: int) -> Answers:
            model, metrics = fit(known, classes)
            return Answers({"": [np.asarray(rank(model, asked.features))]}, metrics)

        return classify

    def _fit(self, layout: Layout) -> Fit:
        """A function from what is known and the number of classes to a classifier and further metrics."""
        raise TypeError(f"{type(self).__name__} is a probe and must define _fit.")


@dataclass(frozen=True)
class LinearProbe(_Probe):
    """Multinomial logistic regression, solved to its optimum by L-BFGS.

    The regularisation that is best on a held-out part of ``train`` is searched from coarse to fine among 97 values,
    then the classifier is fitted to all of ``train`` ("Learning Transferable Visual Models From Natural Language
    Supervision", arXiv 2103.00020, appendix A.3).  It multiplies half the squared norm of the kernel, beside the sum
    of the losses.

    Attributes:
      held_out: share of every class in ``train`` that the regularisation is chosen on.
      regularization: a fixed one; None searches.
      iterations: of L-BFGS, at most.
      seed: of what is held out.
    """

    held_out: float = 0.2
    regularization: float | None = None
    iterations: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise UserError(f"LinearProbe.held_out is {self.held_out}; it is a share between 0 and 1.")

    def _fit(self, layout: Layout) -> Fit:
        solve = jax.jit(
            functools.partial(fit_logistic, iterations=self.iterations),
            static_argnames="classes",
            out_shardings=layout.replicated,
        )
        right = jax.jit(
            lambda model, x, y: jnp.argmax(model(x), axis=1) == y, out_shardings=layout.replicated
        )

        def fit(known: Examples, classes: int) -> tuple[Classifier, dict[str, float]]:
            features, labels, real = known
            regularization = self.regularization
            if regularization is None:
                chosen = held_out(labels, real, self.held_out, self.seed)
                if not chosen.any():
                    raise UserError(
                        "LinearProbe holds nothing out, because no class has two examples; set regularization."
                    )
                rest = (real & ~chosen).astype(np.float32)

                def score(value: float) -> float:
                    model = solve(features, labels, rest, value, classes=classes)
                    return float(np.asarray(right(model, features, labels))[chosen].mean())

                regularization = search(score, SWEEP)
            model = solve(features, labels, real.astype(np.float32), regularization, classes=classes)
            return model, {"regularization": regularization}

        return fit


@dataclass(frozen=True)
class TrainedProbe(_Probe):
    """A linear layer behind BatchNorm without scale and bias, trained by LARS or SGD on the cached features.

    The settings are those of "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, appendix A.1,
    except that images are not augmented: they are encoded once.  After training the statistics of BatchNorm are
    taken anew, from all of ``train``.

    Attributes:
      optimizer: a key of :data:`vlpjax.evaluators.probing.DIRECTIONS`.
      learning_rate: for a batch of 256, to which the real one is proportional; falls along half a cosine.
      momentum, weight_decay: of the optimizer.
      epochs, warmup_epochs: passes over ``train``, and those over which the rate rises from 0.
      batch_size: examples per step; all of ``train`` if it has fewer.
      batch_norm: whether features are standardised.
      seed: of the order and of the initial kernel.
    """

    optimizer: str = "lars"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 90
    warmup_epochs: int = 10
    batch_size: int = 16384
    batch_norm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in DIRECTIONS:
            raise UserError(
                f"TrainedProbe.optimizer is {self.optimizer!r}; there are {', '.join(DIRECTIONS)}."
            )
        if not 0 <= self.warmup_epochs < self.epochs or self.batch_size < 1:
            raise UserError(
                f"TrainedProbe has epochs={self.epochs}, warmup_epochs={self.warmup_epochs} and "
                f"batch_size={self.batch_size}; the warm-up is shorter than the training, and batches are not empty."
            )

    def _fit(self, layout: Layout) -> Fit:
        train = jax.jit(
            functools.partial(
                train_classifier,
                direction=DIRECTIONS[self.optimizer](self.momentum, self.weight_decay),
                batch_norm=self.batch_norm,
                seed=self.seed,
            ),
            static_argnames=("classes", "batch_size"),
            out_shardings=layout.replicated,
        )
        statistics = jax.jit(Standard.of, out_shardings=layout.replicated)

        def fit(known: Examples, classes: int) -> tuple[Classifier, dict[str, float]]:
            features, labels, real = known
            rows = np.flatnonzero(real).astype(np.int32)
            size = min(self.batch_size, len(rows))
            rates = self.rates(len(rows) // size, size)
            model = train(features, labels, rows, rates, batch_size=size, classes=classes)
            if self.batch_norm:
                model = folded(model, statistics(features, real.astype(np.float32)))
            return model, {}

        return fit

    def rates(self, steps: int, batch_size: int) -> np.ndarray:
        """The learning rate of every step, [epochs, steps of an epoch]."""
        total = self.epochs * steps
        warmup = steps * self.warmup_epochs
        step = np.arange(total)
        done = np.clip((step - warmup) / max(total - warmup, 1), 0, 1)
        factor = np.minimum(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + np.cos(math.pi * done))
        rates = self.learning_rate * batch_size / 256 * factor
        return rates.astype(np.float32).reshape(self.epochs, steps)


def folded(model: Classifier, standard: Standard) -> Classifier:
    """The classifier of raw features that equals one of standardised features."""
    kernel = model.kernel / standard.deviation[:, None]
    return Classifier(kernel, model.bias - standard.mean @ kernel)

"""Text transforms that change the order of words: hard negatives for training, perturbed captions for evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np
from grain import transforms as grain_transforms

from vlpjax.data.bad import BadExample
from vlpjax.data.transforms.fields import Example, require
from vlpjax.data.words import ADJECTIVE, NOUN, kinds_of, swaps
from vlpjax.errors import UserError

PERTURBATIONS = ("nouns_adjectives", "all_but_nouns_adjectives", "within_trigrams", "trigrams")
TRIES = 20  # draws until a perturbation differs from the caption


@dataclasses.dataclass(frozen=True)
class SwappedCaption(grain_transforms.RandomMap):
    """A wrong caption of the same words: two nouns, noun phrases, adjectives, adverbs or verbs change places.

    One of all swaps that change the caption is drawn.  A caption without one is a bad example, which another replaces.

    Attributes:
      field: the caption.
      out: where the negative is put.

    Source: "When and why vision-language models behave like bags-of-words", arXiv 2210.01936, section 4.
    """

    field: str = "caption"
    out: str = "negative"

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        caption = require(element, self.field, str)
        found = swaps(caption.split())
        if not found:
            raise BadExample(f"nothing can be swapped in {caption!r}")
        return {**element, self.out: " ".join(found[int(rng.random() * len(found))])}


@dataclasses.dataclass(frozen=True)
class Perturb(grain_transforms.RandomMap):
    """The same words in another order, in one of the four ways of the ARO benchmark.

    The caption itself is cut to as many words, so that length gives nothing away; tokenize it afterwards.  A caption
    that no draw changes is a bad example, which another replaces.

    Attributes:
      kind: ``"nouns_adjectives"`` shuffles these and leaves all others in their places, ``"all_but_nouns_adjectives"``
        the reverse; ``"within_trigrams"`` shuffles the words of every three, ``"trigrams"`` the threes.
      field, out: the caption, and where the perturbed one is put.
      most: words that are kept of the caption.

    Source: "When and why vision-language models behave like bags-of-words", arXiv 2210.01936, section 2 and appendix.
    """

    kind: str
    field: str = "caption"
    out: str = "perturbed"
    most: int = 30

    def __post_init__(self) -> None:
        if self.kind not in PERTURBATIONS:
            raise UserError(f"Perturb.kind is {self.kind!r}; there are {', '.join(PERTURBATIONS)}.")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        caption = require(element, self.field, str)
        words = caption.split()[: self.most]
        changed = perturbed(words, self.kind, rng)
        if changed == words:
            raise BadExample(f"{self.kind} leaves {caption!r} as it is")
        return {**element, self.field: " ".join(words), self.out: " ".join(changed)}


def perturbed(words: list[str], kind: str, rng: np.random.Generator) -> list[str]:
    """The words in another order; the same order only if there is no other one, or after :data:`TRIES` draws."""
    result = words
    for _ in range(TRIES):
        result = _shuffled(words, kind, rng)
        if result != words:
            break
    return result


def _shuffled(words: list[str], kind: str, rng: np.random.Generator) -> list[str]:
    if kind in ("within_trigrams", "trigrams"):
        threes = [words[place : place + 3] for place in range(0, len(words), 3)]
        if kind == "trigrams":
            threes = [threes[place] for place in rng.permutation(len(threes))]
        else:
            threes = [[three[place] for place in rng.permutation(len(three))] for three in threes]
        return [word for three in threes for word in three]
    described = [its in (NOUN, ADJECTIVE) for its in kinds_of(words)]
    moving = [place for place, is_one in enumerate(described) if is_one == (kind == "nouns_adjectives")]
    result = list(words)
    for place, source in zip(moving, rng.permutation(moving) if moving else [], strict=True):
        result[place] = words[source]
    return result

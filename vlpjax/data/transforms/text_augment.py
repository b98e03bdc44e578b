"""Text transforms that leave the meaning more or less as it was: stop words go, words move, words are left out."""

from __future__ import annotations

import dataclasses

import numpy as np
from grain import transforms as grain_transforms

from vlpjax.data.transforms.fields import Example, require
from vlpjax.data.words import word_set
from vlpjax.errors import UserError

STOP_WORDS = word_set("""
    a an the and or but if of at by for with about against between into through during before after above
    below to from up down in out on off over under again further then once here there when where why how
    all any both each few more most other some such no nor not only own same so than too very is are was
    were be been being have has had having do does did doing i me my we our you your he him his she her it
    its they them their this that these those am will just can should now as until while
""")
OPERATIONS = ("insert", "swap", "delete")


@dataclasses.dataclass(frozen=True)
class RemoveStopWords(grain_transforms.RandomMap):
    """Leaves out all stop words, with a probability; a text of nothing else stays as it is.

    Attributes:
      probability: that anything happens.
      field, out: the text, and where the result is put; empty is the field itself.
    """

    probability: float = 0.5
    field: str = "caption"
    out: str = ""

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        words = require(element, self.field, str).split()
        if rng.random() < self.probability:
            words = [word for word in words if word.strip(".,;:!?").lower() not in STOP_WORDS] or words
        return {**element, self.out or self.field: " ".join(words)}


@dataclasses.dataclass(frozen=True)
class EasyAugment(grain_transforms.RandomMap):
    """One operation on a text: a keyword is inserted, words change places, or words are left out.

    The paper's replacement by synonyms becomes the insertion of one of the example's own keywords at a random place:
    another name of the same thing, without a dictionary.  Where there is none, words change places instead.

    Attributes:
      weights: of insertion, swap and deletion.
      share: of the words that are swapped or left out; at least one is.
      keywords: field with words to insert, separated by ``|``; empty inserts nothing.
      field, out: the text, and where the result is put; empty is the field itself.

    Source: "EDA: Easy Data Augmentation Techniques", arXiv 1901.11196; weights of "Improved baselines for
    vision-language pre-training", arXiv 2305.08675.
    """

    weights: tuple[float, float, float] = (0.4, 0.4, 0.2)
    share: float = 0.1
    keywords: str = "keywords"
    field: str = "caption"
    out: str = ""

    def __post_init__(self) -> None:
        if len(self.weights) != 3 or min(self.weights) < 0 or not sum(self.weights):
            raise UserError(
                f"EasyAugment.weights is {self.weights}; it has one for each of {', '.join(OPERATIONS)}, not all 0."
            )
        if not 0 <= self.share <= 1:
            raise UserError(f"EasyAugment.share is {self.share}; it is between 0 and 1.")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        words = require(element, self.field, str).split()
        known = str(element.get(self.keywords) or "").split("|") if self.keywords else []
        known = [word.strip() for word in known if word.strip()]
        operation = OPERATIONS[int(rng.choice(3, p=np.asarray(self.weights) / sum(self.weights)))]
        if operation == "insert" and known:
            place = int(rng.integers(len(words) + 1))
            words = [*words[:place], known[int(rng.integers(len(known)))], *words[place:]]
        elif operation == "delete":
            keep = rng.permutation(len(words))[self._count(words) :]
            words = [words[place] for place in sorted(keep)] or words
        else:
            for _ in range(self._count(words) if len(words) > 1 else 0):
                first, second = rng.choice(len(words), 2, replace=False)
                words[first], words[second] = words[second], words[first]
        return {**element, self.out or self.field: " ".join(words)}

    def _count(self, words: list[str]) -> int:
        return max(1, round(self.share * len(words)))

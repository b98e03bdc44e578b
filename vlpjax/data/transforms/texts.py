"""Text transforms: drawing a caption from the fields of an example, and turning it into token ids."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import lzma
from typing import Any

import numpy as np
from grain import transforms as grain_transforms

from vlpjax.data.bad import BadExample
from vlpjax.data.paths import resolve_path
from vlpjax.data.transforms.fields import Example, require
from vlpjax.errors import UserError


def _cumulative(owner: Any, name: str, count: int) -> tuple[float, ...]:
    """Cumulative weights of `count` choices, the last one 1; equal weights when none are given."""
    weights = getattr(owner, name) or (1.0,) * count
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(
            f"{type(owner).__name__}.{name} is {tuple(weights)}; it takes {count} weights, none negative, not all 0"
        )
    total = sum(weights)
    return tuple(value / total for value in itertools.accumulate(weights))


@dataclasses.dataclass(frozen=True)
class DrawCaption(grain_transforms.RandomMap):
    """Draws a caption: one of `fields`, of its parts one or several in random order, put into a template.

    A field whose text holds `separator` is a list ("duck|bird|water"): between one and `max_parts` of its parts
    are drawn without repetition and joined by ", ".  Fields that are absent or empty are passed over.

    Attributes:
      fields: the text fields to draw from, with `weights` (equal if none).
      templates: texts with one "{}", with `template_weights` (equal if none).
      out: where the caption is put.
    """

    fields: tuple[str, ...] = ("name", "keywords")
    weights: tuple[float, ...] | None = None
    templates: tuple[str, ...] = ("{}",)
    template_weights: tuple[float, ...] | None = None
    separator: str = "|"
    max_parts: int = 3
    out: str = "caption"

    def __post_init__(self) -> None:
        wrong = [template for template in self.templates if template.count("{}") != 1]
        if wrong or not self.templates:
            raise UserError(
                f"DrawCaption.templates has {wrong[:1] or 'nothing'}; a template has exactly one {{}}"
            )
        if not self.fields:
            raise UserError("DrawCaption.fields is empty; it names the text fields to draw from")
        if self.max_parts < 1:
            raise UserError(f"DrawCaption.max_parts is {self.max_parts}; it is 1 or more")
        object.__setattr__(self, "_field_weights", _cumulative(self, "weights", len(self.fields)))
        object.__setattr__(self, "_templates", _cumulative(self, "template_weights", len(self.templates)))

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        which_field, which_template, how_many = rng.random(3).tolist()
        start = min(bisect.bisect_right(self._field_weights, which_field), len(self.fields) - 1)
        for offset in range(len(self.fields)):
            text = element.get(self.fields[(start + offset) % len(self.fields)])
            parts = (
                [part for part in text.split(self.separator) if part.strip()] if isinstance(text, str) else []
            )
            if parts:
                break
        else:
            raise BadExample(f"none of the fields {', '.join(self.fields)} holds a text")
        if len(parts) > 1:
            count = 1 + int(how_many * min(self.max_parts, len(parts)))
            order = np.argsort(rng.random(len(parts)), kind="stable")[:count]
            parts = [parts[i] for i in order]
        template = min(bisect.bisect_right(self._templates, which_template), len(self.templates) - 1)
        return {**element, self.out: self.templates[template].replace("{}", ", ".join(parts))}


@dataclasses.dataclass(frozen=True)
class FixedCaption(grain_transforms.Map):
    """The caption for evaluation: `field` put into `template`, the same every time."""

    template: str = "{}"
    field: str = "name"
    out: str = "caption"

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise UserError(f"FixedCaption.template is {self.template!r}; it has exactly one {{}}")

    def map(self, element: Example) -> Example:
        return {**element, self.out: self.template.replace("{}", require(element, self.field, str))}


@dataclasses.dataclass(frozen=True)
class TranslatedName(grain_transforms.RandomMap):
    """The example's name in one of several languages, drawn evenly from those that have one.

    Attributes:
      locales: such as ("en", "de"); one makes the transform deterministic.
      path: an xz-compressed JSON file ``{"codepoints": [...], "names": {locale: [name or null, ...]}}``.
      key: the field of the example that is looked up in ``codepoints``.
      out: where the name is put.
    """

    locales: tuple[str, ...]
    path: str = "bundled:emoji1594/names.json.xz"
    key: str = "codepoints"
    out: str = "name"

    def __post_init__(self) -> None:
        if not self.locales:
            raise UserError("TranslatedName.locales is empty; it names the languages to draw from")
        known = _translations(self.path)[1]
        unknown = [locale for locale in self.locales if locale not in known]
        if unknown:
            raise UserError(
                f"TranslatedName.locales names {unknown[0]!r}; {self.path} has {', '.join(sorted(known))}"
            )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        rows, names = _translations(self.path)
        key = require(element, self.key, str)
        if key not in rows:
            raise BadExample(f"{self.path} knows no {self.key} {key!r}")
        found = [name for locale in self.locales if (name := names[locale][rows[key]])]
        if not found:
            raise BadExample(f"{key!r} has no name in {', '.join(self.locales)}")
        return {**element, self.out: found[int(rng.random() * len(found))]}


@functools.lru_cache(maxsize=4)
def _translations(path: str) -> tuple[dict[str, int], dict[str, list[str | None]]]:
    """Row of every key, and per locale the names by row."""
    with lzma.open(resolve_path(path), "rt", encoding="utf-8") as file:
        stored = json.load(file)
    return {key: row for row, key in enumerate(stored["codepoints"])}, stored["names"]


@dataclasses.dataclass(frozen=True)
class Tokenize(grain_transforms.Map):
    """Text -> int32 [length] of token ids, padded with the tokenizer's pad id.

    A text that is too long is cut such that the end-of-sequence id stays in the last place.

    Attributes:
      tokenizer: see `vlpjax.data.tokenizers`.
      lower: lower-case the text first.
      bos, eos: put the tokenizer's begin and end ids around the text.
      allow_empty: accept an empty text; otherwise it is a bad example.
    """

    tokenizer: Any
    length: int
    field: str = "caption"
    out: str = "text"
    lower: bool = False
    bos: bool = False
    eos: bool = True
    allow_empty: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 + self.bos + self.eos:
            raise UserError(
                f"Tokenize.length is {self.length}; it must leave room for a token and the special ids"
            )

    def map(self, element: Example) -> Example:
        text = require(element, self.field, str)
        if not self.allow_empty and not text.strip():
            raise BadExample(f"field {self.field!r} is an empty text")
        return {**element, self.out: self.encode(text)}

    def encode(self, text: str) -> np.ndarray:
        """The padded ids of one text, int32 [length]."""
        tokenizer = self.tokenizer
        begin = [self._special("bos_id")] if self.bos else []
        end = [self._special("eos_id")] if self.eos else []
        ids = tokenizer.encode(text.lower() if self.lower else text)
        row = np.full(self.length, tokenizer.pad_id, np.int32)
        ids = [*begin, *ids[: self.length - len(begin) - len(end)], *end]
        row[: len(ids)] = ids
        return row

    def _special(self, name: str) -> int:
        value = getattr(self.tokenizer, name)
        if value is None:
            raise UserError(
                f"Tokenize wants {name}, which {self.tokenizer} does not have; set {name[:3]}=False"
            )
        return value

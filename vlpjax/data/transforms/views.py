"""Several views of one image: what self-supervision compares with one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from grain import transforms as grain_transforms

from vlpjax.data.transforms.fields import Example, require
from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Views(grain_transforms.RandomMap):
    """Makes views of a field, each by a chain of transforms of its own.

    Two views, a weak and a strong one, or two large and eight small crops ("SwAV", arXiv 2006.09882, multi-crop)
    are said the same way: by naming them.  Every view starts from the field as it is here, so decode before.  The
    chains see and change the field under its own name; what they do to other fields is dropped.

    What a view draws is a function of the example's place in the stream and the names of the view and the step, so
    adding a view changes nothing about the others.  With ``seed`` it is a function of a number that the example
    carries instead: then the same augmentation is made again whenever the example comes by, as data sets with
    stored augmentations need ("Reinforce Data, Multiply Impact", arXiv 2303.08983; "TinyViT", arXiv 2207.10666).

    Attributes:
      views: name of the new field -> its transforms by name, in order.
      field: what views are made of.
      seed: field with a whole number that all views draw from; None draws anew every time.
      drop: whether the field itself goes.
    """

    views: Mapping[str, Mapping[str, Any]]
    field: str = "image"
    seed: str | None = None
    drop: bool = False

    def __post_init__(self) -> None:
        if not self.views:
            raise UserError("Views.views is empty; name at least one view")
        for view, chain in self.views.items():
            for name, transform in chain.items():
                if not isinstance(transform, (grain_transforms.Map, grain_transforms.RandomMap)):
                    raise UserError(
                        f"Views.views.{view}.{name} is a {type(transform).__name__}; "
                        "it must be a grain Map or RandomMap"
                    )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        require(element, self.field, object)
        base = (
            int(rng.integers(1 << 62))
            if self.seed is None
            else int(require(element, self.seed, (int, np.integer)))
        )
        made = {view: self._view(element, view, base) for view in self.views}
        kept = {name: value for name, value in element.items() if not (self.drop and name == self.field)}
        return {**kept, **made}

    def _view(self, element: Example, view: str, base: int) -> Any:
        seen = dict(element)
        for name, transform in self.views[view].items():
            if isinstance(transform, grain_transforms.RandomMap):
                words = np.frombuffer(f"{view}/{name}".encode(), np.uint8)
                seen = transform.random_map(
                    seen, np.random.default_rng([base & (2**64 - 1), *map(int, words)])
                )
            else:
                seen = transform.map(seen)
        return seen[self.field]

"""Reading a field of an example, and the transforms that keep, rename or drop fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grain import transforms as grain_transforms

from vlpjax.data.bad import BadExample

Example = dict[str, Any]


def require(example: Mapping[str, Any], field: str, kinds: type | tuple[type, ...]) -> Any:
    """The value of `field`, checked to be one of `kinds`; raises `BadExample` if it is absent or otherwise."""
    value = example.get(field)
    if value is None:
        raise BadExample(
            f"field {field!r} is missing; the example has {', '.join(map(repr, example)) or 'none'}"
        )
    if not isinstance(value, kinds):
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise BadExample(f"field {field!r} is of type {type(value).__name__}, not {wanted}")
    return value


@dataclasses.dataclass(frozen=True)
class Keep(grain_transforms.Map):
    """Keeps `fields` and drops all others."""

    fields: tuple[str, ...]

    def map(self, element: Example) -> Example:
        return {name: require(element, name, object) for name in self.fields}


@dataclasses.dataclass(frozen=True)
class Drop(grain_transforms.Map):
    """Drops `fields`; a field that is not there is no error."""

    fields: tuple[str, ...]

    def map(self, element: Example) -> Example:
        return {name: value for name, value in element.items() if name not in self.fields}


@dataclasses.dataclass(frozen=True)
class Rename(grain_transforms.Map):
    """Renames fields: ``names = {old: new}``."""

    names: Mapping[str, str]

    def map(self, element: Example) -> Example:
        for old in self.names:
            require(element, old, object)
        return {self.names.get(name, name): value for name, value in element.items()}

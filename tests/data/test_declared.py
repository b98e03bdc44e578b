"""A source that only says what its examples would be."""

from __future__ import annotations

import numpy as np
import pytest

from vlpjax.data.sources import Declared
from vlpjax.errors import UserError

EXAMPLE = {"image": "float32[4, 4,3]", "text": "int32[7]", "label": "int32[]", "seen": "bool[2]"}


def test_examples_are_zeros_of_the_declared_types_and_shapes() -> None:
    source = Declared(EXAMPLE, 3)
    assert len(source) == 3
    for index in (0, np.int64(2)):
        found = source[index]
        shapes = {name: (str(value.dtype), value.shape) for name, value in found.items()}
        assert shapes == {
            "image": ("float32", (4, 4, 3)), "text": ("int32", (7,)), "label": ("int32", ()), "seen": ("bool", (2,)),
        }  # fmt: skip
        assert not any(np.any(value) for value in found.values())
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"Record {index} of Declared does not exist: it has 3 records"):
            source[index]
    assert "2" in source.describe(2)


def test_two_sources_are_the_same_if_they_declare_the_same() -> None:
    same, other, longer = (
        Declared(dict(EXAMPLE), 3),
        Declared({**EXAMPLE, "label": "int32[1]"}, 3),
        Declared(EXAMPLE, 4),
    )
    assert Declared(EXAMPLE, 3).fingerprint() == same.fingerprint()
    assert len({source.fingerprint() for source in (same, other, longer)}) == 3


@pytest.mark.parametrize(
    "text", ["float32", "float64[3]", "float32[3", "int32[a]", "int32[-1]", "int32[3,]", ""]
)
def test_what_is_no_type_and_shape_is_told(text: str) -> None:
    with pytest.raises(UserError, match="declared field 'image' is .*write a type and a shape"):
        Declared({"image": text}, 3)


def test_there_is_at_least_one_example() -> None:
    with pytest.raises(UserError, match="number of examples is 0"):
        Declared(EXAMPLE, 0)

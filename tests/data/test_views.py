"""Views of an image: pure, independent of one another, and the same again from a stored seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpjax.config import build, spec
from vlpjax.data import transforms as T
from vlpjax.data.bad import BadExample
from vlpjax.errors import UserError

CROP = {"crop": T.RandomResizedCrop(8), "flip": T.RandomFlip(), "normalize": T.Normalize(range="-1..1")}
STRONG = {**CROP, "jitter": T.ColorJitter(brightness=0.4), "normalize": T.Normalize(range="-1..1")}
STRONG = {name: STRONG[name] for name in ("crop", "flip", "jitter", "normalize")}


def example(**fields: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    return {"image": Image.fromarray(pixels), "caption": "a hand pointing left", "label": 3, **fields}


def made(views: T.Views, given: dict[str, Any] | None = None, seed: int = 0) -> dict[str, Any]:
    return views.random_map(given or example(), np.random.default_rng(seed))


def test_each_view_is_made_by_its_own_chain_from_the_field_as_it_is() -> None:
    small = T.Resize(4)
    found = made(T.Views({"whole": {}, "small": {"resize": small}, "tiny": {"a": small, "b": T.Resize(2)}}))
    assert found["whole"].size == (32, 24)
    assert (found["small"].size, found["tiny"].size) == ((4, 4), (2, 2))
    np.testing.assert_array_equal(found["small"], small.map(example())["image"])


def test_other_fields_are_untouched_and_the_example_is_not_changed() -> None:
    given = example()
    before = dict(given)
    found = made(T.Views({"view1": {"flip": T.RandomFlip(probability=1.0)}, "view2": CROP}), given)
    assert given == before and set(found) == {*before, "view1", "view2"}
    assert found["caption"] == "a hand pointing left" and found["label"] == 3  # the flip rewrote its own copy
    assert found["image"] is given["image"]
    assert "image" not in made(T.Views({"view1": CROP}, drop=True))


def test_the_same_place_in_the_stream_gives_the_same_views_and_another_place_others() -> None:
    views = T.Views({"one": CROP, "two": CROP})
    first, again, other = made(views), made(views), made(views, seed=1)
    for name in ("one", "two"):
        np.testing.assert_array_equal(first[name], again[name])
        assert np.any(first[name] != other[name])
    assert np.any(first["one"] != first["two"])  # the same chain, drawn anew


@pytest.mark.parametrize("seed", [None, "seed"])
def test_adding_a_view_or_a_step_changes_no_other_view(seed: str | None) -> None:
    given = example(seed=np.int64(5))
    few = made(T.Views({"one": CROP, "two": STRONG}, seed=seed), given)
    many = made(T.Views({"zero": STRONG, "two": STRONG, "one": CROP, "three": CROP}, seed=seed), given)
    for name in ("one", "two"):
        np.testing.assert_array_equal(few[name], many[name])
    # A step's draws are named by it: another step before it does not shift them.
    crops = [{"crop": CROP["crop"]}, {"flip": T.RandomFlip(probability=0.0), "crop": CROP["crop"]}]
    plain, later = (made(T.Views({"one": chain}, seed=seed), given)["one"] for chain in crops)
    np.testing.assert_array_equal(plain, later)


def test_a_stored_seed_makes_the_same_views_again_wherever_the_example_comes_by() -> None:
    views = T.Views({"one": STRONG, "two": STRONG}, seed="seed")
    first, again = (made(views, example(seed=2**62 + 7), seed) for seed in (0, 1))
    other = made(views, example(seed=8))
    for name in ("one", "two"):
        np.testing.assert_array_equal(first[name], again[name])
        assert np.any(first[name] != other[name])
    assert made(views, example(seed=np.int32(-3)))["one"].shape == (8, 8, 3)


def test_views_are_said_in_a_config() -> None:
    described = spec(
        T.Views,
        views={
            "weak": {"crop": spec(T.RandomResizedCrop, size=8)},
            "strong": {"crop": spec(T.RandomResizedCrop, size=8), "grey": spec(T.Grayscale, probability=1.0)},
        },
    )
    found = made(build(described))
    assert found["weak"].size == found["strong"].size == (8, 8)
    grey = np.asarray(found["strong"])
    assert (grey[..., 0] == grey[..., 2]).all()


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="Views.views is empty"):
        T.Views({})
    with pytest.raises(
        UserError, match=r"Views.views.one.crop is a int; it must be a grain Map or RandomMap"
    ):
        T.Views({"one": {"crop": 8}})
    with pytest.raises(BadExample, match="field 'image' is missing"):
        made(T.Views({"one": CROP}), {"label": 1})
    with pytest.raises(BadExample, match="field 'seed' is missing"):
        made(T.Views({"one": CROP}, seed="seed"))
    with pytest.raises(BadExample, match="field 'seed' is of type float"):
        made(T.Views({"one": CROP}, seed="seed"), example(seed=0.5))

"""Every option of InfoNCE against a formula written out in loops; what groups of devices exchange."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tests.objectives.rig import compared, comparison, scalars, slope
from tests.tiny import assert_trees_close, layout_of, unit
from vlpjax.errors import UserError
from vlpjax.objectives.contrastive import InfoNCE

B, E, SCALE = 16, 6, 7.0
HEADS = scalars(logit_scale=np.log(SCALE))
RNG = np.random.default_rng(0)
FEATURES = {name: unit(RNG.normal(size=(B, E))).astype(np.float32) for name in ("image", "text")}
CAPTIONS = unit(RNG.normal(size=(B, 2, E))).astype(np.float32)
NEGATIVES = unit(RNG.normal(size=(B, 3, E))).astype(np.float32)
LABELS = RNG.integers(0, 6, B).astype(np.int32)
VALID = RNG.random(B) < 0.7
SHARE = RNG.uniform(0.4, 0.9, B).astype(np.float32)
BATCH = {"label": LABELS, "valid_pair": VALID, "share": SHARE}


def cross_entropy(logits: Any, target: Any) -> float:
    logits, target = np.asarray(logits, np.float64), np.asarray(target, np.float64)
    return float(-target @ (logits - np.log(np.sum(np.exp(logits)))))


def plain(image: Any, text: Any) -> float:
    """The loss without options."""
    logits = SCALE * image @ text.T
    count = len(image)
    rows = [
        cross_entropy(side[row], np.eye(count)[row]) for side in (logits, logits.T) for row in range(count)
    ]
    return float(np.sum(rows)) / (2 * count)


def one_sided(image: Any, text: Any) -> float:
    logits = SCALE * text @ image.T
    return float(np.mean([cross_entropy(logits[row], np.eye(B)[row]) for row in range(B)]))


def with_captions(image: Any, text: Any, captions: Any) -> float:
    texts = [text, captions[:, 0], captions[:, 1]]
    total = 0.0
    for row in range(B):
        logits = SCALE * np.concatenate([each @ image[row] for each in texts])
        target = np.tile(np.eye(B)[row], 3) / 3
        total += cross_entropy(logits, target)
        total += np.mean([cross_entropy(SCALE * image @ each[row], np.eye(B)[row]) for each in texts])
    return total / (2 * B)


def with_negatives(image: Any, text: Any, negatives: Any, own: bool) -> float:
    total = 0.0
    for row in range(B):
        wrong = negatives[row] if own else np.swapaxes(negatives, 0, 1).reshape(-1, E)
        logits = SCALE * np.concatenate([text, wrong]) @ image[row]
        total += cross_entropy(logits, np.eye(len(logits))[row])
        total += cross_entropy(SCALE * image @ text[row], np.eye(B)[row])
    return total / (2 * B)


def without_some(image: Any, text: Any) -> float:
    return plain(image[VALID], text[VALID])


def without_some_of_a_class(image: Any, text: Any) -> float:
    image, text, labels = image[VALID], text[VALID], LABELS[VALID]
    same = labels[:, None] == labels
    target, logits = same / same.sum(axis=1, keepdims=True), SCALE * image @ text.T
    rows = [cross_entropy(x[row], target[row]) for x in (logits, logits.T) for row in range(len(image))]
    return float(np.mean(rows))


def with_mixing(image: Any, text: Any) -> float:
    same = LABELS[:, None] == LABELS
    once = same / same.sum(axis=1, keepdims=True)
    target = np.stack([SHARE[row] * once[row] + (1 - SHARE[row]) * once[B - 1 - row] for row in range(B)])
    columns = target.T / target.T.sum(axis=1, keepdims=True)
    logits, total = SCALE * image @ text.T, 0.0
    for row in range(B):
        total += cross_entropy(logits[row], target[row]) + cross_entropy(logits.T[row], columns[row])
    return total / (2 * B)


def grouped(image: Any, text: Any, groups: int) -> float:
    parts = [(image[part], text[part]) for part in np.split(np.arange(B), groups)]
    return float(np.mean([plain(*part) for part in parts]))


CASES: dict[str, tuple[InfoNCE, Callable[..., float], dict[str, Any]]] = {
    "one_sided": (InfoNCE(rows=("text",)), one_sided, {}),
    "captions": (InfoNCE(captions=("a", "b")), with_captions, {"captions": CAPTIONS}),
    "negatives": (
        InfoNCE(negatives=("wrong",)),
        lambda image, text, negatives: with_negatives(image, text, negatives, False),
        {"negatives": NEGATIVES},
    ),
    "own_negatives": (
        InfoNCE(negatives=("wrong",), own_negatives=True),
        lambda image, text, negatives: with_negatives(image, text, negatives, True),
        {"negatives": NEGATIVES},
    ),
    "valid": (InfoNCE(valid="valid_pair"), without_some, {}),
    "valid_same": (InfoNCE(valid="valid_pair", same="label"), without_some_of_a_class, {}),
    "mixed": (InfoNCE(mixed="share", same="label"), with_mixing, {}),
    "groups": (InfoNCE(groups=4), lambda image, text: grouped(image, text, 4), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_formula(name: str) -> None:
    objective, formula, more = CASES[name]
    features = FEATURES | more
    found = compared(objective, features, HEADS, batch=BATCH)
    np.testing.assert_allclose(found.loss.value, formula(**features), rtol=1e-5)
    for index, part in enumerate(features):
        direction = np.random.default_rng(index).normal(size=features[part].shape)
        expected = slope(formula, features, part, direction)
        np.testing.assert_allclose(np.sum(found.features[part] * direction), expected, rtol=1e-3, atol=1e-5)
    # The scale multiplies all that images are compared with, so its slope is that along the images themselves.
    expected = slope(formula, features, "image", np.asarray(features["image"], np.float64))
    np.testing.assert_allclose(found.heads["loss_logit_scale"]["value"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["captions", "negatives", "own_negatives", "valid", "mixed"])
def test_value_and_gradients_are_the_same_on_eight_devices(name: str) -> None:
    objective, _, more = CASES[name]
    one, eight = (
        compared(objective, FEATURES | more, HEADS, batch=BATCH, layout=layout)
        for layout in (None, layout_of(8, replica=2, fsdp=4))
    )
    assert_trees_close(eight.loss.value, one.loss.value, rtol=1e-6)
    assert_trees_close(eight.gradients, one.gradients, rtol=1e-5, atol=1e-7)
    assert_trees_close(dict(eight.loss.metrics), dict(one.loss.metrics), rtol=1e-6)


@pytest.mark.parametrize("rows", [("image", "text"), ("text",)])
def test_accuracy_is_that_of_valid_pairs_among_themselves(rows: tuple[str, ...]) -> None:
    """Every valid query finds its own key, but for a key of no valid pair that is nearer to all."""
    key, query = ("image", "text") if rows == ("text",) else ("text", "image")
    features = {key: np.eye(B, dtype=np.float32), query: np.eye(B, dtype=np.float32)}
    features[query][:, np.flatnonzero(~VALID)[0]] = 2.0
    found = compared(InfoNCE(valid="valid_pair", rows=rows), features, HEADS, batch=BATCH)
    assert found.loss.metrics["accuracy"] == 1.0
    assert compared(InfoNCE(rows=rows), features, HEADS).loss.metrics["accuracy"] < 0.5


def test_smoothing_is_spread_over_valid_columns_only() -> None:
    some = compared(InfoNCE(valid="valid_pair", label_smoothing=0.3), FEATURES, HEADS, batch=BATCH)
    image, text = FEATURES["image"][VALID], FEATURES["text"][VALID]
    alone = compared(InfoNCE(label_smoothing=0.3), {"image": image, "text": text}, HEADS)
    np.testing.assert_allclose(some.loss.value, alone.loss.value, rtol=1e-5)


def test_negatives_whose_logits_vanish_change_nothing() -> None:
    images = np.abs(FEATURES["image"])  # so that all of them are far from the negatives
    features = {"image": images, "text": FEATURES["text"]}
    far = np.full((B, 1, E), -50, np.float32)
    with_them = compared(InfoNCE(negatives=("wrong",)), features | {"negatives": far}, HEADS)
    without = compared(InfoNCE(), features, HEADS)
    np.testing.assert_allclose(with_them.loss.value, without.loss.value, rtol=1e-6)
    np.testing.assert_allclose(with_them.features["negatives"], 0.0, atol=1e-6)


def test_negatives_are_never_rows() -> None:
    """The texts' half does not reach them at all."""
    features = FEATURES | {"negatives": NEGATIVES}
    both, images_only = (
        compared(InfoNCE(negatives=("wrong",), rows=rows), features, HEADS).features["negatives"]
        for rows in (("image", "text"), ("image",))
    )
    np.testing.assert_allclose(2 * both, images_only, rtol=1e-5, atol=1e-8)


def test_equal_captions_cost_the_images_rows_the_logarithm_of_their_number() -> None:
    features = FEATURES | {"captions": np.stack([FEATURES["text"]] * 2, axis=1)}
    three = compared(InfoNCE(captions=("a", "b"), rows=("image",)), features, HEADS)
    one = compared(InfoNCE(rows=("image",)), FEATURES, HEADS)
    np.testing.assert_allclose(three.loss.value, one.loss.value + np.log(3), rtol=1e-6)


def test_a_mixture_of_nothing_is_the_unmixed_loss() -> None:
    mixed = compared(InfoNCE(mixed="share"), FEATURES, HEADS, batch={"share": np.ones(B, np.float32)})
    unmixed = compared(InfoNCE(), FEATURES, HEADS)
    np.testing.assert_allclose(mixed.loss.value, unmixed.loss.value, rtol=1e-6)


def test_a_fixed_scale_is_no_parameter() -> None:
    objective = InfoNCE(temperature=1 / SCALE, learned=False)
    assert objective.heads() == {} and objective.constraints() == {}
    np.testing.assert_allclose(
        compared(objective, FEATURES, scalars()).loss.value, plain(**FEATURES), rtol=1e-5
    )
    with pytest.raises(UserError, match="learned=False fixes it"):
        InfoNCE(learned=False, scale_of="clip")


# --- groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 4, 16])
def test_groups_are_the_same_on_eight_devices(groups: int) -> None:
    objective = InfoNCE(groups=groups, label_smoothing=0.1)
    one, eight = (
        compared(objective, FEATURES, HEADS, layout=layout)
        for layout in (None, layout_of(8, replica=2, fsdp=4))
    )
    assert_trees_close(eight.gradients, one.gradients, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(eight.loss.value, one.loss.value, rtol=1e-6)


def test_micro_batches_fill_groups_up() -> None:
    """In four groups of a batch four times as large, an example meets as many others as it does without either."""
    alike = {name: np.tile(FEATURES["image"][:1], (4 * B, 1)) for name in FEATURES}
    np.testing.assert_allclose(compared(InfoNCE(groups=4), alike, HEADS).loss.value, np.log(B), rtol=1e-6)


def test_other_groups_have_no_influence() -> None:
    """The gradient of a group's rows does not change when the others' features do."""
    changed = {
        name: np.concatenate([x[:4], unit(x[4:] ** 3)]).astype(np.float32) for name, x in FEATURES.items()
    }
    first, second = (
        compared(InfoNCE(groups=4), features, HEADS).features for features in (FEATURES, changed)
    )
    for name in FEATURES:
        np.testing.assert_array_equal(first[name][:4], second[name][:4])
        assert np.any(first[name][4:] != second[name][4:])


def devices_together(line: str) -> int:
    """Devices per group of a collective, in whichever of its three notations the compiler writes them."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return int(np.prod([int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2])]))
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    assert listed, line
    return len(listed[1].split(","))


def gathers(groups: int) -> list[tuple[int, int]]:
    """Of each all-gather in the compiled gradient: devices per group, and numbers that a device ends up with."""
    layout = layout_of(8)
    features = jax.device_put(FEATURES, layout.sharding("batch"))
    function = jax.jit(comparison(InfoNCE(groups=groups), HEADS, layout=layout))
    text = function.lower(features, HEADS["params"], HEADS["params"], {}).compile().as_text()
    found = []
    for line in re.findall(r".* = .*all-gather\(.*", text):
        shapes = re.findall(r"f32\[([\d,]+)\]", line.partition("all-gather(")[0])
        size = sum(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
        found.append((devices_together(line), size))
    return found


def test_features_are_gathered_inside_a_group_only() -> None:
    whole, four = gathers(1), gathers(4)
    assert whole and four
    assert {devices for devices, _ in whole} == {8}
    assert {devices for devices, _ in four} == {2}
    # What a device receives falls by the number of groups.
    assert 4 * max(size for _, size in four) <= max(size for _, size in whole)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UserError, match="does not divide the batch of 16"):
        compared(InfoNCE(groups=3), FEATURES, HEADS)
    with pytest.raises(UserError, match="'image', 'text' or both"):
        InfoNCE(rows=("picture",))
    with pytest.raises(UserError, match="rows has no 'image'"):
        InfoNCE(rows=("text",), negatives=("wrong",))
    with pytest.raises(UserError, match="one group"):
        InfoNCE(mixed="share", groups=2)
    with pytest.raises(UserError, match="6 blocks of examples do not lie evenly on 8 devices"):
        wide = {name: np.concatenate([x, x, x]) for name, x in FEATURES.items()}
        compared(InfoNCE(groups=6), wide, HEADS, layout=layout_of(8))

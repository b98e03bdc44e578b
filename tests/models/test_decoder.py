"""The decoder: what tokens see, packed and cached and scanned, and that its switches reach the blocks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.config import build, spec
from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder, prefix_causal
from vlpjax.models.positions import Rotary, Yarn
from vlpjax.parallel.attention import Interval

V, T = 31, 10
IDS = np.random.default_rng(0).integers(0, V, (2, T))
DECODER = Decoder(
    V, 16, 5, 4, kv_heads=2, mlp_dim=24, pattern=("local", "global"), window=3, local_rotary=Rotary(base=100.0),
    tied=False, qk_norm="rms",
)  # fmt: skip


@functools.cache
def variables() -> Any:
    return nn.meta.unbox(jax.jit(DECODER.init)(jax.random.key(0), IDS))


def scanned() -> Any:
    """The same parameters for the scanned form."""
    params = dict(variables()["params"])
    blocks = [params.pop(f"block_{layer}") for layer in range(5)]
    return {"params": params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


@functools.partial(jax.jit, static_argnames=("decoder", "hidden", "attention"))
def apply(decoder: Decoder, variables: Any, ids: Any, **options: Any) -> dict[str, Any]:
    return decoder.apply(variables, ids, **options)


def changed_by(place: int, **options: Any) -> list[int]:
    """Which tokens' features change with the token at ``place`` of the first row."""
    other = IDS.copy()
    other[0, place] = (other[0, place] + 1) % V
    one, two = (apply(DECODER, variables(), ids, **options)["tokens"][0] for ids in (IDS, other))
    return np.flatnonzero(np.any(one != two, axis=-1)).tolist()


def test_tokens_see_what_stands_before_them() -> None:
    assert changed_by(4) == list(range(4, T))


def test_local_layers_see_the_last_window_tokens() -> None:
    outputs = apply(DECODER, variables(), IDS, attention=tuple(range(5)))
    index = np.arange(T)
    before = index[:, None] >= index
    near = before & (index[:, None] - index < 3)
    for layer, weights in outputs["attention"].items():
        np.testing.assert_array_equal(weights[0, 0] > 0, near if layer % 2 == 0 else before)


def test_a_scan_and_rematerialisation_change_nothing() -> None:
    options = {"hidden": (0, 2, -1), "attention": (1,)}
    expected = apply(DECODER, variables(), IDS, **options)
    assert jax.tree.structure(
        nn.meta.unbox(jax.eval_shape(DECODER.clone(scan=True).init, jax.random.key(0), IDS))
    ) == (jax.tree.structure(scanned()))
    for decoder, weights in (
        (DECODER.clone(scan=True), scanned()),
        (DECODER.clone(scan=True, remat="full"), scanned()),
        (DECODER.clone(remat="dots"), variables()),
    ):
        found = apply(decoder, weights, IDS, **options)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("scan", [False, True])
def test_a_cache_changes_nothing(scan: bool) -> None:
    decoder, weights = (DECODER.clone(scan=True), scanned()) if scan else (DECODER, variables())
    expected = apply(DECODER, variables(), IDS)["logits"]
    cache = decoder.init_cache(2, T + 3)
    pieces = []
    for start, end in ((0, 5), (5, 6), (6, 10)):
        outputs = apply(decoder, weights, IDS[:, start:end], cache=cache, start=start)
        cache = outputs["cache"]
        pieces.append(outputs["logits"])
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), expected, rtol=1e-4, atol=1e-5)
    assert cache.key.shape == (5, 2, T + 3, 2, 4)


def test_packed_texts_are_what_they_are_alone() -> None:
    packed = np.concatenate([IDS[0, :6], IDS[1, :4], [0, 0]])[None]
    segments = np.array([[1] * 6 + [2] * 4 + [0] * 2])
    found = apply(DECODER, variables(), packed, segment_ids=segments)["logits"][0]
    expected = apply(DECODER, variables(), IDS)["logits"]
    np.testing.assert_allclose(found[:6], expected[0, :6], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[6:10], expected[1, :4], rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(found))


def test_a_prefix_sees_all_of_itself() -> None:
    decoder = DECODER.clone(window=T)
    run = functools.partial(apply, decoder, variables())
    weights = run(IDS, interval=prefix_causal(jnp.array([4, 1]), T), attention=(1,))["attention"][1]
    index = np.arange(T)
    before = index[:, None] >= index
    np.testing.assert_array_equal(weights[0, 0] > 0, before | (index < 4))
    np.testing.assert_array_equal(weights[1, 0] > 0, before)


def test_masks_stand_alone_or_cut_an_interval() -> None:
    random = np.random.default_rng(1)
    mask = random.random((2, T, T)) < 0.7
    mask[:, np.arange(T), np.arange(T)] = True
    index = np.arange(T)
    for interval, allowed in (
        (None, True),
        (Interval(jnp.zeros((1, T), int), index[None] + 1), index[:, None] >= index),
    ):
        outputs = apply(DECODER, variables(), IDS, mask=mask, interval=interval, attention=(0, 1))
        recent = index[:, None] - index < 3
        np.testing.assert_array_equal(outputs["attention"][1][:, 0] > 0, mask & allowed)
        np.testing.assert_array_equal(outputs["attention"][0][:, 0] > 0, mask & allowed & recent)


def test_embeddings_stand_for_ids() -> None:
    decoder = DECODER.clone(embed_scale=2.5)
    rows = decoder.apply(variables(), IDS, method="embed")
    np.testing.assert_allclose(
        rows, 2.5 * variables()["params"]["token_embedding"]["embedding"][IDS], rtol=1e-6
    )
    expected = apply(decoder, variables(), IDS)["logits"]
    found = apply(decoder, variables(), None, embeddings=rows)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # A first call with embeddings makes all parameters nevertheless.
    shapes = jax.eval_shape(lambda rows: DECODER.init(jax.random.key(0), embeddings=rows, logits=False), rows)
    assert jax.tree.structure(nn.meta.unbox(shapes)) == jax.tree.structure(variables())


def test_coordinates_of_images_turn_queries_and_keys() -> None:
    decoder = DECODER.clone(rotary=Rotary(sections=(1, 1, 0)), local_rotary=None)
    flat = np.broadcast_to(np.arange(T), (3, 2, T))
    grid = flat.copy()
    grid[1, :, 3:7] = 20
    one, two, three = (
        apply(decoder, variables(), IDS, positions=positions)["logits"] for positions in (None, flat, grid)
    )
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert float(np.abs(one - three).max()) > 1e-3


def test_tied_decoders_have_no_head_and_soft_caps_bound_logits() -> None:
    decoder = DECODER.clone(tied=True, final_soft_cap=0.5)
    params = {name: value for name, value in variables()["params"].items() if name != "head"}
    outputs = apply(decoder, {"params": params}, IDS)
    plain = outputs["tokens"] @ params["token_embedding"]["embedding"].T
    np.testing.assert_allclose(outputs["logits"], 0.5 * np.tanh(plain / 0.5), rtol=1e-4, atol=1e-5)
    assert "head" not in jax.eval_shape(decoder.init, jax.random.key(0), IDS)["params"]


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits() -> None:
    decoder = DECODER.clone(dtype=jnp.bfloat16)
    outputs = apply(decoder, variables(), IDS)
    assert outputs["tokens"].dtype == jnp.bfloat16 and outputs["logits"].dtype == jnp.float32
    assert decoder.init_cache(1, 4).key.dtype == jnp.bfloat16
    exact = apply(DECODER, variables(), IDS)["logits"]
    assert float(np.abs(outputs["logits"] - exact).mean() / np.abs(exact).mean()) < 0.05


def test_dropout_is_for_training() -> None:
    decoder = DECODER.clone(dropout=0.5)
    run = jax.jit(lambda key: decoder.apply(variables(), IDS, train=True, rngs={"dropout": key})["logits"])
    assert np.any(run(jax.random.key(0)) != run(jax.random.key(1)))
    np.testing.assert_array_equal(
        apply(decoder, variables(), IDS)["logits"], apply(DECODER, variables(), IDS)["logits"]
    )


def test_learned_positions_are_added_by_position() -> None:
    decoder = Decoder(V, 8, 1, 2, rotary=None, learned_positions=True, length=16)
    weights = nn.meta.unbox(jax.jit(decoder.init)(jax.random.key(0), IDS))
    shifted = apply(decoder, weights, IDS, positions=np.arange(T)[None] + 3)["logits"]
    table = weights["params"]["position_embedding"]
    moved = {"params": weights["params"] | {"position_embedding": jnp.roll(table, -3, axis=0)}}
    np.testing.assert_allclose(shifted, apply(decoder, moved, IDS)["logits"], rtol=1e-5, atol=1e-6)


def test_every_parameter_has_logical_axes() -> None:
    for scan in (False, True):
        shapes = jax.eval_shape(DECODER.clone(scan=scan).init, jax.random.key(0), IDS)["params"]
        for leaf in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)):
            assert isinstance(leaf, nn.LogicallyPartitioned)
            assert len(leaf.names) == leaf.value.ndim


def test_it_can_be_described_and_built() -> None:
    described = spec(
        Decoder,
        vocabulary=V,
        width=8,
        depth=1,
        heads=2,
        rotary=spec(Rotary, scaling=spec(Yarn, factor=4.0, length=64)),
    )
    decoder = build(described)
    assert decoder.rotary == Rotary(scaling=Yarn(4.0, 64)) and decoder.tied


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (dict(pattern=("global", "far")), {}, "'global' and 'local'"),
        (dict(window=None), {}, "give them a window"),
        (dict(order="post"), {}, "'pre' and 'both'"),
        (dict(length=8), {}, "takes 8 tokens"),
        (dict(learned_positions=True), {}, "needs a length"),
        (dict(scan=True, local_rotary=Rotary(fraction=0.5)), {}, "equally many features"),
        ({}, dict(embeddings=np.zeros((2, T, 16))), "one of the two"),
        ({}, dict(cache=DECODER.init_cache(2, 4)), "has 4 slots, but 10"),
        ({}, dict(cache=DECODER.init_cache(2, 16), segment_ids=IDS), "no segment_ids"),
    ],
)
def test_mistakes_are_told(fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda: DECODER.clone(**fields).init(jax.random.key(0), IDS, **options))

"""The encoder-decoder: its relative positions, its masks, its cache, and generation equal to `transformers`'."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.core import meta
from transformers.models.t5.modeling_t5 import T5Attention

from vlpjax.errors import UserError
from vlpjax.models.beam import Beam
from vlpjax.models.encoder_decoder import EncoderDecoder, relative_buckets, shift_right
from vlpjax.models.generate import generate
from vlpjax.models.sampling import Greedy, NoRepeat, Sample

MODEL = EncoderDecoder(
    vocabulary=31, width=12, depth=2, decoder_depth=2, heads=2, head_dim=5, mlp_dim=20, buckets=8, max_distance=10
)  # fmt: skip
IDS = np.array([[9, 4, 7, 1, 0, 0], [3, 8, 2, 5, 6, 1]], np.int32)
OUTPUTS = np.array([[0, 6, 3, 9], [0, 2, 2, 7]], np.int32)
LENGTHS = np.array([4, 6])


@pytest.fixture(scope="module")
def variables() -> Any:
    return meta.unbox(jax.jit(MODEL.init)(jax.random.key(0), IDS, OUTPUTS))


@functools.partial(jax.jit, static_argnames="model")
def whole(variables: Any, ids: jax.Array, outputs: jax.Array, model: EncoderDecoder = MODEL) -> Any:
    return model.apply(variables, ids, outputs, hidden=(0, -1), decoder_hidden=(-1,))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (16, 64)])
def test_buckets_are_those_of_t5(bidirectional: bool, buckets: int, max_distance: int) -> None:
    offsets = np.arange(-300, 301)[None]
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(offsets), bidirectional, buckets, max_distance
    )
    found = relative_buckets(jnp.asarray(offsets), buckets, max_distance, bidirectional)
    np.testing.assert_array_equal(found, theirs)


def test_padding_is_not_seen_and_later_outputs_are_not_either(variables: Any) -> None:
    before = whole(variables, IDS, OUTPUTS)
    short = whole(variables, IDS[:1, :4], OUTPUTS[:1])
    np.testing.assert_allclose(before["logits"][0], short["logits"][0], atol=1e-5)
    np.testing.assert_allclose(before["encoder"]["pooled"][0], short["encoder"]["pooled"][0], atol=1e-5)
    changed = OUTPUTS.copy()
    changed[:, 2] = 11
    after = whole(variables, IDS, changed)["logits"]
    np.testing.assert_array_equal(before["logits"][:, :2], after[:, :2])
    assert np.all(np.any(before["logits"][:, 2:] != after[:, 2:], axis=-1))


def test_where_a_token_stands_matters_by_distance_only(variables: Any) -> None:
    """The same words further on: the encoder, unlike one with a table of positions, sees the same."""
    words = np.array([[4, 7, 9]], np.int32)
    apply = jax.jit(lambda v, t, n: MODEL.apply(v, tokens=t, lengths=n, method="encode")["tokens"])
    tokens = MODEL.apply(variables, words, method="embed")
    found = apply(variables, tokens, np.array([3]))
    assert np.abs(found[:, ::-1] - apply(variables, tokens[:, ::-1], np.array([3]))).max() > 1e-3
    twice = jnp.concatenate([tokens, tokens], axis=1)
    np.testing.assert_allclose(apply(variables, twice, np.array([3]))[:, :3], found, atol=1e-5)


def test_the_cache_gives_what_the_whole_gives(variables: Any) -> None:
    expected = whole(variables, IDS, OUTPUTS)

    @jax.jit
    def stepwise(variables: Any, memory: jax.Array) -> jax.Array:
        decode = functools.partial(MODEL.apply, variables, method="decode", memory_lengths=LENGTHS)
        out = decode(OUTPUTS[:, :2], memory=memory, cache=MODEL.init_cache(2, 5, 6))
        logits = [out["logits"]]
        for place in (2, 3):
            out = decode(
                OUTPUTS[:, place : place + 1], cache=out["cache"], start=place
            )  # memory from the cache
            logits.append(out["logits"])
        return jnp.concatenate(logits, axis=1)

    found = stepwise(variables, expected["encoder"]["tokens"])
    np.testing.assert_allclose(found, expected["logits"], atol=1e-5)


def test_a_scanned_stack_gives_what_the_unrolled_gives(variables: Any) -> None:
    params = dict(variables["params"])
    for half in ("encoder", "decoder"):
        own = dict(params[half])
        blocks = [own.pop(f"block_{layer}") for layer in range(2)]
        params[half] = {**own, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}
    scanned = whole({"params": params}, IDS, OUTPUTS, MODEL.clone(scan=True, remat="full"))
    expected = whole(variables, IDS, OUTPUTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, expected)


def test_initial_logits_of_the_attention_have_a_spread_of_one() -> None:
    """Logits that are not scaled start with smaller queries instead."""
    model = EncoderDecoder(vocabulary=9, width=256, depth=1, heads=4, head_dim=64, mlp_dim=8)
    shapes = jax.jit(lambda key: model.init(key, IDS[:, :2] % 9, IDS[:, :2] % 9))
    attention = meta.unbox(shapes(jax.random.key(0)))["params"]["encoder"]["block_0"]["attention"]
    assert np.std(attention["query"]["kernel"]) == pytest.approx((256 * 64) ** -0.5, rel=0.02)
    assert np.std(attention["key"]["kernel"]) == pytest.approx(256**-0.5, rel=0.02)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, EncoderDecoder, Any, jax.Array]:
    """A T5 of theirs with random weights, ours with the same, and what ours encodes."""
    from tests.weights.parity import randomize
    from vlpjax.weights import from_pretrained

    config = transformers.T5Config(
        vocab_size=31, d_model=12, d_kv=5, d_ff=20, num_layers=2, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    peer = randomize(transformers.T5ForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("t5")
    peer.save_pretrained(folder)
    model, variables = from_pretrained(folder)
    memory = jax.jit(lambda variables: model.apply(variables, IDS, method="encode")["tokens"])(variables)
    return peer, model, variables, memory


def theirs(peer: Any, **options: Any) -> np.ndarray:
    with torch.no_grad():
        found = peer.generate(
            input_ids=torch.tensor(IDS),
            attention_mask=torch.tensor(IDS != 0).long(),
            do_sample=False,
            **options,
        )
    return found.numpy()[:, 1:]


def test_greedy_generation_equals_theirs(peers: tuple[Any, EncoderDecoder, Any, jax.Array]) -> None:
    peer, model, variables, memory = peers
    # With random weights it would repeat itself for ever, if it might.
    expected = theirs(peer, max_new_tokens=64, eos_token_id=None, no_repeat_ngram_size=2)
    assert expected.shape == (2, 64) and min(len(set(row)) for row in expected.tolist()) > 10
    options = dict(memory=memory, memory_lengths=LENGTHS, processors=(NoRepeat(2),))
    found = generate(model, variables, max_new_tokens=64, **options)
    np.testing.assert_array_equal(found.tokens, expected)


@functools.partial(jax.jit, static_argnames="model")
def last_logits(variables: Any, memory: jax.Array, ids: jax.Array, count: int, model: EncoderDecoder) -> Any:
    """Of what follows the first ``count`` of ``ids``, by decoding all of them; no cache."""
    decoded = model.apply(variables, ids, memory=memory, memory_lengths=LENGTHS, method="decode")
    return jax.lax.dynamic_index_in_dim(decoded["logits"], count - 1, axis=1, keepdims=False)


@pytest.mark.parametrize("sampler", [Greedy(), Sample(temperature=0.7, top_k=12, top_p=0.95)])
def test_the_cache_changes_nothing_in_generation(
    peers: tuple[Any, EncoderDecoder, Any, jax.Array], sampler: Greedy | Sample
) -> None:
    _, model, variables, memory = peers
    rng, expected = jax.random.key(5), np.zeros((2, 65), np.int32)
    expected[:, 0] = model.start_id
    for count in range(1, 65):
        rng, key = jax.random.split(rng)
        expected[:, count] = sampler(last_logits(variables, memory, expected, count, model), key)
    found = generate(
        model, variables, memory=memory, memory_lengths=LENGTHS, max_new_tokens=64, sampler=sampler,
        rng=jax.random.key(5),
    )  # fmt: skip
    np.testing.assert_array_equal(found.tokens, expected[:, 1:])
    assert isinstance(sampler, Greedy) or min(len(set(row)) for row in found.tokens.tolist()) > 5


def test_beam_search_equals_theirs(peers: tuple[Any, EncoderDecoder, Any, jax.Array]) -> None:
    peer, model, variables, memory = peers
    expected = theirs(peer, max_new_tokens=12, num_beams=3, eos_token_id=7)
    found = generate(
        model, variables, memory=memory, memory_lengths=LENGTHS, max_new_tokens=12, sampler=Beam(3), eos=(7,)
    )
    np.testing.assert_array_equal(found.tokens[:, : expected.shape[1]], expected)


def test_outputs_that_were_begun_go_on_as_they_would_have(
    peers: tuple[Any, EncoderDecoder, Any, jax.Array],
) -> None:
    _, model, variables, memory = peers
    options = dict(memory=memory, memory_lengths=LENGTHS)
    whole = generate(model, variables, max_new_tokens=9, **options).tokens
    begun = np.concatenate([np.full((2, 1), model.start_id), whole], axis=1)
    begun[1, 3:] = 0  # the second row is shorter, and is moved to the right
    again = generate(model, variables, begun[:, :5], lengths=[5, 3], max_new_tokens=4, **options).tokens
    np.testing.assert_array_equal(again[0], whole[0, 4:8])
    np.testing.assert_array_equal(again[1], whole[1, 2:6])


def test_generation_tells_what_it_needs(variables: Any) -> None:
    with pytest.raises(UserError, match="EncoderDecoder needs memory="):
        generate(MODEL, variables, max_new_tokens=2)
    with pytest.raises(UserError, match="no embeddings="):
        memory = np.zeros((1, 2, 12), np.float32)
        generate(MODEL, variables, embeddings=memory, memory=memory, max_new_tokens=2)


def test_shift_right() -> None:
    np.testing.assert_array_equal(shift_right(jnp.array([[5, 6, 1]]), 2), [[2, 5, 6]])


def test_bad_input_is_told(variables: Any) -> None:
    with pytest.raises(UserError, match="either ids or tokens, but was given neither"):
        MODEL.apply(variables, method="encode")
    with pytest.raises(UserError, match="cross=True was called without a memory"):
        MODEL.apply(variables, OUTPUTS, method="decode")

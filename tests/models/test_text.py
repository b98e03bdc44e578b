"""The text tower: causal and read at the end of the text as in CLIP, or bidirectional as in BERT and SigLIP."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.positions_2d import sincos_positions
from vlpjax.models.text import MaskedLanguageHead, TextTransformer

TOWER = TextTransformer(vocabulary=20, length=8, width=16, depth=2, heads=2, embedding=8)
IDS = np.array([[5, 6, 7, 1, 0, 0, 0, 0], [3, 9, 1, 0, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7, 8, 1]], np.int32)


@pytest.fixture(scope="module")
def variables() -> Any:
    return TOWER.init(jax.random.key(0), IDS)


def test_outputs_by_name(variables: Any) -> None:
    outputs = TOWER.apply(variables, IDS)
    assert {name: x.shape for name, x in outputs.items()} == {
        "tokens": (3, 8, 16),
        "pooled": (3, 16),
        "embedding": (3, 8),
    }


def test_the_feature_is_the_token_at_the_end_of_the_text(variables: Any) -> None:
    outputs = TOWER.apply(variables, IDS)
    for row, end in enumerate((3, 2, 7)):
        np.testing.assert_array_equal(outputs["pooled"][row], outputs["tokens"][row, end])


def test_no_token_sees_a_later_one(variables: Any) -> None:
    changed = IDS.copy()
    changed[2, 5] = 19
    before, after = (TOWER.apply(variables, ids)["tokens"][2] for ids in (IDS, changed))
    np.testing.assert_array_equal(before[:5], after[:5])
    assert all(np.any(before[place] != after[place]) for place in (5, 6, 7))


def test_padding_does_not_matter_and_words_do(variables: Any) -> None:
    short = TOWER.apply(variables, IDS[:2, :4])["embedding"]  # no padding beyond the longest text
    whole = TOWER.apply(variables, IDS[:2])["embedding"]
    np.testing.assert_allclose(short, whole, rtol=1e-5, atol=1e-6)
    changed = IDS[:2].copy()
    changed[:, 0] += 1
    other = TOWER.apply(variables, changed)["embedding"]
    assert float(np.min(np.abs(np.asarray(other - whole)).max(axis=1))) > 1e-4


def test_fixed_positions_are_added_to_scaled_words() -> None:
    fields: dict[str, Any] = dict(positions="sincos", embed_scale=4.0, final_norm=False)
    tower = TextTransformer(20, 8, width=16, depth=0, heads=2, **fields)
    variables = tower.init(jax.random.key(0), IDS)
    assert set(variables["params"]) == {"token_embedding"}
    words = np.asarray(nn.unbox(variables)["params"]["token_embedding"]["embedding"])[IDS]
    places = sincos_positions(np.arange(8)[:, None], 16)
    tokens = tower.apply(variables, IDS)["tokens"]
    np.testing.assert_allclose(tokens, 4 * words + places, rtol=1e-6, atol=1e-7)
    with pytest.raises(UserError, match=r"positions is 'rotary'.*'sincos'"):
        jax.eval_shape(tower.clone(positions="rotary").init, jax.random.key(0), IDS)


def test_the_end_of_text_need_not_be_the_largest_id(variables: Any) -> None:
    largest = IDS.copy()
    largest[0, 1] = 19
    outputs = TOWER.apply(variables, largest)
    np.testing.assert_array_equal(outputs["pooled"][0], outputs["tokens"][0, 3])


def test_another_padding_id(variables: Any) -> None:
    ids = np.where(IDS == 0, 11, IDS)
    outputs = TOWER.clone(pad_id=11).apply(variables, ids)
    np.testing.assert_array_equal(outputs["pooled"][1], outputs["tokens"][1, 2])


def test_dropout_is_for_training(variables: Any) -> None:
    tower = TOWER.clone(dropout=0.5)
    np.testing.assert_array_equal(
        tower.apply(variables, IDS)["pooled"], TOWER.apply(variables, IDS)["pooled"]
    )
    first, second = (
        tower.apply(variables, IDS, train=True, rngs={"dropout": jax.random.key(seed)})["pooled"]
        for seed in (0, 1)
    )
    assert np.any(first != second)


def test_texts_that_are_too_long_are_told(variables: Any) -> None:
    with pytest.raises(UserError, match="takes 8 tokens, but the batch has 9"):
        TOWER.apply(variables, np.ones((1, 9), np.int32))


BERT = TextTransformer(
    vocabulary=20, length=8, width=16, depth=2, heads=2, mlp_dim=24, causal=False, pool="cls", pooler=True,
    mask_padding=True, order="post", types=2, embedding_norm=True, final_norm=False, epsilon=1e-12,
)  # fmt: skip
PADDED = IDS[:2]  # 4 and 3 tokens


@functools.partial(jax.jit, static_argnames=("tower", "hidden", "attention"))
def run(tower: TextTransformer, variables: Any, ids: Any, **options: Any) -> Any:
    return tower.apply(variables, ids, **options)


@pytest.fixture(scope="module")
def bert() -> Any:
    return jax.jit(BERT.init)(jax.random.key(0), IDS)


def test_a_bidirectional_tower_sees_what_comes_after_but_no_padding(bert: Any) -> None:
    before = run(BERT, bert, IDS)["tokens"]
    changed = IDS.copy()
    changed[2, 5] = 19
    assert np.all(np.any(before[2] != run(BERT, bert, changed)["tokens"][2], axis=-1))
    np.testing.assert_allclose(before[:2, :3], run(BERT, bert, IDS[:2, :4])["tokens"][:, :3], atol=1e-5)


def test_without_a_mask_padding_is_seen(bert: Any) -> None:
    siglip = BERT.clone(mask_padding=False)
    given = run(BERT, bert, IDS, lengths=np.array([8, 8, 8]))["tokens"]  # ids of padding, but told to be none
    np.testing.assert_allclose(run(siglip, bert, IDS)["tokens"], given, atol=1e-6)
    assert np.any(given[0, :4] != run(BERT, bert, IDS)["tokens"][0, :4])


@pytest.mark.parametrize("pool", ["cls", "mean", "last", "eot"])
def test_pools_are_read_from_the_tokens(bert: Any, pool: str) -> None:
    found = run(BERT.clone(pool=pool, pooler=False), bert, PADDED)
    tokens, lengths = np.asarray(found["tokens"]), (4, 3)
    for row, length in enumerate(lengths):
        expected = {
            "cls": tokens[row, 0],
            "mean": tokens[row, :length].mean(axis=0),
            "last": tokens[row, -1],
            "eot": tokens[row, length - 1],
        }[pool]
        np.testing.assert_allclose(found["pooled"][row], expected, atol=1e-6)


def test_the_pooler_is_a_tanh_layer_on_what_was_pooled(bert: Any) -> None:
    dense = nn.meta.unbox(bert)["params"]["pooler"]
    first = run(BERT.clone(pooler=False), bert, PADDED)["pooled"]
    expected = np.tanh(first @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(run(BERT, bert, PADDED)["pooled"], expected, atol=1e-5)


def test_the_end_of_text_may_be_its_first_id(variables: Any) -> None:
    """CLIP's tokenizer pads with the id that ends a text."""
    ids = np.array([[5, 6, 7, 1, 1, 1, 1, 1], [3, 9, 4, 8, 0, 0, 0, 0]], np.int32)
    found = run(TOWER.clone(eos_id=1), variables, ids)
    np.testing.assert_array_equal(found["pooled"][0], found["tokens"][0, 3])
    np.testing.assert_array_equal(
        found["pooled"][1], found["tokens"][1, 3]
    )  # none: the last that is no padding


def test_types_are_added(bert: Any) -> None:
    plain = run(BERT, bert, PADDED)["tokens"]
    np.testing.assert_array_equal(plain, run(BERT, bert, PADDED, types=np.zeros_like(PADDED))["tokens"])
    assert np.any(plain != run(BERT, bert, PADDED, types=np.ones_like(PADDED))["tokens"])
    with pytest.raises(UserError, match="token types, but has types=0"):
        BERT.clone(types=0).apply(bert, PADDED, types=np.ones_like(PADDED))


def test_layers_are_read_out_scanned_or_not(bert: Any) -> None:
    unrolled = run(BERT, bert, PADDED, hidden=(0, -1), attention=(1,))
    np.testing.assert_array_equal(unrolled["hidden"][-1], unrolled["tokens"])  # no final norm
    shares = np.asarray(unrolled["attention"][1])
    assert shares.shape == (2, 2, 8, 8)
    np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-6)
    assert np.all(shares[1, :, :, 3:] == 0)  # padding
    params = dict(nn.meta.unbox(bert)["params"])
    blocks = [params.pop(f"block_{layer}") for layer in range(2)]
    params["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    scanned = run(
        BERT.clone(scan=True, remat="dots"), {"params": params}, PADDED, hidden=(0, -1), attention=(1,)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, unrolled)


def test_cross_attention_reads_the_memory_up_to_its_length() -> None:
    tower = BERT.clone(cross=True, depth=1)
    memory = np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    variables = jax.jit(functools.partial(tower.init, memory=memory))(jax.random.key(0), PADDED)
    lengths = np.array([5, 2])
    changed = memory.copy()
    changed[:, 3] += 1
    found, other = (
        run(tower, variables, PADDED, memory=x, memory_lengths=lengths)["pooled"] for x in (memory, changed)
    )
    assert np.any(found[0] != other[0])
    np.testing.assert_array_equal(found[1], other[1])
    with pytest.raises(UserError, match="cross=True was called without a memory"):
        tower.apply(variables, PADDED)


def test_a_mask_further_restricts(bert: Any) -> None:
    causal = np.tril(np.ones((1, 8, 8), bool))
    given = run(BERT, bert, PADDED, mask=causal)["tokens"]
    np.testing.assert_allclose(given, run(BERT.clone(causal=True), bert, PADDED)["tokens"], atol=1e-6)


def test_the_head_for_masked_tokens_is_tied_to_the_table() -> None:
    head = MaskedLanguageHead(vocabulary=20)
    tokens = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)
    table = np.random.default_rng(1).standard_normal((20, 16)).astype(np.float32)
    logits, variables = jax.jit(functools.partial(head.init_with_output, jax.random.key(0)))(tokens, table)
    params = nn.meta.unbox(variables)["params"]
    assert set(params) == {"dense", "norm", "bias"} and params["bias"].shape == (20,)
    features = np.asarray(nn.gelu(tokens @ params["dense"]["kernel"], approximate=False))
    features = (features - features.mean(-1, keepdims=True)) / np.sqrt(features.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(logits, features @ table.T, atol=1e-4)
    with pytest.raises(UserError, match="tied=True was called without a table"):
        head.apply(variables, tokens)
    with pytest.raises(UserError, match=r"shape \(19, 16\), but vocabulary and width are \(20, 16\)"):
        head.apply(variables, tokens, table[:19])
    own = jax.eval_shape(head.clone(tied=False).init, jax.random.key(0), tokens)
    assert nn.meta.unbox(own)["params"]["embedding"].shape == (20, 16)


def test_an_unknown_pool_is_told(bert: Any) -> None:
    with pytest.raises(UserError, match="pool is 'max'; there are 'eot', 'cls', 'mean', 'last'"):
        BERT.clone(pool="max").apply(bert, PADDED)

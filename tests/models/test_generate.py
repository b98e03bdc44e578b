"""Generation: the cache changes nothing, rows do not matter to one another, and samplers and stops do what they say."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.beam import Beam
from vlpjax.models.decoder import Decoder, prefix_causal
from vlpjax.models.generate import generate
from vlpjax.models.positions import Rotary
from vlpjax.models.sampling import (
    NEVER,
    AllowedTokens,
    MinNewTokens,
    NoRepeat,
    RepetitionPenalty,
    Sample,
    Written,
)

V, NEW = 31, 16
DECODER = Decoder(V, 16, 2, 4, kv_heads=2, mlp_dim=24, pattern=("local", "global"), window=5, scan=True)
PROMPTS = np.random.default_rng(0).integers(1, V, (3, 7))
LENGTHS = [7, 3, 5]


@functools.cache
def variables() -> Any:
    drawn = jax.jit(DECODER.init)(jax.random.key(0), PROMPTS)
    # Larger weights: a fresh decoder repeats one token for ever, which shows little.
    return jax.tree.map(lambda x: 3 * x, drawn)


@jax.jit
def logits_of(ids: Any, prefix: Any) -> Any:
    """All logits of one whole text of fixed length, of which the first ``prefix`` tokens see one another; no cache."""
    interval, near = (
        prefix_causal(jnp.full(1, prefix), ids.shape[1], window) for window in (None, DECODER.window)
    )
    return DECODER.apply(variables(), ids, interval=interval, local_interval=near)["logits"][0]


def alone(prompt: np.ndarray, new: int = NEW, prefix_lm: bool = False, change: Any = None) -> list[int]:
    """Greedy continuation of one text by running all of it for every token."""
    text = list(prompt)
    while len(text) < len(prompt) + new:
        ids = np.zeros((1, 7 + NEW), np.int32)
        ids[0, : len(text)] = text
        logits = np.asarray(logits_of(ids, len(prompt) if prefix_lm else 0)[len(text) - 1])
        text.append(int(np.argmax(logits if change is None else change(logits, text))))
    return text[len(prompt) :]


def padded(side: str) -> np.ndarray:
    """The prompts with their first tokens, filled up with nonsense."""
    rows = np.full_like(PROMPTS, 9)
    for row, length in enumerate(LENGTHS):
        rows[row, slice(0, length) if side == "right" else slice(7 - length, 7)] = PROMPTS[row, :length]
    return rows


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_row_gets_what_it_would_get_alone_without_a_cache(side: str) -> None:
    found = generate(DECODER, variables(), padded(side), lengths=LENGTHS, padding=side, max_new_tokens=NEW)
    expected = [alone(PROMPTS[row, :length]) for row, length in enumerate(LENGTHS)]
    np.testing.assert_array_equal(found.tokens, expected)
    assert found.lengths.tolist() == [NEW] * 3
    assert len({tuple(row) for row in expected}) == 3 and len(set(expected[0])) > 3  # they say something


def test_the_end_of_text_ends_a_row_and_only_that_row() -> None:
    free = generate(DECODER, variables(), PROMPTS, max_new_tokens=NEW).tokens
    end = int(free[1, 4])
    first = [row.tolist().index(end) + 1 if end in row else NEW for row in free]
    found = generate(DECODER, variables(), PROMPTS, max_new_tokens=NEW, eos=(end,), pad=30)
    assert found.lengths.tolist() == first
    for row, length in enumerate(first):
        np.testing.assert_array_equal(found.tokens[row, :length], free[row, :length])
        assert np.all(found.tokens[row, length:] == 30)


def test_embeddings_stand_for_ids() -> None:
    rows = DECODER.apply(variables(), PROMPTS, method="embed")
    free = generate(DECODER, variables(), PROMPTS, max_new_tokens=NEW)
    found = generate(DECODER, variables(), embeddings=rows, max_new_tokens=NEW)
    np.testing.assert_array_equal(found.tokens, free.tokens)
    changed = generate(DECODER, variables(), embeddings=rows[:, ::-1], max_new_tokens=NEW)
    assert np.any(changed.tokens != free.tokens)


def test_a_prefix_may_see_all_of_itself() -> None:
    found = generate(DECODER, variables(), PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, prefix_lm=True)
    expected = [alone(PROMPTS[row, :length], prefix_lm=True) for row, length in enumerate(LENGTHS)]
    np.testing.assert_array_equal(found.tokens, expected)
    assert np.any(found.tokens != [alone(PROMPTS[row, :length]) for row, length in enumerate(LENGTHS)])


def test_given_positions_go_on_from_the_largest() -> None:
    decoder = DECODER.clone(rotary=Rotary(sections=(1, 1, 0)), scan=False, depth=1, pattern=("global",))
    drawn = jax.tree.map(lambda x: 3 * x, jax.jit(decoder.init)(jax.random.key(1), PROMPTS))
    plain = np.broadcast_to(np.arange(7), (3, 3, 7))
    far = plain.copy()
    far[1, :, 3:] += 40

    def run(positions: Any) -> Any:
        return generate(decoder, drawn, PROMPTS, positions=positions, max_new_tokens=NEW).tokens

    np.testing.assert_array_equal(run(plain), run(None))
    whole = np.concatenate([PROMPTS, run(far)], axis=1)
    positions = np.concatenate([far, np.broadcast_to(47 + np.arange(NEW), (3, 3, NEW))], axis=-1)
    logits = jax.jit(lambda ids, at: decoder.apply(drawn, ids, positions=at)["logits"])(whole, positions)
    np.testing.assert_array_equal(np.argmax(logits[:, 6:-1], axis=-1), whole[:, 7:])


def decode(tokens: Any) -> str:
    return "".join(chr(ord("a") + token % 26) * (1 + token // 26) for token in tokens)


def test_stop_strings_end_rows_exactly_where_they_begin() -> None:
    free = generate(DECODER, variables(), PROMPTS, max_new_tokens=NEW, decode=decode)
    assert free.texts == [decode(row) for row in free.tokens]
    stop = decode(free.tokens[0, 9:11])  # lies in two tokens
    found = generate(
        DECODER,
        variables(),
        PROMPTS,
        max_new_tokens=NEW,
        decode=decode,
        stop=(stop, "?"),
        check_every=5,
    )
    assert found.texts is not None
    assert found.texts == [text.partition(stop)[0] for text in free.texts]
    assert decode(found.tokens[0, : found.lengths[0]]) == found.texts[0] and found.lengths[0] <= 9
    assert not np.any(found.tokens[0, found.lengths[0] :])


def test_a_stop_string_inside_a_token_cuts_the_text_inside_it() -> None:
    words = ["one ", "two\n\nthree ", "four "]

    def spoken(tokens: Any) -> str:
        return "".join(words[token % 3] for token in tokens)

    found = generate(
        DECODER, variables(), PROMPTS, max_new_tokens=NEW, decode=spoken, stop=("\n\n",), check_every=3
    )
    assert found.texts is not None
    for row, text in enumerate(found.texts):
        before = spoken(found.tokens[row, : found.lengths[row]])
        assert text == before + "two" or (text == before and found.lengths[row] == NEW)
    assert any(text.endswith("two") for text in found.texts)


def test_processors_see_prompt_and_continuation() -> None:
    def change(logits: np.ndarray, text: list[int]) -> np.ndarray:
        logits = logits.copy()
        seen = sorted(set(text))
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.7, logits[seen] * 1.7)
        for at in range(len(text) - 1):
            if text[at] == text[-1]:
                logits[text[at + 1]] = -np.inf
        return logits

    processors = (RepetitionPenalty(1.7), NoRepeat(2))
    found = generate(
        DECODER, variables(), PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, processors=processors
    )
    expected = [alone(PROMPTS[row, :length], change=change) for row, length in enumerate(LENGTHS)]
    np.testing.assert_array_equal(found.tokens, expected)


def written(ids: list[list[int]], start: list[int], prompt_end: int, end: int) -> Written:
    return Written(jnp.asarray(ids), jnp.asarray(start), prompt_end, jnp.asarray(end))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_repeat_bans_what_would_complete_a_known_sequence(size: int) -> None:
    random = np.random.default_rng(size)
    ids = random.integers(0, 3, (6, 12))
    start = [0, 2, 5, 8, 9, 10]
    logits = NoRepeat(size)(jnp.zeros((6, 3)), written(ids.tolist(), start, 8, 10))
    for row in range(6):
        text = ids[row, start[row] : 10].tolist()
        grams = {tuple(text[at : at + size]) for at in range(len(text) - size + 1)}
        last = tuple(text[len(text) - size + 1 :])
        banned = [(size == 1 and token in text) or (*last, token) in grams for token in range(3)]
        np.testing.assert_array_equal(logits[row] == NEVER, banned)


def test_min_new_tokens_and_allowed_tokens() -> None:
    state = written([[1, 2, 3, 0, 0, 0]], [0], 2, 3)
    logits = jnp.zeros((1, 6))
    banned = MinNewTokens(2, eos=(4, 5))(logits, state)[0] == NEVER
    assert banned.tolist() == [False] * 4 + [True] * 2
    late = state._replace(end=jnp.asarray(4))
    assert not np.any(MinNewTokens(2, eos=(4, 5))(logits, late) == NEVER)
    assert (AllowedTokens((1, 3))(logits, state)[0] == NEVER).tolist() == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]


def test_samplers_draw_from_what_they_say_with_the_right_shares() -> None:
    shares = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = jnp.log(jnp.asarray(np.tile(shares, (20_000, 1))))
    draw = jax.jit(lambda sampler, key: sampler(logits, key), static_argnums=0)

    def frequencies(sampler: Sample) -> np.ndarray:
        return np.bincount(draw(sampler, jax.random.key(0)), minlength=5) / 20_000

    np.testing.assert_allclose(frequencies(Sample()), shares, atol=0.02)
    hot = shares**0.5 / np.sum(shares**0.5)
    np.testing.assert_allclose(frequencies(Sample(temperature=2.0)), hot, atol=0.02)
    np.testing.assert_allclose(frequencies(Sample(top_k=2)), [4 / 7, 3 / 7, 0, 0, 0], atol=0.02)
    # 0.4 + 0.3 do not reach 0.75 yet, so the third stays.
    np.testing.assert_allclose(frequencies(Sample(top_p=0.75)), np.array([8, 6, 3, 0, 0]) / 17, atol=0.02)
    assert frequencies(Sample(top_p=1e-6)).tolist() == [1, 0, 0, 0, 0]


def test_sampling_repeats_with_its_key_and_differs_with_another() -> None:
    def run(seed: int) -> Any:
        key = jax.random.key(seed)
        return generate(DECODER, variables(), PROMPTS, max_new_tokens=NEW, sampler=Sample(), rng=key).tokens

    np.testing.assert_array_equal(run(0), run(0))
    assert np.any(run(0) != run(1))


def test_a_beam_of_the_vocabularys_size_finds_the_likeliest_continuation() -> None:
    decoder = Decoder(5, 8, 1, 2, mlp_dim=8)
    prompts, lengths = PROMPTS[:2, :4] % 5, (4, 2)
    drawn = jax.tree.map(lambda x: 4 * x, jax.jit(decoder.init)(jax.random.key(2), prompts))
    beam = Beam(25, length_penalty=0.0)
    found = generate(decoder, drawn, prompts, lengths=lengths, max_new_tokens=3, sampler=beam)
    every = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    run = jax.jit(lambda ids: jax.nn.log_softmax(decoder.apply(drawn, ids)["logits"]))
    for row, length in enumerate(lengths):
        ids = np.concatenate(
            [np.tile(prompts[row, :length], (125, 1)), every, np.zeros((125, 4 - length), int)], axis=1
        )
        likely = np.asarray(run(ids))[:, length - 1 : length + 2]
        totals = np.take_along_axis(likely, every[..., None], axis=-1)[..., 0].sum(axis=1)
        np.testing.assert_array_equal(found.tokens[row], every[np.argmax(totals)])
        assert found.scores is not None
        np.testing.assert_allclose(found.scores[row], totals.max(), rtol=1e-5)


def test_one_beam_is_greedy() -> None:
    greedy, single = (
        generate(DECODER, variables(), PROMPTS, lengths=LENGTHS, max_new_tokens=NEW, sampler=sampler)
        for sampler in (None, Beam(1))
    )
    np.testing.assert_array_equal(single.tokens, greedy.tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(max_new_tokens=0), "at least 1"),
        (dict(stop=("x",)), "need decode"),
        (dict(sampler=Sample()), "give rng"),
        (dict(padding="middle"), "'left' and 'right'"),
        (dict(lengths=[7, 0, 3]), r"cannot be \[7, 0, 3\]"),
    ],
)
def test_mistakes_are_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(DECODER, {}, PROMPTS, **{"max_new_tokens": 4, **fields})


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="top_p"):
        Sample(top_p=0.0)
    with pytest.raises(UserError, match="size is at least 1"):
        Beam(0)
    with pytest.raises(UserError, match="prompts: token ids, embeddings"):
        generate(DECODER, {}, max_new_tokens=4)

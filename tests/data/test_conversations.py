"""Conversations as rows of ids: what is asked for, where pictures stand, and where a row is cut."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlpjax.data.bad import BadExample
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import Ask, ChatTemplate, Conversation, Frames
from vlpjax.errors import UserError

PIECES = SentencePieceTokenizer("bundled:emoji1594.spm.model")
PLACEHOLDER, EACH, END = 3000, 3, PIECES.eos_id
PLAIN = ChatTemplate(user="<image>")
CHAT = ChatTemplate(opening="a chat.", system="{} ", user="user: {} ", assistant="assistant: {}")
PICTURE = Image.new("RGB", (4, 4))


def conversation(template: ChatTemplate = CHAT, length: int = 60, **fields: Any) -> Conversation:
    return Conversation(PIECES, length, template, PLACEHOLDER, EACH, **fields)


def row_of(transform: Conversation, *words: str, images: int = 0, opening: str = "user") -> dict[str, Any]:
    """The row of turns that alternate between user and assistant."""
    roles = ("user", "assistant") if opening == "user" else ("system", "user", "assistant")
    roles = roles[:1] * (opening == "system") + ("user", "assistant") * len(words)
    turns = [dict(role=role, content=text) for role, text in zip(roles, words, strict=False)]
    return transform.map({"turns": turns, "image": [PICTURE] * images})


def asked(row: dict[str, Any]) -> list[int]:
    return row["tokens"][row["weights"] == 1].tolist()


def test_a_plain_row_is_a_picture_and_the_caption_that_is_asked_for() -> None:
    row = row_of(conversation(PLAIN), "describe it.\n<image>", "red apple", images=1)
    caption = [*PIECES.encode("red apple"), END]
    want = [PLACEHOLDER] * EACH + caption
    assert row["tokens"][: len(want)].tolist() == want and asked(row) == caption
    assert np.all(row["tokens"][len(want) :] == PIECES.pad_id) and row["tokens"].shape == (61,)
    assert row["weights"].dtype == np.float32 and set(row["weights"].tolist()) == {0.0, 1.0}


def test_a_chat_is_tokenized_turn_behind_turn_and_answers_with_their_ends_are_asked_for() -> None:
    row = row_of(conversation(), "a fruit?", "red apple", "and now?", "cat")
    first = PIECES.encode("a chat. user: a fruit? assistant: red apple")
    second = PIECES.encode("user: and now? assistant: cat")
    assert row["tokens"][: len(first) + len(second) + 2].tolist() == [*first, END, *second, END]
    # The blank before an answer is the answer's: a prompt ends with the colon.
    prompt = PIECES.encode("a chat. user: a fruit? assistant:")
    assert first[: len(prompt)] == prompt
    assert asked(row) == [
        *first[len(prompt) :],
        END,
        *second[len(PIECES.encode("user: and now? assistant:")) :],
        END,
    ]
    assert PIECES.decode(asked(row)) == "red apple cat"


def test_the_begin_id_opens_the_row_or_its_text() -> None:
    @dataclasses.dataclass(frozen=True)
    class Beginning(SentencePieceTokenizer):
        bos_id: int = 2999  # type: ignore[assignment]

    def row(bos: str) -> list[int]:
        template = ChatTemplate(user="<image>{} ", bos=bos)
        made = Conversation(Beginning(PIECES.path), 60, template, PLACEHOLDER, EACH)
        found = row_of(made, "a fruit?", "cat", images=1)
        assert PIECES.decode(asked(found)) == "cat"
        return found["tokens"].tolist()

    text = PIECES.encode("a fruit? cat")
    for bos, want in [
        ("row", [2999, *[PLACEHOLDER] * EACH, *text, END]),
        ("text", [*[PLACEHOLDER] * EACH, 2999, *text, END]),
        ("", [*[PLACEHOLDER] * EACH, *text, END]),
    ]:
        assert row(bos)[: len(want)] == want


def test_a_system_turn_stands_in_place_of_the_opening() -> None:
    own = row_of(conversation(), "be brief.", "a fruit?", "red apple", opening="system")
    assert own["tokens"][:12].tolist() == PIECES.encode("be brief. user: a fruit? assistant: red apple")[:12]
    assert PIECES.decode(asked(own)) == "red apple"


@pytest.mark.parametrize(
    ("text", "images"),
    [("what?", 0), ("<image> what?", 1), ("from <image> to <image>", 2), ("<image><image>", 2)],
)
def test_every_mark_is_a_run_of_placeholders_in_its_place(text: str, images: int) -> None:
    row = row_of(conversation(), text, "red apple", images=images)
    # As if every piece of text were tokenized by itself.
    pieces = f"a chat. user: {text} assistant: red apple".split("<image>")
    want: list[int] = []
    for number, piece in enumerate(pieces):
        want += [PLACEHOLDER] * EACH * bool(number) + PIECES.encode(piece)
    assert row["tokens"][: len(want)].tolist() == want
    assert np.all(row["weights"][row["tokens"] == PLACEHOLDER] == 0)
    assert PIECES.decode(asked(row)) == "red apple" and len(row["image"]) == images


def test_words_and_marks_are_those_of_the_data_and_the_template_has_its_own() -> None:
    llava = conversation(
        role_key="from", text_key="value", roles={"human": "user", "gpt": "assistant"}, lower=True
    )
    turns = [{"from": "human", "value": "<image>\nA Fruit?"}, {"from": "gpt", "value": "Red Apple"}]
    row = llava.map({"turns": json.dumps(turns), "image": b"encoded", "id": "7"})
    assert PIECES.decode(asked(row)) == "red apple" and row["image"] == [b"encoded"] and row["id"] == "7"
    whole = [i for i in row["tokens"].tolist() if i != PLACEHOLDER]
    assert PIECES.decode(whole) == "a chat. user: a fruit? assistant: red apple"
    ended = conversation(dataclasses.replace(PLAIN, assistant="{}!", eos=False))
    assert PIECES.decode(asked(row_of(ended, "<image>", "cat", images=1))) == "cat!"


def test_a_long_row_is_cut_at_its_end_and_never_inside_a_picture() -> None:
    words = ("<image> a fruit?", "red apple", "and <image>?", "cat")
    whole = row_of(conversation(), *words, images=2)
    second = np.flatnonzero(whole["tokens"] == PLACEHOLDER)[EACH:]
    for length in range(int(second[0]) - 2, int(second[-1]) + 2):
        row = row_of(conversation(length=length), *words, images=2)
        shown = 2 if length + 1 > second[-1] else 1
        kept = length + 1 if shown == 2 or length + 1 <= second[0] else int(second[0])
        np.testing.assert_array_equal(row["tokens"][:kept], whole["tokens"][:kept])
        np.testing.assert_array_equal(row["weights"][:kept], whole["weights"][:kept])
        assert not row["weights"][kept:].any() and np.all(row["tokens"][kept:] == PIECES.pad_id)
        assert len(row["image"]) == shown
        frames = Frames(frames=2, size=4, tokens_per_frame=EACH, placeholder=PLACEHOLDER, field="image")
        assert frames.map(row)["image"].shape == (2, 4, 4, 3)  # it counts placeholders


def test_what_teaches_nothing_is_left_out() -> None:
    with pytest.raises(BadExample, match="'<image>' stands 1 times in a text with 0 pictures"):
        row_of(conversation(), "<image>", "cat")
    with pytest.raises(BadExample, match="nothing that the assistant says is in the first 5 of"):
        row_of(conversation(length=4), "a fruit?", "red apple")
    with pytest.raises(BadExample, match="a turn of 'gpt'; turns are of system, user, assistant"):
        conversation().map({"turns": [dict(role="gpt", content="cat")]})
    with pytest.raises(BadExample, match="holds no turns with 'role' and 'content'"):
        conversation().map({"turns": [{"from": "human"}]})


def test_settings_that_cannot_be_are_told() -> None:
    with pytest.raises(UserError, match="ChatTemplate.assistant is 'cat'"):
        ChatTemplate(assistant="cat")
    with pytest.raises(UserError, match="ChatTemplate.user is '{} {}'"):
        ChatTemplate(user="{} {}")
    with pytest.raises(UserError, match="ChatTemplate.bos is 'yes'"):
        ChatTemplate(bos="yes")
    with pytest.raises(UserError, match="tokens_per_image=0"):
        Conversation(PIECES, 8, CHAT, PLACEHOLDER, 0)
    with pytest.raises(UserError, match="mark is empty"):
        conversation(mark="")
    with pytest.raises(UserError, match="wants bos_id"):
        row_of(conversation(ChatTemplate(bos="row")), "a", "cat")
    with pytest.raises(UserError, match="Ask.questions is empty"):
        Ask(())


def test_questions_are_drawn_and_answered_by_a_field() -> None:
    ask = Ask(("<image> what?", "which?"), answer="name")
    found = [ask.random_map({"name": "cat"}, np.random.default_rng(seed))["turns"] for seed in range(20)]
    assert {turns[0]["content"] for turns in found} == {"<image> what?", "which?"}
    assert all(turns[1] == dict(role="assistant", content="cat") for turns in found)


def test_pictures_are_stretched_padded_or_cropped_to_a_square() -> None:
    wide = Image.new("RGB", (8, 4), (10, 20, 30))
    wide.putpixel((0, 0), (255, 0, 0))

    def framed(**fields: Any) -> np.ndarray:
        frames = Frames(frames=1, size=4, tokens_per_frame=1, placeholder=9, resample="nearest", **fields)
        return frames.map({"video": [wide], "tokens": [9]})["video"][0]

    assert framed().tolist() == framed(mode="stretch").tolist()
    padded = framed(mode="pad", fill=(1, 2, 3))
    assert np.all(padded[[0, 3]] == (1, 2, 3)) and np.all(padded[1:3, 1:] == (10, 20, 30))
    assert np.all(framed(mode="crop") == (10, 20, 30))
    with pytest.raises(UserError, match="Frames.mode is 'fit'"):
        framed(mode="fit")

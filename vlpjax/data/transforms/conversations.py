"""Conversations with pictures as rows of token ids, of which only what the assistant says is asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image

from vlpjax.data.bad import BadExample
from vlpjax.data.transforms.fields import Example, require
from vlpjax.errors import UserError

ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
    """A piece of a conversation's text.

    Attributes:
      text: its characters.
      asked: whether the model is to say them.
      ends: whether an end-of-text token follows, which is asked for as well.
    """

    text: str
    asked: bool = False
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How turns become one text.

    Blanks between what introduces an answer and the answer are asked for with it: tokenizers join them to its first
    word, and a prompt that waits for an answer ends before them.

    Attributes:
      system, user, assistant: a turn of theirs, its words in place of "{}".  A user's turn without "{}" leaves the
        words out ("<image>" makes a caption of every answer).  What follows "{}" in the assistant's is asked for too.
      opening: what the system says where it has no turn; empty: nothing.
      bos: where the tokenizer's begin id stands: ``"row"``, first of all; ``"text"``, before the first text, after the
        pictures that open the row; empty, nowhere.
      eos: whether its end id ends every turn of the assistant.

    Raises:
      UserError: more than one "{}" in a turn, none where words may not be left out, or another ``bos``.
    """

    system: str = "{}\n"
    user: str = "{}\n"
    assistant: str = "{}"
    opening: str = ""
    bos: str = ""
    eos: bool = True

    def __post_init__(self) -> None:
        for role in ROLES:
            turn = getattr(self, role)
            if turn.count("{}") > 1 or ("{}" not in turn and role != "user"):
                raise UserError(
                    f"ChatTemplate.{role} is {turn!r}; a turn has its words in place of one {{}}."
                )

        if self.bos not in ("", "row", "text"):
            raise UserError(f"ChatTemplate.bos is {self.bos!r}; it is 'row', 'text' or empty.")

    def parts(self, turns: Sequence[tuple[str, str]]) -> list[Part]:
        """The text of these (role, words), part by part.

        Raises:
          BadExample: a role that there is not.
        """
        said = list(turns)
        if self.opening and not (said and said[0][0] == "system"):
            said.insert(0, ("system", self.opening))
        parts: list[Part] = []
        for role, words in said:
            if role not in ROLES:
                raise BadExample(f"a turn of {role!r}; turns are of {', '.join(ROLES)}")
            before, place, after = getattr(self, role).partition("{}")
            if role == "assistant":
                introduced = before.rstrip(" ")
                answer = before[len(introduced) :] + words + after
                parts += [Part(introduced), Part(answer, asked=True, ends=self.eos)]
            else:
                parts.append(Part(before + (words if place else "") + after))
        return parts


@dataclasses.dataclass(frozen=True)
class Ask(grain_transforms.RandomMap):
    """A text of the example becomes the assistant's answer to a question that is drawn.

    Attributes:
      questions: to draw from, evenly; the mark of a picture in them says where it is shown.
      answer: the field that holds the text.
      out: where the turns are put.
    """

    questions: tuple[str, ...]
    answer: str = "caption"
    out: str = "turns"

    def __post_init__(self) -> None:
        if not self.questions:
            raise UserError("Ask.questions is empty; it takes one question or more.")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        question = self.questions[int(rng.random() * len(self.questions))]
        answer = require(element, self.answer, str)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {**element, self.out: turns}


@dataclasses.dataclass(frozen=True)
class Conversation(grain_transforms.Map):
    """Turns and their pictures -> ids int32 [length + 1], weights float32 [length + 1], and what pictures are shown.

    Without padding there are as many ids and weights as the conversation has, at most ``length + 1``; so several fit in
    a row (:class:`vlpjax.data.packed_documents.PackedDocuments`).

    Where a text has a picture's mark, the row has ``tokens_per_image`` placeholders; any number of pictures may stand
    anywhere, and a text without one is a row like any other.  Text between pictures and ends of turns is tokenized as a
    whole.  Weights are 1 for what the assistant says, the end of its turns included, and 0 for all else: for what the
    others say, what the template adds, placeholders, and padding.

    A row that is too long is cut at its end.  A picture that would be cut is left out, and is no longer among the
    pictures, so that :class:`vlpjax.data.transforms.frames.Frames` may follow.

    Attributes:
      tokenizer: see :mod:`vlpjax.data.tokenizers`.
      length: of a row, as the model sees it; it has one id more, which is only predicted.
      template: how turns become one text.
      placeholder: the id that stands for a visual token; it may lie behind the vocabulary.
      tokens_per_image: visual tokens that the connector makes of a picture.
      mark: stands for a picture in a text.
      lower: lower-case the text first.
      field: of the turns: a list of maps, or the same as JSON.  ``role_key`` and ``text_key`` are the maps' keys, and
        ``roles`` translates roles to those of :data:`ROLES`, where they have other names.
      images_field: of the pictures, one or a list; none has no such field.
      out, weights_out: where ids and weights are put.
      pad: whether rows are filled up to their length.
    """

    tokenizer: Any
    length: int
    template: ChatTemplate
    placeholder: int
    tokens_per_image: int
    mark: str = "<image>"
    lower: bool = False
    field: str = "turns"
    role_key: str = "role"
    text_key: str = "content"
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images_field: str = "image"
    out: str = "tokens"
    weights_out: str = "weights"
    pad: bool = True

    def __post_init__(self) -> None:
        if self.length < 1 or self.tokens_per_image < 1:
            raise UserError(
                f"Conversation has length={self.length} and tokens_per_image={self.tokens_per_image}; both are 1 or "
                "more."
            )
        if not self.mark:
            raise UserError("Conversation.mark is empty; it is the text that stands for a picture.")

    def map(self, element: Example) -> Example:
        images = listed(element.get(self.images_field))
        ids, weights, ends = self.encode(self._turns(element))
        if len(ends) != len(images):
            raise BadExample(f"{self.mark!r} stands {len(ends)} times in a text with {len(images)} pictures")
        room = self.length + 1
        shown = sum(end <= room for end in ends)
        if shown < len(ends):
            room = min(room, ends[shown] - self.tokens_per_image)
        kept = min(len(ids), room)
        size = self.length + 1 if self.pad else kept
        row, asked = np.full(size, self.tokenizer.pad_id, np.int32), np.zeros(size, np.float32)
        row[:kept], asked[:kept] = ids[:kept], weights[:kept]
        if not asked[1:].any():
            raise BadExample(f"nothing that the assistant says is in the first {room} of {len(ids)} ids")
        return {**element, self.out: row, self.weights_out: asked, self.images_field: images[:shown]}

    def encode(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[float], list[int]]:
        """All ids of (role, words), the weight of each, and where the placeholders of each picture end."""
        begin = [self._special("bos_id")] if self.template.bos else []
        ids, begin = ([], begin) if self.template.bos == "text" else (begin, [])
        weights, ends = [0.0] * len(ids), list[int]()
        text, asked = "", list[bool]()

        def flush() -> None:
            nonlocal text, asked, begin
            if text:
                ids.extend(begin)
                weights.extend([0.0] * len(begin))
                begin = []
                found, places = self.tokenizer.encode_with_offsets(text)
                ids.extend(found)
                # A token is of the part that its last character is of.
                weights.extend(float(asked[max(last - 1, 0)]) for _, last in places)
            text, asked = "", []

        for part in self.template.parts(turns):
            for number, piece in enumerate(part.text.split(self.mark)):
                if number:
                    flush()
                    ids.extend([self.placeholder] * self.tokens_per_image)
                    weights.extend([0.0] * self.tokens_per_image)
                    ends.append(len(ids))
                piece = piece.lower() if self.lower else piece
                text, asked = text + piece, [*asked, *[part.asked] * len(piece)]
            if part.ends:
                flush()
                ids.append(self._special("eos_id"))
                weights.append(1.0)
        flush()
        return ids, weights, ends

    def _turns(self, element: Example) -> list[tuple[str, str]]:
        """(role, words) of every turn, by our names of the roles."""
        turns = require(element, self.field, (list, tuple, str))
        try:
            turns = json.loads(turns) if isinstance(turns, str) else turns
            named = [(str(turn[self.role_key]), str(turn[self.text_key])) for turn in turns]
        except (ValueError, TypeError, KeyError) as error:
            raise BadExample(
                f"field {self.field!r} holds no turns with {self.role_key!r} and {self.text_key!r}: {error}"
            ) from error
        return [(self.roles.get(role, role), words) for role, words in named]

    def _special(self, name: str) -> int:
        value = getattr(self.tokenizer, name)
        if value is None:
            raise UserError(
                f"Conversation.template wants {name}, which {self.tokenizer} does not have; leave it out"
            )
        return int(value)


def listed(images: Any) -> list[Any]:
    """What a field of pictures holds: none, one, or several."""
    if images is None:
        return []
    return [images] if isinstance(images, (bytes, Image.Image)) else list(images)

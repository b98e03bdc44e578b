"""Slideshows: rows of videos and the names of what they show, and the check of frames against placeholders."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tiny import DATA
from vlpjax.data.bad import BadExample
from vlpjax.data.drawings import on_paper
from vlpjax.data.sources import TFDS, Slideshows
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import Frames
from vlpjax.errors import UserError

DRAWINGS = TFDS(directory=DATA, split="openmoji[:40]")
PIECES = SentencePieceTokenizer("bundled:emoji1594.spm.model")
EACH, PLACEHOLDER, LENGTH, ROOM = 3, 3000, 48, 5


def shows(**changes: Any) -> Slideshows:
    fields = dict(
        count=20,
        length=LENGTH,
        frames=ROOM,
        tokens_per_frame=EACH,
        placeholder=PLACEHOLDER,
        size=8,
        concepts=6,
    )
    return Slideshows(DRAWINGS, PIECES, **{**fields, **changes})


def test_every_video_is_its_placeholders_and_then_the_names_of_its_frames() -> None:
    pictures = {
        str(DRAWINGS[place]["name"]).lower(): on_paper(DRAWINGS[place]["image"], 8) for place in range(40)
    }
    source = shows()
    names_seen, lengths = set(), set()
    for index in range(len(source)):
        row, shown = source[index], 0
        assert row["tokens"].shape == row["segment_ids"].shape == (LENGTH + 1,)
        for number in range(1, row["segment_ids"].max() + 1):
            ids = row["tokens"][row["segment_ids"] == number]
            frames, rest = divmod(int(np.sum(ids == PLACEHOLDER)), EACH)
            assert not rest and np.all(ids[: frames * EACH] == PLACEHOLDER)
            ends = np.flatnonzero(ids == PIECES.eos_id)
            assert len(ends) == frames and ends[-1] == len(ids) - 1
            start = frames * EACH
            for end in ends:
                name = next(name for name in pictures if PIECES.encode(name) == ids[start:end].tolist())
                np.testing.assert_array_equal(row["video"][shown], pictures[name])
                names_seen.add(name)
                shown, start = shown + 1, int(end) + 1
            lengths.add(frames)
        assert np.all(row["video"][shown:] == 255) and shown <= ROOM
        assert np.all(row["tokens"][row["segment_ids"] == 0] == 0)
    assert len(names_seen) == 6 and lengths == {1, 2, 3}


def test_a_row_is_the_same_whenever_it_is_made_and_another_one_is_not() -> None:
    np.testing.assert_array_equal(shows()[3]["video"], shows()[3]["video"])
    assert np.any(shows()[3]["tokens"] != shows()[4]["tokens"])
    assert np.any(shows()[3]["tokens"] != shows(seed=1)[3]["tokens"])
    assert shows().fingerprint() != shows(seed=1).fingerprint()
    assert shows().describe(3) == "row 3 of 20 of slideshows"


def test_rows_that_hold_no_video_are_told() -> None:
    with pytest.raises(UserError, match="Slideshows.longest is 0"):
        shows(longest=0)
    with pytest.raises(UserError, match="No video fits in a row of Slideshows.length=3"):
        shows(length=3)[0]


def encoded(color: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (6, 4), (color, color, color)).save(data, "PNG")
    return data.getvalue()


FRAMES = Frames(frames=3, size=4, tokens_per_frame=2, placeholder=9)


def test_frames_become_one_array_with_room_for_more() -> None:
    found = FRAMES.map({"video": [encoded(7), encoded(200)], "tokens": [1, 9, 9, 5, 9, 9]})
    assert found["video"].shape == (3, 4, 4, 3) and found["video"].dtype == np.uint8
    assert [int(frame.max()) for frame in found["video"]] == [7, 200, 0]
    assert found["tokens"].dtype == np.int32


def test_a_row_with_other_placeholders_than_its_frames_have_tokens_is_left_out() -> None:
    with pytest.raises(BadExample, match="stands 3 times in a row whose 2 frames have 4 visual tokens"):
        FRAMES.map({"video": [encoded(7)] * 2, "tokens": [1, 9, 9, 5, 9]})
    with pytest.raises(BadExample, match="4 frames, but there is room for 3"):
        FRAMES.map({"video": [encoded(7)] * 4, "tokens": [9] * 8})
    with pytest.raises(UserError, match="Frames.resample is 'cubic'"):
        Frames(3, 4, 2, 9, resample="cubic")

"""Tokenizers and the Tokenize transform."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from vlpjax.data.bad import BadExample
from vlpjax.data.tokenizers import JsonTokenizer, SentencePieceTokenizer
from vlpjax.data.transforms import Tokenize
from vlpjax.errors import UserError

BUNDLED = SentencePieceTokenizer("bundled:emoji1594.spm.model")


@pytest.fixture(scope="module")
def json_file(tmp_path_factory) -> str:
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "red": 5, "duck": 6}
    model = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    model.enable_truncation(2)  # what the file says of lengths is not our business
    model.enable_padding(length=9)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return str(path)


def test_the_bundled_tokenizer_goes_there_and_back():
    ids = BUNDLED.encode("a red duck")
    assert 0 < len(ids) <= 6
    assert BUNDLED.decode([*ids, BUNDLED.eos_id, BUNDLED.pad_id]) == "a red duck"
    assert (BUNDLED.pad_id, BUNDLED.eos_id, BUNDLED.unk_id) == (0, 1, 2)
    assert max(ids) < BUNDLED.vocab_size


def test_any_tokenizer_json_can_be_used(json_file):
    tokenizer = JsonTokenizer(json_file)
    assert tokenizer.encode("a red duck swims") == [4, 5, 6, 0]
    assert tokenizer.decode([2, 4, 5, 3, 1]) == "a red"
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 3, 0)
    assert tokenizer.vocab_size == 7
    assert JsonTokenizer(json_file, eos="duck").eos_id == 6
    with pytest.raises(UserError, match=r"JsonTokenizer.eos is '<end>', which is not in the vocabulary"):
        _ = JsonTokenizer(json_file, eos="<end>").eos_id


def test_tokenizers_pickle_before_and_after_use(json_file):
    for tokenizer in (SentencePieceTokenizer(BUNDLED.path), JsonTokenizer(json_file)):
        ids = pickle.loads(pickle.dumps(tokenizer)).encode("a red duck")
        assert tokenizer.encode("a red duck") == ids
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again == tokenizer
        assert again.encode("a red duck") == ids


def test_what_is_remembered_cannot_be_changed_from_outside():
    BUNDLED.encode("duck").append(99)
    assert 99 not in BUNDLED.encode("duck")


def test_the_fingerprint_is_that_of_the_content(json_file, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(json_file).read_bytes())
    assert JsonTokenizer(str(copy)).fingerprint() == JsonTokenizer(json_file).fingerprint()
    copy.write_bytes(copy.read_bytes() + b"\n")
    assert JsonTokenizer(str(copy)).fingerprint() != JsonTokenizer(json_file).fingerprint()


def test_files_that_are_no_tokenizers_are_told(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(UserError, match="does not exist"):
        SentencePieceTokenizer(str(path)).encode("x")
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        SentencePieceTokenizer(str(path)).encode("x")
    with pytest.raises(UserError, match="it has no 'model'"):
        JsonTokenizer(str(path)).encode("x")
    path.write_text("duck")
    with pytest.raises(UserError, match="is not JSON"):
        JsonTokenizer(str(path)).encode("x")


# --- Tokenize -----------------------------------------------------------------------------------------------------


def test_a_short_text_ends_with_eos_and_is_padded(json_file):
    transform = Tokenize(tokenizer=JsonTokenizer(json_file), length=6)
    row = transform.map({"caption": "a duck"})["text"]
    assert (row.tolist(), row.dtype) == ([4, 6, 3, 1, 1, 1], np.int32)


def test_cutting_keeps_begin_and_end(json_file):
    tokenizer, text = JsonTokenizer(json_file), "a red duck a red duck"
    rows = {
        (bos, eos): Tokenize(tokenizer=tokenizer, length=4, bos=bos, eos=eos).encode(text).tolist()
        for bos in (False, True)
        for eos in (False, True)
    }
    assert rows[False, True] == [4, 5, 6, 3]
    assert rows[True, True] == [2, 4, 5, 3]
    assert rows[True, False] == [2, 4, 5, 6]
    assert rows[False, False] == [4, 5, 6, 4]
    assert tokenizer.batch(["a", text], 4).tolist() == [[4, 3, 1, 1], [4, 5, 6, 3]]


def test_lower_casing_is_a_choice(json_file):
    tokenizer = JsonTokenizer(json_file)
    assert Tokenize(tokenizer=tokenizer, length=3, lower=True).encode("RED").tolist() == [5, 3, 1]
    assert Tokenize(tokenizer=tokenizer, length=3).encode("RED").tolist() == [0, 3, 1]


def test_an_empty_text_is_a_bad_example_unless_allowed(json_file):
    tokenizer = JsonTokenizer(json_file)
    with pytest.raises(BadExample, match="field 'caption' is an empty text"):
        Tokenize(tokenizer=tokenizer, length=3).map({"caption": "  "})
    with pytest.raises(BadExample, match="of type int, not str"):
        Tokenize(tokenizer=tokenizer, length=3).map({"caption": 5})
    empty = Tokenize(tokenizer=tokenizer, length=3, allow_empty=True).map({"caption": ""})
    assert empty["text"].tolist() == [3, 1, 1]


def test_a_wanted_special_id_must_exist():
    if_absent = Tokenize(tokenizer=BUNDLED, length=4, bos=True)
    with pytest.raises(UserError, match=r"wants bos_id.*set bos=False"):
        if_absent.encode("duck")

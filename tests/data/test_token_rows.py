"""Rows of tokens: documents end to end, cut where they are full; what cannot be a row is told."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import rows_of
from vlpjax.data.sources import PackedTexts, TokenFiles
from vlpjax.data.sources.base import Source
from vlpjax.data.sources.token_rows import segment_ids
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.errors import UserError

TOKENIZER = SentencePieceTokenizer("bundled:emoji1594.spm.model")
TEXTS = rows_of(name=["a red duck", "two trees", "a house", ""], keywords=["bird|water", "", "home", "star"])
END = 9


def test_a_document_ends_after_its_end_token() -> None:
    np.testing.assert_array_equal(
        segment_ids(np.array([4, END, 5, 6, END, END, 7]), END), [1, 1, 2, 2, 2, 3, 4]
    )


@pytest.fixture
def files(tmp_path: Path) -> TokenFiles:
    numbers = np.arange(1, 12) % (END + 1)
    numbers[:9].astype("<u2").tofile(tmp_path / "0.bin")  # 2 rows of 4 + 1
    numbers.astype("<u2").tofile(tmp_path / "1.bin")  # 2 rows
    return TokenFiles(str(tmp_path / "*.bin"), length=4, end=END)


def test_rows_of_a_file_share_their_ends_and_rows_of_two_files_nothing(files: TokenFiles) -> None:
    rows = [files[index]["tokens"].tolist() for index in range(len(files))]
    assert rows == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
    assert files[0]["tokens"].dtype == np.int32
    assert files[1]["segment_ids"].tolist() == [1] * 5
    assert "4 to 8 of" in files.describe(3) and files.describe(3).endswith("1.bin")
    with pytest.raises(IndexError):
        files[4]


def test_a_source_of_files_is_its_content_and_its_settings(files: TokenFiles, tmp_path: Path) -> None:
    assert isinstance(files, Source)
    assert pickle.loads(pickle.dumps(files)).fingerprint() == files.fingerprint()
    assert TokenFiles(str(tmp_path / "*.bin"), length=2, end=END).fingerprint() != files.fingerprint()
    plain = TokenFiles(str(tmp_path / "*.bin"), length=4)
    assert set(plain[0]) == {"tokens"}


def test_texts_are_packed_without_a_gap() -> None:
    packed = PackedTexts(TEXTS, TOKENIZER, length=3, fields=("name", "keywords"))
    texts = ["a red duck", "bird|water", "two trees", "a house", "home", "star"]
    whole = [number for text in texts for number in (*TOKENIZER.encode(text), TOKENIZER.eos_id)]
    rows = [packed[index] for index in range(len(packed))]
    assert len(rows) == (len(whole) - 1) // 3
    for index, row in enumerate(rows):
        assert row["tokens"].tolist() == whole[3 * index : 3 * index + 4]
        assert row["segment_ids"][0] == 1
        ends = np.flatnonzero(row["tokens"][:-1] == TOKENIZER.eos_id)
        assert np.flatnonzero(np.diff(row["segment_ids"])).tolist() == ends.tolist()
    assert pickle.loads(pickle.dumps(packed)).fingerprint() == packed.fingerprint()


def test_what_makes_no_row_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"PackedTexts.length is 0"):
        PackedTexts(TEXTS, TOKENIZER, length=0)
    with pytest.raises(UserError, match=r"too few for a row of PackedTexts.length=99"):
        len(PackedTexts(TEXTS, TOKENIZER, length=99, fields=("name",)))
    with pytest.raises(UserError, match=r"TokenFiles.dtype is 'int8'; there are 'uint16'"):
        TokenFiles("tokens.bin", length=4, dtype="int8")
    with pytest.raises(UserError, match="none.bin"):
        len(TokenFiles(str(tmp_path / "none.bin"), length=4))
    (tmp_path / "cut.bin").write_bytes(b"1" * 25)
    with pytest.raises(UserError, match=r"cut.bin has 25 bytes, which are no whole numbers of type uint16"):
        len(TokenFiles(str(tmp_path / "cut.bin"), length=4))

"""Tokenizers of every published kind: made small here, compared with transformers, and taken there and back."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from data_pipelines import train_tokenizer
from vlpjax.data import protobuf
from vlpjax.data.tokenizer_making import byte_letters, clip_tokenizer, fold, train_sentencepiece
from vlpjax.data.tokenizers import JsonTokenizer, SentencePieceTokenizer
from vlpjax.errors import UserError

WORDS = (
    "a red duck",
    "two small ducks",
    "the duck's blue hat",
    "a photo of a red hat",
    "café 1594!",
    "it isn't",
)
ODD = (
    "", " ", "  a  red\tduck\n", "A RED DUCK", "Ünïcödé Straße ΑΣ İ", "cafe\u0301", "ﬁre ①", "鴨と犬",
    "🦆\U0001f469\u200d\U0001f680", "don't we'll I'm",
    "3.14159 1,594", "#@!?...", "a\u00a0b\u200bc", "x_y-z/w", "ÀÉ", "\ufeffduck", "a<|endoftext|>b", "ǅ ŉ", "١٢٣",
    "a" * 80,
)  # fmt: skip
CAPTIONS = (*WORDS, *ODD, *(f"{one} and {two}" for one in WORDS for two in ODD[:13]))


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A list of merges in CLIP's form, learned from the words above, and the number of ids it gives."""
    model = hf.Tokenizer(hf.models.BPE(end_of_word_suffix="</w>"))
    model.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [hf.pre_tokenizers.Whitespace(), hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = hf.trainers.BpeTrainer(vocab_size=200, end_of_word_suffix="</w>", show_progress=False)
    model.train_from_iterator(WORDS, trainer)
    folder = tmp_path_factory.mktemp("clip")
    model.model.save(str(folder))
    lines = (folder / "merges.txt").read_text().splitlines()
    pairs = [line for line in lines if not line.startswith("#version")]
    path = folder / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(["a heading", *pairs, "not wanted", ""]).encode()))
    return path, 512 + len(pairs) + 2


@pytest.fixture(scope="module")
def clip(merges: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("clip") / "tokenizer.json"
    clip_tokenizer(*merges).save(str(path))
    return JsonTokenizer(str(path))


def test_clips_tokenizer_is_that_of_transformers(clip: JsonTokenizer, merges: tuple[Path, int]) -> None:
    pairs = [tuple(line.split()) for line in gzip.decompress(merges[0].read_bytes()).decode().split("\n")]
    model = clip._model
    theirs = CLIPTokenizer(vocab=model.get_vocab(), merges=pairs[1 : merges[1] - 513])
    assert clip.vocab_size == merges[1] == len(theirs)
    assert (
        (clip.bos_id, clip.eos_id)
        == (theirs.bos_token_id, theirs.eos_token_id)
        == (merges[1] - 2, merges[1] - 1)
    )
    assert len(CAPTIONS) >= 100
    for text in CAPTIONS:
        assert [clip.bos_id, *clip.encode(text), clip.eos_id] == theirs(text).input_ids, text
    assert clip.decode(clip.encode("A  Red DUCK's café")) == "a red duck 's café"


def test_a_list_of_merges_that_is_none_is_told(merges: tuple[Path, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no list of 49000 merges: .* (is no merge|it holds)"):
        clip_tokenizer(merges[0], 49000 + 514)
    (tmp_path / "file").write_bytes(b"text")
    with pytest.raises(UserError, match="is no gzipped list of merges"):
        clip_tokenizer(tmp_path / "file")


def byte_bpe(kind: str) -> hf.Tokenizer:
    """Byte-level BPE as Llama 3 (words cut by its pattern) or Qwen 2 (NFC first, digits one by one) has it."""
    digits = r"\p{N}{1,3}" if kind == "llama" else r"\p{N}"
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    model = hf.Tokenizer(hf.models.BPE(ignore_merges=kind == "llama"))
    if kind == "qwen":
        model.normalizer = hf.normalizers.NFC()
    model.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(words), behavior="isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = hf.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"] if kind == "llama" else ["<|endoftext|>", "<|im_end|>"]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(WORDS, trainer)
    return model


def wordpiece() -> hf.Tokenizer:
    """BERT's uncased tokenizer."""
    model = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    model.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    model.decoder = hf.decoders.WordPiece()
    trainer = hf.trainers.WordPieceTrainer(
        vocab_size=80, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    model.train_from_iterator(WORDS, trainer)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen", "wordpiece"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    (wordpiece() if request.param == "wordpiece" else byte_bpe(request.param)).save(str(path))
    return JsonTokenizer(str(path))


def test_a_saved_folder_is_the_same_tokenizer_in_transformers(
    published: JsonTokenizer, tmp_path: Path
) -> None:
    published.save(tmp_path / "folder")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert isinstance(theirs, PreTrainedTokenizerFast)
    for text in CAPTIONS:
        found = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = published.encode_with_offsets(text)
        assert published.encode(text) == ids == found.input_ids, text
        assert places == found.offset_mapping, text
        assert published.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    names = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    assert names == (published.bos_id, published.eos_id, published.own_pad_id, published.unk_id)
    assert len(theirs) == published.vocab_size


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_byte_level_text_comes_back_exactly(text: str) -> None:
    model = LLAMA
    assert model.decode(model.encode(text, add_special_tokens=False).ids) == text


LLAMA = byte_bpe("llama")


def test_wordpieces_come_back_in_lower_case_without_accents(published: JsonTokenizer) -> None:
    text = "A Photo of the café's  red DUCK"
    back = published.decode(published.encode(text))
    assert back == ("a photo of the cafe ' s red duck" if published.unk_id is not None else text)


# --- SentencePiece ------------------------------------------------------------------------------------------------


SIZE = {"unigram": 287, "bpe": 310}


@pytest.fixture(scope="module", params=list(SIZE))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> SentencePieceTokenizer:
    """Trained through the command line on own text."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text").write_text("\n\n".join(WORDS * 3))
    line = [
        f"--text={folder / 'text'}",
        f"--out={folder / 'model'}",
        f"--vocab_size={SIZE[request.param]}",
        f"--kind={request.param}",
    ]
    assert train_tokenizer.main(line) == 0
    assert train_tokenizer.main([*line, "--check"]) == 0
    return SentencePieceTokenizer(str(folder / "model"))


def test_own_text_gives_a_tokenizer(trained: SentencePieceTokenizer) -> None:
    assert trained.vocab_size in SIZE.values()
    assert (trained.pad_id, trained.eos_id, trained.unk_id, trained.bos_id) == (0, 1, 2, None)
    assert len(trained.encode("a red duck")) < len("a red duck")
    for text in CAPTIONS:  # up to the normalisation that is inside the model
        normal = sentencepiece.SentencePieceProcessor(model_file=trained.path).normalize(text)
        assert trained.decode(trained.encode(text)) == normal.replace("▁", " ").strip(), text
    assert trained.decode(trained.encode("A  RED Duck\n")) == fold("A RED Duck")


def test_places_of_pieces_are_characters(trained: SentencePieceTokenizer) -> None:
    for text in CAPTIONS:
        ids, places = trained.encode_with_offsets(text)
        assert ids == trained.encode(text)
        assert all(0 <= first <= last <= len(text) for first, last in places)
        assert [first for first, _ in places] == sorted(first for first, _ in places)
        covered = {at for first, last in places for at in range(first, last)}
        assert all(at in covered for at, letter in enumerate(text) if letter.isalnum()), text
    text = "Ü 🦆 duck"
    ids, places = trained.encode_with_offsets(text)
    by_place = [text[first:last] for first, last in places]
    assert by_place.count("Ü") == 2
    assert by_place.count("🦆") == 4
    assert "".join(by_place[by_place.index("🦆") + 4 :]) == " duck"


def test_a_saved_sentencepiece_model_is_the_same_tokenizer_in_transformers(
    trained: SentencePieceTokenizer, tmp_path: Path
) -> None:
    trained.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert len(theirs) == trained.vocab_size
    for text in CAPTIONS:
        found = theirs(text, add_special_tokens=False).input_ids
        assert found == trained.encode(text), text
        assert theirs.decode(found) == trained.decode(found), text


def test_training_that_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot train 5000 pieces on this text: .*[Vv]ocab"):
        train_sentencepiece(WORDS, 5000)
    with pytest.raises(UserError, match="is 'word'; there are 'unigram' and 'bpe'"):
        train_sentencepiece(WORDS, 300, "word")
    with pytest.raises(UserError, match="--text needs --out"):
        train_tokenizer.main([f"--text={tmp_path / 'no'}"])
    with pytest.raises(UserError, match="cannot be read as UTF-8 text"):
        train_tokenizer.main([f"--text={tmp_path / 'no'}", f"--out={tmp_path / 'model'}"])


def test_a_folder_that_cannot_be_made_is_told(trained: SentencePieceTokenizer) -> None:
    with pytest.raises(UserError, match=r"the folder '.*/model' for a tokenizer cannot be made"):
        trained.save(trained.path)


def test_messages_are_read_and_edited_field_by_field() -> None:
    message = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x1d\x00\x00\x80\x3f" + b"\x12\x00"
    assert list(protobuf.fields(message)) == [(1, 150), (2, b"hi"), (3, b"\x00\x00\x80\x3f"), (2, b"")]
    assert protobuf.with_fields(message, {}) == message
    longer = protobuf.with_fields(message, {2: lambda text: text + b"!" * 200})
    assert list(protobuf.fields(longer))[1] == (2, b"hi" + b"!" * 200)


def test_letters_of_bytes_are_those_of_byte_level_bpe() -> None:
    assert sorted(byte_letters()) == sorted(hf.pre_tokenizers.ByteLevel.alphabet())

"""Making tokenizers: SentencePiece models trained on own text, and CLIP's from its published list of merges.

Lower-casing and the other normalisation are inside a trained model's file, so that training and use cannot
differ in them.
"""

from __future__ import annotations

import gzip
import io
import pathlib
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from vlpjax.data import protobuf
from vlpjax.errors import UserError

PAD_ID, EOS_ID, UNK_ID, NO_BOS = 0, 1, 2, -1

# Blocks whose characters are normalised: Latin, Greek and Cyrillic with their extensions, punctuation, sub-
# and superscripts, full-width forms.  The built-in rules for all of Unicode would add 240 kB to the file.
BLOCKS = (range(0x20, 0x530), range(0x1E00, 0x20A0), range(0xFF01, 0xFF5F))
SPACES = "\t\n\v\f\r\u2028\u2029"
INVISIBLE = "\u200b\u200c\u200d\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"


def normalization_rules() -> str:
    """Rules in SentencePiece's form: one line per character, hexadecimal source, tab, hexadecimal target."""
    rules = dict.fromkeys(SPACES, " ") | dict.fromkeys(INVISIBLE, "")
    for codepoint in (codepoint for block in BLOCKS for codepoint in block):
        character = chr(codepoint)
        target = fold(character)
        if target != character:
            rules.setdefault(character, target)
    return "".join(
        f"{hexadecimal(source)}\t{hexadecimal(target)}\n" for source, target in sorted(rules.items())
    )


def fold(text: str) -> str:
    """Compatibility composition (NFKC) and case folding."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def hexadecimal(text: str) -> str:
    """Code points of a text, separated by blanks."""
    return " ".join(f"{ord(character):X}" for character in text)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, kind: str = "unigram") -> bytes:
    """Trains a SentencePiece model on own text; returns the bytes of the model file.

    Padding, end and unknown have the ids 0, 1 and 2; there is no begin id; what no piece spells is spelled in
    bytes.  The same texts in the same order give the same bytes.

    Args:
      texts: one sentence or caption each.
      vocab_size: pieces, 256 single bytes and the three special ones included.
      kind: ``"unigram"`` (Kudo, arXiv 1804.10959) or ``"bpe"`` (Sennrich et al., arXiv 1508.07909).

    Raises:
      UserError: the text is too little for so many pieces, or there is none; another kind.

    """
    import sentencepiece

    if kind not in ("unigram", "bpe"):
        raise UserError(f"the kind of SentencePiece model is {kind!r}; there are 'unigram' and 'bpe'")
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        rules = pathlib.Path(scratch) / "rules.tsv"
        rules.write_text(normalization_rules(), encoding="utf-8")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type=kind,
                vocab_size=vocab_size,
                normalization_rule_tsv=str(rules),
                character_coverage=1.0,
                byte_fallback=True,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=NO_BOS,
                num_threads=1,  # the sums of several depend on how the text was dealt among them
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"SentencePiece cannot train {vocab_size} pieces on this text: {' '.join(str(error).split())}"
            ) from error
    return without_paths(model.getvalue())


def without_paths(model: bytes) -> bytes:
    """Removes the name of the temporary rules file, which the trainer leaves in the model.

    The bytes are edited in place: the message classes that SentencePiece ships load beside few versions of
    protobuf only.  Field numbers are those of ``sentencepiece_model.proto``: 3 is the normalizer, in which 1
    is its name and 6 the path of its rules.
    """
    return protobuf.with_fields(
        model, {3: lambda spec: protobuf.with_fields(spec, {1: lambda _: b"nfkc_casefold", 6: lambda _: b""})}
    )


def sentencepiece_as_json(path: str | pathlib.Path) -> Any:
    """A SentencePiece model as a ``tokenizers.Tokenizer`` that gives the same ids, to be saved as JSON.

    Raises:
      UserError: the model keeps runs of blanks, or begins a text without one: nothing here does.
    """
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    message = protobuf.message(pathlib.Path(path).read_bytes())
    trainer, normal = (protobuf.message(message.get(field, b"")) for field in (2, 3))
    if not (normal.get(3, 1) and normal.get(4, 1)):
        raise UserError(
            f"{path} treats blanks in a way of its own; use the tokenizer.json that belongs to it"
        )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
    unknown, spelled = processor.unk_id(), bool(trainer.get(35, 0))
    kind = trainer.get(3, 1)
    model: models.Model
    if kind == 1:
        model = models.Unigram(pieces, unknown, byte_fallback=spelled)
    elif kind == 2:
        model = models.BPE(
            vocab={piece: index for index, (piece, _) in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=processor.id_to_piece(unknown),
            fuse_unk=True,
            byte_fallback=spelled,
        )
    else:
        raise UserError(
            f"{path} is a model of words or characters; 'unigram' and 'bpe' have a tokenizer.json"
        )
    tokenizer = tokenizers.Tokenizer(model)
    if normal.get(2):
        tokenizer.normalizer = normalizers.Precompiled(normal[2])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(piece, normalized=False, special=True)
            for index, (piece, _) in enumerate(pieces)
            if processor.is_control(index) or index == unknown
        ]
    )
    return tokenizer


def _merges(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best piece first; SentencePiece keeps only the results."""
    scores = dict(pieces)
    found = [
        (-score, piece[:cut], piece[cut:])
        for piece, score in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    ranks = {piece: rank for rank, (piece, _) in enumerate(pieces)}
    found.sort(key=lambda merge: (merge[0], ranks[merge[1]], ranks[merge[2]]))
    return [(left, right) for _, left, right in found]


def clip_tokenizer(merges: str | pathlib.Path, vocab_size: int = 49_408) -> Any:
    """CLIP's lower-casing byte-level BPE (arXiv 2103.00020), as a ``tokenizers.Tokenizer`` to be saved as JSON.

    Ids are those of the published models: 256 bytes, 256 bytes that end a word, the merges, begin and end.

    Args:
      merges: the published list ``bpe_simple_vocab_16e6.txt.gz``: a heading, then one merge a line, by rank.
      vocab_size: how many ids there are; the list is cut to it.

    Raises:
      UserError: the file is no such list, or holds fewer merges than asked for.
    """
    import tokenizers
    from tokenizers import decoders, normalizers, pre_tokenizers, processors

    try:
        lines = gzip.decompress(pathlib.Path(merges).read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{merges} is no gzipped list of merges ({error})") from error
    wanted = vocab_size - 2 * 256 - 2
    rows = [line.split() for line in lines[1 : 1 + wanted]]
    wrong = [number for number, row in enumerate(rows, 2) if len(row) != 2]
    if wrong or len(rows) != wanted:
        told = f"line {wrong[0]} is no merge" if wrong else f"it holds {len(rows)} merges"
        raise UserError(f"{merges} is no list of {wanted} merges: {told}")
    pairs = [(left, right) for left, right in rows]
    letters = byte_letters()
    begin, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), begin, end]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=pairs, unk_token=end, end_of_word_suffix="</w>", continuing_subword_prefix=""
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    blank = letters[256 - 68 + 32]  # the letter of the byte 0x20
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("</w>", blank), decoders.ByteLevel(), decoders.Strip(" ", 0, 1)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])]
    )
    tokenizer.add_special_tokens([begin, end])
    return tokenizer


def byte_letters() -> list[str]:
    """The letters that byte-level BPE writes bytes as, in the order of CLIP's and GPT-2's ids.

    188 bytes that print stand for themselves; the other 68, the blank among them, are U+0100 and on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in plain] + [chr(0x100 + number) for number in range(256 - len(plain))]

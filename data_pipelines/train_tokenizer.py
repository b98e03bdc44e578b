"""Trains the SentencePiece model that ships with emoji-1594: python -m data_pipelines.train_tokenizer

The text is every distinct name and keyword of the bundled captions, and every name inside every caption
template (--template, may be given several times, with {} for the name).  Lower-casing and the other
normalisation are inside the model file, so that training and use cannot differ in them.  The same input gives
the same bytes; with --check the model is trained again and compared with --out instead of written.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

import sentencepiece

from vlpjax.errors import UserError

BUNDLED = pathlib.Path(__file__).resolve().parents[1] / "vlpjax" / "data" / "bundled"
TEMPLATES = (
    "an emoji of {}",
    "a photo of {}",
    "a drawing of {}",
    "a picture of {}",
    "an icon of {}",
    "a cartoon of {}",
    "a small picture of {} on white",
)
# What the captions support: SentencePiece finds about 3,070 pieces in them, 256 single bytes included.
VOCAB_SIZE = 3000
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


def read_captions(folder: pathlib.Path) -> tuple[list[str], list[str]]:
    """Reads all names, and all distinct keywords, of a prepared emoji-1594; both in order of first use."""
    import tensorflow_datasets as tfds

    if not (folder / "dataset_info.json").is_file():
        raise UserError(f"{folder} holds no data set; build it with python -m data_pipelines.emoji1594")
    source = tfds.builder_from_directory(folder).as_data_source(split="noto")
    records = [source[index] for index in range(len(source))]
    names = [record["name"].decode("utf-8") for record in records]
    keywords = [word for record in records for word in record["keywords"].decode("utf-8").split("|") if word]
    return names, list(dict.fromkeys(keywords))


def sentences(names: Sequence[str], keywords: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The training text: names, keywords, and each name inside each template."""
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"caption template {template!r} must hold {{}} exactly once, for the name")
    return [*names, *keywords, *(t.replace("{}", name) for t in templates for name in names)]


def train(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> bytes:
    """Trains a unigram model (Kudo 2018); returns the bytes of the model file.

    One thread, because the sums of several threads depend on how the text was dealt among them.
    """
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        rules = pathlib.Path(scratch) / "rules.tsv"
        rules.write_text(normalization_rules(), encoding="utf-8")
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                normalization_rule_tsv=str(rules),
                character_coverage=1.0,
                byte_fallback=True,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=NO_BOS,
                num_threads=1,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"SentencePiece cannot train {vocab_size} pieces on this text: {error}"
            ) from error
    return without_paths(model.getvalue())


def without_paths(model: bytes) -> bytes:
    """Removes the name of the temporary rules file, which the trainer leaves in the model.

    The bytes are edited in place: the message classes that SentencePiece ships load beside few versions of
    protobuf only.  Field numbers are those of ``sentencepiece_model.proto``: 3 is the normalizer, in which 1
    is its name and 6 the path of its rules.
    """
    return with_fields(
        model, {3: lambda spec: with_fields(spec, {1: lambda _: b"nfkc_casefold", 6: lambda _: b""})}
    )


def with_fields(message: bytes, changes: Mapping[int, Callable[[bytes], bytes]]) -> bytes:
    """A protobuf message in which the contents of some fields, by number, have been replaced."""
    changed, position = b"", 0
    while position < len(message):
        start = position
        key, position = read_varint(message, position)
        length, position = read_varint(message, position)
        if key & 7 != 2:  # a number, which is its own content; text and messages are of wire type 2
            changed += message[start:position]
            continue
        content, position = message[position : position + length], position + length
        content = changes.get(key >> 3, bytes)(content)
        changed += varint(key) + varint(len(content)) + content
    return changed


def read_varint(message: bytes, position: int) -> tuple[int, int]:
    """The variable-length integer at a position, and the position after it."""
    number = shift = 0
    while True:
        byte = message[position]
        number |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return number, position


def varint(number: int) -> bytes:
    """A non-negative integer in protobuf's variable-length form."""
    more = b""
    while number > 127:
        more, number = more + bytes([number & 127 | 128]), number >> 7
    return more + bytes([number])


def check_round_trip(model: bytes, texts: Iterable[str]) -> None:
    """Raises UserError if a text comes back changed, or needs an unknown or a single-byte piece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts:
        ids = processor.encode(text)
        if processor.decode(ids) != fold(text) or any(processor.is_byte(i) or i == UNK_ID for i in ids):
            raise UserError(f"the caption {text!r} does not survive the tokenizer: {processor.decode(ids)!r}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.train_tokenizer", description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=BUNDLED / "emoji1594" / "1.0.0")
    parser.add_argument("--out", type=pathlib.Path, default=BUNDLED / "emoji1594.spm.model")
    parser.add_argument("--template", action="append", help="a caption template; default: a built-in list")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--check", action="store_true", help="compare with --out instead of writing it")
    options = parser.parse_args(arguments)
    texts = sentences(*read_captions(options.data), options.template or TEMPLATES)
    model = train(texts, options.vocab_size)
    check_round_trip(model, texts)
    if options.check:
        same = options.out.is_file() and options.out.read_bytes() == model
        print(f"{options.out} {'equals' if same else 'differs from'} the model trained again")
        return 0 if same else 1
    options.out.write_bytes(model)
    print(f"wrote {options.out}: {options.vocab_size} pieces, {len(model):,} bytes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

"""Trains a SentencePiece model: python -m data_pipelines.train_tokenizer [--text=FILE --out=MODEL]

Of own text, one caption a line, or else the model that ships with emoji-1594, whose text is every distinct
name and keyword of the bundled captions, and every name inside every caption template (--template, may be
given several times, with {} for the name).  Lower-casing and the other
normalisation are inside the model file, so that training and use cannot differ in them.  The same input gives
the same bytes; with --check the model is trained again and compared with --out instead of written.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterable, Sequence

import sentencepiece

from vlpjax.data.tokenizer_making import UNK_ID, fold, train_sentencepiece
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


def check_round_trip(model: bytes, texts: Iterable[str]) -> None:
    """Raises UserError if a text comes back changed, or needs an unknown or a single-byte piece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in texts:
        ids = processor.encode(text)
        if processor.decode(ids) != fold(text) or any(processor.is_byte(i) or i == UNK_ID for i in ids):
            raise UserError(f"the caption {text!r} does not survive the tokenizer: {processor.decode(ids)!r}")


def read_lines(file: pathlib.Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text={file} cannot be read as UTF-8 text: {error}") from error
    return [line for line in lines if line]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.train_tokenizer", description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=BUNDLED / "emoji1594" / "1.0.0")
    parser.add_argument("--text", type=pathlib.Path, help="train on the lines of this file instead")
    parser.add_argument("--out", type=pathlib.Path, help="the model file; default: the bundled one")
    parser.add_argument("--template", action="append", help="a caption template; default: a built-in list")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--kind", default="unigram", help="unigram or bpe")
    parser.add_argument("--check", action="store_true", help="compare with --out instead of writing it")
    options = parser.parse_args(arguments)
    if options.text and not options.out:
        raise UserError(
            "--text needs --out, the model file to write: the bundled model is of the bundled captions"
        )
    out = options.out or BUNDLED / "emoji1594.spm.model"
    if options.text:
        texts = read_lines(options.text)
    else:
        texts = sentences(*read_captions(options.data), options.template or TEMPLATES)
    model = train_sentencepiece(texts, options.vocab_size, options.kind)
    if not options.text:
        check_round_trip(model, texts)
    if options.check:
        same = out.is_file() and out.read_bytes() == model
        print(f"{out} {'equals' if same else 'differs from'} the model trained again")
        return 0 if same else 1
    out.write_bytes(model)
    print(f"wrote {out}: {options.vocab_size} pieces, {len(model):,} bytes")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

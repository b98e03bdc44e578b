"""Tokenizers: text to ids and back, for SentencePiece models and for any ``tokenizer.json``.

A tokenizer is a small frozen dataclass that holds a path.  The file is loaded when it is first needed, in the
process that needs it, never over the network; pickling passes on the path only.  `encode` gives the plain ids;
begin and end ids, cutting and padding are the business of `vlpjax.data.transforms.Tokenize`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlpjax.data import protobuf
from vlpjax.data.paths import resolve_path
from vlpjax.errors import UserError

# Captions come back every epoch; this many encoded texts are remembered per process.
CACHED_TEXTS = 65_536


@dataclasses.dataclass(frozen=True)
class Tokenizer(abc.ABC):
    """Common part of all tokenizers; `path` is a file, or "bundled:NAME" for one that ships with the package."""

    path: str

    @abc.abstractmethod
    def _load(self, path: str) -> Any:
        """The library's tokenizer object; raises `UserError` if the file is no such thing."""

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of `text` without begin and end ids."""

    @abc.abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text`, and for each where in it the token comes from: (first character, one past the last).

        Several tokens that spell one character have that character's place.  Blanks that only part words belong
        to no token, to the one before or to the one after, as the model has it.
        """

    @abc.abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer into `folder` as the files that `transformers` reads.

        Raises:
          UserError: the folder cannot be made.
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; padding, begin and end ids are left out."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids; all ids are smaller."""

    @property
    @abc.abstractmethod
    def own_pad_id(self) -> int | None:
        """Id of the vocabulary's token for padding."""

    @property
    def pad_id(self) -> int:
        """Id that fills a row; 0 where the vocabulary has no token of its own for it."""
        return self.own_pad_id or 0

    @property
    @abc.abstractmethod
    def bos_id(self) -> int | None:
        """Id that begins a text."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int | None:
        """Id that ends a text."""

    @property
    @abc.abstractmethod
    def unk_id(self) -> int | None:
        """Id of what the vocabulary does not know."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without begin and end ids."""
        return list(self._remembered(text))

    def batch(self, texts: Sequence[str], length: int, **options: Any) -> np.ndarray:
        """Int32 [texts, length]; `options` are those of `vlpjax.data.transforms.Tokenize`."""
        from vlpjax.data.transforms.texts import Tokenize  # here, because it is above this module

        row = Tokenize(tokenizer=self, length=length, **options)
        return (
            np.stack([row.encode(text) for text in texts]) if len(texts) else np.zeros((0, length), np.int32)
        )

    def fingerprint(self) -> str:
        """Hash of the file's content, the same wherever the file lies."""
        return hashlib.blake2b(Path(self._file).read_bytes(), digest_size=8).hexdigest()

    @functools.cached_property
    def _file(self) -> str:
        path = str(resolve_path(self.path))
        if not Path(path).is_file():
            raise UserError(
                f"tokenizer file {path!r} does not exist ({type(self).__name__}.path is {self.path!r})"
            )
        return path

    @functools.cached_property
    def _model(self) -> Any:
        return self._load(self._file)

    @functools.cached_property
    def _remembered(self) -> Any:
        return functools.lru_cache(maxsize=CACHED_TEXTS)(lambda text: tuple(self._encode(text)))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file (Kudo & Richardson 2018)."""

    def _load(self, path: str) -> Any:
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError as error:
            raise UserError(f"tokenizer file {path!r} is not a SentencePiece model") from error

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # The message is read by hand: its class has had three names in the versions that setup.py allows.
        message = self._model.encode(text, out_type="serialized_proto")
        pieces = [protobuf.message(piece) for number, piece in protobuf.fields(message) if number == 2]
        ids = [int(piece.get(2, 0)) for piece in pieces]
        whole = [0]  # characters that are complete after so many bytes
        for character in text:
            whole += [whole[-1]] * (len(character.encode("utf-8")) - 1) + [whole[-1] + 1]
        places, end = [], 0
        for index, piece in reversed(list(zip(ids, pieces, strict=True))):
            first, last = int(piece.get(4, 0)), int(piece.get(5, 0))
            if first < last or not self._model.is_byte(index):
                end = last
            # Of a character that is spelled in bytes, only the last byte is given its place.
            places.append((whole[first], whole[max(last, end)]))
        return ids, places[::-1]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``spiece.model``, a ``tokenizer.json`` of the same ids, and the names of the special tokens."""
        from vlpjax.data.tokenizer_making import sentencepiece_as_json

        converted, target = sentencepiece_as_json(self._file), _folder(folder)
        (target / "spiece.model").write_bytes(Path(self._file).read_bytes())
        converted.save(str(target / "tokenizer.json"))
        _write_names(target, self, self._model.id_to_piece)

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.pad_id, self.bos_id, self.eos_id}
        return self._model.decode([int(i) for i in ids if int(i) not in special])

    @functools.cached_property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    @functools.cached_property
    def own_pad_id(self) -> int | None:
        return _or_none(self._model.pad_id())

    @functools.cached_property
    def bos_id(self) -> int | None:
        return _or_none(self._model.bos_id())

    @functools.cached_property
    def eos_id(self) -> int | None:
        return _or_none(self._model.eos_id())

    @functools.cached_property
    def unk_id(self) -> int | None:
        return _or_none(self._model.unk_id())


def _folder(path: str | os.PathLike[str]) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the folder {str(path)!r} for a tokenizer cannot be made: {error.strerror}"
        ) from error
    return Path(path)


def _write_names(folder: Path, tokenizer: Tokenizer, name: Callable[[int], str]) -> None:
    """Writes which tokens are special, by name, as ``tokenizer_config.json`` and ``special_tokens_map.json``."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.own_pad_id,
        "unk_token": tokenizer.unk_id,
    }
    names = {role: name(index) for role, index in ids.items() if index is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **names,
    }
    for file, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", names)):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _or_none(index: int) -> int | None:
    return index if index >= 0 else None  # SentencePiece says -1 for "has none"


# Names under which published vocabularies keep their special tokens, tried in this order.
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")
BOS_NAMES = ("<s>", "<bos>", "[CLS]", "<|startoftext|>", "<|begin_of_text|>")
EOS_NAMES = ("</s>", "<eos>", "[SEP]", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>")
UNK_NAMES = ("<unk>", "[UNK]")


@dataclasses.dataclass(frozen=True)
class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the Hugging Face `tokenizers` library.

    Such a file does not say which of its tokens begin, end and pad a text.  `pad`, `bos`, `eos` and `unk` name
    them; where they are not given, the usual names are looked up in the vocabulary.
    """

    pad: str | None = None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None

    def _load(self, path: str) -> Any:
        import tokenizers

        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"tokenizer file {path!r} is not JSON: {error}") from error
        if not isinstance(content, dict) or "model" not in content:
            raise UserError(f"tokenizer file {path!r} is JSON, but no tokenizer.json: it has no 'model'")
        model = tokenizers.Tokenizer.from_file(path)
        model.no_truncation()
        model.no_padding()
        return model

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._model.encode(text, add_special_tokens=False)
        return encoding.ids, list(encoding.offsets)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json``, the same bytes as were read, and the names of the special tokens."""
        target = _folder(folder)
        (target / "tokenizer.json").write_bytes(Path(self._file).read_bytes())
        _write_names(target, self, self._model.id_to_token)

    def decode(self, ids: Iterable[int]) -> str:
        special = {self.pad_id, self.bos_id, self.eos_id}
        return self._model.decode([int(i) for i in ids if int(i) not in special])

    @functools.cached_property
    def vocab_size(self) -> int:
        return self._special_ids[0]

    @functools.cached_property
    def own_pad_id(self) -> int | None:
        return self._special_ids[1]

    @functools.cached_property
    def bos_id(self) -> int | None:
        return self._special_ids[2]

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._special_ids[3]

    @functools.cached_property
    def unk_id(self) -> int | None:
        return self._special_ids[4]

    @functools.cached_property
    def _special_ids(self) -> tuple[int, int | None, int | None, int | None, int | None]:
        # One past the largest id: added tokens may lie beyond the count of tokens.
        size = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        return (
            size,
            self._id("pad", PAD_NAMES),
            self._id("bos", BOS_NAMES),
            self._id("eos", EOS_NAMES),
            self._id("unk", UNK_NAMES),
        )

    def _id(self, role: str, usual: tuple[str, ...]) -> int | None:
        given = getattr(self, role)
        found = [self._model.token_to_id(name) for name in ((given,) if given else usual)]
        if given and found[0] is None:
            raise UserError(
                f"JsonTokenizer.{role} is {given!r}, which is not in the vocabulary of {self.path!r}"
            )
        return next((index for index in found if index is not None), None)

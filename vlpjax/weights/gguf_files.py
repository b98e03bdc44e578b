"""GGUF files, as llama.cpp writes them: config, tokenizer and (quantised) weights of a decoder in one file.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format.  Tensors get the names that
`transformers` gives them, so that the families' rules apply.  Two things are not as their names suggest: blocks of
quantised numbers, which are made into float32 row by row as they are read; and the rows of the query and key
projections of the architecture ``llama``, which the conversion permutes (each head's two rotary halves are
interleaved).  The permutation is undone; without that, text still looks fluent and perplexity is far off.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlpjax.errors import UserError

# Their names -> those of `transformers`, of the architectures whose weights are stored as they are.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{n}.attn_norm": "model.layers.{n}.input_layernorm",
    "blk.{n}.attn_q": "model.layers.{n}.self_attn.q_proj",
    "blk.{n}.attn_k": "model.layers.{n}.self_attn.k_proj",
    "blk.{n}.attn_v": "model.layers.{n}.self_attn.v_proj",
    "blk.{n}.attn_output": "model.layers.{n}.self_attn.o_proj",
    "blk.{n}.attn_q_norm": "model.layers.{n}.self_attn.q_norm",
    "blk.{n}.attn_k_norm": "model.layers.{n}.self_attn.k_norm",
    "blk.{n}.ffn_norm": "model.layers.{n}.post_attention_layernorm",
    "blk.{n}.ffn_gate": "model.layers.{n}.mlp.gate_proj",
    "blk.{n}.ffn_up": "model.layers.{n}.mlp.up_proj",
    "blk.{n}.ffn_down": "model.layers.{n}.mlp.down_proj",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PERMUTED = ("llama",)  # architectures whose query and key rows are permuted

# How a byte-level BPE cuts text before merging, by ``tokenizer.ggml.pre``.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


class GgufTensors:
    """Tensors of a GGUF file under the names of `transformers`, made into float32 as they are read.

    Attributes:
      what, shapes: of :class:`vlpjax.weights.tensors.Tensors`.
      bytes_read: how many bytes of the file were read so far.
    """

    def __init__(self, what: str, stored: Mapping[str, Stored], heads: Mapping[str, int]):
        self.what = what
        self.shapes = {name: tensor.shape for name, tensor in stored.items()}
        self.bytes_read = 0
        self._stored = stored
        self._heads = heads  # of tensors whose rows are permuted, the number of heads

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str, part: Sequence[slice] = ()) -> np.ndarray:
        from gguf import GGMLQuantizationType, quants

        tensor = self._stored[name]
        shape, rows = tensor.shape, tensor.rows
        slices = (*part, *(slice(None) for _ in shape[len(part) :]))
        order = unpermuted_rows(shape[0], self._heads[name]) if name in self._heads else np.arange(shape[0])
        if len(shape) > 1:
            # Numbers are stored in blocks along a row: whole rows are read, and only those that are wanted.
            rows = rows[order[slices[0]]]
        self.bytes_read += rows.nbytes
        numbers = quants.dequantize(rows, GGMLQuantizationType(tensor.kind))
        found = numbers[0][order][slices] if len(shape) == 1 else numbers[(slice(None), *slices[1:])]
        return np.array(found, np.float32)


def unpermuted_rows(rows: int, heads: int) -> np.ndarray:
    """For every row of a query or key projection, where a GGUF file of the architecture ``llama`` keeps it.

    A head's first and second rotary halves are stored in turns.
    """
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def open_gguf(file: Path) -> tuple[dict[str, Any], GgufTensors]:
    """Config (as `transformers` would write it) and tensors.

    Raises:
      UserError: a damaged file, or an architecture or tensor that is not known.
    """
    fields, stored = _read(file)
    config = gguf_config(file, fields, stored)
    named: dict[str, Stored] = {}
    heads: dict[str, int] = {}
    for name, tensor in stored.items():
        if name == "rope_freqs.weight":
            _check_rope_freqs(file, tensor)
            continue
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, part, kind = match.groups() if match else (None, "", "")
        theirs = NAMES.get(f"blk.{{n}}.{part}" if layer is not None else part)
        if theirs is None:
            raise UserError(
                f"{file}: the tensor {name!r} is no part of the architecture {config['model_type']!r}."
            )
        full = f"{theirs.replace('{n}', layer or '')}.{kind}"
        named[full] = tensor
        if config["model_type"] in PERMUTED and part in ("attn_q", "attn_k"):
            heads[full] = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    return config, GgufTensors(str(file), named, heads)


def gguf_config(file: Path, fields: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
    """The fields of ``config.json`` out of a file's metadata."""
    kind = fields.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{file} has the architecture {kind!r}; of GGUF files there are {', '.join(ARCHITECTURES)}."
        )

    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if value is None:
            raise UserError(f"{file} does not say {kind}.{name}.")
        return value

    width, heads = get("embedding_length"), get("attention.head_count")
    if "token_embd.weight" not in stored:
        raise UserError(f"{file} lacks the tensor 'token_embd.weight'.")
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "vocab_size": stored["token_embd.weight"].shape[0],
        "max_position_embeddings": get("context_length"),
        # Both were rounded to float32 on the way into the file.
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": any(name.endswith("attn_q.bias") for name in stored) and kind != "qwen2",
        "tie_word_embeddings": "output.weight" not in stored,
    }
    scaling = fields.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UserError(
            f"{file} scales rotary positions by {scaling!r}; of GGUF files there are 'none' and 'linear'."
        )
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": _shortest(get("rope.scaling.factor"))}
    for name in ("bos", "eos"):
        if f"tokenizer.ggml.{name}_token_id" in fields:
            config[f"{name}_token_id"] = fields[f"tokenizer.ggml.{name}_token_id"]
    return config


def gguf_tokenizer(file: Path) -> dict[str, bytes]:
    """The tokenizer of a GGUF file as ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
      UserError: a kind of tokenizer that a ``tokenizer.json`` is not made of here.
    """
    fields, _ = _read(file)
    kind, before = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise UserError(
            f"{file} has a tokenizer of the kind {kind!r}; only byte-level BPE ('gpt2') can be taken out."
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    added = [
        {
            "id": index,
            "content": token,
            "special": types[index] == _CONTROL,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for index, token in enumerate(tokens)
        if types[index] in (_CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if before == "qwen2" else None,
        "pre_tokenizer": _pre_tokenizer(file, before),
        "post_processor": {**_BYTES, "use_regex": True},
        "decoder": {**_BYTES, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": before == "llama-bpe",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := fields.get(f"tokenizer.ggml.{field}_token_id")) is not None:
            settings[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    files = {"tokenizer.json": content, "tokenizer_config.json": settings}
    return {name: json.dumps(value, ensure_ascii=False, indent=2).encode() for name, value in files.items()}


def _pre_tokenizer(file: Path, before: str) -> dict[str, Any]:
    plain = {**_BYTES, "use_regex": True}
    if before in ("default", "gpt-2"):
        return plain
    if before == "smollm":
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, plain]}
    if before in _SPLITS:
        split = {
            "type": "Split",
            "pattern": {"Regex": _SPLITS[before]},
            "behavior": "Isolated",
            "invert": False,
        }
        return {"type": "Sequence", "pretokenizers": [split, {**_BYTES, "use_regex": False}]}
    known = ("default", "gpt-2", "smollm", *_SPLITS)
    raise UserError(f"{file} cuts text by {before!r} before its BPE; known are {', '.join(known)}.")


@dataclass(frozen=True)
class Stored:
    """A tensor in the file.

    Attributes:
      shape: outermost axis first (the file writes it the other way round).
      kind: number of its type of quantisation.
      rows: its bytes, [rows, bytes of a row], mapped from the file.
    """

    shape: tuple[int, ...]
    kind: int
    rows: np.ndarray


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata and tensors by their names in the file.

    The `gguf` package makes numbers out of quantised blocks.  Its own reader takes half a minute for a vocabulary.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ModuleNotFoundError as error:
        raise UserError(f"{file} is a GGUF file; `pip install gguf` to read it.") from error
    content = np.memmap(file, np.uint8, mode="r")
    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    try:
        stream = _Stream(content.data)
        if stream.take(4) != b"GGUF" or stream.number("I") not in (2, 3):
            raise UserError(f"{file} is no GGUF file of version 2 or 3.")
        tensors, entries = stream.number("Q"), stream.number("Q")
        fields = {stream.text(): stream.value(stream.number("I")) for _ in range(entries)}
        infos = []
        for _ in range(tensors):
            name = stream.text()
            shape = tuple(stream.number("Q") for _ in range(stream.number("I")))[::-1]
            infos.append((name, shape, stream.number("I"), stream.number("Q")))
    except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is cut off, or damaged ({error}).") from error
    alignment = fields.get("general.alignment", 32)
    start = -(-stream.position // alignment) * alignment
    found = {}
    for name, shape, kind, offset in infos:
        if kind not in sizes:
            raise UserError(f"{file}: the tensor {name!r} has the unknown type {kind}.")
        block, nbytes = sizes[kind]
        row = shape[-1] // block * nbytes if shape else nbytes
        first, last = start + offset, start + offset + math.prod(shape[:-1]) * row
        if last > content.size or (shape and shape[-1] % block):
            raise UserError(
                f"{file} is cut off: it has {content.size} bytes, and the tensor {name!r} of shape {shape} ends at "
                f"byte {last}."
            )
        found[name] = Stored(shape, kind, content[first:last].reshape(-1, row))
    return fields, found


class _Stream:
    """Reads the head of a GGUF file from front to back."""

    NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9

    def __init__(self, buffer: memoryview):
        self.buffer = buffer
        self.position = 0

    def take(self, count: int) -> bytes:
        piece = self.buffer[self.position : self.position + count]
        if len(piece) < count:
            raise IndexError(f"byte {self.position + count} is beyond its end")
        self.position += count
        return bytes(piece)

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == self.STRING:
            return self.text()
        if kind == self.ARRAY:
            item, count = self.number("I"), self.number("Q")
            return [self.value(item) for _ in range(count)]
        return self.number(self.NUMBERS[kind])


def _check_rope_freqs(file: Path, tensor: Stored) -> None:
    """Llama 3.1 keeps its rotary scaling as a tensor of factors; without it the model is another."""
    if not np.all(tensor.rows.view(np.float32) == 1):
        raise UserError(
            f"{file} scales rotary positions by the tensor 'rope_freqs.weight', which no config can say; read the "
            "model's safetensors files instead."
        )


def _shortest(value: float) -> float:
    """The shortest decimal number that is the same in float32: 9.999999747e-06 is 1e-05."""
    return float(str(np.float32(value)))

"""GGUF files: names, quantised blocks, permuted rows, config and tokenizer, against `gguf` and `transformers`."""

from __future__ import annotations

import json

import gguf
import jax
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.weights import real
from vlpjax.errors import UserError
from vlpjax.weights import from_pretrained
from vlpjax.weights.gguf_files import NAMES, gguf_tokenizer, open_gguf, unpermuted_rows

HEADS, KV_HEADS, WIDTH, HIDDEN = 4, 2, 32, 64


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    return LlamaForCausalLM(config).eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(file, model, *, architecture="llama", kind=gguf.GGMLQuantizationType.F32, extra=(), tokens=()):
    """A file as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokens[0])
        writer.add_token_list(tokens[1])
        writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens[1]])
        writer.add_token_merges(tokens[2])
        writer.add_eos_token_id(0)
    names = {theirs: ours for ours, theirs in NAMES.items()}
    for name, tensor in model.state_dict().items():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        stem = name.replace(f".{layer}.", ".{n}.") if layer else name
        stem, _, suffix = stem.rpartition(".")
        array = tensor.numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            array = permuted(array, HEADS if stem.endswith("q_proj") else KV_HEADS)
        target = f"{names[stem].replace('{n}', layer)}.{suffix}"
        if array.ndim == 1:
            writer.add_tensor(target, array)
        else:
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    for name, array in extra:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_config_and_tensors_are_those_that_were_converted(llama, tmp_path):
    config, tensors = open_gguf(write(tmp_path / "a.gguf", llama))
    expected = llama.state_dict()
    assert tensors.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors.read(name), tensor.numpy(), err_msg=name)
    assert config["model_type"] == "llama" and config["rope_theta"] == 5000 and config["rms_norm_eps"] == 1e-6
    assert not config["tie_word_embeddings"] and not config["attention_bias"]
    again = LlamaConfig(**config)
    for field in ("hidden_size", "num_key_value_heads", "num_hidden_layers", "head_dim", "vocab_size"):
        assert getattr(again, field) == getattr(llama.config, field)


def test_the_imported_model_says_what_theirs_says(llama, tmp_path):
    model, variables = from_pretrained(write(tmp_path / "a.gguf", llama))
    ids = np.arange(20)[None] % 40
    with torch.no_grad():
        expected = llama(torch.tensor(ids)).logits.numpy()
    found = np.asarray(jax.jit(model.apply)(variables, ids)["logits"])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("part", [(slice(3, 17), slice(5, 9)), (slice(8, 9),), ()])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_parts_of_quantised_tensors_are_those_of_the_whole(llama, tmp_path, kind, part):
    _, tensors = open_gguf(write(tmp_path / "a.gguf", llama, kind=gguf.GGMLQuantizationType[kind]))
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        whole = tensors.read(name)
        np.testing.assert_array_equal(tensors.read(name, part), whole[part])
        exact = llama.state_dict()[name].numpy()
        assert (
            np.abs(whole - exact).max() <= {"F32": 0, "F16": 1e-3, "BF16": 1e-2}.get(kind, 0.2) * exact.max()
        )


def test_only_the_rows_of_a_part_are_read(llama, tmp_path):
    _, tensors = open_gguf(write(tmp_path / "a.gguf", llama))
    tensors.read("model.layers.0.self_attn.q_proj.weight", (slice(4, 12), slice(0, 3)))
    assert tensors.bytes_read == 8 * WIDTH * 4


def test_the_permutation_is_that_of_the_converter():
    rows = np.arange(24)
    np.testing.assert_array_equal(permuted(rows, 3)[unpermuted_rows(24, 3)], rows)


def test_other_architectures_are_not_permuted(llama, tmp_path):
    _, tensors = open_gguf(write(tmp_path / "a.gguf", llama, architecture="qwen2"))
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(tensors.read(name), llama.state_dict()[name].numpy())


BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]


@pytest.mark.parametrize("before", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_the_tokenizer_comes_out(llama, tmp_path, before):
    tokens = ["<|end|>", *BYTES, "Ġa", "12"]
    file = write(tmp_path / "a.gguf", llama, tokens=(before, tokens, ["Ġ a", "1 2"]))
    files = gguf_tokenizer(file)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    found = tokenizer.encode("b a 12é<|end|>")
    assert tokenizer.decode(found.ids) == "b a 12é"
    assert found.tokens[:2] == ["b", "Ġa"] and found.ids[-1] == 0
    assert ("12" in found.tokens) == (before in ("gpt-2", "llama-bpe"))
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|end|>"


def test_what_is_not_known_is_told(llama, tmp_path):
    with pytest.raises(UserError, match="architecture 'mamba'; of GGUF files there are llama, qwen2, qwen3"):
        open_gguf(write(tmp_path / "a.gguf", llama, architecture="mamba"))
    extra = (("blk.0.mystery.weight", np.ones((2, 32), np.float32)),)
    with pytest.raises(UserError, match=r"'blk.0.mystery.weight' is no part of the architecture 'llama'"):
        open_gguf(write(tmp_path / "b.gguf", llama, extra=extra))
    extra = (("rope_freqs.weight", np.full(4, 2, np.float32)),)
    with pytest.raises(UserError, match="scales rotary positions by the tensor 'rope_freqs.weight'"):
        open_gguf(write(tmp_path / "c.gguf", llama, extra=extra))
    file = write(tmp_path / "d.gguf", llama, tokens=("elsewhere", ["a"], []))
    with pytest.raises(UserError, match="cuts text by 'elsewhere' before its BPE; known are default"):
        gguf_tokenizer(file)
    with pytest.raises(UserError, match="tokenizer of the kind None"):
        gguf_tokenizer(write(tmp_path / "e.gguf", llama))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_told(llama, tmp_path, share):
    file = write(tmp_path / "a.gguf", llama)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cut off"):
        open_gguf(file)
    file.write_bytes(b"GGML" + content[4:])
    with pytest.raises(UserError, match="no GGUF file"):
        open_gguf(file)


def test_a_real_file():
    """SmolLM2-135M-Instruct: every tensor's shape and a quantised one's numbers, by the `gguf` package's reader."""
    file = real.file("smollm2")
    config, tensors = open_gguf(file)
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["rope_theta"]) == (
        30,
        3,
        100_000,
    )
    assert config["tie_word_embeddings"] and config["rms_norm_eps"] == 1e-5
    assert len(tensors.shapes) == 272 and tensors.shapes["model.embed_tokens.weight"] == (49152, 576)
    tokenizer = Tokenizer.from_str(gguf_tokenizer(file)["tokenizer.json"].decode())
    text = "In 1987, Ana's 3 cats — naïve ones — ran.\n\tdef f(x): return x + 1  # ok"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1

"""A real language model, SmolLM2-135M-Instruct out of a GGUF file: it reads prose, and answers, as `transformers` does.

Perplexity is what shows a wrong order of rows in the query and key projections; single answers stay fluent.
"""

from __future__ import annotations

import functools
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests.weights import real
from vlpjax.models.generate import generate
from vlpjax.models.vocabulary_loss import vocabulary_loss
from vlpjax.weights.families import family_of
from vlpjax.weights.gguf_files import gguf_tokenizer
from vlpjax.weights.importing import read_variables
from vlpjax.weights.opening import open_weights

PROSE = """The harbour lay quiet in the early morning. A thin mist stood over the water, and the boats, tied to the
long wooden pier, moved only a little with the tide. The fishermen had gone out before sunrise and would not be back
until the afternoon, so the only people to be seen were an old woman who swept the steps of the church and a boy who
sat on a heap of nets and tried to mend a kite.

He had found the kite on the beach the day before. One of its sticks was broken and the paper was torn in two places,
but the tail was whole, a long row of red and yellow ribbons that somebody had tied with great care. The boy had cut a
new stick from a willow branch, and now he was gluing a piece of an old map over the larger hole. When the glue was
dry, part of the coast of Norway would fly above the village.

"You will need more wind than that," said the old woman, who had stopped sweeping and was looking at the flags on the
boats, which hung straight down. The boy nodded. He was in no hurry. His grandfather had told him that the wind always
comes to those who wait for it with everything in good order, and that most people are still looking for their string
when it arrives. So he checked the knots once more, laid the string in wide loops on the stones, and waited."""
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
NEW = 24


@functools.cache
def tokenizer() -> Any:
    return Tokenizer.from_str(gguf_tokenizer(real.file("smollm2"))["tokenizer.json"].decode())


@functools.cache
def ours() -> tuple[Any, Any]:
    """Read into the scanned form, which compiles thirty layers as one."""
    opened = open_weights(real.file("smollm2"))
    family = family_of(opened.config)
    model = family.build(opened.config).clone(scan=True)
    return model, read_variables(family, model, opened)


@functools.cache
def theirs() -> Any:
    """The same file in `transformers`: config and names written out, nothing of our reader used."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    parts = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(real.file("smollm2")).tensors:
        *layer, part, kind = str(tensor.name).split(".")
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if part in ("attn_q", "attn_k"):  # the halves of each head's 64 features are stored in turns
            weight = weight.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        state[f"{prefix}{parts[part]}.{kind}"] = torch.from_numpy(np.array(weight, np.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


def nats(model: Any, variables: Any, ids: np.ndarray) -> np.ndarray:
    """Per token of a text but the first."""

    def run(variables: Any, ids: Any) -> Any:
        tokens = model.apply(variables, ids, logits=False)["tokens"]
        kernel = model.apply(variables, method="output_kernel")
        return vocabulary_loss(tokens[:, :-1], kernel, ids[:, 1:], chunk=64)[1].nats

    return np.asarray(jax.jit(run)(variables, jnp.asarray(ids)))


def test_a_page_of_prose_costs_as_many_nats() -> None:
    ids = np.array([tokenizer().encode(PROSE).ids])
    assert ids.shape[1] > 250
    found = nats(*ours(), ids)
    with torch.no_grad():
        logits = theirs()(torch.from_numpy(ids)).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(ids[0, 1:]), reduction="none"
    ).numpy()
    np.testing.assert_allclose(found[0], expected, atol=2e-3)
    assert found.mean() == pytest.approx(expected.mean(), rel=1e-5)
    assert 2.0 < found.mean() < 4.0  # a small model that reads English; 10.8 is guessing
    print("nats per token", found.mean(), expected.mean(), np.abs(found[0] - expected).max())


def test_a_question_gets_the_same_answer() -> None:
    ids = np.array([tokenizer().encode(QUESTION).ids])
    eos = tokenizer().token_to_id("<|im_end|>")
    expected = (
        theirs()
        .generate(
            torch.from_numpy(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=eos
        )[0, ids.shape[1] :]
        .tolist()
    )
    found = generate(
        *ours(),
        ids,
        max_new_tokens=NEW,
        eos=(eos,),
        pad=eos,
        decode=lambda ids: tokenizer().decode(list(ids)),
    )
    assert found.tokens[0, : found.lengths[0]].tolist() == expected
    assert found.texts is not None and "Paris" in found.texts[0]

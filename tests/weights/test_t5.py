"""T5 weights: equal to `transformers` in both directions, for every form that was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.activations import ACT2FN

from tests.weights.parity import Outputs, assert_identical, check, compare, hidden_states, layers, randomize
from vlpjax.errors import UserError
from vlpjax.models.encoder_decoder import EncoderDecoder
from vlpjax.models.layers import activation
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.families.t5 import FAMILY

IDS = np.array([[21, 11, 7, 40, 1, 0, 0], [5, 1, 0, 0, 0, 0, 0], [12, 4, 9, 8, 50, 21, 1]], np.int32)
OUTPUTS = np.array([[0, 4, 7, 44], [0, 9, 1, 0], [0, 8, 8, 51]], np.int32)
REAL = (IDS != 0)[..., None]
LAYERS = (0, 1)


def fields(**changes: Any) -> dict[str, Any]:
    return dict(
        vocab_size=53,
        d_model=28,
        d_kv=5,
        d_ff=44,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        **changes,
    )


def untied(peer: Any) -> Any:
    """With a head of its own, which `transformers` lets a model have only when its file does."""
    peer.lm_head.weight = torch.nn.Parameter(torch.zeros_like(peer.lm_head.weight))
    return peer


def run_theirs(peer: Any) -> Outputs:
    out = peer(
        input_ids=torch.tensor(IDS),
        attention_mask=torch.tensor(IDS != 0).long(),
        decoder_input_ids=torch.tensor(OUTPUTS),
        output_hidden_states=True,
        use_cache=False,
    )
    # The last of theirs is after the final norm.
    encoder = hidden_states(out.encoder_hidden_states[:-1], "encoder_")
    found = {name: state * torch.tensor(REAL) for name, state in encoder.items()}
    found |= hidden_states(out.decoder_hidden_states[:-1], "decoder_")
    found |= {"memory": out.encoder_last_hidden_state * torch.tensor(REAL)}
    if isinstance(peer, (transformers.T5Model, transformers.MT5Model)):
        return {**found, "tokens": out.last_hidden_state}
    return {**found, "tokens": out.decoder_hidden_states[-1], "logits": out.logits}


def run_ours(model: EncoderDecoder, variables: Any) -> Outputs:
    out = model.apply(
        variables, IDS, OUTPUTS, hidden=LAYERS[:-1], decoder_hidden=tuple(range(model.layers - 1))
    )
    encoder = layers(out["encoder"]["hidden"], "encoder_")
    return {
        **{name: state * REAL for name, state in encoder.items()},
        **layers(out.get("hidden", {}), "decoder_"),
        "memory": out["encoder"]["tokens"] * REAL,
        "tokens": out["tokens"],
        "logits": out["logits"],
    }


def test_t5_equals_theirs(tmp_path: Path) -> None:
    peer = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields()))
    parity = check(peer, tmp_path, run_theirs, run_ours)
    assert parity.model.tied and not parity.model.gated


def test_t5_1_1_with_a_head_of_its_own_equals_theirs(tmp_path: Path) -> None:
    config = transformers.T5Config(**fields(feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    peer = untied(transformers.T5ForConditionalGeneration(config))
    parity = check(peer, tmp_path, run_theirs, run_ours)
    assert not parity.model.tied and parity.model.gated


def test_mt5_equals_theirs_and_is_written_as_t5(tmp_path: Path) -> None:
    peer = untied(
        transformers.MT5ForConditionalGeneration(
            transformers.MT5Config(**{**fields(), "num_decoder_layers": 1})
        )
    )
    parity = check(peer, tmp_path, run_theirs, run_ours)
    assert not parity.model.tied and parity.model.activation == "gelu_tanh"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "t5"


def test_a_model_without_a_head_equals_theirs(tmp_path: Path) -> None:
    peer = randomize(transformers.T5Model(transformers.T5Config(**fields(feed_forward_proj="gated-silu"))))
    peer.save_pretrained(tmp_path / "theirs")
    model, variables = from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = run_theirs(peer)
    found = jax.jit(lambda variables: run_ours(model, variables))(variables)
    compare({name: found[name] for name in expected}, expected)


def test_the_copies_of_old_files_are_read(tmp_path: Path) -> None:
    peer = randomize(transformers.T5ForConditionalGeneration(transformers.T5Config(**fields())))
    peer.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    old = {**tensors, **dict.fromkeys(names, tensors["shared.weight"])}
    old["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones(
        (8, 3), np.float32
    )
    save_file(old, tmp_path / "old" / "model.safetensors")
    model, variables = from_pretrained(tmp_path / "old")
    save_pretrained(model, variables, tmp_path / "back")
    assert_identical(tmp_path / "theirs", tmp_path / "back")


@pytest.mark.parametrize(
    "name", ["relu", "gelu", "gelu_new", "silu", "gated-gelu", "gated-silu", "gated-relu"]
)
def test_every_activation_is_written_as_what_it_was_read_from(name: str) -> None:
    model = FAMILY.build(fields(feed_forward_proj=name))
    again = FAMILY.build(FAMILY.describe(model))
    assert (again.activation, again.gated) == (model.activation, model.gated)
    theirs = transformers.T5Config(feed_forward_proj=name)
    assert theirs.is_gated_act == model.gated
    x = np.linspace(-3, 3, 50, dtype=np.float32)
    expected = ACT2FN[theirs.dense_act_fn](torch.tensor(x))
    np.testing.assert_allclose(activation(model.activation)(x), expected, atol=2e-6)


def test_what_t5_cannot_hold_is_told() -> None:
    model = EncoderDecoder(vocabulary=10, activation="gelu", gated=True)
    with pytest.raises(UserError, match="activation is 'gelu' with gated=True"):
        FAMILY.describe(model)
    with pytest.raises(UserError, match="feed_forward_proj='gated-tanh'"):
        FAMILY.build(fields(feed_forward_proj="gated-tanh"))
    with pytest.raises(UserError, match="T5EncoderModel"):
        FAMILY.build({**fields(), "architectures": ["T5EncoderModel"]})

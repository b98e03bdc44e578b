"""Decoders against `transformers`: every family, both ways, every hidden state, bit-identical files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.weights.decoder_peers import CONFIGS, SCALINGS, peer, scanned
from tests.weights.parity import check, layers, load_theirs
from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.models.positions import Rotary
from vlpjax.models.text import TextTransformer
from vlpjax.weights.families import family_holding, family_of

IDS = np.random.default_rng(0).integers(0, 61, (2, 23))


def load(folder: Path) -> torch.nn.Module:
    model: Any = load_theirs(folder)
    model.set_attn_implementation("eager")
    return model


def run_theirs(model: Any) -> dict[str, Any]:
    outputs = model(torch.from_numpy(IDS), output_hidden_states=True)
    states = outputs.hidden_states  # the embeddings, each layer's output, the last one after the final norm
    hidden = {f"hidden_{layer}": state for layer, state in enumerate(states[1:-1])}
    return {"logits": outputs.logits, "tokens": states[-1], "embedded": states[0], **hidden}


def run_ours(model: Any, variables: Any) -> dict[str, Any]:
    model, variables = scanned(model, variables)  # compiles faster
    outputs = model.apply(variables, jnp.asarray(IDS), hidden=range(model.depth - 1))
    embedded = model.apply(variables, jnp.asarray(IDS), method="embed")
    if model.learned_positions:
        embedded += variables["params"]["position_embedding"][: IDS.shape[1]]
    shown = {"logits": outputs["logits"], "tokens": outputs["tokens"], "embedded": embedded}
    return shown | layers(outputs["hidden"])


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_in_both_directions(name: str, tmp_path: Path) -> None:
    check(peer(name), tmp_path, run_theirs, run_ours, load=load)


def built(**config: Any) -> Decoder:
    """The decoder of a config as it stands in a file, in sizes of our own."""
    sizes = dict(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=7, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    model = family_of(config).build({**sizes, **config})
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("name", SCALINGS)
def test_both_spellings_of_rotary_fields_are_read(name: str) -> None:
    new = built(model_type="llama", rope_parameters={"rope_theta": 300.0, **SCALINGS[name]})
    old = built(model_type="llama", rope_theta=300.0, rope_scaling=SCALINGS[name])
    assert old.rotary == new.rotary != Rotary(300.0)
    older = {("type" if key == "rope_type" else key): value for key, value in SCALINGS[name].items()}
    assert built(model_type="llama", rope_theta=300.0, rope_scaling=older).rotary == new.rotary
    _, config = family_holding(new)
    both = [
        {key: value for key, value in config.items() if key not in without}
        for without in (("rope_parameters",), ("rope_theta", "rope_scaling"))
    ]
    assert [built(model_type="llama", **fields).rotary for fields in both] == [new.rotary] * 2


def test_defaults_of_absent_fields() -> None:
    gemma3 = built(model_type="gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert gemma3.kinds() == ("local",) * 5 + ("global", "local")
    assert gemma3.rotary is not None and gemma3.local_rotary == Rotary(10_000.0)
    assert gemma3.rotary.base == 1_000_000.0 and gemma3.rotary.scaling is not None
    assert (gemma3.head_dim, gemma3.scale, gemma3.window, gemma3.tied) == (256, 1 / 16, 4096, True)
    gemma2 = built(model_type="gemma2")
    assert gemma2.kinds()[:3] == ("local", "global", "local")
    assert (gemma2.soft_cap, gemma2.final_soft_cap) == (50.0, 30.0)
    assert built(model_type="gemma", hidden_act="gelu").activation == "gelu_tanh"
    assert not built(model_type="llama").tied
    assert built(model_type="qwen2", sliding_window=3).kinds() == ("global",) * 7  # written, but not used


def test_what_a_family_writes_is_what_it_reads() -> None:
    for name, theirs in CONFIGS.items():
        config = theirs.to_dict()
        family = family_of(config)
        model = family.build(config)
        assert isinstance(model, Decoder)
        for one in (model, model.clone(length=None) if not model.learned_positions else model):
            again = family.build({"model_type": config["model_type"], **family.describe(one)})
            differing = {
                field.name
                for field in dataclasses.fields(Decoder)
                if field.name not in ("parent", "name")
                and getattr(again, field.name) != getattr(one, field.name)
            }
            # Written out where they are defaults: the same model.
            assert differing <= {"kv_heads", "head_dim", "mlp_dim", "scale", "local_rotary"}, (
                name,
                differing,
            )
            if "scale" in differing:
                head_dim = one.head_dim or one.width // one.heads
                assert one.scale == pytest.approx(again.scale or head_dim**-0.5, rel=1e-12)


def test_a_decoder_goes_to_the_first_family_that_can_hold_it() -> None:
    def name(**fields: Any) -> str:
        return family_holding(Decoder(61, 24, 2, 4, mlp_dim=40, **fields))[0].name

    assert name() == "llama"
    assert name(qkv_bias=True) == "qwen2"
    assert name(qk_norm="rms") == "qwen3"
    assert name(pattern=("local",), window=4) == "mistral"
    gemma = dict(norm="rms_offset", embed_scale=24**0.5, activation="gelu_tanh")
    assert name(**gemma) == "gemma"
    assert name(**gemma, order="both") == "gemma2"
    assert name(**gemma, order="both", qk_norm="rms_offset", local_rotary=Rotary(5.0)) == "gemma3"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(model_type="llama", hidden_act="mish"), "has the activation 'mish'"),
        (dict(model_type="llama", vocab_size=None), "vocab_size is None"),
        (dict(model_type="llama", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic'"),
        (dict(model_type="llama", rope_scaling={"type": "linear"}), "needs 'factor'"),
        (
            dict(model_type="gemma2", use_bidirectional_attention=True),
            "use_bidirectional_attention=True; only False",
        ),
        (dict(model_type="gemma2", layer_types=["chunked_attention"]), "has 'chunked_attention'"),
        (dict(model_type="gpt2", n_embd=24), "n_layer is None"),
        (
            dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx=True; only False",
        ),
    ],
)
def test_configs_that_we_cannot_hold_are_told(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**config)


@pytest.mark.parametrize(
    ("fields", "family", "message"),
    [
        (dict(soft_cap=3.0), "llama", "soft_cap=None; this one has 3.0"),
        (dict(rotary=None), "qwen3", "qk_norm='rms'; this one has None"),
        (dict(rotary=None), "llama", "one kind of rotary positions"),
        (dict(rotary=Rotary(sections=(1, 1, 1))), "llama", "without sections"),
        (dict(activation="relu", norm="rms_offset"), "gemma2", "order='both'"),
    ],
)
def test_decoders_that_a_family_cannot_hold_are_told(
    fields: dict[str, Any], family: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        family_of({"model_type": family}).describe(Decoder(61, 24, 2, 4, **fields))
    with pytest.raises(UserError, match="holds a Decoder, not a TextTransformer"):
        family_of({"model_type": family}).describe(TextTransformer(5, 4))


def test_the_example_makes_all_parameters() -> None:
    family = family_of({"model_type": "llama"})
    model = Decoder(61, 24, 2, 4, tied=False)
    shapes = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids), *family.example(model))
    assert set(shapes["params"]) == {"token_embedding", "block_0", "block_1", "final_norm", "head"}


@pytest.mark.parametrize("interleaved", [False, True])
def test_coordinates_are_dealt_to_angles_as_in_qwens_vision_language_models(interleaved: bool) -> None:
    parameters = {"rope_type": "default", "rope_theta": 700.0, "mrope_section": [4, 3, 3]}
    if interleaved:
        from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl

        config: Any = configuration_qwen3_vl.Qwen3VLTextConfig(
            head_dim=20, rope_parameters={**parameters, "mrope_interleaved": True}
        )
        theirs: Any = modeling_qwen3_vl.Qwen3VLTextRotaryEmbedding(config)
    else:
        from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

        config = configuration_qwen2_vl.Qwen2VLTextConfig(
            hidden_size=80, num_attention_heads=4, rope_parameters=parameters
        )
        theirs = modeling_qwen2_vl.Qwen2VLRotaryEmbedding(config)
    positions = np.random.default_rng(0).integers(0, 40, (3, 2, 9))
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions))
    rotation = Rotary(700.0, sections=(4, 3, 3), interleaved=interleaved)(jnp.asarray(positions), 20)
    np.testing.assert_allclose(rotation.cos, cos[..., :10], atol=1e-5)
    np.testing.assert_allclose(rotation.sin, sin[..., :10], atol=1e-5)

"""DINOv2 with and without registers, plain and gated, on images of any size, equals `transformers`'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.weights import parity
from vlpjax.errors import UserError
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained, save_pretrained

# The table of positions is 5 x 5; images are larger than that one way and smaller the other.
SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=35, patch_size=7)
IMAGES = np.random.default_rng(0).standard_normal((2, 21, 42, 3)).astype(np.float32)
SEEN = np.random.default_rng(1).random((2, 18)) < 0.6  # which patches are not masked


def theirs(model: Any) -> dict[str, Any]:
    pixels = torch.from_numpy(np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)))
    out = model(pixels, output_hidden_states=True)
    masked = model(pixels, bool_masked_pos=torch.from_numpy(~SEEN))
    count = out.last_hidden_state.shape[1] - 18
    return {
        "prefix": out.last_hidden_state[:, :count],
        "tokens": out.last_hidden_state[:, count:],
        "pooled": out.pooler_output,
        "masked": masked.pooler_output,
        **parity.hidden_states(out.hidden_states),
    }


def ours(model: ViT, variables: Any) -> dict[str, Any]:
    out = model.apply(variables, IMAGES, hidden=(0, 1))
    masked = model.apply(variables, IMAGES, masked=jnp.asarray(~SEEN))
    named = {name: out[name] for name in ("prefix", "tokens", "pooled")}
    return {**named, "masked": masked["pooled"], **parity.layers(out["hidden"])}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_towers_equal_theirs(tmp_path: Path, registers: int, gated: bool) -> None:
    fields: dict[str, Any] = dict(**SIZES, use_swiglu_ffn=gated, layerscale_value=0.5)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**fields, num_register_tokens=registers)
        peer = transformers.Dinov2WithRegistersModel(config)
    else:
        peer = transformers.Dinov2Model(transformers.Dinov2Config(**fields, mlp_ratio=2 if gated else 4))
    found = parity.check(peer, tmp_path, theirs, ours)
    assert found.model.registers == registers
    assert found.model.gated == gated


def test_a_tower_without_mask_token_is_read_and_written(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(**SIZES, use_mask_token=False, qkv_bias=False)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "theirs")
    model, variables = from_pretrained(tmp_path / "theirs")
    assert "mask_token" not in variables["params"]
    save_pretrained(model, variables, tmp_path / "back")
    parity.assert_identical(tmp_path / "theirs", tmp_path / "back")
    parity.load_theirs(tmp_path / "back")


def test_a_tower_is_written_as_the_family_that_it_is_of(tmp_path: Path) -> None:
    fields = dict(image_size=28, patch=14, width=16, depth=1, heads=2, pre_norm=False, patch_bias=True,
                  layer_scale=1.0, mask_token=True)  # fmt: skip
    plain = ViT(**fields)
    for family, wrong in [
        ("dinov2_with_registers", "ViT.registers is 0"),
        ("dinov2_gated", "ViT.gated is False"),
    ]:
        with pytest.raises(UserError, match=wrong):
            save_pretrained(plain, {}, tmp_path / "ours", family=family)
    with pytest.raises(UserError, match="40 wide"):
        save_pretrained(plain.clone(mlp_dim=40), {}, tmp_path / "ours", family="dinov2")
    with pytest.raises(UserError, match="ViT.layer_scale is None"):
        save_pretrained(plain.clone(layer_scale=None), {}, tmp_path / "ours", family="dinov2")


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="Dinov2ForImageClassification"):
        from_pretrained(tmp_path)

"""ViT with pooler, with a classifier and with neither equal `transformers`'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from tests.weights import parity
from vlpjax.errors import UserError
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained, save_pretrained

SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
RANDOM = np.random.default_rng(0)


def drawn(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RANDOM.standard_normal((2, height, width, channels)).astype(np.float32)


def pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def their_tower(model: Any, images: np.ndarray, **options: Any) -> dict[str, Any]:
    out = model(pixels(images), output_hidden_states=True, **options)
    states = {"prefix": out.last_hidden_state[:, :1], "tokens": out.last_hidden_state[:, 1:]}
    return {**states, **parity.hidden_states(out.hidden_states)}


def our_tower(model: ViT, variables: Any, images: np.ndarray) -> dict[str, Any]:
    out = model.apply(variables, images, hidden=tuple(range(model.depth)))
    return {"prefix": out["prefix"], "tokens": out["tokens"], **parity.layers(out["hidden"])}


def with_prefix(name: str) -> str:
    """Names in the file of a bare tower, as we write them."""
    return f"vit.{name}"


def test_a_tower_with_pooler_equals_theirs_on_oblong_images_patches_and_five_channels(tmp_path: Path) -> None:
    images = drawn(24, 16, channels=5)
    config = transformers.ViTConfig(
        **SIZES, image_size=(24, 16), patch_size=(6, 4), num_channels=5, qkv_bias=False
    )
    parity.check(
        transformers.ViTModel(config),
        tmp_path,
        lambda model: {"pooled": model(pixels(images)).pooler_output, **their_tower(model, images)},
        lambda model, variables: {
            "pooled": model.apply(variables, images)["pooled"],
            **our_tower(model, variables, images),
        },
        rename=with_prefix,
    )


def test_images_of_another_size_than_the_table_of_positions(tmp_path: Path) -> None:
    images = drawn(32, 16)
    parity.check(
        transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=24, patch_size=8)),
        tmp_path,
        lambda model: their_tower(model, images, interpolate_pos_encoding=True),
        lambda model, variables: our_tower(model.clone(resize_positions=True), variables, images),
        rename=with_prefix,
    )


@pytest.mark.parametrize("labels", [5, 0])
def test_a_classifier_of_some_or_no_classes_equals_theirs(tmp_path: Path, labels: int) -> None:
    images = drawn(24, 24)
    config = transformers.ViTConfig(
        **SIZES, image_size=24, patch_size=8, num_labels=labels, hidden_act="gelu_new"
    )
    parity.check(
        transformers.ViTForImageClassification(config),
        tmp_path,
        lambda model: {"logits": model(pixels(images)).logits},
        lambda model, variables: {"logits": model.apply(variables, images)["embedding"]},
    )


def test_a_file_without_the_pooler_that_its_class_has_is_read_by_name(tmp_path: Path) -> None:
    images = drawn(24, 24)
    config = transformers.ViTConfig(**SIZES, image_size=24, patch_size=8)
    peer = parity.randomize(transformers.ViTModel(config, add_pooling_layer=False))
    peer.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="pooler/kernel"):
        from_pretrained(tmp_path / "theirs")
    model, variables = from_pretrained(tmp_path / "theirs", family="vit_without_pooler")
    with torch.no_grad():
        expected = their_tower(peer, images)
    parity.compare(jax.jit(lambda variables: our_tower(model, variables, images))(variables), expected)
    save_pretrained(model, variables, tmp_path / "back")
    parity.assert_identical(tmp_path / "theirs", tmp_path / "back", rename=with_prefix)
    parity.load_theirs(tmp_path / "back")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"pre_norm": True}, "ViT.pre_norm is True"),
        ({"pool": "mean", "class_tokens": 1}, "ViT.pool is 'mean'"),
        ({"embedding": 4}, "ViT.projection_bias is False"),
        ({"gated": True, "activation": "silu"}, "ViT.gated is True"),
        ({"qk_norm": "layer"}, "ViT.qk_norm is 'layer'"),
        ({"frames": 2, "tubelet": 2}, "ViT.frames is 2"),
    ],
)
def test_what_vit_cannot_hold_is_told(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    sizes = dict(image_size=16, patch=8, width=16, depth=1, heads=2, pre_norm=False, patch_bias=True)
    with pytest.raises(UserError, match=told):
        save_pretrained(ViT(**{**sizes, **fields}), {}, tmp_path / "ours", family="vit")


def test_other_heads_of_vit_are_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=24, patch_size=8, encoder_stride=8)
    transformers.ViTForMaskedImageModeling(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ViTForMaskedImageModeling"):
        from_pretrained(tmp_path)

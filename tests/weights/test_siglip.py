"""SigLIP, and SigLIP 2 with images of any shape: both towers, and the image tower alone, equal `transformers`'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.weights import parity
from vlpjax.errors import UserError
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained, save_pretrained

SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
VISION = dict(**SIZES, image_size=24, patch_size=8)
FLEXIBLE = dict(**SIZES, num_patches=16, patch_size=4)
TEXT = dict(vocab_size=50, hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=9, projection_size=24)  # fmt: skip
IMAGES = np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 50, (3, 9))
LAYERS = (0, 1)


def joined(image: Any, text: Any, scale: Any, bias: Any, ours: bool) -> dict[str, Any]:
    """What both sides return, by the same names."""
    if ours:
        unit = [part["embedding"] for part in (image, text)]
        unit = [features / jnp.linalg.norm(features, axis=-1, keepdims=True) for features in unit]
        logits = jnp.exp(scale) * unit[0] @ unit[1].T + bias
        named = {"image": image["tokens"], "pooled": image["pooled"], "text": text["tokens"]}
        hidden = {**parity.layers(image["hidden"], "image_"), **parity.layers(text["hidden"], "text_")}
        return {"logits": logits, "image_embedding": unit[0], "text_embedding": unit[1], **named, **hidden}
    states = {
        **parity.hidden_states(image.hidden_states, "image_"),
        **parity.hidden_states(text.hidden_states, "text_"),
    }
    return {
        "image": image.last_hidden_state,
        "pooled": image.pooler_output,
        "text": text.last_hidden_state,
        **states,
    }


def their_images(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def test_siglip_equals_theirs(tmp_path: Path) -> None:
    config = transformers.SiglipConfig(vision_config=VISION, text_config=TEXT)
    ids = torch.from_numpy(IDS)

    def theirs(model: Any) -> dict[str, Any]:
        out = model(ids, their_images(IMAGES))
        image = model.vision_model(their_images(IMAGES), output_hidden_states=True)
        text = model.text_model(ids, output_hidden_states=True)
        return {
            "logits": out.logits_per_image,
            "image_embedding": out.image_embeds,
            "text_embedding": out.text_embeds,
            **joined(image, text, None, None, ours=False),
        }

    def ours(model: Towers, variables: Any) -> dict[str, Any]:
        def run(towers: Towers) -> dict[str, Any]:
            image = towers.call("image", IMAGES, hidden=LAYERS)
            text = towers.call("text", jnp.asarray(IDS), hidden=LAYERS)
            return joined(
                image, text, towers.call("clip_logit_scale"), towers.call("clip_logit_bias"), ours=True
            )

        return model.apply(variables, method=run)

    parity.check(transformers.SiglipModel(config), tmp_path, theirs, ours)


@pytest.mark.parametrize("head", [True, False])
def test_an_image_tower_alone_takes_other_image_sizes(tmp_path: Path, head: bool) -> None:
    images = np.random.default_rng(0).standard_normal((2, 32, 16, 3)).astype(np.float32)

    def theirs(model: Any) -> dict[str, Any]:
        out = model(their_images(images), interpolate_pos_encoding=True, output_hidden_states=True)
        pooled = {"pooled": out.pooler_output} if head else {}
        return {"tokens": out.last_hidden_state, **pooled, **parity.hidden_states(out.hidden_states)}

    def ours(model: ViT, variables: Any) -> dict[str, Any]:
        out = model.clone(resize_positions=True).apply(variables, images, hidden=LAYERS)
        pooled = {"pooled": out["pooled"]} if head else {}
        return {"tokens": out["tokens"], **pooled, **parity.layers(out["hidden"])}

    config = transformers.SiglipVisionConfig(**VISION, vision_use_head=head)
    peer = transformers.SiglipVisionModel(config)
    parity.check(peer, tmp_path, theirs, ours, rename=lambda name: f"vision_model.{name}")


def flexible_batch() -> tuple[dict[str, np.ndarray], list[tuple[int, int]]]:
    """One image per row: wide, square and small, tall; the rest of a row is padding, which is noise."""
    grids = [(2, 7), (3, 3), (5, 2)]
    tokens = 15
    random = np.random.default_rng(2)
    positions = np.zeros((3, tokens, 2), np.int32)
    segment_ids = np.zeros((3, tokens), np.int32)
    for row, (height, width) in enumerate(grids):
        positions[row, : height * width] = np.stack(
            np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1
        ).reshape(-1, 2)
        segment_ids[row, : height * width] = 1
    patches = random.standard_normal((3, tokens, 4 * 4 * 3)).astype(np.float32)
    return {"patches": patches, "positions": positions, "segment_ids": segment_ids}, grids


def test_siglip_2_with_images_of_any_shape_equals_theirs(tmp_path: Path) -> None:
    batch, grids = flexible_batch()
    real = batch["segment_ids"][..., None] > 0
    ids = torch.from_numpy(IDS)
    inputs = {
        "pixel_values": torch.from_numpy(batch["patches"]),
        "pixel_attention_mask": torch.from_numpy(batch["segment_ids"].astype(np.int64)),
        "spatial_shapes": torch.tensor(grids),
    }

    def without_padding(outputs: dict[str, Any]) -> dict[str, Any]:
        """What padding becomes means nothing, on either side."""
        padded = {name for name in outputs if name == "image" or name.startswith("image_hidden")}
        return {name: value * real if name in padded else value for name, value in outputs.items()}

    def theirs(model: Any) -> dict[str, Any]:
        out = model(input_ids=ids, **inputs)
        image = model.vision_model(**inputs, output_hidden_states=True)
        text = model.text_model(ids, output_hidden_states=True)
        found = {
            "logits": out.logits_per_image,
            "image_embedding": out.image_embeds,
            "text_embedding": out.text_embeds,
            **joined(image, text, None, None, ours=False),
        }
        return without_padding({name: value.numpy() for name, value in found.items()})

    def ours(model: Towers, variables: Any) -> dict[str, Any]:
        def run(towers: Towers) -> dict[str, Any]:
            image = towers.call("image", batch, hidden=LAYERS)
            image |= {name: image[name][:, 0] for name in ("pooled", "embedding")}  # one image per row
            text = towers.call("text", jnp.asarray(IDS), hidden=LAYERS)
            return joined(
                image, text, towers.call("clip_logit_scale"), towers.call("clip_logit_bias"), ours=True
            )

        return without_padding(model.apply(variables, method=run))

    config = transformers.Siglip2Config(vision_config=FLEXIBLE, text_config=TEXT)
    parity.check(transformers.Siglip2Model(config), tmp_path, theirs, ours)


def test_a_packed_image_has_the_features_of_the_same_plain_image(tmp_path: Path) -> None:
    peer = parity.randomize(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**FLEXIBLE)))
    peer.save_pretrained(tmp_path)
    model, variables = from_pretrained(tmp_path)
    batch, grids = flexible_batch()
    (height, width), count = grids[0], grids[0][0] * grids[0][1]
    patches = batch["patches"][:1, :count].reshape(1, height, width, 4, 4, 3)
    image = patches.transpose(0, 1, 3, 2, 4, 5).reshape(1, 4 * height, 4 * width, 3)
    run = jax.jit(lambda inputs: model.apply(variables, inputs)["pooled"])
    packed = run({name: value[:1] for name, value in batch.items()})[:, 0]
    parity.compare({"pooled": packed}, {"pooled": run(image)}, 1e-5)


def test_what_siglip_cannot_hold_is_told(tmp_path: Path) -> None:
    fields = dict(
        image_size=16, patch=8, width=16, depth=1, heads=2, pool="map", pre_norm=False, patch_bias=True
    )
    told = {
        "pool": ("mean", "ViT.pool is 'mean'"),
        "patch_bias": (False, "ViT.patch_bias is False"),
        "positions": ("sincos", "ViT.positions is 'sincos'"),
        "class_tokens": (1, "ViT.class_tokens is 1"),
        "layer_scale": (0.1, "ViT.layer_scale is True"),
    }
    for field, (value, message) in told.items():
        with pytest.raises(UserError, match=message):
            save_pretrained(ViT(**{**fields, field: value}), {}, tmp_path / "ours", family="siglip_vision")

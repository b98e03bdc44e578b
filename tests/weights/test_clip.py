"""CLIP: both towers, and each alone, equal `transformers`' in both directions."""

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
from vlpjax.models.heads import Scalar
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained, save_pretrained

VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    image_size=24,
    patch_size=8,
)
TEXT = dict(vocab_size=50, hidden_size=16, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=9, eos_token_id=49)  # fmt: skip
IMAGES = np.random.default_rng(0).standard_normal((2, 24, 24, 3)).astype(np.float32)
# The end of text in the middle, at the end, and twice; ids behind the end are drawn like all others.
IDS = np.random.default_rng(1).integers(1, 49, (3, 9))
IDS[0, 4] = IDS[1, 8] = IDS[2, 2] = IDS[2, 6] = 49


def pixels(images: np.ndarray) -> torch.Tensor:
    """The same images, channels first."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def their_image(model: Any, images: np.ndarray, **options: Any) -> dict[str, Any]:
    """All that an image tower of `transformers` returns, by our names."""
    out = model(pixels(images), output_hidden_states=True, **options)
    return {
        "tokens": out.last_hidden_state[:, 1:],
        "pooled": out.pooler_output,
        **parity.hidden_states(out.hidden_states),
    }


def our_image(model: ViT, variables: Any, images: np.ndarray) -> dict[str, Any]:
    """All that an image tower of ours returns, by the same names."""
    out = model.apply(variables, images, hidden=tuple(range(model.depth)))
    return {"tokens": out["tokens"], "pooled": out["pooled"], **parity.layers(out["hidden"])}


def prefixed(name: str, outputs: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}_{key}": value for key, value in outputs.items()}


def their_clip(model: Any) -> dict[str, Any]:
    out = model(torch.from_numpy(IDS), pixels(IMAGES))
    text = model.text_model(torch.from_numpy(IDS), output_hidden_states=True)
    return {
        "logits": out.logits_per_image,
        "image_embedding": out.image_embeds,
        "text_embedding": out.text_embeds,
        **prefixed("image", their_image(model.vision_model, IMAGES)),
        "text_tokens": text.last_hidden_state,
        "text_pooled": text.pooler_output,
        **parity.hidden_states(text.hidden_states, "text_"),
    }


def our_clip(model: Towers, variables: Any) -> dict[str, Any]:
    def run(towers: Towers) -> dict[str, Any]:
        image = towers.call("image", IMAGES, hidden=(0, 1, 2))
        text = towers.call("text", jnp.asarray(IDS), hidden=(0, 1))
        unit = [features["embedding"] for features in (image, text)]
        unit = [features / jnp.linalg.norm(features, axis=-1, keepdims=True) for features in unit]
        return {
            "logits": jnp.exp(towers.call("clip_logit_scale")) * unit[0] @ unit[1].T,
            "image_embedding": unit[0],
            "text_embedding": unit[1],
            "image_tokens": image["tokens"],
            "image_pooled": image["pooled"],
            **parity.layers(image["hidden"], "image_"),
            "text_tokens": text["tokens"],
            "text_pooled": text["pooled"],
            **parity.layers(text["hidden"], "text_"),
        }

    return model.apply(variables, method=run)


@pytest.mark.parametrize("eos", [49, 2])
def test_both_towers_equal_theirs_with_new_and_old_configs(tmp_path: Path, eos: int) -> None:
    config = transformers.CLIPConfig(
        vision_config=VISION, text_config={**TEXT, "eos_token_id": eos}, projection_dim=20
    )
    parity.check(transformers.CLIPModel(config), tmp_path, their_clip, our_clip)


def test_an_image_tower_alone_takes_other_image_sizes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 16, 40, 3)).astype(np.float32)
    parity.check(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**{**VISION, "hidden_act": "gelu"})),
        tmp_path,
        lambda model: their_image(model, images, interpolate_pos_encoding=True),
        lambda model, variables: our_image(model.clone(resize_positions=True), variables, images),
        rename=lambda name: f"vision_model.{name}",
    )


def test_towers_with_projections_equal_theirs(tmp_path: Path) -> None:
    parity.check(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**VISION, projection_dim=20)
        ),
        tmp_path / "image",
        lambda model: {"embedding": model(pixels(IMAGES)).image_embeds},
        lambda model, variables: {"embedding": model.apply(variables, IMAGES)["embedding"]},
    )
    parity.check(
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**TEXT, projection_dim=20)),
        tmp_path / "text",
        lambda model: {"embedding": model(torch.from_numpy(IDS)).text_embeds},
        lambda model, variables: {"embedding": model.apply(variables, jnp.asarray(IDS))["embedding"]},
    )


def small(image: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Towers:
    """Our own towers, with their usual settings but for these."""
    sizes = dict(width=16, depth=1, heads=2, embedding=12)
    return Towers.of(
        {
            "image": ViT(**{**sizes, "image_size": 16, "patch": 8, **(image or {})}),
            "text": TextTransformer(**{**sizes, "vocabulary": 30, "length": 6, "eos_id": 1, **(text or {})}),
            "clip_logit_scale": Scalar(1.0),
        }
    )


def test_our_usual_towers_which_norm_before_pooling_are_exported(tmp_path: Path) -> None:
    towers, images = small(), IMAGES[:, :16, :16]
    example = {"image": (images,), "text": (jnp.ones((1, 6), int),), "clip_logit_scale": ()}

    def run(towers: Towers) -> dict[str, Any]:
        return {name: towers.call(name, *arguments) for name, arguments in example.items()}

    variables = parity.draw(jax.eval_shape(lambda: towers.init(jax.random.key(0), method=run)))
    save_pretrained(towers, variables, tmp_path / "ours", family="clip")
    peer = parity.load_theirs(tmp_path / "ours")
    with torch.no_grad():
        expected = {"embedding": peer.get_image_features(pixels(images)).pooler_output}
    found = jax.jit(lambda variables: towers.apply(variables, method=run))(variables)
    parity.compare({"embedding": found["image"]["embedding"]}, expected)


@pytest.mark.parametrize(
    ("image", "text", "told"),
    [
        ({"stem": "conv"}, {}, "ViT.stem is 'conv'"),
        ({"image_size": (16, 24)}, {}, r"ViT.image_size is \(16, 24\)"),
        ({"registers": 4}, {}, "ViT.registers is 4"),
        ({"norm": "rms"}, {}, "ViT.norm is 'rms'"),
        ({"activation": "mish"}, {}, "'mish' has no counterpart"),
        ({"embedding": 8}, {}, "ViT.embedding is 8 and TextTransformer.embedding is 12"),
        ({}, {"eos_id": None}, "eos_id is None"),
        ({}, {"eos_id": 2}, "eos_id is 2"),
        ({}, {"pool": "mean"}, "TextTransformer.pool is 'mean'"),
    ],
)
def test_what_clip_cannot_hold_is_told(tmp_path: Path, image: Any, text: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        save_pretrained(small(image, text), {"params": {}}, tmp_path / "ours", family="clip")
    assert not (tmp_path / "ours").exists()


def test_an_unknown_activation_in_a_config_is_told(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(**{**VISION, "hidden_act": "mish"})
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="activation 'mish'"):
        from_pretrained(tmp_path)

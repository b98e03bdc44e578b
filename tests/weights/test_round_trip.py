"""Every family, written and read again: the same bits in float32, and half a unit of the last place in bfloat16.

Nothing is run: a small config becomes a module, whose variables are drawn, written, and read from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from tests.weights import parity
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.families import all_families, family_named
from vlpjax.weights.family import boxed_shapes

BODY: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=8,
)  # fmt: skip
WORDS: dict[str, Any] = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=31,
    max_position_embeddings=12,
)  # fmt: skip
DECODER: dict[str, Any] = dict(WORDS, num_attention_heads=4, num_key_value_heads=1, head_dim=6)
T5: dict[str, Any] = dict(
    vocab_size=31, d_model=24, d_kv=6, d_ff=20, num_layers=2, num_decoder_layers=1, num_heads=2
)
SEEING = dict(
    vision_config=dict(BODY, model_type="clip_vision_model"), text_config=dict(DECODER, model_type="llama"),
    image_token_index=30,
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": dict(vision_config=BODY, text_config=WORDS, projection_dim=12),
    "clip_vision": BODY,
    "clip_text": WORDS,
    "siglip": dict(vision_config=BODY, text_config=WORDS),
    "siglip_vision": BODY,
    "siglip_text": WORDS,
    "siglip2": dict(vision_config=dict(BODY, num_patches=4), text_config=WORDS),
    "siglip2_vision": dict(BODY, num_patches=4),
    "vit": BODY,
    "vit_without_pooler": dict(BODY, architectures=["ViTForImageClassification"], id2label={0: "a", 1: "b"}),
    "dinov2": dict(BODY, mlp_ratio=2),
    "dinov2_gated": dict(BODY, mlp_ratio=2, use_swiglu_ffn=True),
    "dinov2_with_registers": dict(BODY, mlp_ratio=2, num_register_tokens=3),
    "dinov2_with_registers_gated": dict(BODY, mlp_ratio=2, num_register_tokens=3, use_swiglu_ffn=True),
    "vit_mae": BODY,
    "vit_mae_with_decoder": dict(
        BODY, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
    ),
    "bert": WORDS,
    "t5": T5,
    "gpt2": dict(vocab_size=31, n_embd=24, n_layer=2, n_head=4, n_positions=12),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"), DECODER),
    "blip2": dict(
        vision_config=BODY, text_config=dict(T5, model_type="t5"), num_query_tokens=5, image_text_hidden_size=12,
        qformer_config=dict(WORDS, encoder_hidden_size=24), image_token_index=30,
    ),
    "llava": SEEING,
    "llava_next": dict(SEEING, image_grid_pinpoints=[[16, 32], [32, 16]]),
    "paligemma": dict(
        vision_config=dict(BODY, vision_use_head=False), text_config=dict(DECODER, model_type="gemma"),
        projection_dim=24, image_token_index=30,
    ),
    **{f"efficientnet_lite{size}": {} for size in range(5)},
    "timm": dict(
        architecture="vit_base_patch16_224",
        model_args=dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5),
    ),
    "open_clip": dict(
        model_cfg=dict(
            embed_dim=12, vision_cfg=dict(layers=2, width=24, head_width=8, patch_size=8, image_size=16),
            text_cfg=dict(context_length=12, vocab_size=31, width=24, heads=3, layers=2),
        )
    ),
}  # fmt: skip


def drawn(name: str) -> tuple[nn.Module, Any]:
    """A small module of a family, and variables of all magnitudes that are met in weights."""
    family = family_named(name)
    model = family.build({"model_type": family.model_types[0], **CONFIGS[name]})
    shapes = nn.meta.unbox(boxed_shapes(family, model))
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.standard_normal(leaf.shape, np.float32)
        return values * np.float32(2.0) ** random.integers(-20, 4, leaf.shape[-1:] or (1,)).astype(np.float32)

    return model, jax.tree.map(lambda leaf: draw(leaf).reshape(leaf.shape), shapes)


def assert_rounded(exact: Any, rounded: Any) -> None:
    """Each value is the nearest of bfloat16's, off by half a unit of its last place at most: 2^-8 of itself."""
    for whole, half in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert (np.abs(half - whole) <= 2.0**-8 * np.abs(whole)).all()
        np.testing.assert_array_equal(half, whole.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_every_family_is_in_this_file() -> None:
    assert set(CONFIGS) == {family.name for family in all_families()}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    model, variables = drawn(name)
    save_pretrained(model, variables, tmp_path / "whole", family=name)
    again, found = from_pretrained(tmp_path / "whole", family=name)
    assert family_named(name).describe(again) == family_named(name).describe(model)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    save_pretrained(again, found, tmp_path / "again", family=name)
    parity.assert_identical(tmp_path / "whole", tmp_path / "again")

    save_pretrained(model, variables, tmp_path / "half", family=name, dtype="bfloat16")
    found = from_pretrained(tmp_path / "half", family=name)[1]
    assert_rounded(variables, found)
    save_pretrained(again, found, tmp_path / "half again", family=name, dtype="bfloat16")
    parity.assert_identical(tmp_path / "half", tmp_path / "half again")

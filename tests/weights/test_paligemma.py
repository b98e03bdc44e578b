"""PaliGemma 1 and 2: logits, hidden states and answers equal `transformers`', in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.weights import parity
from tests.weights.test_llava import IMAGE, IMAGES, PROMPTS, TEXT, VISION, outputs, pixels, published
from vlpjax.errors import UserError
from vlpjax.models.vision_language import expand_prompts, generate_with_images
from vlpjax.weights.families import family_of

IDS = np.array(expand_prompts(PROMPTS, [[4]] * 2, IMAGE))
PREFIX = np.array([7, 6])  # each row's images and question; the rest is the answer
GEMMA = {**TEXT, "head_dim": 10}
CONFIGS: dict[str, Any] = {
    "gemma": transformers.GemmaConfig(**GEMMA),
    "gemma2": transformers.Gemma2Config(
        **GEMMA,
        sliding_window=5,
        query_pre_attn_scalar=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
}


def peer(name: str) -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=CONFIGS[name],
        projection_dim=24,
        image_token_index=IMAGE,
        vocab_size=61,
    )
    config._attn_implementation = "eager"
    return transformers.PaliGemmaForConditionalGeneration(config)


def load(folder: Path) -> Any:
    model: Any = parity.load_theirs(folder)
    model.set_attn_implementation("eager")  # the others know no soft caps
    return model


def run_theirs(model: Any) -> dict[str, Any]:
    kinds = torch.tensor(np.arange(IDS.shape[1]) >= PREFIX[:, None]).long()
    return outputs(
        model(torch.from_numpy(IDS), pixels(IMAGES), token_type_ids=kinds, output_hidden_states=True)
    )


def run_ours(model: Any, variables: Any) -> dict[str, Any]:
    found = model.apply(variables, jnp.asarray(IDS), IMAGES, jnp.asarray(PREFIX), hidden=(0,))
    return {
        "logits": found["logits"],
        "tokens": found["tokens"],
        "hidden_0": found["hidden"][0],
        "images": found["image_tokens"],
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_in_both_directions(name: str, tmp_path: Path) -> None:
    model = peer(name)
    found = parity.check(model, tmp_path, run_theirs, run_ours, load=load, rename=published)
    print(name, max(found.imported.values()), max(found.exported.values()))
    whole = torch.zeros(IDS.shape, dtype=torch.long)
    with torch.no_grad():
        theirs = model.generate(
            torch.from_numpy(IDS), pixel_values=pixels(IMAGES), token_type_ids=whole, max_new_tokens=20,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
    ours = generate_with_images(found.model, found.variables, IDS, IMAGES, max_new_tokens=20)
    np.testing.assert_array_equal(ours.tokens, theirs[:, IDS.shape[1] :])


def test_the_published_configs_are_understood() -> None:
    fields: dict[str, Any] = {
        "model_type": "paligemma", "projection_dim": 2048, "hidden_size": 2048, "vocab_size": 257152,
        "image_token_index": 257152,
        "text_config": {
            "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
            "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14,
            "num_attention_heads": 16, "num_hidden_layers": 27, "projection_dim": 2048, "vision_use_head": False,
        },
    }  # fmt: skip
    model: Any = family_of(fields).build(fields)
    assert (model.decoder.head_dim, model.decoder.tied, model.decoder.width) == (256, True, 2048)
    assert model.image.pool == "none" and model.prefix_lm
    with pytest.raises(UserError, match="projection_dim=100"):
        family_of(fields).build({**fields, "projection_dim": 100})

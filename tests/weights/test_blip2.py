"""BLIP-2: both stages equal `transformers`', in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.weights import parity
from tests.weights.test_llava import IMAGES, pixels
from vlpjax.errors import UserError
from vlpjax.models.vision_language import expand_prompts
from vlpjax.weights.families import family_of

VISION = dict(
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
QFORMER = dict(
    vocab_size=30, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=28,
    max_position_embeddings=10,
)  # fmt: skip
TEXT = dict(
    vocab_size=41, d_model=20, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
)  # fmt: skip
FLAN = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
QUERIES, IMAGE = 5, 40
WORDS = np.array([[7, 4, 9, 0], [3, 8, 2, 6]])
OUTPUTS = np.array([[0, 5, 6], [0, 11, 1]])


def config(text: Any = FLAN, **qformer: Any) -> Any:
    return transformers.Blip2Config(
        vision_config=VISION, qformer_config={**QFORMER, **qformer}, text_config={"model_type": "t5", **TEXT, **text},
        num_query_tokens=QUERIES, image_text_hidden_size=12, image_token_index=IMAGE,
    )  # fmt: skip


@pytest.mark.parametrize("text", [FLAN, {}], ids=["Flan-T5", "T5"])
def test_the_second_stage_equals_theirs(text: dict[str, Any], tmp_path: Path) -> None:
    ids = np.array(expand_prompts([[IMAGE, *words] for words in WORDS], [[QUERIES]] * 2, IMAGE))

    def run_theirs(model: Any) -> dict[str, Any]:
        out = model(
            pixel_values=pixels(IMAGES), input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(ids != 0),
            decoder_input_ids=torch.from_numpy(OUTPUTS), output_hidden_states=True,
        )  # fmt: skip
        text = out.language_model_outputs
        return {
            "logits": out.logits,
            "image": out.vision_outputs.last_hidden_state,
            "queries": out.qformer_outputs.last_hidden_state,
            "encoded": text.encoder_last_hidden_state * torch.from_numpy(ids != 0)[..., None],
            "hidden_0": text.encoder_hidden_states[1] * torch.from_numpy(ids != 0)[..., None],
            "decoder_hidden_0": text.decoder_hidden_states[1],
        }

    def run_ours(model: Any, variables: Any) -> dict[str, Any]:
        out = model.apply(
            variables, IMAGES, jnp.asarray(ids), jnp.asarray(OUTPUTS), hidden=(0,), decoder_hidden=(0,)
        )
        return {
            "logits": out["logits"],
            "image": out["image"]["image_tokens"],
            "queries": out["image"]["queries"],
            "encoded": out["encoder"]["tokens"] * (ids != 0)[..., None],
            "hidden_0": out["encoder"]["hidden"][0] * (ids != 0)[..., None],
            "decoder_hidden_0": out["hidden"][0],
        }

    peer: Any = transformers.Blip2ForConditionalGeneration(config(text))
    if text:  # a head of its own, which `transformers` lets a model have only when its file does
        head = peer.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    found = parity.check(peer, tmp_path, run_theirs, run_ours)
    print(max(found.imported.values()), max(found.exported.values()))
    assert found.model.language.tied == (not text)


def test_the_first_stage_equals_theirs(tmp_path: Path) -> None:
    whole = config(use_qformer_text_input=True)
    whole.image_token_index = None
    seen = torch.from_numpy(WORDS != 0).long()

    def run_theirs(model: Any) -> dict[str, Any]:
        given = dict(pixel_values=pixels(IMAGES), input_ids=torch.from_numpy(WORDS), attention_mask=seen)
        matched = model(**given, use_image_text_matching_head=True)
        apart = model(**given, use_image_text_matching_head=False)
        return {
            "matching": matched.logits_per_image,
            "image": matched.vision_model_output.last_hidden_state,
            "images": apart.image_embeds,
            "texts": apart.text_embeds,
        }

    def run_ours(model: Any, variables: Any) -> dict[str, Any]:
        matched = model.apply(variables, IMAGES, jnp.asarray(WORDS))
        images = model.apply(variables, IMAGES)["embedding"]
        texts = model.apply(variables, ids=jnp.asarray(WORDS))["text_embedding"]
        return {
            "matching": matched["matching"],
            "image": matched["image_tokens"],
            "images": images / jnp.linalg.norm(images, axis=-1, keepdims=True),
            "texts": texts / jnp.linalg.norm(texts, axis=-1, keepdims=True),
        }

    peer = transformers.Blip2ForImageTextRetrieval(whole)
    found = parity.check(peer, tmp_path, run_theirs, run_ours)
    print(max(found.imported.values()), max(found.exported.values()))


def test_images_alone_equal_theirs(tmp_path: Path) -> None:
    def run_theirs(model: Any) -> dict[str, Any]:
        out = model(pixel_values=pixels(IMAGES))
        return {"image": out.last_hidden_state, "images": out.image_embeds}

    def run_ours(model: Any, variables: Any) -> dict[str, Any]:
        out = model.apply(variables, IMAGES)
        unit = out["embedding"] / jnp.linalg.norm(out["embedding"], axis=-1, keepdims=True)
        return {"image": out["image_tokens"], "images": unit}

    parity.check(transformers.Blip2VisionModelWithProjection(config()), tmp_path, run_theirs, run_ours)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"text_config": {"model_type": "opt"}}, "'opt'"),
        ({"text_config": {"model_type": "t5"}}, "image_token_index"),
        ({"architectures": ["Blip2QFormerModel"]}, "Blip2QFormerModel"),
        ({"architectures": ["Blip2ForImageTextRetrieval"]}, "use_qformer_text_input"),
    ],
)
def test_configs_that_cannot_be_represented_are_named(fields: dict[str, Any], told: str) -> None:
    whole = {"model_type": "blip-2", **fields}
    with pytest.raises(UserError, match=told):
        family_of(whole).build(whole)

"""What the families of language models with images share: their parts' configs and rules, and both spellings of names.

The parts are written by the families of the parts.  `transformers` names tensors in two ways: files that were
published say ``language_model.model.layers...``, ``language_model.lm_head`` and ``vision_tower.vision_model...``, and
are written so; some releases wrote ``model.language_model.layers...``, ``lm_head`` and ``model.vision_tower...``, which
are read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.models.vit import ViT
from vlpjax.weights import decoders
from vlpjax.weights.encoders import expect, image_example
from vlpjax.weights.families import clip, gemma, gemma2, llama, mistral, qwen2, qwen3, siglip
from vlpjax.weights.family import Family, first_that_holds
from vlpjax.weights.layout import Rule, under

# By the "model_type" of a text_config.  A decoder that is to be written goes to the first that can hold it.
TEXTS: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
}
# Published configs leave out of a text_config what has its default.
_SMALL = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_GEMMA = {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_SMALL, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_SMALL,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {**_SMALL, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "qwen3": {
        **_SMALL,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    "gemma": {
        **_GEMMA,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "gemma2": {
        **_GEMMA,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
# By the "model_type" of a vision_config: how it becomes a tower, and back.
VISIONS: dict[str, tuple[Callable[[dict[str, Any]], ViT], Callable[[ViT], dict[str, Any]]]] = {
    "clip_vision_model": (lambda config: clip.build_vision(config, None), clip.describe_vision),
    "siglip_vision_model": (siglip.build_vision, siglip.describe_vision),
}


def build_text(family: str, config: Mapping[str, Any], kinds: Sequence[str]) -> Decoder:
    """The decoder of a ``text_config``.

    Args:
      family: for messages.
      kinds: values of its ``model_type`` that there may be; the first is the default.

    Raises:
      UserError: another kind.
    """
    text = dict(config.get("text_config") or {})
    kind = text.get("model_type", kinds[0])
    if kind not in kinds:
        raise UserError(
            f"The {family} config has a text_config of model_type {kind!r}; there are {', '.join(kinds)}."
        )
    text = {**TEXT_DEFAULTS[kind], **text}
    # Whether embeddings are tied is said by the part or by the whole, where either says it.
    default = kind.startswith("gemma")
    text["tie_word_embeddings"] = bool(
        text.get("tie_word_embeddings", default) or config.get("tie_word_embeddings")
    )
    model = TEXTS[kind].build(text)
    assert isinstance(model, Decoder)
    return model


def describe_text(family: str, model: Decoder, kinds: Sequence[str]) -> dict[str, Any]:
    """The ``text_config`` of a decoder, of the first of these kinds that can hold it.

    Raises:
      UserError: none can.
    """
    writers = ((kind, kind, TEXTS[kind].describe) for kind in kinds)
    kind, config = first_that_holds(writers, model, f"{family} cannot hold this decoder")
    return {"model_type": kind, **config}


def build_vision(
    family: str, config: Mapping[str, Any], kinds: Sequence[str], default: Mapping[str, Any]
) -> tuple[ViT, str]:
    """The image tower of a ``vision_config``, and its ``model_type``.

    Args:
      kinds: as in :func:`build_text`.
      default: the ``vision_config`` where there is none.
    """
    vision = dict(config.get("vision_config") or default)
    kind = vision.get("model_type", kinds[0])
    if kind not in kinds:
        raise UserError(
            f"The {family} config has a vision_config of model_type {kind!r}; there are {', '.join(kinds)}."
        )
    build, _ = VISIONS[kind]
    return build(vision), kind


def describe_vision(family: str, model: nn.Module, kinds: Sequence[str]) -> dict[str, Any]:
    """The ``vision_config`` of an image tower, of the first of these kinds that can hold it.

    Raises:
      UserError: none can.
    """
    tower = expect(f"{family}'s image tower", model, ViT)
    if tower.embedding is not None:
        raise UserError(
            f"ViT.embedding is {tower.embedding}, but {family}'s image tower projects nothing; set it to None and "
            "leave the projection out of the variables."
        )
    writers = ((kind, kind, VISIONS[kind][1]) for kind in kinds)
    return first_that_holds(writers, tower, f"{family} cannot hold this image tower")[1]


def hold(family: str, model: nn.Module, connector: type[nn.Module], **fixed: Any) -> VisionLanguageModel:
    """The module, if it is one whose connector is of this kind and whose fields have the values that a family fixes.

    Raises:
      UserError: it is not.
    """
    whole: VisionLanguageModel = expect(family, model, VisionLanguageModel)
    expect(f"{family}'s connector", whole.connector, connector)
    expect(f"{family}'s language model", whole.decoder, Decoder)
    for field, value in fixed.items():
        if getattr(whole, field) != value:
            raise UserError(
                f"VisionLanguageModel.{field} is {getattr(whole, field)!r}, which {family} cannot hold; there it is "
                f"{value!r}."
            )
    return whole


def rules(text: tuple[Rule, ...], connector: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Of a whole model; what stands before all names, ``model.``, is left to :data:`PREFIXES`.

    Args:
      text: the rules of the decoders.
      connector: the connector's, ours under ``connector/``.
    """
    towers = (*clip.VISION, *siglip.VISION)
    return (
        *under("image/", "vision_tower.vision_model.", towers),
        *under("image/", "vision_tower.", towers),
        *under("connector/", "multi_modal_projector.", connector),
        *under("decoder/", "language_model.", text),
        Rule("decoder/head/kernel", "lm_head.weight", "v d -> d v"),
    )


PREFIXES = ("", "model.")
TIED = tuple(
    (head, f"language_model.{body}embed_tokens.weight")
    for head in ("language_model.lm_head.weight", "lm_head.weight")
    for body in ("model.", "")
)
IGNORED = (r".*\.position_ids", *(rf"language_model\.{expression}" for expression in decoders.IGNORED))


def example(model: nn.Module) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One token, one image, and the length of the prompt."""
    whole = expect("A language model with images", model, VisionLanguageModel)
    number = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return number[0], *image_example(whole.image), number[1]

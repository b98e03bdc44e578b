"""LLaVA 1.5 ("Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744) as `transformers` writes it."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.connectors import MlpConnector
from vlpjax.models.positions_2d import pair
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.models.vit import ViT
from vlpjax.weights import decoders, multimodal
from vlpjax.weights.configs import activation_named, filled_in, their_activation
from vlpjax.weights.encoders import linear
from vlpjax.weights.family import Family

TEXTS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
VISIONS = ("clip_vision_model", "siglip_vision_model")
DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
VISION_DEFAULT = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CONNECTOR = (*linear("up", "linear_1"), *linear("down", "linear_2"))


def build(config: dict[str, Any], family: str = "LLaVA") -> VisionLanguageModel:
    """The module of a config."""
    config = filled_in({**config, **_renamed(config)}, DEFAULTS)
    decoder = multimodal.build_text(family, config, TEXTS)
    image, kind = multimodal.build_vision(family, config, VISIONS, VISION_DEFAULT)
    strategy = config["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise UserError(
            f"The {family} config has vision_feature_select_strategy={strategy!r}; there are 'default', 'full'."
        )
    if strategy == "default" and kind != "clip_vision_model":
        raise UserError(
            f"The {family} config has vision_feature_select_strategy='default', which leaves out the class token, but "
            f"an image tower of the kind {kind!r} has none; it takes 'full'."
        )
    layers = config["vision_feature_layer"]
    return VisionLanguageModel(
        image=image,
        connector=MlpConnector(
            decoder.width,
            activation=activation_named(family, config["projector_hidden_act"]),
            bias=config["multimodal_projector_bias"],
        ),
        decoder=decoder,
        image_token=config["image_token_index"],
        image_layers=tuple(our_layer(family, layer, image.depth) for layer in _listed(layers)),
        image_prefix=strategy == "full",
    )


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """Fields that some releases spell otherwise, by the names that are written."""
    return {"image_token_index": config["image_token_id"]} if "image_token_id" in config else {}


def _listed(layers: int | list[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else layers


def our_layer(family: str, layer: int, depth: int) -> int:
    """Our number of a block, by theirs, which counts the embeddings as the first state.

    Raises:
      UserError: the embeddings, or no state at all.
    """
    if not (1 <= layer <= depth or -depth <= layer <= -1):
        raise UserError(
            f"The {family} config has vision_feature_layer={layer}; it takes 1 to {depth} or -{depth} to -1, the "
            "outputs of blocks."
        )
    return layer if layer < 0 else layer - 1


def describe(model: nn.Module, family: str = "LLaVA", **fixed: Any) -> dict[str, Any]:
    """The config of a module."""
    model = multimodal.hold(family, model, MlpConnector, prefix_lm=False, **fixed)
    connector: Any = model.connector
    if (
        connector.input_norm
        or connector.hidden not in (None, connector.width)
        or connector.width != model.decoder.width
    ):
        raise UserError(
            f"{family}'s connector has no input_norm and is {model.decoder.width} wide, as its decoder, but the "
            f"MlpConnector has input_norm={connector.input_norm}, width={connector.width} and "
            f"hidden={connector.hidden}."
        )
    if not model.image_layers:
        raise UserError(
            f"VisionLanguageModel.image_layers is {model.image_layers}; {family} takes the outputs of blocks, such as "
            "(-2,)."
        )
    vision = multimodal.describe_vision(family, model.image, VISIONS)
    if not model.image_prefix and vision["model_type"] != "clip_vision_model":
        model = model.clone(image_prefix=True)  # there is nothing before the patches: the same tokens
    layers = [layer if layer < 0 else layer + 1 for layer in model.image_layers or ()]
    return {
        "vision_config": vision,
        "text_config": multimodal.describe_text(family, model.decoder, TEXTS),
        "image_token_index": model.image_token,
        "image_seq_length": image_tokens(model),
        "projector_hidden_act": their_activation(connector.activation),
        "multimodal_projector_bias": connector.bias,
        "vision_feature_select_strategy": "full" if model.image_prefix else "default",
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "tie_word_embeddings": model.decoder.tied,
    }


def image_tokens(model: VisionLanguageModel) -> int:
    """Tokens of one picture of the tower's size."""
    tower: Any = model.image
    assert isinstance(tower, ViT)
    (height, width), patch = pair(tower.image_size), pair(tower.patch)
    prefix = tower.registers + (
        int(tower.pool == "cls") if tower.class_tokens is None else tower.class_tokens
    )
    return (height // patch[0]) * (width // patch[1]) + prefix * model.image_prefix


FAMILY = Family(
    name="llava",
    model_types=("llava",),
    architecture="LlavaForConditionalGeneration",
    build=build,
    describe=lambda model: describe(model, tiling=None),
    rules=multimodal.rules(decoders.PRE, CONNECTOR),
    example=multimodal.example,
    ignored=multimodal.IGNORED,
    tied=multimodal.TIED,
    prefixes=multimodal.PREFIXES,
)

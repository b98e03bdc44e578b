"""CLIP as open_clip writes it: ``open_clip_config.json``, both towers and the scale (and bias, if there is one).

Source of the layout: "Reproducible scaling laws for contrastive language-image learning", arXiv 2212.07143, and
https://github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.heads import Scalar
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights.configs import require
from vlpjax.weights.encoders import (
    BIAS,
    SCALE,
    expect,
    fused_attention,
    hold,
    linear,
    mlp_width,
    normed,
    size,
    square,
    their_size,
    tower_example,
    towers_of,
)
from vlpjax.weights.family import Family, patch_sizes
from vlpjax.weights.layout import Rule, under

_BLOCK = "transformer.resblocks.{n}"
BLOCK: tuple[Rule, ...] = (
    *normed("block_{n}/attention_norm", f"{_BLOCK}.ln_1"),
    *fused_attention(
        "block_{n}/attention",
        f"{_BLOCK}.attn.in_proj_weight",
        f"{_BLOCK}.attn.in_proj_bias",
        f"{_BLOCK}.attn.out_proj",
    ),
    Rule("block_{n}/attention_scale", f"{_BLOCK}.ls_1.gamma"),
    *normed("block_{n}/mlp_norm", f"{_BLOCK}.ln_2"),
    *linear("block_{n}/mlp/up", f"{_BLOCK}.mlp.c_fc"),
    *linear("block_{n}/mlp/down", f"{_BLOCK}.mlp.c_proj"),
    Rule("block_{n}/mlp_scale", f"{_BLOCK}.ls_2.gamma"),
)
VISION: tuple[Rule, ...] = (
    Rule("patches/projection/kernel", "conv1.weight", "o c p q -> (p q c) o"),
    Rule("class_token", "class_embedding", "d -> 1 1 d"),
    Rule("position_embedding", "positional_embedding", "n d -> 1 n d"),
    *normed("pre_norm", "ln_pre"),
    *BLOCK,
    *normed("final_norm", "ln_post"),
    *normed("pool_norm", "ln_post"),
    Rule(
        "projection/kernel/kernel", "proj"
    ),  # a matrix that features are multiplied by, not a layer's weight
)
TEXT: tuple[Rule, ...] = (
    Rule("token_embedding/embedding", "token_embedding.weight"),
    Rule("position_embedding", "positional_embedding"),
    *BLOCK,
    *normed("final_norm", "ln_final"),
    Rule("projection/kernel/kernel", "text_projection"),
)

VISION_DEFAULTS: dict[str, Any] = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "ls_init_value": None, "no_ln_pre": False, "final_ln_after_pool": False, "pool_type": "tok",
}  # fmt: skip
TEXT_DEFAULTS: dict[str, Any] = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "pad_id": 0, "eos_id": 2, "no_causal_mask": False, "pool_type": "argmax",
}  # fmt: skip
EPSILON = 1e-5  # torch.nn.LayerNorm's
_VISION_POOLS = {"tok": "cls", "avg": "mean"}
_TEXT_POOLS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "cls"}


def _known(field: str, value: Any, known: Mapping[str, str]) -> str:
    if value not in known:
        raise UserError(
            f"The open_clip config has {field}={value!r}; there are {', '.join(map(repr, known))}."
        )
    return known[value]


def _epsilon(config: Mapping[str, Any]) -> float:
    return float((config.get("norm_kwargs") or {}).get("eps", EPSILON))


def _activation(config: Mapping[str, Any], quick: bool) -> str:
    approximate = (config.get("act_kwargs") or {}).get("approximate", "none")
    return "quick_gelu" if quick else {"none": "gelu", "tanh": "gelu_tanh"}[approximate]


def build_vision(config: Mapping[str, Any], embedding: int, quick: bool) -> ViT:
    """The image tower of a ``vision_cfg``."""
    require("open_clip vision", config, timm_model_name=None, attentional_pool=False, qk_norm=False,
            scaled_cosine_attn=False, scale_heads=False, scale_attn_inner=False, scale_attn=False, scale_fc=False,
            block_type=None)  # fmt: skip
    config = {**VISION_DEFAULTS, **config}
    if not isinstance(config["layers"], int):
        raise UserError(
            f"The open_clip config has vision_cfg.layers={config['layers']!r}, which is a ResNet's; only vision "
            "transformers can be represented."
        )
    after = config["final_ln_after_pool"]
    return ViT(
        image_size=size(config["image_size"]),
        patch=size(config["patch_size"]),
        width=config["width"],
        depth=config["layers"],
        heads=config["width"] // config["head_width"],
        mlp_dim=int(config["width"] * config["mlp_ratio"]),
        class_tokens=1,
        pool=_known("vision_cfg.pool_type", config["pool_type"], _VISION_POOLS),
        embedding=embedding,
        pre_norm=not config["no_ln_pre"],
        final_norm=not after,
        pool_norm=after,
        layer_scale=config["ls_init_value"],
        activation=_activation(config, quick),
        epsilon=_epsilon(config),
    )


def build_text(config: Mapping[str, Any], embedding: int, quick: bool) -> TextTransformer:
    """The text tower of a ``text_cfg``."""
    require("open_clip text", config, hf_model_name=None, embed_cls=False, proj_bias=False, proj_type="linear",
            ls_init_value=None, qk_norm=False, scaled_cosine_attn=False, scale_heads=False, scale_attn_inner=False,
            scale_attn=False, scale_fc=False, block_type=None)  # fmt: skip
    config = {**TEXT_DEFAULTS, **config}
    pool = _known("text_cfg.pool_type", config["pool_type"], _TEXT_POOLS)
    ends = {"argmax": config["vocab_size"] - 1, "eos": config["eos_id"]}  # the end of text has the largest id
    return TextTransformer(
        vocabulary=config["vocab_size"],
        length=config["context_length"],
        width=config["width"],
        depth=config["layers"],
        heads=config["heads"],
        mlp_dim=int(config["width"] * config["mlp_ratio"]),
        embedding=embedding,
        activation=_activation(config, quick),
        epsilon=_epsilon(config),
        pad_id=config["pad_id"],
        causal=not config["no_causal_mask"],
        pool=pool,
        eos_id=ends.get(config["pool_type"]),
    )


def build(config: dict[str, Any]) -> Towers:
    given = config["model_cfg"]
    require("open_clip", given, nonscalar_logit_scale=False, multimodal_cfg=None)
    embedding, quick = given["embed_dim"], given.get("quick_gelu", False)
    towers: dict[str, nn.Module] = {
        "image": build_vision(given["vision_cfg"], embedding, quick),
        "text": build_text(given["text_cfg"], embedding, quick),
        SCALE: Scalar(given.get("init_logit_scale", math.log(1 / 0.07))),
    }
    if given.get("init_logit_bias") is not None:
        towers[BIAS] = Scalar(given["init_logit_bias"])
    return Towers.of(towers)


def _shared(tower: ViT | TextTransformer) -> dict[str, Any]:
    """What both parts of a config say alike."""
    ratio = mlp_width(tower) / tower.width
    if int(tower.width * ratio) != mlp_width(tower):
        ratio = (mlp_width(tower) + 0.5) / tower.width
    config: dict[str, Any] = {"width": tower.width, "layers": tower.depth, "mlp_ratio": ratio}
    if tower.epsilon != EPSILON:
        config["norm_kwargs"] = {"eps": tower.epsilon}
    if tower.activation == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    return config


def describe(model: nn.Module) -> dict[str, Any]:
    towers = towers_of("open_clip", model, ("image", "text", SCALE), (BIAS,))
    image = expect("open_clip's image tower", towers["image"], ViT)
    text = expect("open_clip's text tower", towers["text"], TextTransformer)
    if text.pool == "eot" and text.eos_id is None:
        raise UserError(
            "TextTransformer.eos_id is None, but open_clip finds the end of a text by its id; set the tokenizer's."
        )
    last = text.eos_id == text.vocabulary - 1
    pool = {"cls": "first", "eot": "argmax" if last else "eos"}.get(text.pool, text.pool)
    config: dict[str, Any] = {
        "embed_dim": image.embedding,
        "quick_gelu": image.activation == "quick_gelu",
        "vision_cfg": {
            **_shared(image),
            "image_size": their_size(image.image_size),
            "patch_size": square("open_clip", "patch", image.patch),
            "head_width": image.width // image.heads,
            "ls_init_value": image.layer_scale,
            "no_ln_pre": not image.pre_norm,
            "final_ln_after_pool": image.pool_norm,
            "pool_type": {"cls": "tok", "mean": "avg"}.get(image.pool, image.pool),
        },
        "text_cfg": {
            **_shared(text),
            "context_length": text.length,
            "vocab_size": text.vocabulary,
            "heads": text.heads,
            "pad_id": text.pad_id,
            "no_causal_mask": not text.causal,
            "pool_type": pool,
            **({} if text.eos_id is None else {"eos_id": text.eos_id}),
        },
    }
    if BIAS in towers:
        config["init_logit_bias"] = towers[BIAS].initial
    rebuilt = build({"model_cfg": config})
    hold("open_clip", image, rebuilt.makers["image"]())
    hold("open_clip", text, rebuilt.makers["text"]())
    return {"model_cfg": config, "preprocess_cfg": {}}


OPEN_CLIP = Family(
    name="open_clip",
    model_types=("open_clip",),
    architecture="",
    build=build,
    describe=describe,
    rules=(
        *under("image/", "visual.", VISION),
        *under("text/", "", TEXT),
        *under("text/", "text.", TEXT),  # of models whose text tower is a module of its own ("custom_text")
        Rule(f"{SCALE}/value", "logit_scale"),
        Rule(f"{BIAS}/value", "logit_bias"),
    ),
    example=tower_example,
    sizes=lambda config: patch_sizes({**config["model_cfg"]["vision_cfg"], "num_channels": 3}),
    ignored=(r"(text\.)?attn_mask",),
    config_file="open_clip_config.json",
    weights_file="open_clip_model.safetensors",
)

"""Vision transformers as timm writes them: ``config.json`` with an ``architecture`` and arguments of it.

A classifier is the tower's projection, with a bias: ``"embedding"`` are the logits.  Written folders name a plain
architecture and all of its arguments, which timm takes from the config.

Source of the layout: "PyTorch Image Models", https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.positions_2d import pair
from vlpjax.models.vit import ViT
from vlpjax.weights.encoders import (
    attention_out,
    convolved,
    expect,
    fused_attention,
    hold,
    linear,
    mlp_width,
    normed,
    size,
    their_size,
    tower_example,
)
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule

_BLOCK = "blocks.{n}"
_POOL = "pool_head/attention"
RULES: tuple[Rule, ...] = (
    *convolved("patches/projection", "patch_embed.proj"),
    Rule("class_token", "cls_token"),
    Rule("registers", "reg_token"),
    Rule("position_embedding", "pos_embed"),
    *normed("pre_norm", "norm_pre"),
    *normed("block_{n}/attention_norm", f"{_BLOCK}.norm1"),
    *fused_attention(
        "block_{n}/attention", f"{_BLOCK}.attn.qkv.weight", f"{_BLOCK}.attn.qkv.bias", f"{_BLOCK}.attn.proj"
    ),
    *normed("block_{n}/attention/query_norm", f"{_BLOCK}.attn.q_norm"),
    *normed("block_{n}/attention/key_norm", f"{_BLOCK}.attn.k_norm"),
    Rule("block_{n}/attention_scale", f"{_BLOCK}.ls1.gamma"),
    *normed("block_{n}/mlp_norm", f"{_BLOCK}.norm2"),
    *linear("block_{n}/mlp/up", f"{_BLOCK}.mlp.fc1"),
    *linear("block_{n}/mlp/down", f"{_BLOCK}.mlp.fc2"),
    Rule("block_{n}/mlp_scale", f"{_BLOCK}.ls2.gamma"),
    *normed("final_norm", "norm"),
    *normed("pool_norm", "fc_norm"),
    Rule("pool_head/query", "attn_pool.latent"),
    Rule(f"{_POOL}/query/kernel", "attn_pool.q.weight", "(h d) i -> i h d"),
    Rule(f"{_POOL}/query/bias", "attn_pool.q.bias", "(h d) -> h d"),
    Rule((f"{_POOL}/key/kernel", f"{_POOL}/value/kernel"), "attn_pool.kv.weight", "(n h d) i -> n i h d"),
    Rule((f"{_POOL}/key/bias", f"{_POOL}/value/bias"), "attn_pool.kv.bias", "(n h d) -> n h d"),
    *attention_out(_POOL, "attn_pool.proj"),
    *normed("pool_head/mlp_norm", "attn_pool.norm"),
    *linear("pool_head/mlp/up", "attn_pool.mlp.fc1"),
    *linear("pool_head/mlp/down", "attn_pool.mlp.fc2"),
    *linear("projection/kernel", "head"),
)

# Arguments of timm's VisionTransformer that change what it computes, and their values if nothing is said.
DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "num_classes": 1000,
    "global_pool": "token",
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "qk_norm": False,
    "proj_bias": True,
    "init_values": None,
    "class_token": True,
    "pos_embed": "learn",
    "no_embed_class": False,
    "reg_tokens": 0,
    "pre_norm": False,
    "final_norm": True,
    "fc_norm": None,
    "norm_layer": None,
    "act_layer": None,
}
# Those that change nothing here: rates of training, initial values, sizes at run time.
WITHOUT_EFFECT = frozenset(
    {"drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
     "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"}
)  # fmt: skip
EPSILON, CLIP_EPSILON = 1e-6, 1e-5

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "medium": dict(embed_dim=512, depth=12, num_heads=8),
    "betwixt": dict(embed_dim=640, depth=12, num_heads=10),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "so400m": dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
    "giant": dict(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
    "giantopt": dict(embed_dim=1536, depth=40, num_heads=16),
    "gigantic": dict(embed_dim=1664, depth=48, num_heads=16, mlp_ratio=64 / 13),
}
_MEAN = dict(class_token=False, global_pool="avg", fc_norm=False)
_MAP = dict(class_token=False, global_pool="map")
_DINO = dict(init_values=1e-5, img_size=518)
# What stands between the patch and the image size in a name; "epsilon" is of our own.
_KINDS: dict[str, dict[str, Any]] = {
    "": {},
    "gap": _MEAN,
    "clip": dict(pre_norm=True, epsilon=CLIP_EPSILON),
    "clip_quickgelu": dict(pre_norm=True, epsilon=CLIP_EPSILON, act_layer="quick_gelu"),
    "siglip": _MAP,
    "siglip_gap": _MEAN,
    "dinov2": _DINO,
    "reg4_dinov2": dict(**_DINO, reg_tokens=4, no_embed_class=True),
}
# SigLIP's towers of these sizes take the approximate GELU.
_APPROXIMATE = re.compile(r"vit_(base_patch32|large_patch16_siglip(_gap)?_512|so400m_patch16|giantopt)")
_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
_POOLS = {"token": "cls", "avg": "mean", "map": "map", "": "none"}


def _of_name(name: str) -> dict[str, Any]:
    """The arguments that a name of an architecture stands for."""
    match = re.fullmatch(
        r"(?:vit|deit)_([a-z0-9]+)_patch(\d+)(?:_([a-z0-9_]*?[a-z][a-z0-9_]*?))?(?:_(\d+))?", name
    )
    kind = (match[3] or "") if match else ""
    if (
        match is None
        or match[1] not in _SIZES
        or kind not in _KINDS
        or (match[1] == "giant" and "dino" in kind)
    ):
        raise UserError(
            f"The timm config has the architecture {name!r}; there are vit_SIZE_patchP[_KIND][_PIXELS] with the sizes "
            f"{', '.join(_SIZES)} and the kinds {', '.join(filter(None, _KINDS))}."
        )
    arguments = {**_SIZES[match[1]], "patch_size": int(match[2]), **_KINDS[kind]}
    if "siglip" in kind and _APPROXIMATE.match(name):
        arguments["act_layer"] = "gelu_tanh"
    return {**arguments, "img_size": int(match[4])} if match[4] else arguments


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a config's tower, and its ``epsilon``.

    Raises:
      UserError: an architecture or an argument that is not known.
    """
    found = {**DEFAULTS, "epsilon": EPSILON, **_of_name(config["architecture"])}
    inputs = (config.get("pretrained_cfg") or config).get("input_size")
    if inputs:
        found |= {"in_chans": inputs[0], "img_size": tuple(inputs[1:])}
    if "num_classes" in config:
        found["num_classes"] = config["num_classes"]
    given = config.get("model_args") or {}
    if unknown := given.keys() - DEFAULTS.keys() - WITHOUT_EFFECT:
        name = min(unknown)
        raise UserError(
            f"The timm config has model_args.{name}={given[name]!r}, which cannot be represented."
        )
    return {**found, **{name: value for name, value in given.items() if name in DEFAULTS}}


def _chosen(field: str, value: Any, known: Mapping[Any, Any]) -> Any:
    if value not in known:
        raise UserError(f"The timm config has {field}={value!r}; there are {', '.join(map(repr, known))}.")
    return known[value]


def build(config: dict[str, Any]) -> ViT:
    given = arguments(config)
    if given["reg_tokens"] and not given["no_embed_class"] and given["pos_embed"] == "learn":
        raise UserError(
            "The timm config has reg_tokens with no_embed_class=False, which gives registers positions; registers here "
            "have none."
        )
    mean = given["global_pool"] == "avg"
    after = given["final_norm"] and (mean if given["fc_norm"] is None else given["fc_norm"])
    classes = given["num_classes"] if given["global_pool"] else 0
    kind = _chosen("norm_layer", given["norm_layer"], {None: "layer", "layernorm": "layer", "rmsnorm": "rms"})
    return ViT(
        image_size=size(given["img_size"]),
        patch=size(given["patch_size"]),
        patch_bias=not given["pre_norm"],
        channels=given["in_chans"],
        width=given["embed_dim"],
        depth=given["depth"],
        heads=given["num_heads"],
        mlp_dim=int(given["embed_dim"] * given["mlp_ratio"]),
        class_tokens=int(given["class_token"]),
        registers=given["reg_tokens"],
        positions=_chosen("pos_embed", given["pos_embed"], {"learn": "learned", "none": "none", "": "none"}),
        position_prefix=not given["no_embed_class"],
        position_antialias=True,
        pool=_chosen("global_pool", given["global_pool"], _POOLS),
        embedding=classes or None,
        projection_bias=classes > 0,
        pre_norm=given["pre_norm"],
        final_norm=given["final_norm"] and not after,
        pool_norm=bool(after),
        norm=kind,
        epsilon=given["epsilon"],
        qk_norm=kind if given["qk_norm"] else None,
        layer_scale=given["init_values"] or None,
        activation=_chosen("act_layer", given["act_layer"] or "gelu", {name: name for name in _ACTIVATIONS}),
        qkv_bias=given["qkv_bias"],
        out_bias=given["proj_bias"],
        mlp_bias=given["proj_bias"],
    )


def describe(model: nn.Module) -> dict[str, Any]:
    tower = expect("timm's vision transformer", model, ViT)
    if tower.epsilon not in (EPSILON, CLIP_EPSILON):
        raise UserError(f"ViT.epsilon is {tower.epsilon}; timm's are {EPSILON} and {CLIP_EPSILON}.")
    class_tokens = int(tower.pool == "cls") if tower.class_tokens is None else tower.class_tokens
    ratio = mlp_width(tower) / tower.width
    if int(tower.width * ratio) != mlp_width(tower):  # timm cuts off, so a rounding error would cost one
        ratio = (mlp_width(tower) + 0.5) / tower.width
    given = {
        "img_size": their_size(tower.image_size),
        "patch_size": their_size(tower.patch),
        "in_chans": tower.channels,
        "num_classes": tower.embedding or 0,
        "global_pool": {ours: theirs for theirs, ours in _POOLS.items()}.get(tower.pool, tower.pool),
        "embed_dim": tower.width,
        "depth": tower.depth,
        "num_heads": tower.heads,
        "mlp_ratio": ratio,
        "qkv_bias": tower.qkv_bias,
        "qk_norm": tower.qk_norm is not None,
        "proj_bias": tower.out_bias,
        "init_values": tower.layer_scale,
        "class_token": bool(class_tokens),
        "pos_embed": "learn" if tower.positions == "learned" else "none",
        "no_embed_class": bool(tower.registers) or (class_tokens > 0 and not tower.position_prefix),
        "reg_tokens": tower.registers,
        "pre_norm": tower.pre_norm,
        "final_norm": tower.final_norm or tower.pool_norm,
        "fc_norm": tower.pool_norm,
        "norm_layer": "rmsnorm" if tower.norm == "rms" else None,
        "act_layer": tower.activation,
    }
    # The architecture says the epsilon, which no argument does; everything else is an argument.
    plain = tower.epsilon == EPSILON
    config = {
        "architecture": "vit_base_patch16_224" if plain else "vit_base_patch16_clip_224",
        "num_classes": given["num_classes"],
        "num_features": tower.width,
        "global_pool": given["global_pool"],
        "model_args": {name: value for name, value in given.items() if value is not None},
        "pretrained_cfg": {
            "input_size": [tower.channels, *pair(tower.image_size)],
            "fixed_input_size": True,
            "num_classes": given["num_classes"],
        },
    }
    hold("timm", tower, build(config))
    return config


def patch_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """Height, width and channels of a patch."""
    given = arguments(config)
    height, width = pair(size(given["patch_size"]))
    return {"p": height, "q": width, "c": given["in_chans"]}


TIMM = Family(
    name="timm",
    model_types=("timm",),
    architecture="",
    build=build,
    describe=describe,
    rules=RULES,
    example=tower_example,
    sizes=patch_sizes,
)

"""The layouts of timm and open_clip, read and written: peers are written out here, with PyTorch's own layers.

The peers take the fields of the published configs and name their parameters as the published files do.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tests.weights import parity
from vlpjax.errors import UserError
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights import from_pretrained, save_pretrained
from vlpjax.weights.families import timm

RANDOM = np.random.default_rng(0)


def pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


class Quick(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Factor(nn.Module):
    """A learned factor per feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


# --- timm -----------------------------------------------------------------------------------------------------


class TimmAttention(nn.Module):
    def __init__(
        self, width: int, heads: int, bias: bool, qk_norm: bool, make_norm: Callable[[int], nn.Module]
    ):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = make_norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = make_norm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


def timm_mlp(width: int, hidden: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), act=act, fc2=nn.Linear(hidden, width)))


class TimmBlock(nn.Module):
    def __init__(self, args: dict[str, Any], make_norm: Callable[[int], nn.Module], act: nn.Module):
        super().__init__()
        width = args["embed_dim"]
        self.norm1, self.norm2 = make_norm(width), make_norm(width)
        self.attn = TimmAttention(
            width, args["num_heads"], args.get("qkv_bias", True), args.get("qk_norm", False), make_norm
        )
        scaled = args.get("init_values") is not None
        self.ls1, self.ls2 = (Factor(width) if scaled else nn.Identity() for _ in range(2))
        self.mlp = timm_mlp(width, int(width * args.get("mlp_ratio", 4.0)), act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmPool(nn.Module):
    def __init__(self, args: dict[str, Any], make_norm: Callable[[int], nn.Module], act: nn.Module):
        super().__init__()
        width, self.heads = args["embed_dim"], args["num_heads"]
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv, self.proj = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.norm = make_norm(width)
        self.mlp = timm_mlp(width, int(width * args.get("mlp_ratio", 4.0)), act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, width = x.shape
        query = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, 1, self.heads, -1).transpose(1, 2)
        key, value = self.kv(x).reshape(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(query, key, value)
        x = self.proj(x.transpose(1, 2).reshape(batch, 1, width))
        return (x + self.mlp(self.norm(x)))[:, 0]


class TimmViT(nn.Module):
    """timm's VisionTransformer, as far as its files have it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        args = self.args = config["model_args"]
        width, channels = args["embed_dim"], args.get("in_chans", 3)
        patch = args["patch_size"]
        epsilon = 1e-5 if "clip" in config["architecture"] else 1e-6
        acts = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "quick_gelu": Quick(), "silu": nn.SiLU()}
        act = acts[args.get("act_layer", "gelu")]
        rms = args.get("norm_layer") == "rmsnorm"

        def make_norm(features: int) -> nn.Module:
            return nn.RMSNorm(features, eps=epsilon) if rms else nn.LayerNorm(features, eps=epsilon)

        self.pool = args.get("global_pool", "token")
        classes, self.regs = int(args.get("class_token", True)), args.get("reg_tokens", 0)
        self.prefix = classes + self.regs
        pre = args.get("pre_norm", False)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(channels, width, patch, patch, bias=not pre)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if classes else None
        self.reg_token = nn.Parameter(torch.zeros(1, self.regs, width)) if self.regs else None
        image = (args["img_size"],) * 2 if isinstance(args["img_size"], int) else args["img_size"]
        patches = (patch,) * 2 if isinstance(patch, int) else patch
        count = (image[0] // patches[0]) * (image[1] // patches[1])
        self.bare = args.get("no_embed_class", False)  # no positions for the class token
        self.pos_embed = nn.Parameter(torch.zeros(1, count + classes * (not self.bare), width))
        self.norm_pre = make_norm(width) if pre else nn.Identity()
        self.blocks = nn.ModuleList(TimmBlock(args, make_norm, act) for _ in range(args["depth"]))
        after = args.get("fc_norm")
        after = self.pool == "avg" if after is None else after
        self.norm = nn.Identity() if after else make_norm(width)
        self.attn_pool = TimmPool(args, make_norm, act) if self.pool == "map" else None
        self.fc_norm = make_norm(width) if after else nn.Identity()
        labels = args.get("num_classes", config.get("num_classes", 1000))
        self.head = nn.Linear(width, labels) if labels else nn.Identity()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        first = [] if self.cls_token is None else [self.cls_token.expand(len(x), -1, -1)]
        registers = [] if self.reg_token is None else [self.reg_token.expand(len(x), -1, -1)]
        if self.bare:
            x = torch.cat([*first, *registers, x + self.pos_embed], dim=1)
        else:
            x = torch.cat([*first, x], dim=1) + self.pos_embed
        x = self.norm_pre(x)
        found = {}
        for layer, block in enumerate(self.blocks):
            x = found[f"hidden_{layer}"] = block(x)
        x = self.norm(x)
        pooled = (
            x[:, 0] if self.pool == "token" else x[:, self.prefix :].mean(1) if self.pool == "avg" else None
        )
        pooled = self.attn_pool(x[:, self.prefix :]) if pooled is None else pooled
        pooled = self.fc_norm(pooled)
        return {**found, "tokens": x[:, self.prefix :], "pooled": pooled, "logits": self.head(pooled)}


def save_timm(model: nn.Module, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(model.config))
    save_file(model.state_dict(), folder / "model.safetensors")


def load_timm(folder: Path) -> nn.Module:
    model = TimmViT(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


SMALL: dict[str, Any] = dict(embed_dim=24, depth=2, num_heads=3, img_size=24, patch_size=8, num_classes=5)
MEAN: dict[str, Any] = dict(class_token=False, global_pool="avg")
MAP: dict[str, Any] = dict(num_classes=0, class_token=False, global_pool="map", act_layer="gelu_tanh")
CLIP: dict[str, Any] = dict(num_classes=0, mlp_ratio=2.7, pre_norm=True, act_layer="quick_gelu")
DINO: dict[str, Any] = dict(init_values=0.1, reg_tokens=3, no_embed_class=True)
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", dict(img_size=(24, 16), patch_size=(6, 4), in_chans=4)),
    "clip": ("vit_base_patch32_clip_quickgelu_224", CLIP),
    "siglip": ("vit_base_patch16_siglip_224", MAP),
    "mean, norm before": ("vit_base_patch16_gap_224", dict(MEAN, fc_norm=False)),
    "mean, norm after": ("vit_small_patch16_224", dict(global_pool="avg", qkv_bias=False)),
    "registers": ("vit_small_patch14_reg4_dinov2", DINO),
    "norms of queries": ("vit_small_patch16_224", dict(qk_norm=True, norm_layer="rmsnorm")),
}


@pytest.mark.parametrize("kind", TIMM)
def test_the_layout_of_timm(tmp_path: Path, kind: str) -> None:
    architecture, more = TIMM[kind]
    args = {**SMALL, **more}
    height, width = (args["img_size"],) * 2 if isinstance(args["img_size"], int) else args["img_size"]
    images = RANDOM.standard_normal((2, height, width, args.get("in_chans", 3))).astype(np.float32)

    def ours(model: ViT, variables: Any) -> dict[str, Any]:
        out = model.apply(variables, images, hidden=(0, 1))
        named = {"tokens": out["tokens"], "pooled": out["pooled"], "logits": out["embedding"]}
        return {**named, **parity.layers(out["hidden"])}

    parity.check(
        TimmViT({"architecture": architecture, "model_args": args}),
        tmp_path,
        lambda model: model(pixels(images)),
        ours,
        save=save_timm,
        load=load_timm,
        family="timm",
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (
            "vit_base_patch16_224",
            dict(width=768, depth=12, heads=12, mlp_dim=3072, image_size=(224, 224), pool="cls"),
        ),
        (
            "vit_large_patch14_clip_336",
            dict(width=1024, pre_norm=True, patch_bias=False, epsilon=1e-5, patch=14),
        ),
        (
            "vit_so400m_patch14_siglip_384",
            dict(width=1152, depth=27, mlp_dim=4304, pool="map", activation="gelu"),
        ),
        ("vit_so400m_patch16_siglip_384", dict(activation="gelu_tanh")),
        ("vit_small_patch14_reg4_dinov2", dict(registers=4, position_prefix=False, image_size=(518, 518))),
        ("vit_giant_patch14_clip_224", dict(mlp_dim=6144)),
        ("vit_gigantic_patch14_clip_quickgelu_224", dict(mlp_dim=8192, activation="quick_gelu")),
    ],
)
def test_published_names_of_timm_mean_these_towers(name: str, fields: dict[str, Any]) -> None:
    pixels = fields.pop("image_size", (224, 224))
    tower = timm.build(
        {"architecture": name, "num_classes": 0, "pretrained_cfg": {"input_size": [3, *pixels]}}
    )
    assert {field: getattr(tower, field) for field in fields} == fields
    assert tower.image_size == pixels
    assert tower.embedding is None


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architecture": "resnet50"}, "architecture 'resnet50'"),
        ({"architecture": "vit_giant_patch14_dinov2"}, "vit_giant_patch14_dinov2"),
        (
            {"architecture": "vit_base_patch16_224", "model_args": {"block_fn": "x"}},
            "model_args.block_fn='x'",
        ),
        ({"architecture": "vit_base_patch16_224", "model_args": {"reg_tokens": 2}}, "no_embed_class=False"),
        ({"architecture": "vit_base_patch16_224", "model_args": {"global_pool": "max"}}, "global_pool='max'"),
    ],
)
def test_what_timm_has_and_we_do_not_is_told(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        timm.build(config)


# --- open_clip ------------------------------------------------------------------------------------------------


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, act: nn.Module, epsilon: float, scaled: bool):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=epsilon), nn.LayerNorm(width, eps=epsilon)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls_1, self.ls_2 = (Factor(width) if scaled else nn.Identity() for _ in range(2))
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=act, c_proj=nn.Linear(hidden, width))
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        normed = self.ln_1(x)
        x = x + self.ls_1(self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class OpenClipTransformer(nn.Module):
    def __init__(self, config: dict[str, Any], heads: int, act: nn.Module, epsilon: float):
        super().__init__()
        width, scaled = config["width"], config.get("ls_init_value") is not None
        hidden = int(width * config.get("mlp_ratio", 4.0))
        self.resblocks = nn.ModuleList(
            OpenClipBlock(width, heads, hidden, act, epsilon, scaled) for _ in range(config["layers"])
        )

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        states = []
        for block in self.resblocks:
            x = block(x, mask)
            states.append(x)
        return x, states


def open_clip_act(config: dict[str, Any], quick: bool) -> nn.Module:
    return Quick() if quick else nn.GELU(**(config.get("act_kwargs") or {}))


class OpenClipVision(nn.Module):
    def __init__(self, config: dict[str, Any], embed_dim: int, quick: bool):
        super().__init__()
        self.config, width, patch = config, config["width"], config["patch_size"]
        height, across = (
            (config["image_size"],) * 2 if isinstance(config["image_size"], int) else config["image_size"]
        )
        epsilon = config.get("norm_kwargs", {}).get("eps", 1e-5)
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(
            torch.zeros((height // patch) * (across // patch) + 1, width)
        )
        self.ln_pre = nn.Identity() if config.get("no_ln_pre") else nn.LayerNorm(width, eps=epsilon)
        heads = width // config.get("head_width", 64)
        self.transformer = OpenClipTransformer(config, heads, open_clip_act(config, quick), epsilon)
        self.ln_post = nn.LayerNorm(width, eps=epsilon)
        self.proj = nn.Parameter(torch.zeros(width, embed_dim))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x, states = self.transformer(self.ln_pre(x))
        mean, after = self.config.get("pool_type") == "avg", self.config.get("final_ln_after_pool")
        x = x if after else self.ln_post(x)
        pooled = x[:, 1:].mean(1) if mean else x[:, 0]
        pooled = self.ln_post(pooled) if after else pooled
        hidden = {f"image_hidden_{layer}": state for layer, state in enumerate(states)}
        return {**hidden, "image_tokens": x[:, 1:], "image": pooled @ self.proj}


class OpenClipText(nn.Module):
    """The text tower; plain models hold its parameters at their top."""

    def __init__(self, config: dict[str, Any], embed_dim: int, quick: bool):
        super().__init__()
        self.text_config, width, count = config, config["width"], config["context_length"]
        epsilon = config.get("norm_kwargs", {}).get("eps", 1e-5)
        self.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.zeros(count, width))
        self.transformer = OpenClipTransformer(config, config["heads"], open_clip_act(config, quick), epsilon)
        self.ln_final = nn.LayerNorm(width, eps=epsilon)
        self.text_projection = nn.Parameter(torch.zeros(width, embed_dim))

    def encode_text(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        config, count = self.text_config, ids.shape[1]
        mask = None if config.get("no_causal_mask") else torch.full((count, count), -torch.inf).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:count]
        x, states = self.transformer(x, mask)
        x = self.ln_final(x)
        kind = config.get("pool_type", "argmax")
        place = {
            "argmax": ids.argmax(-1),
            "first": torch.zeros(len(ids)).long(),
            "last": torch.full((len(ids),), count - 1),
        }
        if kind == "eos":
            place["eos"] = (ids == config["eos_id"]).int().argmax(-1)
        hidden = {f"text_hidden_{layer}": state for layer, state in enumerate(states)}
        pooled = x[torch.arange(len(ids)), place[kind]]
        return {**hidden, "text_tokens": x, "text": pooled @ self.text_projection}


class OpenClip(OpenClipText):
    def __init__(self, config: dict[str, Any]):
        model = config["model_cfg"]
        given = (model["embed_dim"], model.get("quick_gelu", False))
        custom = model.get("custom_text", False)
        if custom:
            nn.Module.__init__(self)
            self.text = OpenClipText(model["text_cfg"], *given)
        else:
            super().__init__(model["text_cfg"], *given)
        self.config, self.custom = config, custom
        self.visual = OpenClipVision(model["vision_cfg"], *given)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = None
        if model.get("init_logit_bias") is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(model["init_logit_bias"])))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {**self.visual(images), **(self.text if self.custom else self).encode_text(ids)}
        image, text = (functional.normalize(found[name], dim=-1) for name in ("image", "text"))
        bias = 0.0 if self.logit_bias is None else self.logit_bias
        return {**found, "logits": self.logit_scale.exp() * image @ text.T + bias}


def save_open_clip(model: nn.Module, folder: Path) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps(model.config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def load_open_clip(folder: Path) -> nn.Module:
    model = OpenClip(json.loads((folder / "open_clip_config.json").read_text()))
    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return model.eval()


VISION = dict(layers=2, width=24, head_width=8, patch_size=8, image_size=24)
TEXT = dict(context_length=9, vocab_size=50, width=16, heads=2, layers=2)
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "plain": dict(vision_cfg=dict(VISION, image_size=[24, 16]), text_cfg=TEXT),
    "quick": dict(vision_cfg=dict(VISION, mlp_ratio=3.3, ls_init_value=0.5), text_cfg=TEXT, quick_gelu=True),
    "custom text": dict(
        vision_cfg=dict(VISION, pool_type="avg", no_ln_pre=True, final_ln_after_pool=True),
        text_cfg=dict(TEXT, pool_type="eos", eos_id=7, norm_kwargs={"eps": 1e-6}),
        custom_text=True,
    ),
    "bidirectional, with bias": dict(
        vision_cfg=dict(VISION, act_kwargs={"approximate": "tanh"}),
        text_cfg=dict(TEXT, no_causal_mask=True, pool_type="last"),
        init_logit_bias=-10,
    ),
}


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_the_layout_of_open_clip(tmp_path: Path, kind: str) -> None:
    config = {"model_cfg": {"embed_dim": 20, **OPEN_CLIP[kind]}, "preprocess_cfg": {}}
    side = config["model_cfg"]["vision_cfg"]["image_size"]
    images = RANDOM.standard_normal((2, 24, 24 if isinstance(side, int) else side[1], 3)).astype(np.float32)
    ids = RANDOM.integers(8, 49, (3, 9))
    for row, place in enumerate((4, 8, 2)):
        ids[row, place] = config["model_cfg"]["text_cfg"].get("eos_id", 49)

    def ours(model: Towers, variables: Any) -> dict[str, Any]:
        def run(towers: Towers) -> dict[str, Any]:
            image = towers.call("image", images, hidden=(0, 1))
            text = towers.call("text", jnp.asarray(ids), hidden=(0, 1))
            unit = [part["embedding"] for part in (image, text)]
            unit = [part / jnp.linalg.norm(part, axis=-1, keepdims=True) for part in unit]
            bias = towers.call("clip_logit_bias") if "clip_logit_bias" in towers else 0.0
            return {
                "logits": jnp.exp(towers.call("clip_logit_scale")) * unit[0] @ unit[1].T + bias,
                "image": image["embedding"],
                "image_tokens": image["tokens"],
                "text": text["embedding"],
                "text_tokens": text["tokens"],
                **parity.layers(image["hidden"], "image_"),
                **parity.layers(text["hidden"], "text_"),
            }

        return model.apply(variables, method=run)

    parity.check(
        OpenClip(config),
        tmp_path,
        lambda model: model(pixels(images), torch.from_numpy(ids)),
        ours,
        save=save_open_clip,
        load=load_open_clip,
        rename=lambda name: name.removeprefix("text."),
        family="open_clip",
    )


@pytest.mark.parametrize(
    ("vision", "text", "told"),
    [
        (
            {"timm_model_name": "vit_base_patch16_siglip_224"},
            {},
            "timm_model_name='vit_base_patch16_siglip_224'",
        ),
        ({"layers": [3, 4, 6, 3]}, {}, r"vision_cfg.layers=\[3, 4, 6, 3\]"),
        ({"pool_type": "none"}, {}, "vision_cfg.pool_type='none'"),
        ({}, {"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base'"),
        ({}, {"embed_cls": True}, "embed_cls=True"),
    ],
)
def test_what_open_clip_has_and_we_do_not_is_told(tmp_path: Path, vision: Any, text: Any, told: str) -> None:
    model = {"embed_dim": 20, "vision_cfg": {**VISION, **vision}, "text_cfg": {**TEXT, **text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=told):
        from_pretrained(tmp_path)


def test_an_epsilon_that_timm_has_not_is_told(tmp_path: Path) -> None:
    tower = ViT(image_size=16, patch=8, width=16, depth=1, heads=2, epsilon=1e-12)
    with pytest.raises(UserError, match="ViT.epsilon is 1e-12"):
        save_pretrained(tower, {}, tmp_path / "ours", family="timm")

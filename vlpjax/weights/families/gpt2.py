"""GPT-2 ("Language Models are Unsupervised Multitask Learners"): LayerNorm, learned positions, plain MLPs."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.configs import activation_named, require, their_activation
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

_NAMES = {
    "vocabulary": "vocab_size",
    "width": "n_embd",
    "depth": "n_layer",
    "heads": "n_head",
    "length": "n_positions",
}
# Their linear layers hold kernels as ours do: inputs first.
_QKV = tuple(f"attention/{name}" for name in ("query", "key", "value"))
_BLOCK = (
    Rule(tuple(f"{name}/kernel" for name in _QKV), "attn.c_attn.weight", "i (n h d) -> n i h d"),
    Rule(tuple(f"{name}/bias" for name in _QKV), "attn.c_attn.bias", "(n h d) -> n h d"),
    Rule("attention/out/kernel", "attn.c_proj.weight", "(h d) o -> h d o"),
    Rule("attention/out/bias", "attn.c_proj.bias"),
    Rule("mlp/up/kernel", "mlp.c_fc.weight"),
    Rule("mlp/up/bias", "mlp.c_fc.bias"),
    Rule("mlp/down/kernel", "mlp.c_proj.weight"),
    Rule("mlp/down/bias", "mlp.c_proj.bias"),
    Rule("attention_norm/scale", "ln_1.weight"),
    Rule("attention_norm/bias", "ln_1.bias"),
    Rule("mlp_norm/scale", "ln_2.weight"),
    Rule("mlp_norm/bias", "ln_2.bias"),
)
_BODY = (
    Rule("token_embedding/embedding", "wte.weight"),
    Rule("position_embedding", "wpe.weight"),
    *under("block_{n}/", "h.{n}.", _BLOCK),
    Rule("final_norm/scale", "ln_f.weight"),
    Rule("final_norm/bias", "ln_f.bias"),
)


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config.  Dropout of attention weights is not ours; that of branches is."""
    require("GPT-2", config, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    sizes: dict[str, Any] = {ours: config.get(theirs) for ours, theirs in _NAMES.items()}
    for ours, theirs in _NAMES.items():
        if not isinstance(sizes[ours], int):
            raise UserError(f"The config's {theirs} is {sizes[ours]!r}; it must be a whole number.")
    return Decoder(
        **sizes,
        mlp_dim=config.get("n_inner") or 4 * config["n_embd"],
        activation=activation_named("GPT-2", config.get("activation_function") or "gelu_new"),
        gated=False,
        norm="layer",
        epsilon=config.get("layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        scale=None if config.get("scale_attn_weights", True) else 1.0,
        rotary=None,
        learned_positions=True,
        tied=bool(config.get("tie_word_embeddings", True)),
        dropout=float(config.get("resid_pdrop", 0.1)),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    model = decoders.hold(model, "gpt2")
    decoders.hold(
        model, "gpt2", norm="layer", order="pre", gated=False, qk_norm=None, soft_cap=None, final_soft_cap=None,
        rotary=None, learned_positions=True, embed_scale=1.0, qkv_bias=True, out_bias=True, mlp_bias=True,
        pattern=("global",) * len(model.pattern),
    )  # fmt: skip
    if model.kv_heads not in (None, model.heads) or model.head_dim not in (None, model.width // model.heads):
        decoders.hold(model, "gpt2", kv_heads=model.heads, head_dim=model.width // model.heads)
    if model.scale not in (None, 1.0):
        decoders.hold(model, "gpt2", scale=None)
    activation = their_activation(model.activation)
    return {
        **{theirs: getattr(model, ours) for ours, theirs in _NAMES.items()},
        "n_inner": model.mlp_dim or 4 * model.width,
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else activation,
        "layer_norm_epsilon": model.epsilon,
        "scale_attn_weights": model.scale is None,
        "tie_word_embeddings": model.tied,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    build=build,
    describe=describe,
    rules=(
        *under("", "transformer.", _BODY),
        Rule("head/kernel", "lm_head.weight", "v d -> d v"),
        *_BODY,  # the released files have no prefix
    ),
    example=decoders.example,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    tied=(("lm_head.weight", "transformer.wte.weight"),),
)

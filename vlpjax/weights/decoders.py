"""What the families of decoders share: tensor names, rotary fields of a config, and checks.

`transformers` writes rotary settings as ``rope_parameters`` since version 5, before as ``rope_theta`` and
``rope_scaling``.  Both are read; both are written, so that folders load in either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.models.positions import Linear, Llama3, Rotary, Yarn
from vlpjax.weights.configs import activation_named, their_activation
from vlpjax.weights.layout import Rule, under

LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}

_ATTENTION = (
    Rule("query/kernel", "q_proj.weight", "(h d) i -> i h d"),
    Rule("key/kernel", "k_proj.weight", "(h d) i -> i h d"),
    Rule("value/kernel", "v_proj.weight", "(h d) i -> i h d"),
    Rule("query/bias", "q_proj.bias", "(h d) -> h d"),
    Rule("key/bias", "k_proj.bias", "(h d) -> h d"),
    Rule("value/bias", "v_proj.bias", "(h d) -> h d"),
    Rule("out/kernel", "o_proj.weight", "o (h d) -> h d o"),
    Rule("out/bias", "o_proj.bias"),
    Rule("query_norm/scale", "q_norm.weight"),
    Rule("key_norm/scale", "k_norm.weight"),
)
_MLP = tuple(
    rule
    for name in ("gate", "up", "down")
    for rule in (
        Rule(f"{name}/kernel", f"{name}_proj.weight", "o i -> i o"),
        Rule(f"{name}/bias", f"{name}_proj.bias"),
    )
)


def rules(**norms: str) -> tuple[Rule, ...]:
    """The rules of a decoder with Llama's names; ``norms`` are those of a block, ours=theirs.

    The body's names stand under ``model.`` with a head beside it, or alone where no head was saved.
    """
    block = (
        *under("attention/", "self_attn.", _ATTENTION),
        *under("mlp/", "mlp.", _MLP),
        *(Rule(f"{ours}/scale", f"{theirs}.weight") for ours, theirs in norms.items()),
    )
    body = (
        Rule("token_embedding/embedding", "embed_tokens.weight"),
        *under("block_{n}/", "layers.{n}.", block),
        Rule("final_norm/scale", "norm.weight"),
    )
    return (
        *under("", "model.", body),
        Rule("head/kernel", "lm_head.weight", "v d -> d v"),
        *body,
    )


PRE = rules(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm")
BOTH = rules(
    attention_norm="input_layernorm",
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
IGNORED = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.\w*inv_freq",)


def example(model: nn.Module) -> tuple[Any, ...]:
    """Two tokens of one text."""
    return (jax.ShapeDtypeStruct((1, 2), jnp.int32),)


def hold(model: nn.Module, family: str, **fixed: Any) -> Decoder:
    """The module as a decoder whose fields have the values that a family fixes, or a UserError."""
    if not isinstance(model, Decoder):
        raise UserError(f"The family {family!r} holds a Decoder, not a {type(model).__name__}.")
    for field, value in fixed.items():
        found = getattr(model, field)
        if found != value:
            raise UserError(
                f"The family {family!r} holds decoders with {field}={value!r}; this one has {found!r}."
            )
    return model


def sizes(
    config: Mapping[str, Any], activation_field: str = "hidden_act", default: str = "silu"
) -> dict[str, Any]:
    """The fields of a Decoder that all configs with Llama's names have."""
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for field in needed:
        if not isinstance(config.get(field), int):
            raise UserError(f"The config's {field} is {config.get(field)!r}; it must be a whole number.")
    return dict(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim"),
        mlp_dim=config["intermediate_size"],
        activation=activation_named("decoder's", config.get(activation_field) or default),
        epsilon=config.get("rms_norm_eps", 1e-6),
        length=config.get("max_position_embeddings"),
    )


def their_sizes(model: Decoder, activation_field: str = "hidden_act") -> dict[str, Any]:
    """The inverse of :func:`sizes`."""
    fields = dict(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads or model.heads,
        head_dim=model.head_dim or model.width // model.heads,
        intermediate_size=model.mlp_dim or 4 * model.width,
        rms_norm_eps=model.epsilon,
        tie_word_embeddings=model.tied,
        **{activation_field: their_activation(model.activation)},
    )
    return fields if model.length is None else {**fields, "max_position_embeddings": model.length}


def rotary(config: Mapping[str, Any], parameters: Mapping[str, Any], base: float) -> Rotary:
    """The rotary positions of ``rope_parameters`` (or of ``rope_scaling``).

    Args:
      base: where the parameters name none.

    Raises:
      UserError: a kind of scaling that we do not have, or one without its numbers.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    length = (
        config.get("original_max_position_embeddings")
        or parameters.get("original_max_position_embeddings")
        or config.get("max_position_embeddings")
    )
    scaling: Linear | Llama3 | Yarn | None
    try:
        if kind == "default":
            scaling = None
        elif kind == "linear":
            scaling = Linear(float(parameters["factor"]))
        elif kind == "llama3":
            low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
            scaling = Llama3(float(parameters["factor"]), low, high, int(length or 0))
        elif kind == "yarn":
            scaling = _yarn(parameters, int(length or 0))
        else:
            raise UserError(
                f"The config's rope_type is {kind!r}; there are 'default', 'linear', 'llama3', 'yarn'."
            )
    except KeyError as missing:
        raise UserError(f"The config's rope_type {kind!r} needs {missing}, which is not there.") from None
    if isinstance(scaling, (Llama3, Yarn)) and scaling.length <= 0:
        raise UserError(f"The config's rope_type {kind!r} needs 'original_max_position_embeddings'.")
    fraction = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return Rotary(float(parameters.get("rope_theta") or base), float(fraction), scaling)


def _yarn(parameters: Mapping[str, Any], length: int) -> Yarn:
    attention = parameters.get("attention_factor")
    scale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention is None and scale and all_dim:
        # DeepSeek's two temperatures; only their quotient acts on cosines and sines.
        unit = Yarn(float(parameters["factor"]), length).amplitude - 1
        attention = (1 + unit * scale) / (1 + unit * all_dim)
    return Yarn(
        float(parameters["factor"]),
        length,
        fast=float(parameters.get("beta_fast") or 32),
        slow=float(parameters.get("beta_slow") or 1),
        attention_factor=attention,
        rounded=bool(parameters.get("truncate", True)),
    )


def config_rotary(config: Mapping[str, Any], base: float = 10_000.0) -> Rotary:
    """The rotary positions of a config with one kind of them, in the newer or the older spelling."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta")
    return rotary(config, parameters, float(theta or base))


def rope_parameters(how: Rotary) -> dict[str, Any]:
    """The inverse of :func:`rotary`."""
    fields: dict[str, Any] = {"rope_theta": how.base, "rope_type": "default"}
    if how.sections:
        raise UserError(
            f"Rotary.sections is {how.sections}; text decoders are exported without sections only."
        )
    if how.fraction != 1:
        fields["partial_rotary_factor"] = how.fraction
    scaling = how.scaling
    if isinstance(scaling, Linear):
        fields |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3):
        fields |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.length,
        }
    elif isinstance(scaling, Yarn):
        fields |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "original_max_position_embeddings": scaling.length,
            "truncate": scaling.rounded,
        }
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    return fields


def their_rotary(model: Decoder) -> dict[str, Any]:
    """The inverse of :func:`config_rotary`, in both spellings."""
    if model.rotary is None or model.local_rotary not in (None, model.rotary):
        raise UserError(
            f"The family holds decoders with one kind of rotary positions; this one has {model.rotary} "
            f"and, for local layers, {model.local_rotary}."
        )
    parameters = rope_parameters(model.rotary)
    fields = {"rope_parameters": parameters, "rope_theta": model.rotary.base}
    if model.rotary.fraction != 1:
        fields["partial_rotary_factor"] = model.rotary.fraction
    if model.rotary.scaling is not None:
        fields["rope_scaling"] = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return fields


def pattern(config: Mapping[str, Any], kinds: list[str]) -> tuple[str, ...]:
    """The shortest pattern that repeats to the kinds of all layers: the config's ``layer_types``, or ``kinds``.

    Args:
      kinds: by the family's older fields, in their words.
    """
    types = config.get("layer_types") or kinds
    unknown = [kind for kind in types if kind not in LAYER_TYPES]
    if unknown:
        raise UserError(f"The config's layer_types has {unknown[0]!r}; we have {', '.join(LAYER_TYPES)}.")
    ours = [LAYER_TYPES[kind] for kind in types]
    for period in range(1, len(ours) + 1):
        if all(kind == ours[layer % period] for layer, kind in enumerate(ours)):
            return tuple(ours[:period])
    return ("global",)


def layer_types(model: Decoder) -> list[str]:
    """The inverse of :func:`pattern`."""
    theirs = {ours: name for name, ours in LAYER_TYPES.items()}
    return [theirs[kind] for kind in model.kinds()]

"""Small decoders of `transformers`, one or more per family, for the tests of weights and of generation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
import transformers

torch.set_num_threads(1)  # models this small only wait for more

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
GEMMA = {**SIZES, "head_dim": 10, "num_hidden_layers": 4, "pad_token_id": 0}
LONG = {"original_max_position_embeddings": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, **LONG},
    "yarn with its own factor": {
        "rope_type": "yarn", "factor": 8.0, "attention_factor": 1.3, "truncate": False, **LONG
    },
}  # fmt: skip


def llama(**fields: Any) -> Any:
    """A config of the Llama family with these fields."""
    return transformers.LlamaConfig(**{**SIZES, **fields})


CONFIGS: dict[str, Any] = {
    "llama": llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama, one head of keys, tied, biases": llama(
        num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=8
    ),
    **{
        f"llama, {name}": llama(rope_parameters={"rope_theta": 300.0, **scaling})
        for name, scaling in SCALINGS.items()
    },
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2, windows": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=10),
    "gemma": transformers.GemmaConfig(**GEMMA),
    "gemma2": transformers.Gemma2Config(
        **GEMMA, sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **GEMMA, sliding_window=5, query_pre_attn_scalar=7,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
        },
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=61, n_embd=24, n_layer=3, n_head=4, n_positions=96, n_inner=50, bos_token_id=None, eos_token_id=None
    ),
}  # fmt: skip


def peer(name: str) -> torch.nn.Module:
    """A decoder with random weights, and attention written out."""
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name], attn_implementation="eager"
    )
    return model


def scanned(model: Any, variables: Any) -> tuple[Any, Any]:
    """The decoder and its variables in the form that runs its layers as a scan."""
    params = dict(variables["params"])
    blocks = [params.pop(f"block_{layer}") for layer in range(model.depth)]
    return model.clone(scan=True), {
        "params": params | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
    }

"""The Q-Former's parameters as `transformers` names them in BLIP-2: rules for the families that have one.

Source of the architecture: "BLIP-2", arXiv 2301.12597.
"""

from __future__ import annotations

from vlpjax.weights.encoders import linear, normed
from vlpjax.weights.families.bert import bert_attention
from vlpjax.weights.layout import Rule

_LAYER = "encoder.layer.{n}"


def _attention(ours: str, norm: str, theirs: str) -> tuple[Rule, ...]:
    """Attention, and the norm behind it."""
    return (
        *bert_attention(f"block_{{n}}/{ours}", f"{_LAYER}.{theirs}.attention", f"{_LAYER}.{theirs}.output"),
        *normed(f"block_{{n}}/{norm}", f"{_LAYER}.{theirs}.output.LayerNorm"),
    )


def _mlp(ours: str, ending: str) -> tuple[Rule, ...]:
    """An MLP, and the norm behind it; those of the queries have an ending of their own."""
    return (
        *linear(f"block_{{n}}/{ours}/up", f"{_LAYER}.intermediate{ending}.dense"),
        *linear(f"block_{{n}}/{ours}/down", f"{_LAYER}.output{ending}.dense"),
        *normed(f"block_{{n}}/{ours}_norm", f"{_LAYER}.output{ending}.LayerNorm"),
    )


# Of the module that is called ``qformer`` there.
QFORMER: tuple[Rule, ...] = (
    *normed("embedding_norm", "layernorm"),
    *_attention("attention", "attention_norm", "attention"),
    *_attention("cross_attention", "cross_norm", "crossattention"),
    *_mlp("mlp", "_query"),
    *_mlp("text_mlp", ""),
)
# Of the model around it: the learned queries; and in models for retrieval the embeddings of texts and the joint space.
QUERIES: tuple[Rule, ...] = (Rule("query_tokens", "query_tokens"),)
TEXTS: tuple[Rule, ...] = (
    Rule("token_embedding/embedding", "embeddings.word_embeddings.weight"),
    Rule("position_embedding", "embeddings.position_embeddings.weight"),
    *linear("projection/kernel", "vision_projection"),
    *linear("text_projection/kernel", "text_projection"),
)

"""Trains Llama 2: a decoder with rotary positions, RMSNorm and SwiGLU learns to predict the next token of packed text.

python -m vlpjax.main --config=experiments/decoders/llama2_7b.py --workdir=runs/llama2

``small`` needs nothing but this package: a decoder of 1.6 million parameters learns the names and keywords of the
bundled drawings.  ``llama2_7b.py:paper`` is the 7B model on 2 trillion tokens, which needs the tokens (as
``tokens/llama2/*.bin``) and some hundred accelerators; its memory, its traffic and the time of a step can be had
without either.
"""

from __future__ import annotations

import optax

from experiments._bundled import SEEN, VOCABULARY, source
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import PackedTexts, TokenFiles
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.experiment import base_config
from vlpjax.models.decoder import Decoder
from vlpjax.objectives.next_token import NextToken
from vlpjax.optim.optimizer import Optimizer, Schedule

SIZES = ("small", "paper")
SYSTEM = dict(
    system="Llama 2",
    paper="Llama 2: Open Foundation and Fine-Tuned Chat Models, arXiv 2307.09288",
    here="a causal decoder on packed text, its loss taken chunk by chunk",
    published="7B on 2.0 trillion tokens: 45.3 % MMLU, 5-shot",
    measured="not measured yet",
)
LENGTH = 4096  # tokens of a row of ``paper``
ROWS = 1024  # of a batch of ``paper``: 4 million tokens
TOKENS = 2_000_000_000_000
# What blocks save, beside their inputs: attention is not run twice.  "tensors" computes nothing but norms and
# activations again, and takes more memory.
LITTLE = "save:attention_out,attention_lse,key,value"
# With more fast memory than the compiler's default of 16 MiB for their tiles, large products come nearer to the peak.
# (Compiling takes longer.)
VMEM = (r"tpu-TPU v5p?-\d+", {"compiler_options": ("xla_tpu_scoped_vmem_limit_kib=32768",)})


def get_config(size: str = "small") -> Config:
    config = base_config()
    config.name = "Llama 2, small" if size == "small" else "Llama 2, 7B"
    return small(config) if size == "small" else paper(config)


def small(config: Config, length: int = 64) -> Config:
    """The names and keywords of the drawings, as one long text."""
    config.duration = "150 steps"
    config.towers = dict(
        decoder=spec(
            Decoder, vocabulary=VOCABULARY, width=128, depth=4, heads=4, mlp_dim=352, epsilon=1e-5, tied=False
        )
    )
    config.objectives = dict(
        next=dict(weight=1.0, loss=spec(NextToken, segment_field="segment_ids", chunk=64))
    )
    texts = spec(
        PackedTexts,
        source=source(SEEN),
        tokenizer=spec(SentencePieceTokenizer, path="bundled:emoji1594.spm.model"),
        length=length,
        fields=("name", "keywords"),
        lower=True,
    )
    config.data.train = spec(Pipeline, source=texts, transforms={}, batch_size=32)
    config.optimizer = adamw(3e-3, "10%")
    return config


def paper(config: Config) -> Config:
    """The 7B model, 500,000 steps of 4 million tokens."""
    config.duration = "500000 steps"
    config.precision = "bfloat16"
    config.mesh_rules = (VMEM,)
    config.plan.attention_share = 0.5  # causal
    config.towers = dict(decoder=decoder())
    config.objectives = dict(next=dict(weight=1.0, loss=spec(NextToken)))
    config.data = dict(example=dict(tokens=f"int32[{LENGTH + 1}]"), examples=TOKENS // LENGTH)
    config.data.train = spec(
        Pipeline,
        source=spec(TokenFiles, files="tokens/llama2/*.bin", length=LENGTH),
        transforms={},
        batch_size=ROWS,
        workers=8,
    )
    config.optimizer = adamw(3e-4, "2000 steps")
    return config


def decoder() -> Config:
    """The 7B model itself."""
    return spec(
        Decoder,
        vocabulary=32_000,
        width=4096,
        depth=32,
        heads=32,
        mlp_dim=11_008,
        epsilon=1e-5,
        length=LENGTH,
        tied=False,
        scan=True,
        remat=LITTLE,
    )


def adamw(rate: float, warmup: str) -> Config:
    """AdamW as section 2.2 of the paper gives it."""
    return spec(
        Optimizer,
        direction=spec(optax.scale_by_adam, b1=0.9, b2=0.95, eps=1e-5),
        learning_rate=rate,
        schedule=spec(Schedule, warmup=warmup, final=0.1),
        weight_decay=0.1,
        clip_norm=1.0,
    )

"""Trains Llama 3: Llama 2's decoder with shared keys and values, slower rotations and a larger vocabulary.

python -m vlpjax.main --config=experiments/decoders/llama3.py --workdir=runs/llama3

``small`` needs nothing but this package: a decoder of 1.5 million parameters learns the names and keywords of the
bundled drawings.  ``llama3.py:paper`` is the 8B model on rows of 8,192 tokens, ``llama3.py:paper_long`` the same on
rows of 131,072 tokens that lie over 16 devices each, and ``llama3.py:paper_70b`` the 70B model.  These need tokens (as
``tokens/llama3/*.bin``) and a pod; their memory, their traffic and the time of a step can be had without either.
"""

from __future__ import annotations

from typing import NamedTuple

from experiments.decoders import llama2_7b
from experiments.decoders.llama2_7b import LITTLE, VMEM, adamw
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TokenFiles
from vlpjax.experiment import base_config
from vlpjax.models.decoder import Decoder
from vlpjax.models.positions import Rotary
from vlpjax.objectives.next_token import NextToken

SIZES = ("small", "paper", "paper_long", "paper_70b")
SYSTEM = dict(
    system="Llama 3",
    paper="The Llama 3 Herd of Models, arXiv 2407.21783",
    here="the decoder with grouped keys and values; rows of 131,072 tokens lie over 16 devices",
    published="8B on 15 trillion tokens, tuned on instructions: 69.4 % MMLU, 5-shot",
    measured="not measured yet",
)
TOKENS = 15_000_000_000_000
CHUNK = 1024  # tokens of a device whose logits exist at once, 0.5 GB; each chunk adds to the vocabulary's gradient
ROTARY = spec(Rotary, base=500_000.0)
COMPILER = VMEM[1]["compiler_options"]
# Four long rows are four groups of devices, and 64 chips of v5p have 16 for each.  Each rank of ``ulysses`` has one of
# the eight heads of keys and values, so that none is sent twice; the two of ``ring`` gather each other's.
ROWS_APART = {"fsdp": 4, "ulysses": -1}
LONG = (r"tpu-TPU v5p?-64", {"mesh.ring": 2, "compiler_options": COMPILER})
# 4,096 chips share the 16 million tokens of a batch: two to a row.
POD = (r"tpu-TPU v5p?-4096", {"mesh.ulysses": 2, "compiler_options": COMPILER})
# With room to spare: kernels are gathered and tokens traded once in a step instead of twice.
KERNELS = f"{LITTLE},exchanged,residual,mlp_gate,kernel"


class Training(NamedTuple):
    """What tables 3 and 4 and section 3.4 of the paper give for a model, and the rows that are trained on.

    Attributes:
      width, depth, heads, mlp_dim: of the decoder; all have 8 heads of keys and values.
      rate: peak learning rate.
      length: tokens of a row, ``rows`` of them in a batch.
      remat: what blocks save, beside their inputs.
      rules: ``config.mesh_rules``; ``mesh`` is what they change.
    """

    width: int
    depth: int
    heads: int
    mlp_dim: int
    rate: float
    length: int
    rows: int
    remat: str
    rules: tuple[tuple[str, dict[str, object]], ...]
    mesh: dict[str, int] = {}


PAPERS = {
    "paper": Training(4096, 32, 32, 14_336, 3e-4, 8192, 1024, LITTLE, (VMEM,)),
    "paper_long": Training(4096, 32, 32, 14_336, 3e-4, 131_072, 4, KERNELS, (LONG, VMEM), ROWS_APART),
    "paper_70b": Training(8192, 80, 64, 28_672, 1.5e-4, 8192, 2048, "tensors", (POD, VMEM)),
}


def get_config(size: str = "small") -> Config:
    config = base_config()
    if size == "small":
        return small(config)
    config.name = f"Llama 3, {'70B' if size == 'paper_70b' else '8B'}"
    return paper(config, PAPERS[size])


def small(config: Config) -> Config:
    """Llama 2's small decoder, with Llama 3's rotations and two heads of queries to one of keys and values."""
    llama2_7b.small(config)
    config.name = "Llama 3, small"
    config.towers.decoder.kv_heads = 2
    config.towers.decoder.rotary = ROTARY
    return config


def paper(config: Config, training: Training) -> Config:
    """A model of the herd on 15 trillion tokens; decay and betas are not published and are Llama 2's."""
    config.duration = f"{TOKENS // (training.length * training.rows)} steps"
    config.precision = "bfloat16"
    config.mesh_rules = training.rules
    config.mesh.update(training.mesh)
    config.plan.attention_share = 0.5  # causal
    config.towers = dict(decoder=decoder(training, ROTARY))
    config.objectives = dict(next=dict(weight=1.0, loss=spec(NextToken, chunk=CHUNK)))
    config.data = dict(
        example=dict(tokens=f"int32[{training.length + 1}]"), examples=TOKENS // training.length
    )
    config.data.train = spec(
        Pipeline,
        source=spec(TokenFiles, files="tokens/llama3/*.bin", length=training.length),
        transforms={},
        batch_size=training.rows,
        workers=8,
    )
    config.optimizer = adamw(training.rate, "8000 steps")
    return config


def decoder(training: Training, rotary: Config) -> Config:
    """The model itself."""
    return spec(
        Decoder,
        vocabulary=128_256,
        width=training.width,
        depth=training.depth,
        heads=training.heads,
        kv_heads=8,
        mlp_dim=training.mlp_dim,
        epsilon=1e-5,
        rotary=rotary,
        length=training.length,
        tied=False,
        scan=True,
        remat=training.remat,
    )

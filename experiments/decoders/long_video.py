"""Trains a decoder on long videos: frames are encoded where they lie, tokens lie where attention wants them.

python -m vlpjax.main --config=experiments/decoders/long_video.py --workdir=runs/long_video

``small`` needs nothing but this package: rows of short videos whose frames are bundled drawings, each video followed by
the names of what it showed, for a decoder of 1 million parameters to write.  ``long_video.py:paper`` carries the last
stage of LongVILA to 2,097,152 tokens in one row: 10,240 frames through SigLIP's So400m/14 into a decoder of Llama 3's
8B, on 256 chips.  It needs the rows (``videos/*.array_record``: ``video``, a list of pictures, ``tokens``, ids in which
196 placeholders stand for each), and the pretrained weights to start from; its memory, its traffic and the time of a
step can be had without any of that.
"""

from __future__ import annotations

from flax import linen as nn

from experiments._bundled import SEEN, VOCABULARY, source
from experiments._recipes import adamw
from experiments.decoders import llama3
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import ArrayRecords, Slideshows
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import Frames
from vlpjax.experiment import base_config
from vlpjax.models.connectors import AdaptiveAveragePool, MlpConnector
from vlpjax.models.decoder import Decoder
from vlpjax.models.positions import Rotary
from vlpjax.models.vit import ViT
from vlpjax.objectives.visual_next_token import VisualNextToken

SIZES = ("small", "paper")
SYSTEM = dict(
    system="LongVILA",
    paper="LongVILA: Scaling Long-Context Visual Language Models for Long Videos, arXiv 2408.10188",
    here="frames and tokens sharded one after the other; rows of 2,097,152 tokens",
    published="99.8 % of needles found in 6,000 frames",
    measured="not measured yet",
)
LENGTH = 2_097_152  # tokens of a row of ``paper``
FRAMES = 10_240  # of it, 2,007,040 tokens; the rest are words
PER_FRAME = 196  # visual tokens: 14 x 14 of the tower's 27 x 27 patches
PLACEHOLDER = 128_002  # the first of Llama 3's reserved tokens
# Each of 8 neighbours takes the heads that share one head of keys, of all their tokens.  Parameters lie in 32 pieces,
# because the tower's 1,152 features cannot be cut into 256.
POD = (
    r"tpu-TPU v5p?-256",
    {
        "mesh.ring": 32,
        "mesh.ulysses": 8,
        "sharding_rules.embed": ("ring",),
        "compiler_options": ("xla_tpu_scoped_vmem_limit_kib=32768",),
    },
)


def get_config(size: str = "small") -> Config:
    config = base_config()
    config.name = "Long video, small" if size == "small" else "Long video, 8B"
    return small(config) if size == "small" else paper(config)


def small(config: Config, length: int = 64, frames: int = 8, concepts: int = 24) -> Config:
    """Drawings of a few concepts by several vendors; the names of one to three follow them."""
    config.duration = "300 steps"
    config.towers = dict(
        image=spec(ViT, image_size=32, patch=8, width=96, depth=2, heads=4, pool="none"),
        connector=connector(grid=2, width=128),
        decoder=spec(
            Decoder, vocabulary=VOCABULARY, width=128, depth=2, heads=4, mlp_dim=352, epsilon=1e-5, tied=False
        ),
    )
    loss = spec(VisualNextToken, placeholder=VOCABULARY, segment_field="segment_ids", chunk=64)
    config.objectives = dict(next=dict(weight=1.0, loss=loss))
    rows = spec(
        Slideshows,
        source=source(SEEN),
        tokenizer=spec(SentencePieceTokenizer, path="bundled:emoji1594.spm.model"),
        count=4096,
        length=length,
        frames=frames,
        tokens_per_frame=4,
        placeholder=VOCABULARY,
        concepts=concepts,
    )
    config.data.train = spec(Pipeline, source=rows, transforms={}, batch_size=16)
    config.optimizer = adamw(3e-3, warmup="10%", weight_decay=0.0, clip_norm=1.0)
    return config


def paper(config: Config) -> Config:
    """One row a step; LongVILA's last stage, whose longest rows had 2,048 frames."""
    config.duration = "6 epochs"
    config.precision = "bfloat16"
    config.mesh.fsdp, config.mesh.ring = 1, -1  # all devices share the one row
    config.mesh_rules = (POD,)
    config.sharding_rules = dict(embed=("fsdp", "ring", "ulysses", "expert"))
    config.plan.attention_share = 0.5  # causal
    config.towers = dict(
        image=spec(
            ViT, image_size=384, patch=14, patch_crop=True, patch_bias=True, width=1152, depth=27, heads=16,
            mlp_dim=4304, activation="gelu_tanh", pre_norm=False, pool="none", scan=True, remat="full",
        ),
        connector=connector(grid=14, width=4096),
        decoder=llama3.decoder(
            llama3.PAPERS["paper"]._replace(length=LENGTH, remat="tensors"), spec(Rotary, base=3_580_165_449.0)
        ),
    )  # fmt: skip
    loss = spec(VisualNextToken, placeholder=PLACEHOLDER, chunk=1024, frames_at_once=20)
    config.objectives = dict(next=dict(weight=1.0, loss=loss))
    config.data = dict(
        example=dict(tokens=f"int32[{LENGTH + 1}]", video=f"uint8[{FRAMES},384,384,3]"), examples=15_000
    )
    frames = spec(Frames, frames=FRAMES, size=384, tokens_per_frame=PER_FRAME, placeholder=PLACEHOLDER)
    config.data.train = spec(
        Pipeline,
        source=spec(ArrayRecords, files="videos/*.array_record"),
        transforms=dict(frames=frames),
        batch_size=1,
    )
    config.optimizer = adamw(5e-5, warmup="3%", weight_decay=0.0, clip_norm=1.0)
    return config


def connector(grid: int, width: int) -> Config:
    """Patches averaged over a coarser grid, and two linear maps."""
    return spec(
        nn.Sequential,
        layers=(spec(AdaptiveAveragePool, grid=(grid, grid)), spec(MlpConnector, width=width)),
    )

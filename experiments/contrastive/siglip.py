"""Trains SigLIP: every image-text pair of the batch is a yes-or-no question, and texts travel around the devices.

python -m vlpjax.main --config=experiments/contrastive/siglip.py --workdir=runs/siglip

``small`` needs nothing but this package: it is ``clip.py:small`` under the sigmoid loss.  ``siglip.py:paper`` is
So400m/14 at 224 px with its published towers, optimizer, batch and length.
"""

from __future__ import annotations

from experiments.contrastive import _web
from experiments.contrastive import clip as clip_experiment
from vlpjax.config import Config, spec
from vlpjax.data.tokenizers import JsonTokenizer
from vlpjax.data.transforms import Normalize, Resize, Tokenize
from vlpjax.experiment import base_config
from vlpjax.objectives.contrastive import Sigmoid
from vlpjax.optim.adafactor import adafactor

SIZES = ("small", "paper")
SYSTEM = dict(
    system="SigLIP",
    paper="Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343",
    here="the sigmoid loss of pairs, in chunks around the ring of devices",
    published="So400m/14 at 224 px: 82.0 % zero-shot ImageNet",
    measured="not measured yet",
)
LENGTH = 64


def get_config(size: str = "small") -> Config:
    return small() if size == "small" else paper()


def small() -> Config:
    """CLIP's small setting with the other loss."""
    config = clip_experiment.small()
    config.name = "SigLIP, small"
    config.objectives = dict(siglip=dict(weight=1.0, loss=spec(Sigmoid, same="label", bias=-5.0, chunks=4)))
    return config


def paper() -> Config:
    """So400m/14: two towers of 27 blocks, 40 billion pairs seen, 32,768 to a batch."""
    config = base_config()
    config.name = "SigLIP, So400m/14"
    config.duration = "40_000_000_000 examples"
    # 1,152 features cannot be cut into more than 128 equal pieces.
    config.mesh_rules = ((r"tpu-.*-256", {"mesh.replica": 2, "mesh.fsdp": 128}),)
    body = dict(
        width=1152, depth=27, heads=16, mlp_dim=4304, activation="gelu_tanh", epsilon=1e-6,
    )  # fmt: skip
    config.towers = dict(
        image=_web.vit(
            14, embedding=None, pool="map", patch_bias=True, pre_norm=False, final_norm=True, pool_norm=False, **body
        ),
        text=_web.text(
            embedding=1152, length=LENGTH, vocabulary=32_000, eos_id=None, causal=False, pool="last",
            pad_id=1, projection_bias=True, **body,
        ),
    )  # fmt: skip
    config.objectives = dict(siglip=dict(weight=1.0, loss=spec(Sigmoid, chunks=64)))
    config.data = _web.declared(224, LENGTH, examples=10_000_000_000)
    config.data.train = _web.pairs(
        dict(
            resize=spec(Resize, size=224, resample="bilinear"),
            tokenize=_tokenize("text"),
            normalize=spec(Normalize, range="-1..1"),
        ),
        32_768,
    )
    config.data.train.source.tars = "webli/{00000..99999}.tar"
    # The published weight decay of 1e-4 is not multiplied by the learning rate, ours is.
    config.optimizer = _web.adamw(1e-3, 1e-4 / 1e-3, "20_000 steps", clip_norm=1.0)
    config.optimizer.direction = spec(adafactor, b2=0.95)
    config.evaluators = dict(
        imagenet=_web.zero_shot(224, _tokenize("caption"), spec(Normalize, range="-1..1"))
    )
    return config


def _tokenize(field: str) -> Config:
    """Lower-cased pieces, filled up with the end token as big_vision's ``c4_en`` has them: the tower reads the last."""
    pieces = spec(JsonTokenizer, path="tokenizers/siglip/tokenizer.json", pad="</s>", eos="</s>")
    return spec(Tokenize, tokenizer=pieces, length=LENGTH, lower=True, field=field)

"""BEiT: blocks of patches are hidden, and the ids that a frozen tokenizer gives them are predicted.

python -m vlpjax.main --config=experiments/masked/beit.py --workdir=runs/beit

``small`` (the default) learns from the bundled drawings at 32 pixels, with a tokenizer of random projections (arXiv
2202.01855) that needs no training of its own.  ``beit.py:paper`` is ViT-B/16 on ImageNet-1k for 800 epochs with the
encoder of DALL-E's discrete VAE, which reads the same crop at 112 pixels.  It needs the data set as TFDS prepares it,
and a run that has that encoder's parameters as its tower ``tokenizer`` in ``runs/dvae``: the published ones are not
read, so they are for you to train or to convert.  Without that run it ends at its start.
"""

from __future__ import annotations

from experiments.masked import _shared, simmim
from vlpjax.config import Config, spec
from vlpjax.data.transforms import Normalize, Resize, Views
from vlpjax.models.image_tokenizers import DiscreteVAEEncoder, RandomProjectionTokenizer
from vlpjax.objectives.masked_image import MaskedPrediction
from vlpjax.objectives.masking import BlockWise
from vlpjax.objectives.targets import TokenIds
from vlpjax.teachers import Teacher

SIZES = ("small", "paper")
SYSTEM = dict(
    system="BEiT",
    paper="BEiT: BERT Pre-Training of Image Transformers, arXiv 2106.08254",
    here="block-wise masks, a frozen tokenizer as a teacher, cross-entropy over its ids",
    published="ViT-B/16, 800 epochs: 83.2 % ImageNet after fine-tuning",
    measured="not measured yet",
)
FROZEN = ((r"tokenizer/.*", None), (r".*", 1.0))


def get_config(size: str = "small") -> Config:
    config = _shared.start("BEiT", size)
    if size == "small":
        vocabulary, patch, field, checkpoint = 256, _shared.PATCH, "image", ""
        config.towers = dict(
            image=_shared.small_tower(mask_token=True),
            tokenizer=spec(RandomProjectionTokenizer, patch=patch, vocabulary=vocabulary),
        )
        mask = spec(BlockWise, ratio=0.4, smallest=4)
        config.data.train = _shared.drawings()
        _shared.small(config)
    else:
        config.duration = "800 epochs"
        vocabulary, patch, field, checkpoint = 8192, 16, "tokenizer_image", "runs/dvae"
        config.towers = dict(
            image=simmim.tower(drop_path=0.1, layer_scale=0.1),
            tokenizer=spec(DiscreteVAEEncoder, vocabulary=vocabulary),
        )
        mask = spec(BlockWise, ratio=75 / 196, smallest=16)
        small = dict(
            resize=spec(Resize, size=112, resample="lanczos"), normalize=spec(Normalize, range="0..1")
        )
        _shared.imagenet(config, batch_size=2048, scale=(0.08, 1.0), views=spec(Views, views={field: small}))
        config.data.train.keep = ("image", field)
        config.data.example[field] = "float32[112,112,3]"
        config.optimizer = _shared.adamw(1.5e-3, warmup="10 epochs", betas=(0.9, 0.999), clip_norm=3.0)
    config.optimizer.rate_rules = FROZEN
    config.teachers = dict(tokenizer=spec(Teacher, towers=("tokenizer",), checkpoint=checkpoint))
    target = spec(TokenIds, vocabulary=vocabulary, field=field)
    objective = spec(MaskedPrediction, mask=mask, target=target, patch=patch)
    config.objectives = dict(beit=dict(weight=1.0, loss=objective))
    return config

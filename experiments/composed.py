"""Four objectives over shared towers, in one file and with no code of its own.

python -m vlpjax.main --config=experiments/composed.py --workdir=runs/composed

Contrast of images and captions, captioning, masked patches, and self-distillation between crops train one image
tower; the text tower has a part in the first two.  Each has a weight to set: ``--config.objectives.mae.weight=0``
switches one off.  Needs nothing but this package.  The evaluations are retrieval and nearest neighbours among
drawings of a vendor that is never trained on.
"""

from __future__ import annotations

from experiments._bundled import VOCABULARY, augmentation, caption, normalize, retrieval, tokenize, train
from experiments.contrastive import clip
from experiments.contrastive.coca import START
from experiments.self_supervised._views import chain, numbered
from vlpjax.config import Config, spec
from vlpjax.data.transforms import FixedCaption, RandomFlip, Views
from vlpjax.models.coca import CaptionDecoder, UnimodalText
from vlpjax.models.vit import ViT
from vlpjax.objectives.captioning import Captioning
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.objectives.dino import DINO
from vlpjax.objectives.masked_image import MaskedAutoencoding
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels
from vlpjax.teachers import EMA

SIZE, LOCAL_SIZE, PATCH, LENGTH = clip.SIZE, 16, 4, clip.LENGTH
GLOBAL, LOCAL = numbered("global", 2), numbered("local", 2)


def get_config() -> Config:
    config = clip.small()
    config.name = "four objectives, shared towers"
    config.towers = dict(
        image=spec(
            ViT, image_size=SIZE, patch=PATCH, width=96, depth=3, heads=4, embedding=128, resize_positions=True
        ),
        text=spec(UnimodalText, vocabulary=VOCABULARY, length=LENGTH, width=128, depth=1, heads=4, embedding=128),
        decoder=spec(CaptionDecoder, vocabulary=VOCABULARY, depth=1, heads=4),
    )  # fmt: skip
    config.objectives = dict(
        clip=dict(weight=1.0, loss=spec(InfoNCE, same="label", temperature=0.04)),
        captions=dict(weight=0.5, loss=spec(Captioning, image_output="tokens")),
        mae=dict(
            weight=0.5,
            loss=spec(
                MaskedAutoencoding, mask=spec(RandomPatches, ratio=0.75), target=spec(Pixels), patch=PATCH,
                decoder_width=64, decoder_depth=1, decoder_heads=4,
            ),
        ),
        dino=dict(
            weight=0.5,
            loss=spec(
                DINO, global_views=GLOBAL, local_views=LOCAL, prototypes=512, hidden=(256,), bottleneck=64,
            ),
        ),
    )  # fmt: skip
    config.teachers.ema = spec(EMA, towers=("image", "dino_head"), decay=0.97, final_decay=1.0)
    weak = augmentation(SIZE)
    weak.pop("flip")  # which sides a caption names is known before the views are made
    crops = {name: chain(SIZE, (0.3, 1.0), normalize=normalize(), flip=False) for name in GLOBAL}
    crops |= {name: chain(LOCAL_SIZE, (0.1, 0.4), normalize=normalize(), flip=False) for name in LOCAL}
    config.data.train = train(
        dict(
            flip=spec(RandomFlip),
            caption=caption(START),
            tokenize=tokenize(LENGTH),
            views=spec(Views, views=dict(image=dict(**weak, normalize=normalize()), **crops)),
        ),
        keep=("image", "text", "label", *GLOBAL, *LOCAL),
        batch_size=128,
    )
    config.evaluators.style = retrieval(SIZE, LENGTH, spec(FixedCaption, template=START))
    return config

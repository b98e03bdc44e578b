"""Trains PaliGemma: a picture and its prompt see one another, and the answer is written word by word.

python -m vlpjax.main --config=experiments/decoders/paligemma.py --workdir=runs/paligemma

``small`` needs nothing but this package: pictures of 25 of the bundled concepts, and their names.  It takes
three minutes of one CPU core, and ends at a loss of 0.9, where names are known but hardly told apart: of an unseen
vendor's 25 drawings 2 are named, and as many when the drawings are exchanged.
``paligemma.py:paper`` tunes PaliGemma 3B to captions of COCO.  It needs its published weights
(``weights/paligemma-3b-pt-224``), the pictures that Karpathy's split trains on (``coco/*.array_record``: ``image``, and
``captions``, texts parted by "|") and some accelerators.
"""

from __future__ import annotations

from experiments._bundled import VOCABULARY, answers, augmentation, normalize, train
from experiments._recipes import adamw, start
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import ArrayRecords
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import (
    Ask,
    ChatTemplate,
    Conversation,
    DrawCaption,
    FixedCaption,
    Frames,
    Normalize,
)
from vlpjax.models.connectors import LinearConnector
from vlpjax.models.decoder import Decoder
from vlpjax.models.vit import ViT
from vlpjax.objectives.visual_next_token import VisualNextToken
from vlpjax.weights.starting import Pretrained

SIZES = ("small", "paper")
SYSTEM = dict(
    system="PaliGemma",
    paper="PaliGemma: A versatile 3B VLM for transfer, arXiv 2407.07726",
    here="pictures and prompts in one block that sees all of itself; the loss is a mean over examples",
    published="3B at 224 px: 141.9 CIDEr on COCO captions",
    measured="25 drawings of an unseen style, said in all words of their names after 200 steps, 1 seed: 8 %, and 8 % "
    "with one another's drawings; chance 4 %",
)
SIZE, LENGTH, EACH = 32, 84, 64  # pixels, tokens of a row and visual tokens of a picture, in ``small``
PAPER_SIZE, PAPER_LENGTH, PAPER_EACH = 224, 320, 256
PAPER_VOCABULARY, PLACEHOLDER = 257_216, 257_152
WEIGHTS_FOLDER = "weights/paligemma-3b-pt-224"


def get_config(size: str = "small") -> Config:
    config = start("PaliGemma", size)
    config.optimizer = adamw(
        3e-3 if size == "small" else 1e-4,
        warmup="5%",
        weight_decay=0.0,
        betas=(0.9, 0.999),
        clip_norm=1.0,
    )
    (small if size == "small" else paper)(config)
    loss = spec(
        VisualNextToken,
        image_field="image",
        weight_field="weights",
        prefix_lm=True,
        mean="examples",
        placeholder=VOCABULARY if size == "small" else PLACEHOLDER,
    )
    config.objectives = dict(next=dict(weight=1.0, loss=loss))
    return config


def small(config: Config) -> None:
    """Drawings of a few concepts by all seen vendors, each asked for its name."""
    config.duration = "200 steps"
    config.towers = dict(
        image=spec(ViT, image_size=SIZE, patch=4, width=96, depth=3, heads=4, pool="none"),
        connector=spec(LinearConnector, width=128),
        decoder=decoder(vocabulary=VOCABULARY, width=128, depth=2, heads=4, head_dim=32, mlp_dim=352),
    )
    tokenizer = spec(SentencePieceTokenizer, path="bundled:emoji1594.spm.model")
    asked = rows(tokenizer, LENGTH, EACH, VOCABULARY, SIZE, "what is this?", bos="", lower=True)
    config.data.train = train(
        dict(**augmentation(SIZE), caption=spec(FixedCaption), **asked, normalize=normalize()),
        keep=("image", "tokens", "weights"),
        batch_size=32,
        concepts="few",
    )
    config.evaluators = dict(answers=answers(SIZE, asked, concepts="few", batch_size=32))


def paper(config: Config) -> None:
    """The transfer to captions of COCO, of which one is drawn per picture and epoch; everything is trained."""
    config.duration = "5 epochs"
    config.precision = "bfloat16"
    config.towers = dict(
        image=spec(
            ViT, image_size=PAPER_SIZE, patch=14, patch_bias=True, width=1152, depth=27, heads=16, mlp_dim=4304,
            activation="gelu_tanh", pre_norm=False, pool="none", scan=True, remat="full",
        ),
        connector=spec(LinearConnector, width=2048),
        decoder=decoder(
            vocabulary=PAPER_VOCABULARY, width=2048, depth=18, heads=8, head_dim=256, mlp_dim=16_384, length=8192,
            scan=True, remat="full",
        ),
    )  # fmt: skip
    config.initialize = {name: spec(Pretrained, path=WEIGHTS_FOLDER) for name in config.towers}
    config.data = dict(
        example=dict(
            image=f"float32[1,{PAPER_SIZE},{PAPER_SIZE},3]",
            tokens=f"int32[{PAPER_LENGTH + 1}]",
            weights=f"float32[{PAPER_LENGTH + 1}]",
        ),
        examples=113_287,
    )
    tokenizer = spec(SentencePieceTokenizer, path=f"{WEIGHTS_FOLDER}/tokenizer.model")
    config.data.train = spec(
        Pipeline,
        source=spec(ArrayRecords, files="coco/*.array_record"),
        transforms=dict(
            caption=spec(DrawCaption, fields=("captions",), max_parts=1),
            **rows(tokenizer, PAPER_LENGTH, PAPER_EACH, PLACEHOLDER, PAPER_SIZE, "caption en", bos="text"),
            normalize=spec(Normalize, range="-1..1"),
        ),
        batch_size=256,
        keep=("image", "tokens", "weights"),
        workers=8,
    )


def decoder(**fields: object) -> Config:
    """Gemma: one head of keys and values, and embeddings that are scaled up and used for logits too."""
    return spec(
        Decoder,
        **fields,
        kv_heads=1,
        activation="gelu_tanh",
        norm="rms_offset",
        embed_scale=float(fields["width"]) ** 0.5,  # type: ignore[arg-type]
        epsilon=1e-6,
    )


def rows(
    tokenizer: Config,
    length: int,
    each: int,
    placeholder: int,
    size: int,
    prompt: str,
    bos: str,
    **fields: object,
) -> dict[str, Config]:
    """Picture and caption to [picture][prompt and a new line][caption and its end]."""
    return dict(
        ask=spec(Ask, questions=(prompt,)),
        conversation=spec(
            Conversation,
            tokenizer=tokenizer,
            length=length,
            template=spec(ChatTemplate, user="<image>{}\n", bos=bos),
            placeholder=placeholder,
            tokens_per_image=each,
            **fields,
        ),
        frames=spec(
            Frames, frames=1, size=size, tokens_per_frame=each, placeholder=placeholder, field="image"
        ),
    )

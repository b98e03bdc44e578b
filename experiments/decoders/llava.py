"""Trains LLaVA: pictures become tokens of a language model, first by a connector alone, then by both together.

python -m vlpjax.main --config=experiments/decoders/llava.py:small_stage1 --workdir=runs/llava_stage1
python -m vlpjax.main --config=experiments/decoders/llava.py --workdir=runs/llava

``small`` needs nothing but this package: pictures of bundled drawings, and questions that their names answer.  Its
first stage may start from the image tower that ``experiments/contrastive/clip.py`` trained, by
``small_stage1,start=runs/clip``; otherwise the frozen tower is a random one, and the frozen decoder always is, so that
stage 1 shows how the stages follow one another rather than what it brings.  The second stage starts from
``runs/llava_stage1``, or from ``start=``.  The stages take 1.3 and 3.5 minutes of one CPU core.

Every conversation has a row of its own, as published.  ``packed=64`` packs them instead, whole and beside one another,
into batches of 64 rows; a conversation is then the same in every epoch, and its pictures are not augmented.  How long
conversations are is measured before the first step; ``paper`` keeps it, beside the data, for the runs that follow.

``llava.py:paper_stage1`` and ``llava.py:paper`` are LLaVA-1.5 with Vicuna-7B: 558,000 captions for the connector, then
665,000 conversations.  They need these (``llava/pretrain/*.array_record`` and ``llava/finetune/*.array_record``:
``turns``, a list of maps with ``from`` and ``value``, and ``image``, a list of encoded pictures, of which there may be
none), the weights of CLIP's L/14 at 336 px and of Vicuna under ``weights/``, and a machine with room for 7 billion
parameters and their moments.
"""

from __future__ import annotations

from experiments._bundled import VOCABULARY, answers, augmentation, caption, normalize, train
from experiments._recipes import adamw
from experiments._recipes import start as named
from experiments.contrastive import clip
from experiments.decoders import llama2_7b
from vlpjax.config import Config, spec
from vlpjax.data.packed_documents import PackedDocuments
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import ArrayRecords
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import Ask, ChatTemplate, Conversation, Frames, Normalize
from vlpjax.models.connectors import MlpConnector
from vlpjax.models.decoder import Decoder
from vlpjax.models.vit import ViT
from vlpjax.objectives.visual_next_token import VisualNextToken
from vlpjax.weights.starting import Pretrained

SIZES = ("small_stage1", "small", "paper_stage1", "paper")
SYSTEM = dict(
    system="LLaVA 1.5",
    paper="Improved Baselines with Visual Instruction Tuning, arXiv 2310.03744",
    here="conversations whose answers alone are asked for, pictures anywhere in them; a connector alone, then with the "
    "decoder",
    published="7B: 78.5 % VQAv2, 62.0 % GQA",
    measured="1,594 drawings of an unseen style, tower from CLIP, 1 seed: 5.1 % of their names' words said, 2.4 % with "
    "one another's drawings, chance 1.9 %; no whole name",
)
# What each stage trains, as rules of the learning rate.
CONNECTOR = ((r"connector/.*", 1.0), (r".*", None))
CONNECTOR_AND_DECODER = ((r"image/.*", None), (r".*", 1.0))
LAYERS = (-2,)  # of the image tower: what the last block adds is for CLIP's own loss
SIZE, LENGTH, EACH = 32, 96, 64  # pixels, tokens of a row and visual tokens of a picture, in ``small``
DOCUMENT = ("caption", "ask", "conversation")  # what makes a conversation of a record, where it has them
QUESTIONS = ("<image> what is this?", "<image> name the picture.", "what does <image> show?")
PAPER_SIZE, PAPER_LENGTH, PAPER_EACH, PLACEHOLDER = 336, 2048, 576, 32_000
CLIP_PIXELS = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
VICUNA = "weights/vicuna-7b-v1.5"
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def get_config(size: str = "small", start: str = "", packed: int = 0) -> Config:
    first = size.endswith("_stage1")
    config = small(first) if size.startswith("small") else paper(first)
    config.objectives = dict(
        next=dict(
            weight=1.0,
            loss=spec(
                VisualNextToken,
                image_field="image",
                weight_field="weights",
                image_layers=LAYERS,
                placeholder=VOCABULARY if size.startswith("small") else PLACEHOLDER,
            ),
        )
    )
    config.optimizer.rate_rules = CONNECTOR if first else CONNECTOR_AND_DECODER
    if not first:
        config.start.run = start or f"runs/llava{'' if size == 'small' else '_paper'}_stage1"
    elif start:
        config.start = dict(run=start, rules=((r"image/.*", True), (r".*", False)))
    if packed:
        if size.startswith("small"):
            pack(config, packed, 4 * LENGTH)
        else:
            pack(config, packed, PAPER_LENGTH, sizes=f"llava/{'pretrain' if first else 'finetune'}/sizes.npy")
    return config


def pack(config: Config, rows: int, length: int, sizes: str = "") -> None:
    """Several conversations to a row of so many tokens; batches of so many rows."""
    data = config.data.train
    steps = data.transforms
    steps.conversation.pad = False
    # As many pictures as there are tokens for, each with a word.
    steps.frames.frames = (length + 1) // (steps.conversation.tokens_per_image + 1)
    data.source = spec(
        PackedDocuments,
        source=data.source,
        transforms={name: steps[name] for name in DOCUMENT if name in steps},
        length=length,
        images=steps.frames.frames,
        sizes=sizes,
    )
    data.transforms = {name: steps[name] for name in ("frames", "normalize")}
    data.keep = (*data.keep, "segment_ids")
    data.batch_size = rows
    config.objectives.next.loss.segment_field = "segment_ids"
    if "example" in config.data:
        example = config.data.example
        example.image = f"float32[{steps.frames.frames},{PAPER_SIZE},{PAPER_SIZE},3]"
        example.segment_ids = f"int32[{length + 1}]"


def small(first: bool) -> Config:
    """Drawings of all seen vendors; captions first, then questions and answers."""
    config = named("LLaVA", f"small, stage {1 if first else 2}")
    config.duration = "100 steps" if first else "200 steps"
    config.towers = dict(
        image=clip.small_image(),
        connector=spec(MlpConnector, width=128),
        decoder=spec(
            Decoder, vocabulary=VOCABULARY, width=128, depth=2, heads=4, mlp_dim=352, epsilon=1e-5, tied=False
        ),
    )
    conversation = spec(
        Conversation,
        tokenizer=spec(SentencePieceTokenizer, path="bundled:emoji1594.spm.model"),
        length=LENGTH,
        template=spec(ChatTemplate, user="<image>")
        if first
        else spec(ChatTemplate, user="user: {} ", assistant="assistant: {}"),
        placeholder=VOCABULARY,
        tokens_per_image=EACH,
        lower=True,
    )
    frames = spec(Frames, frames=1, size=SIZE, tokens_per_frame=EACH, placeholder=VOCABULARY, field="image")
    rows = dict(ask=spec(Ask, questions=QUESTIONS), conversation=conversation, frames=frames)
    config.data.train = train(
        dict(**augmentation(SIZE), caption=caption(), **rows, normalize=normalize()),
        keep=("image", "tokens", "weights"),
        batch_size=32,
    )
    config.evaluators = dict(answers=answers(SIZE, rows))
    config.optimizer = adamw(3e-3, warmup="10%", weight_decay=0.0, clip_norm=1.0)
    return config


def paper(first: bool) -> Config:
    """LLaVA-1.5 with Vicuna-7B, as the paper's appendix gives its two stages."""
    config = named("LLaVA-1.5 7B", f"stage {1 if first else 2}")
    config.duration = "1 epochs"
    config.precision = "bfloat16"
    config.mesh_rules = (llama2_7b.VMEM,)
    config.plan.attention_share = 0.5  # causal
    config.towers = dict(
        # Unrolled, so that the block behind the one that is read is not computed.
        image=spec(
            ViT, image_size=PAPER_SIZE, patch=14, width=1024, depth=24, heads=16, mlp_dim=4096, pool="cls",
            pre_norm=True, final_norm=False, pool_norm=True, activation="quick_gelu", epsilon=1e-5,
        ),
        connector=spec(MlpConnector, width=4096),
        decoder=llama2_7b.decoder(),
    )  # fmt: skip
    if first:
        projection = r"visual_projection\.weight"  # into the space that CLIP's towers share
        config.initialize = dict(
            image=spec(Pretrained, path="weights/clip-vit-large-patch14-336", unused=(projection,)),
            decoder=spec(Pretrained, path=VICUNA),
        )
    fields = dict(image=f"float32[1,{PAPER_SIZE},{PAPER_SIZE},3]", tokens=f"int32[{PAPER_LENGTH + 1}]")
    config.data = dict(
        example=dict(**fields, weights=f"float32[{PAPER_LENGTH + 1}]"),
        examples=558_128 if first else 665_298,
    )
    config.data.train = spec(
        Pipeline,
        source=spec(ArrayRecords, files=f"llava/{'pretrain' if first else 'finetune'}/*.array_record"),
        transforms=dict(
            conversation=paper_conversation(first),
            frames=paper_frames(first),
            normalize=spec(Normalize, **CLIP_PIXELS),
        ),
        batch_size=256 if first else 128,
        keep=("image", "tokens", "weights"),
        workers=8,
    )
    config.optimizer = adamw(1e-3 if first else 2e-5, warmup="3%", weight_decay=0.0, clip_norm=1.0)
    return config


def paper_conversation(first: bool) -> Config:
    """A picture and its caption; or a conversation as Vicuna has them."""
    plain = spec(ChatTemplate, user="<image>", assistant="{}\n", bos="row", eos=False)
    vicuna = spec(
        ChatTemplate,
        system="{} ",
        user="USER: {} ",
        assistant="ASSISTANT: {}",
        opening=SYSTEM_PROMPT,
        bos="row",
    )
    return spec(
        Conversation,
        tokenizer=spec(SentencePieceTokenizer, path=f"{VICUNA}/tokenizer.model"),
        length=PAPER_LENGTH,
        template=plain if first else vicuna,
        placeholder=PLACEHOLDER,
        tokens_per_image=PAPER_EACH,
        role_key="from",
        text_key="value",
        roles={"human": "user", "gpt": "assistant"},
    )


def paper_frames(first: bool) -> Config:
    """The middle of a picture for its caption; all of it, on the mean colour, for questions about it."""
    return spec(
        Frames,
        frames=1,
        size=PAPER_SIZE,
        tokens_per_frame=PAPER_EACH,
        placeholder=PLACEHOLDER,
        field="image",
        mode="crop" if first else "pad",
        fill=(122, 116, 104),
    )

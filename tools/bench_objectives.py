"""Step speed: one whole train step of ours beside public PyTorch implementations, on the same machine, in turn.

    pip install torch torchvision open_clip_torch transformers lightly      # only this benchmark needs all of them
    python tools/bench_objectives.py
    python tools/bench_objectives.py --objectives=clip,dino --pairs=9 --batch=8

- ``clip``: ViT-S/16 with a text tower of its width, against ``open_clip``;
- ``mae``: ViT-B/16 with its decoder, against ``transformers``;
- ``dino``: ViT-S/16, two crops of 224 and eight of 96 pixels, 65,536 prototypes, against ``lightly`` over a tower of
  ``timm``.

A step is the forward and backward pass and AdamW's update, in DINO the teacher's too.  Ours is the step that training
runs, with the experiments' published settings, a smaller batch and no rematerialisation.  Both sides compute in
float32, on all cores, on random pixels.  What is reported is the median over the pairs of theirs / ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from tools._turns import HEADING, Turn, alternate, parse, row  # noqa: E402
from vlpjax.config import Config, load  # noqa: E402
from vlpjax.models.vit_variants import variant  # noqa: E402
from vlpjax.run import Run  # noqa: E402
from vlpjax.step import initial_state, make_train_step  # noqa: E402

RATE = 1e-4  # of PyTorch's AdamW
VOCABULARY = 49_408  # of CLIP, whose end-of-text token comes last
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Objective:
    """A pair of equal steps.

    Attributes:
      title: for the table.
      batch: examples of a step, unless the command line says otherwise.
      ours: makes the experiment's config.
      theirs: makes, from a batch, the PyTorch step and the modules that it trains.
    """

    title: str
    batch: int
    ours: Callable[[], Config]
    theirs: Callable[[Batch], tuple[Turn, list[Any]]]


def clip_config() -> Config:
    config = load(f"{ROOT}/experiments/contrastive/clip.py:paper")
    for name in ("image", "text"):
        config.towers[name].update(width=384, heads=6, embedding=384, scan=False, remat="none")
    config.towers.image.patch = 16
    return config


def open_clip(batch: Batch) -> tuple[Turn, list[Any]]:
    import open_clip
    import torch

    model = open_clip.create_model("ViT-S-16").train()
    loss = open_clip.ClipLoss()
    images, texts = torch.from_numpy(channels_first(batch["image"])), torch.from_numpy(batch["text"]).long()

    def step() -> Any:
        return loss(*model(images, texts))

    return torch_step(step, [model]), [model]


def mae_config() -> Config:
    config = load(f"{ROOT}/experiments/masked/mae.py:paper")
    config.towers.image.update(variant("B/16"))
    return config


def vit_mae(batch: Batch) -> tuple[Turn, list[Any]]:
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)).train()
    images = torch.from_numpy(channels_first(batch["image"]))
    return torch_step(lambda: model(images).loss, [model]), [model]


def dino_config() -> Config:
    config = load(f"{ROOT}/experiments/self_supervised/dino.py:paper")
    config.towers.image.drop_path = 0.0
    config.objectives.loss.loss.freeze_prototypes = ""
    return config


def lightly(batch: Batch) -> tuple[Turn, list[Any]]:
    import timm
    import torch
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    def network() -> Any:
        backbone = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
        head = DINOProjectionHead(384, 2048, 256, 65536, freeze_last_layer=-1)
        return torch.nn.ModuleList([backbone, head]).train()

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    deactivate_requires_grad(teacher)
    loss = DINOLoss(output_dim=65536)
    crops = {
        size: torch.cat(
            [torch.from_numpy(channels_first(x)) for x in batch.values() if x.shape[1:2] == (size,)]
        )
        for size in (224, 96)
    }

    def step() -> Any:
        update_momentum(student, teacher, m=0.996)
        with torch.no_grad():
            targets = teacher[1](teacher[0](crops[224])).chunk(2)
        features = torch.cat([student[0](crops[224]), student[0](crops[96])])
        return loss(list(targets), list(student[1](features).chunk(10)), epoch=0)

    return torch_step(step, [student]), [student]


def torch_step(loss: Callable[[], Any], trained: list[Any]) -> Turn:
    """Gradient and update of PyTorch modules."""
    import torch

    parameters = [p for module in trained for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)

    def turn() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return turn


def channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))


OBJECTIVES = {
    "clip": Objective("CLIP ViT-S/16, open_clip", 8, clip_config, open_clip),
    "mae": Objective("MAE ViT-B/16, transformers", 8, mae_config, vit_mae),
    "dino": Objective("DINO ViT-S/16, lightly", 4, dino_config, lightly),
}


def our_turn(config: Config, batch_size: int) -> tuple[Turn, int, Batch]:
    """The step of an experiment, its number of trained parameters, and a batch."""
    config.data.train.batch_size = batch_size
    run = Run.from_config(config, data=False)
    batch = random_batch(run)
    shardings, batch_sharding = run.abstract[1], run.batch_shardings
    state = jax.jit(lambda: initial_state(run.experiment, batch), out_shardings=shardings)()
    step = make_train_step(run.experiment, run.layout, shardings, batch_sharding)
    placed = jax.device_put(batch, batch_sharding)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def turn() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(state, placed))

    return turn, size, batch


def random_batch(run: Run) -> Batch:
    """Pixels about zero, and texts of ordinary tokens with the end-of-text token at their last place."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if dtype == np.float32:
            return rng.normal(size=shape).astype(dtype)
        if len(shape) == 1:
            return np.arange(shape[0], dtype=dtype)  # the examples' numbers
        words = rng.integers(1, VOCABULARY - 2, shape).astype(dtype)
        words[:, -1] = VOCABULARY - 1
        return words

    return {name: draw(x.shape, x.dtype) for name, x in run.batch_shapes.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments, __doc__, "objectives", OBJECTIVES, 0)
    print(HEADING)
    for name in options.names:
        objective = OBJECTIVES[name]
        size = options.batch or objective.batch
        ours, our_size, batch = our_turn(objective.ours(), size)
        theirs, trained = objective.theirs(batch)
        their_size = sum(p.numel() for module in trained for p in module.parameters() if p.requires_grad)
        pair = alternate(ours, theirs, options.pairs)
        print(row(f"{objective.title}, batch {size}", (our_size, their_size), pair), flush=True)


if __name__ == "__main__":
    main()

"""What the experiments of this folder share: small runs on the bundled drawings, published ones on ImageNet.

No experiment itself (files whose names begin with an underscore are none).
"""

from __future__ import annotations

from typing import Any

from experiments import _bundled
from experiments._recipes import IMAGENET_EXAMPLES, adamw, imagenet, imagenet_labelled
from vlpjax.config import Config, spec
from vlpjax.evaluators.knn import KNN
from vlpjax.models.resnet import ResNet
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant
from vlpjax.optim.lars import lars
from vlpjax.optim.optimizer import Optimizer, Schedule

SIZE, LOCAL_SIZE = 32, 16  # of the small runs' crops, in pixels
SCALE, LOCAL_SCALE = (0.3, 1.0), (0.1, 0.4)  # of the small runs' crops: drawings fill their frame
NORMALIZE = _bundled.normalize()


# --- small ------------------------------------------------------------------------------------------------------


def small(config: Config, views: Config, loss: Config, duration: str = "4 epochs") -> Config:
    """The small run of an objective: a small ViT on views of the seen vendors' drawings."""
    config.duration = duration
    config.towers = dict(image=small_tower())
    config.objectives = dict(loss=dict(weight=1.0, loss=loss))
    config.data.train = _bundled.train(dict(views=views), (*views.views, "label"), batch_size=128)
    config.optimizer = adamw(1e-3, warmup="10%")
    config.evaluators = dict(knn=_bundled.knn(SIZE))
    return config


def small_tower(**fields: Any) -> Config:
    """A ViT of 0.8 million parameters, with a class token, for images of 32 pixels and smaller."""
    settings = dict(
        image_size=SIZE, patch=8, width=128, depth=4, heads=4, pre_norm=False, patch_bias=True,
        resize_positions=True,
    )  # fmt: skip
    return spec(ViT, **(settings | fields))


# --- paper ------------------------------------------------------------------------------------------------------


def paper(
    config: Config, tower: Config, views: Config, loss: Config, batch_size: int, duration: str
) -> Config:
    """The published run of an objective on ImageNet-1K; the optimizer is still to be set."""
    config.duration = duration
    config.towers = dict(image=tower)
    config.objectives = dict(loss=dict(weight=1.0, loss=loss))
    config.data.train = imagenet(dict(views=views), tuple(views.views), batch_size)
    config.data.examples = IMAGENET_EXAMPLES
    config.data.example = {
        name: f"float32[{chain['crop'].size},{chain['crop'].size},3]" for name, chain in views.views.items()
    }
    config.evaluators = dict(
        knn=spec(
            KNN,
            train=imagenet_labelled("train"),
            test=imagenet_labelled("validation"),
            ks=(10, 20),
            every="10%",
        )
    )
    return config


def vit(name: str, **fields: Any) -> Config:
    """A published ViT with a class token, without CLIP's norm before the blocks, for crops of several sizes."""
    return spec(
        ViT, **variant(name), **(dict(pre_norm=False, patch_bias=True, resize_positions=True) | fields)
    )


def resnet50() -> Config:
    """The tower of the first systems."""
    return spec(ResNet)


def lars_optimizer(
    rate: float, *, weight_decay: float, warmup: str = "10 epochs", final: float = 0.0
) -> Config:
    """LARS, whose trust coefficient of 0.001 is part of these papers' learning rates."""
    return spec(
        Optimizer,
        direction=spec(lars, weight_decay=weight_decay),
        learning_rate=rate,
        schedule=spec(Schedule, warmup=warmup, final=final),
    )

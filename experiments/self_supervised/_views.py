"""Recipes of augmentation: the views that self-supervised systems compare, each as a chain of transforms.

No experiment itself (files whose names begin with an underscore are none).  A chain begins with a decoded image and
ends with a normalised array; :func:`views` names chains and puts them into one step.
"""

from __future__ import annotations

from typing import Any

from experiments._recipes import IMAGENET
from vlpjax.config import Config, spec
from vlpjax.data.transforms import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    Normalize,
    RandomFlip,
    RandomResizedCrop,
    Solarize,
    Views,
)

Scale = tuple[float, float]

# Brightness, contrast, saturation and hue.
STRONG = (0.8, 0.8, 0.8, 0.2)  # SimCLR (arXiv 2002.05709, appendix A) and SwAV
EVEN = (0.4, 0.4, 0.4, 0.1)  # MoCo v2 (arXiv 2003.04297)
SOFT = (0.4, 0.4, 0.2, 0.1)  # BYOL (arXiv 2006.07733, appendix B) and all that follow it


def chain(
    size: int,
    scale: Scale,
    jitter: tuple[float, float, float, float] = SOFT,
    blur: float = 0.5,
    solarize: float = 0.0,
    normalize: Config | None = None,
    flip: bool = True,
) -> dict[str, Config]:
    """A random crop, and changes of its colours.

    Args:
      size: of the view, in pixels.
      scale: share of the image's area that the crop has.
      jitter: largest changes of brightness, contrast, saturation and hue, made with probability 0.8.
      blur, solarize: probabilities.
      normalize: the last step; None is ImageNet's mean and deviation.
      flip: mirror half of the views; not where captions tell left from right.
    """
    brightness, contrast, saturation, hue = jitter
    steps: dict[str, Any] = dict(
        crop=spec(RandomResizedCrop, size=size, scale=scale, resample="bicubic"),
        flip=spec(RandomFlip, probability=0.5 if flip else 0.0),
        jitter=spec(
            ColorJitter,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            probability=0.8,
        ),
        grayscale=spec(Grayscale, probability=0.2),
    )
    if blur:
        steps["blur"] = spec(GaussianBlur, probability=blur)
    if solarize:
        steps["solarize"] = spec(Solarize, probability=solarize)
    return {**steps, "normalize": spec(Normalize, **IMAGENET) if normalize is None else normalize}


def views(**chains: dict[str, Config]) -> Config:
    """One step that makes a view per chain and drops the image."""
    return spec(Views, views=chains, drop=True)


def symmetric(size: int, scale: Scale = (0.08, 1.0), **fields: Any) -> Config:
    """Two views of one recipe (SimCLR, MoCo v2)."""
    return views(view1=chain(size, scale, **fields), view2=chain(size, scale, **fields))


def asymmetric(size: int, scale: Scale = (0.08, 1.0), **fields: Any) -> Config:
    """One view always blurred, one rarely and sometimes solarised (BYOL, MoCo v3, VICReg)."""
    return views(
        view1=chain(size, scale, blur=1.0, **fields),
        view2=chain(size, scale, blur=0.1, solarize=0.2, **fields),
    )


def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """``("local1", "local2", ...)``."""
    return tuple(f"{prefix}{number}" for number in range(1, count + 1))


def multi_crop(
    sizes: tuple[int, int],
    local: int,
    global_scale: Scale,
    local_scale: Scale,
    *,
    solarize: bool = True,
    **fields: Any,
) -> Config:
    """Two large crops and ``local`` small ones.

    Args:
      sizes: of large and small crops, in pixels.
      solarize: the large crops as in :func:`asymmetric` (DINO); otherwise all crops of one recipe (SwAV).
    """
    blurs: Any = (dict(blur=1.0), dict(blur=0.1, solarize=0.2)) if solarize else ({}, {})
    large = {
        name: chain(sizes[0], global_scale, **blur, **fields)
        for name, blur in zip(numbered("global", 2), blurs, strict=True)
    }
    small = {name: chain(sizes[1], local_scale, **fields) for name in numbered("local", local)}
    return views(**large, **small)

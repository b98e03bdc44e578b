"""The table of families, and how one is found: by a config, by a name, or by a module that is to be written.

A family is a :class:`vlpjax.weights.family.Family` at the top level of a module of this package; a module is
imported when one of its families is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn

from vlpjax.config import suggest
from vlpjax.errors import UserError
from vlpjax.weights.family import Family, first_that_holds

# "model_type" of a config -> the module with the family that answers it, in this package or (with a dot in its name)
# in another.  A model that is to be written goes to the first family, in this order, that can hold it.
FAMILIES: dict[str, str] = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "clip_text_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip_text_model": "siglip",
    "siglip2": "siglip2",
    "siglip2_vision_model": "siglip2",
    "vit": "vit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "vit_mae": "vit_mae",
    "bert": "bert",
    "t5": "t5",
    "mt5": "t5",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "blip-2": "blip2",
    "llava": "llava",
    "llava_next": "llava_next",
    "paligemma": "paligemma",
    **{f"efficientnet_lite{size}": "efficientnet_lite" for size in range(5)},
    "timm": "timm",
    "open_clip": "open_clip",
}


def model_type(config: Mapping[str, Any]) -> str:
    """The ``model_type`` of a config; the configs of timm and open_clip, which have none, are told by their fields."""
    if "model_type" in config:
        return str(config["model_type"])
    if "model_cfg" in config:
        return "open_clip"
    return "timm" if "architecture" in config else ""


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config names.

    Raises:
      UserError: an architecture that there is no family for; it lists those that there are.
    """
    asked = model_type(config)
    if asked in FAMILIES:
        for family in _families(FAMILIES[asked]):
            if asked in family.model_types:
                return family
    raise UserError(
        f"The config's model_type is {asked!r}, which is no known architecture{suggest(asked, FAMILIES)}; there are "
        f"{', '.join(FAMILIES)}."
    )


def family_named(name: str) -> Family:
    """The family with this name.

    Raises:
      UserError: there is none.
    """
    known = {family.name: family for family in all_families()}
    if name not in known:
        raise UserError(f"There is no family {name!r}{suggest(name, known)}; there are {', '.join(known)}.")
    return known[name]


def family_holding(model: nn.Module) -> tuple[Family, dict[str, Any]]:
    """The first family that can hold a module, and the config that it writes for it.

    Raises:
      UserError: no family can.
    """
    writers = ((family, family.name, family.describe) for family in all_families())
    return first_that_holds(writers, model, f"No family can hold this {type(model).__name__}")


def all_families() -> Iterator[Family]:
    """All families, in the order of the table."""
    for module in dict.fromkeys(FAMILIES.values()):
        yield from _families(module)


def _families(module: str) -> list[Family]:
    """The families at the top level of a module, in their order there."""
    path = module if "." in module else f"{__name__}.{module}"
    return [value for value in vars(importlib.import_module(path)).values() if isinstance(value, Family)]

"""Drawings on white paper: how sources that compose pictures out of drawings read them, and what of them is ink."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

INK = 240  # a pixel with a channel below this is drawn; as Trim has it


def on_paper(data: bytes, side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """An encoded picture, transparent or not, on white."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    paper.alpha_composite(picture)
    return np.asarray(paper.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


def is_ink(pixels: UInt8[np.ndarray, "height width 3"]) -> Bool[np.ndarray, "height width"]:
    """Which pixels are no paper."""
    ink: np.ndarray = pixels.min(axis=-1) < INK
    return ink


def as_png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """The encoded picture."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=1)
    return data.getvalue()

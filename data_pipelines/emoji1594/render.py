"""Turns an icon of an Iconify set into a 64 x 64 WebP image on white.

An icon is a fragment of SVG in a JSON file; it is wrapped into a square canvas, drawn by resvg, composited
on white and encoded with fixed settings.  With the versions in ENCODERS the bytes are the same on every run.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import PIL.features
import PIL.Image
import resvg_py

from vlpjax.errors import UserError

SIZE = 64  # pixels
WEBP: dict[str, Any] = {"quality": 85, "method": 6, "lossless": False, "exact": False}

# The libraries that wrote the bundled files.  Others draw the same picture, but may write other bytes.
ENCODERS = {"resvg_py": "0.5.0", "libwebp": "1.6.0"}


def encoders() -> dict[str, str]:
    """Versions of the installed libraries that decide the bytes, in the form of ENCODERS."""
    return {"resvg_py": metadata.version("resvg_py"), "libwebp": str(PIL.features.version_module("webp"))}


def find_icon(icon_set: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Follows aliases to an icon; returns body, box and transform, or None if the set has no such name.

    An alias may mirror or turn its parent: "pointing right" can be stored as "pointing left", flipped.
    """
    aliases = icon_set.get("aliases", {})
    transform = {"hFlip": False, "vFlip": False, "rotate": 0}
    seen = set()
    while name not in icon_set["icons"]:
        if name not in aliases:
            return None
        if name in seen:
            raise UserError(f"alias {name!r} of icon set {icon_set.get('prefix')!r} leads back to itself")
        seen.add(name)
        alias = aliases[name]
        transform = merge_transforms(transform, alias)
        name = alias["parent"]
    icon = icon_set["icons"][name]
    box = {
        "left": icon.get("left", icon_set.get("left", 0)),
        "top": icon.get("top", icon_set.get("top", 0)),
        "width": icon.get("width", icon_set.get("width", 16)),
        "height": icon.get("height", icon_set.get("height", 16)),
    }
    return {"name": name, "body": icon["body"], **box, **merge_transforms(transform, icon)}


def merge_transforms(outer: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """Joins two steps of an alias chain: two flips cancel, quarter turns add up."""
    return {
        "hFlip": bool(outer.get("hFlip")) != bool(inner.get("hFlip")),
        "vFlip": bool(outer.get("vFlip")) != bool(inner.get("vFlip")),
        "rotate": (outer.get("rotate", 0) + inner.get("rotate", 0)) % 4,
    }


def to_svg(icon: Mapping[str, Any]) -> str:
    """Wraps an icon's body into an SVG whose canvas is the smallest square around the icon's box."""
    width, height = icon["width"], icon["height"]
    side = max(width, height)
    left = icon["left"] - (side - width) / 2
    top = icon["top"] - (side - height) / 2
    center_x, center_y = left + side / 2, top + side / 2
    steps = [f"translate({center_x:g} {center_y:g})"]
    if icon["rotate"]:
        steps.append(f"rotate({90 * icon['rotate']})")
    if icon["hFlip"] or icon["vFlip"]:
        steps.append(f"scale({-1 if icon['hFlip'] else 1} {-1 if icon['vFlip'] else 1})")
    body = icon["body"]
    if len(steps) > 1:
        steps.append(f"translate({-center_x:g} {-center_y:g})")
        body = f'<g transform="{" ".join(steps)}">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side:g} {side:g}" width="{side:g}" height="{side:g}">{body}</svg>'
    )


def rasterize(svg: str, size: int = SIZE) -> PIL.Image.Image:
    """Draws an SVG on white; returns an RGB image of ``size`` x ``size`` pixels."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))
    drawing = PIL.Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = PIL.Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    canvas.alpha_composite(drawing)
    return canvas.convert("RGB")


def encode_webp(image: PIL.Image.Image) -> bytes:
    """Encodes an image with the settings of the bundled files."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", **WEBP)
    return buffer.getvalue()


def render(icon: Mapping[str, Any]) -> bytes:
    """Draws one icon: the bytes of a 64 x 64 RGB WebP image on white."""
    return encode_webp(rasterize(to_svg(icon)))

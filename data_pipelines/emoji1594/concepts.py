"""Says what the 1,594 concepts are, which icon each vendor has for them, and which fold each belongs to."""

from __future__ import annotations

import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.emoji1594 import render

FOLDS = 5
SKIN_TONES = frozenset(f"{tone:x}" for tone in range(0x1F3FB, 0x1F3FF + 1))
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
CANCEL_TAG = "e007f"  # closes the flag of a part of a country

# A concept must be drawn by each of these.  Fluent gradient has the names of Fluent flat.
REQUIRED = ("noto", "twemoji", "fluent_flat", "fluent_gradient", "openmoji")
# Vendors whose icon sets say which code points an icon stands for.  For the others an icon is found by its
# name, and the names of these are tried in this order.
NAMING = ("noto", "twemoji", "openmoji", "fluent_flat")
BORROWED_NAMES = {"fluent_gradient": ("fluent_flat",)}

# Aliases in the icon sets that lead to the drawing of something else: the insect to the bat and ball, and
# "UP!" to the plain arrow.
WRONG_ALIASES = frozenset({("noto_v1", "1f997"), ("emojione", "1f997"), ("emojione", "1f199")})


def sort_key(codepoints: str) -> tuple[int, ...]:
    """Numeric code points, so that concepts are sorted as Unicode numbers them."""
    return tuple(int(part, 16) for part in codepoints.split("-"))


def is_concept(codepoints: str) -> bool:
    """False for skin-tone variants and for flags of countries and their parts."""
    parts = codepoints.split("-")
    is_flag = all(int(part, 16) in REGIONAL_INDICATORS for part in parts) or CANCEL_TAG in parts
    return not is_flag and not SKIN_TONES.intersection(parts)


def fold_of(codepoints: str) -> int:
    """CRC-32 of the first code point, as written, modulo FOLDS: "man elf" and "woman elf" share a fold."""
    return zlib.crc32(codepoints.split("-")[0].encode("utf-8")) % FOLDS


class IconSets:
    """The vendors' icon sets, opened: which concepts exist, and the icon of each vendor for a concept."""

    def __init__(self, packages: Mapping[str, pathlib.Path]):
        self.icons: dict[str, Any] = {v: read_json(path / "icons.json") for v, path in packages.items()}
        self.names: dict[str, Any] = {v: read_json(packages[v] / "chars.json") for v in NAMING}

    def concepts(self) -> list[str]:
        """Code points of the concepts that all of REQUIRED draw, sorted; a concept's index is its label."""
        shared = set.intersection(*(set(names) for names in self.names.values()))
        return sorted(
            (c for c in shared if is_concept(c) and all(self.find(v, c) for v in REQUIRED)), key=sort_key
        )

    def find(self, vendor: str, codepoints: str) -> dict[str, Any] | None:
        """Returns a vendor's icon of a concept, or None if the vendor has not drawn it."""
        if (vendor, codepoints) in WRONG_ALIASES:
            return None
        sources = (vendor,) if vendor in self.names else BORROWED_NAMES.get(vendor, NAMING)
        for source in sources:
            name = self.names[source].get(codepoints)
            icon = render.find_icon(self.icons[vendor], name) if name else None
            if icon:
                return icon
        return None

    def drawings(self, vendor: str, concepts: Sequence[str]) -> list[tuple[int, str, dict[str, Any]]]:
        """Lists (label, code points, icon) of the concepts that a vendor draws, in the order of labels."""
        found = ((label, c, self.find(vendor, c)) for label, c in enumerate(concepts))
        return [(label, c, icon) for label, c, icon in found if icon]


def read_json(path: pathlib.Path) -> Any:
    """Reads one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))

"""Reads names and keywords of emoji from the Unicode CLDR annotations, in English and in other languages.

CLDR writes some sequences with the variation selector U+FE0F and the icon sets write none, so it is removed
on both sides before the two are joined.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlpjax.errors import UserError

VARIATION_SELECTOR = "\ufe0f"
MIN_NAMES = 1500  # a language with fewer names than this is left out of names.json.xz


@dataclasses.dataclass(frozen=True)
class Caption:
    """What one concept is called: its name, and keywords in CLDR's order."""

    name: str
    keywords: tuple[str, ...]


def to_text(codepoints: str) -> str:
    """Turns ``"1f469-200d-1f680"`` into the characters, without U+FE0F."""
    return strip_selectors("".join(chr(int(part, 16)) for part in codepoints.split("-")))


def strip_selectors(text: str) -> str:
    """Removes every U+FE0F (the "draw this as an emoji" mark) from a text."""
    return text.replace(VARIATION_SELECTOR, "")


def merge_annotations(*tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Caption]:
    """Joins CLDR tables (characters -> {"tts": [name], "default": [keywords]}); later tables win.

    Entries without a name are left out.
    """
    captions = {}
    for table in tables:
        for characters, entry in table.items():
            if entry.get("tts"):
                captions[strip_selectors(characters)] = Caption(
                    name=entry["tts"][0].strip(),
                    keywords=tuple(keyword.strip() for keyword in entry.get("default", ())),
                )
    return captions


def read_captions(annotations: pathlib.Path, derived: pathlib.Path, locale: str) -> dict[str, Caption]:
    """Reads one locale from the two unpacked CLDR packages: characters without U+FE0F -> Caption."""
    tables = []
    for package, key in ((derived, "annotationsDerived"), (annotations, "annotations")):
        path = package / key / locale / "annotations.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            tables.append(content[key].get("annotations", {}))  # absent where a locale adds nothing
    if not tables:
        raise UserError(f"the CLDR packages hold no locale {locale!r}")
    return merge_annotations(*tables)


def read_names(
    annotations: pathlib.Path, derived: pathlib.Path, concepts: Sequence[str]
) -> dict[str, list[str | None]]:
    """Reads the concepts' names in every locale that names at least MIN_NAMES of them (None = no name)."""
    names = {}
    for folder in sorted((annotations / "annotations").iterdir()):
        captions = read_captions(annotations, derived, folder.name)
        row = [captions[text].name if text in captions else None for text in map(to_text, concepts)]
        if sum(name is not None for name in row) >= MIN_NAMES:
            names[folder.name] = row
    return names


def pack_names(concepts: Sequence[str], names: Mapping[str, Sequence[str | None]]) -> bytes:
    """Writes ``{"codepoints": [...], "names": {locale: [name or null, ...]}}`` as xz-compressed JSON."""
    content = {
        "codepoints": list(concepts),
        "names": {locale: list(names[locale]) for locale in sorted(names)},
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)

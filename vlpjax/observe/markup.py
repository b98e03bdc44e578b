"""HTML and SVG as function calls: text is escaped because of its type, not because somebody thought of it."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"meta", "img", "br", "hr", "path", "line", "circle", "rect"})


class Markup(str):
    """Text that is HTML already; every other string is escaped when it enters a tag."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element.

    Children are ``Markup`` (kept), strings and numbers (escaped), iterables of these, or ``None``.
    Attribute names lose a trailing underscore (``class_``); the others become hyphens (``text_anchor``).
    The values ``None`` and ``False`` leave the attribute out, ``True`` writes it without a value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID and not children:
        return Markup(f"<{name}{written}>" if name in ("meta", "img", "br", "hr") else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Any) -> Markup:
    """Concatenates children by the rules of ``tag``."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str) or not isinstance(children, Iterable):
        return Markup(html.escape(str(children)))
    return Markup("".join(join(child) for child in children))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{html.escape(str(value))}"'

"""Weak scaling as a drawing: what a chip computes and moves while their number grows and its work stays the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlpjax.planning.report import Plan

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 64, 36, 44
COMPUTE, BYTES = "#1f6feb", "#d1242f"  # legible on white and on black


def weak_scaling(plans: Sequence[tuple[str, Plan]]) -> str:
    """An SVG: chips to the right, compute (left axis) and bytes moved (right axis) per chip, both from zero."""
    chips = [plan.chips for _, plan in plans]
    compute = [1e3 * (plan.timeline.compute + plan.timeline.kernel_seconds) for _, plan in plans]
    moved = [sum(total.amount for total in plan.timeline.collectives.values()) / 1e9 for _, plan in plans]
    low, high = (math.log2(end(chips)) if chips else 0.0 for end in (min, max))

    def across(count: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(count) - low) / max(high - low, 1e-9)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="none">',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}V{TOP}" stroke="#888"/>',
        _text(WIDTH / 2, HEIGHT - 8, "chips", "#888"),
        *[_text(across(count), HEIGHT - BOTTOM + 18, f"{count:,}", "#888") for count in chips],
    ]
    for values, unit, colour, x, anchor in (
        (compute, "ms computed per chip and step", COMPUTE, LEFT, "start"),
        (moved, "GB moved per chip and step", BYTES, WIDTH - RIGHT, "end"),
    ):
        top = 1.2 * max([*values, 1e-9])
        heights = [HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top for value in values]
        points = list(zip(map(across, chips), heights, strict=True))
        parts.append(_text(x, TOP - 16, unit, colour, anchor))
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{line}" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in points]
        parts += [
            _text(px, py - 8, f"{value:.3g}", colour) for (px, py), value in zip(points, values, strict=True)
        ]
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, colour: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{text}</text>'

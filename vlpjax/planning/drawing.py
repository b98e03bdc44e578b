"""Weak scaling as a drawing: what a chip computes and moves while their number grows and its work stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlpjax.errors import UserError
from vlpjax.planning.report import Plan


def draw_weak_scaling(plans: Sequence[tuple[str, Plan]], file: Path) -> None:
    """Writes a drawing: compute and bytes moved per chip and step over the number of chips, both from zero.

    Args:
      file: its ending says the format, such as ``.svg`` or ``.png``.

    Raises:
      UserError: matplotlib is not installed, or does not know the format.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Drawings are made with matplotlib; pip install '.[plan]' has it.") from error

    chips = [plan.chips for _, plan in plans]
    rows = (
        ("ms computed", [1e3 * (plan.timeline.compute + plan.timeline.kernel_seconds) for _, plan in plans]),
        (
            "GB moved",
            [sum(one.amount for one in plan.timeline.collectives.values()) / 1e9 for _, plan in plans],
        ),
    )
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    if file.suffix.removeprefix(".") not in figure.canvas.get_supported_filetypes():
        raise UserError(f"The drawing is {str(file)!r}; it ends in .svg, .png or .pdf.")
    for axes, (name, values) in zip(figure.subplots(1, 2), rows, strict=True):
        axes.plot(chips, values, marker="o")
        for place in zip(chips, values, strict=True):
            axes.annotate(f"{place[1]:.3g}", place, (0, 6), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.set_xticks(chips, [f"{count:,}" for count in chips])
        axes.set(xlabel="chips", title=f"{name} per chip and step", ylim=(0, 1.2 * max([*values, 1e-9])))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlpjax"}):  # text stays text
        figure.savefig(file)

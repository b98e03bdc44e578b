"""Weak scaling as a drawing, and the settings that it is made of."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlpjax.errors import UserError
from vlpjax.planning.drawing import draw_weak_scaling
from vlpjax.planning.schedule import Timeline, Total
from vlpjax.plans import same_work


def plan(chips: int, compute: float, moved: float) -> Any:
    line = Timeline(compute=compute, collectives={("all-gather", "fsdp"): Total(1, moved, 0.0)})
    return SimpleNamespace(chips=chips, timeline=line)


def test_the_drawing_shows_what_a_chip_computes_and_moves(tmp_path: Path) -> None:
    plans = [("a", plan(16, 0.010, 2e9)), ("b", plan(4096, 0.0105, 2.5e9))]
    draw_weak_scaling(plans, tmp_path / "weak.svg")
    drawing = (tmp_path / "weak.svg").read_text()
    texts = [item.text for item in ElementTree.fromstring(drawing).iter() if item.tag.endswith("text")]
    for text in ("16", "4,096", "10", "10.5", "2", "2.5", "ms computed per chip and step"):
        assert text in texts
    with pytest.raises(UserError, match=r"weak\.txt'; it ends in \.svg, \.png or \.pdf\."):
        draw_weak_scaling(plans, tmp_path / "weak.txt")


def test_the_same_work_is_a_batch_that_grows_with_the_chips() -> None:
    first, second = same_work(["v5p:2x2x4", "v6e:16x16*2"], 128)
    assert first.changes == (("plan.topology", "v5p:2x2x4"), ("data.train.batch_size", "2048"))
    assert second.changes[1] == ("data.train.batch_size", str(512 * 128))
    with pytest.raises(UserError, match="no TPU topology 'v5q:2x2'"):
        same_work(["v5q:2x2"], 128)
